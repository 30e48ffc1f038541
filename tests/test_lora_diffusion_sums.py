"LoRAManager, lora_join, lora_add and svd_distill: what readers of the chapter skip."
import pytest
import safetensors
import torch

from lora_nb import LoRAManager, lora_add, lora_join, svd_distill
from lora_nb.core import FormatError, LoraError, data_path
from lora_nb.injection import inject_lora
from lora_nb.lora import Lora
from lora_nb.random_pipes import random_pipe
from lora_nb.worn import branches

close = lambda a, b, eps=1e-5: torch.allclose(a, b, atol=eps, rtol=eps)


def random_lora(pipe, rank, *components, seed=0):
    "A LoRA that does something, in the attention of some components"
    torch.manual_seed(seed)
    worn = inject_lora(pipe, {c: "attention" for c in components}, rank=rank)
    for m in worn.layers.values(): torch.nn.init.normal_(m.lora_up.weight, std=.1)
    lora = worn.lora(); worn.remove()
    return lora



@pytest.fixture(scope="module")
def tiny(): return random_pipe("sd")


def test_a_manager_of_unequal_loras(tiny):
    first, second = random_lora(tiny, 2, "unet", "text_encoder"), random_lora(tiny, 3, "unet", seed=1)
    first = Lora(first.layers, {"<cat>": {"text_encoder": torch.randn(2, 32)}}, {"trigger": "<cat>"})
    second = Lora(second.layers, metadata={"trigger": "moss"})
    manager = LoRAManager([first, second], tiny)
    assert manager.ranklist == [2, 3] and manager.token_size_list == [1, 0]
    assert manager.prompt("a <1> in <2>") == "a <s0-0> in moss" and manager.prompt(None) is None
    with pytest.raises(LoraError, match="1 scales for 2"): manager.tune([1])
    manager.tune([.5, -1])
    for n, (m,) in branches(tiny, manager.name).items():
        want = .5 * first.layers[n].delta() - (second.layers[n].delta() if n in second.layers else 0)
        assert close(m.delta_weight(), want)
    manager.tune([1, 1]); manager.remove()
    assert not branches(tiny) and "<s0-0>" not in tiny.tokenizer.get_vocab()


def test_files_that_cannot_be_joined_by_number(tiny, tmp_path):
    lora = random_lora(tiny, 2, "unet")
    lora.save(tmp_path / "numbered.safetensors", format="lora_diffusion", base=tiny)
    lora.save(tmp_path / "peft.safetensors")
    opened = lambda *names: [safetensors.safe_open(tmp_path / f"{n}.safetensors", "pt") for n in names]
    with pytest.raises(FormatError, match="compose"): lora_join(opened("numbered", "peft"))
    other = random_lora(random_pipe("sdxl"), 2, "unet")
    other.save(tmp_path / "other.safetensors", format="lora_diffusion", base=random_pipe("sdxl"))
    with pytest.raises(FormatError, match="differently"): lora_join(opened("numbered", "other"))
    tensors, about, ranks, words = lora_join(opened("numbered", "numbered"))
    assert ranks == [2, 2] and words == [0, 0] and about["unet:0:rank"] == "4"


def test_the_old_command_still_knows_its_modes(tmp_path):
    neon = str(data_path("loras", "neon.safetensors"))
    with pytest.raises(LoraError, match="Did you mean 'lpl'"): lora_add(neon, neon, str(tmp_path / "x.safetensors"), mode="lp")
    path = lora_add(neon, neon, str(tmp_path / "half.safetensors"), .25, .25)
    n, f = next(iter(Lora.load(neon).layers.items()))
    assert close(Lora.load(path).layers[n].delta().float(), .5 * f.delta().float(), 1e-2)


def test_distilling_from_folder_to_file(tmp_path):
    base, tuned = random_pipe("sd"), random_pipe("sd")
    torch.manual_seed(0)
    w = tuned.unet.mid_block.attentions[0].proj_in.weight
    w.data += torch.outer(torch.randn(len(w)), torch.randn(w[0].numel())).view_as(w)
    for p, n in ((base, "base"), (tuned, "tuned")): p.save_pretrained(tmp_path / n, safe_serialization=True)
    made = svd_distill(tmp_path / "tuned", tmp_path / "base", 1, 1., save_path=str(tmp_path / "x.safetensors"), dtype=torch.float32)
    (name, f), = Lora.load(tmp_path / "x.safetensors").layers.items()
    assert name == "unet.mid_block.attentions.0.proj_in" and list(made.layers) == [name]
    assert close(f.delta(), (w - base.unet.mid_block.attentions[0].proj_in.weight).detach(), 1e-4)
