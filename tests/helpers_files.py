"Random LoRAs for the tests of files."
import torch

from lora_nb.lora import Factors, Lora
from lora_nb.peft_files import base_layers

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def small_lora(seed=0, alpha=2.):
    "Three layers of two components, a word and metadata"
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    return Lora({TO_Q: Factors(rand(16, 2), rand(2, 16), alpha),
                 "unet.conv_in": Factors(rand(16, 4, 1, 1), rand(4, 4, 3, 3), 4.),
                 "text_encoder.encoder.layers.0.self_attn.q_proj": Factors(rand(32, 1), rand(1, 32), None)},
                {"<mascot>": {"text_encoder": rand(1, 32)}}, {"base": "random", "trigger": "<mascot>"})


def random_lora(base, where=lambda name: True, seed=0, **kw):
    "Factors for the layers of a base, each with its own rank and alpha"
    g, layers = torch.Generator().manual_seed(seed), {}
    rand = lambda *shape: torch.randn(*shape, generator=g)
    for i, (n, m) in enumerate(base_layers(base).items()):
        w, r = m.weight.shape, 1 + i % 3
        if where(n): layers[n] = Factors(rand(w[0], r, *[1] * (len(w) - 2)), rand(r, *w[1:]), (r / 2, None, 2. * r)[i % 3])
    return Lora(layers, **kw)


def pair(out, r, n, alpha=None): return Factors(torch.randn(out, r), torch.randn(r, n), alpha)
