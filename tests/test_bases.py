"Edge cases of the chapter bases."
import pytest
import torch

from lora_nb.families import as_base
from lora_nb.random_pipes import random_pipe


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_a_vae_that_overflows_fp16_works_in_fp32(kind):
    base = as_base(random_pipe(kind))
    assert base.vae.config.force_upcast
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():                       # activations beyond 65,504, as those of SDXL's VAE; the weights fit fp16
        for part in (base.vae.encoder, base.vae.decoder): part.conv_in.weight.mul_(3e5); part.conv_in.bias.mul_(3e5)
    base.vae.half()
    before = {k: v.clone() for k, v in base.vae.state_dict().items()}
    with torch.no_grad(): raw = base.vae.encode(pixels.half()).latent_dist.mean
    assert not raw.isfinite().all()             # what it would be without upcasting
    latents = base.encode_images(pixels)
    pictures = base.decode_latents(latents)
    assert latents.isfinite().all() and pictures.isfinite().all()
    assert base.vae.dtype == torch.float16 and all(v.equal(before[k]) for k, v in base.vae.state_dict().items())
    base.vae.float()
    assert torch.allclose(base.encode_images(pixels), latents) and torch.allclose(base.decode_latents(latents), pictures)


def test_a_vae_is_left_in_fp16_where_it_may_be():
    base = as_base(random_pipe("sd"))
    base.vae.half(); base.vae.register_to_config(force_upcast=False)
    seen = []
    base.vae.encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    base.encode_images(torch.zeros(1, 3, 32, 32))
    assert seen == [torch.float16]
