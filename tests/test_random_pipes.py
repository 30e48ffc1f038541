import torch

from lora_nb.random_pipes import RANDOM, random_pipe


def test_every_network_is_in_evaluation_mode():
    nets = [m for f in RANDOM for m in random_pipe(f).components.values() if isinstance(m, torch.nn.Module)]
    assert nets and not any(m.training for m in nets)


def test_another_seed_gives_other_weights():
    one, two = (random_pipe("sd", seed=s).unet.conv_in.weight for s in (0, 1))
    assert not one.equal(two)
