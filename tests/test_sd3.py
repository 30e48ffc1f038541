import math

import pytest
import torch
from diffusers import SD3Transformer2DModel

from lora_nb.bases import Cond
from lora_nb.core import LoraError, TargetError
from lora_nb.families import as_base
from lora_nb.injection import inject_lora
from lora_nb.random_pipes import random_pipe
from lora_nb.sd3 import (attention_logits, attention_maps, block_groups, logit_bound, loss_by_sigma, shift_quantile,
                         without_encoder)


@pytest.fixture(scope="module")
def sd3(): return as_base(random_pipe("sd3"))


@pytest.fixture(scope="module")
def sd(): return as_base(random_pipe("sd"))


def test_a_base_practises_the_quantiles_of_the_shifted_logit_normal(sd3):
    q = torch.linspace(.001, .999, 999, dtype=torch.float64)
    assert sd3.shift == 3.
    assert (sd3.timesteps_at(q) / 1000 - shift_quantile(q, 3.).float()).abs().max() <= 1e-5


def test_listening_leaves_no_hooks(sd3):
    with attention_maps(sd3) as maps: sd3.generate("a", steps=1)
    assert maps and not any(m._forward_pre_hooks for m in sd3.denoiser.modules())


@pytest.mark.parametrize("match, what", (
    ("99", lambda b: attention_maps(b, blocks=[99]).__enter__()),
    ("attn2", lambda b: attention_maps(b, layer="attn3").__enter__()),
    ("77", lambda b: attention_logits(b, blocks=[77]).__enter__())))
def test_blocks_that_are_not_there(match, what, sd3):
    with pytest.raises(TargetError, match=match): what(sd3)


def test_a_unet_has_no_joint_attention(sd):
    with pytest.raises(TargetError, match="MMDiT"): attention_maps(sd.pipe).__enter__()
    with pytest.raises(TargetError, match="MMDiT"): block_groups(sd)
    cond = Cond(prompt_embeds=torch.zeros(1, 77, 32))
    with pytest.raises(LoraError, match="found sd"): loss_by_sigma(sd, torch.zeros(1, 4, 8, 8), cond, [.5])


def test_words_that_are_no_choice(sd3):
    with pytest.raises(LoraError, match="'T5' or 'CLIP'"): without_encoder(sd3, sd3.encode_prompts(["a"]), "BERT")
    with pytest.raises(LoraError, match="'part'"): block_groups(sd3, "size")


def test_no_ceiling_without_norms(sd3):
    config = {k: v for k, v in dict(sd3.denoiser.config).items() if k != "qk_norm"}
    assert logit_bound(SD3Transformer2DModel(**config).transformer_blocks[0].attn) == math.inf
    assert logit_bound(sd3.denoiser.transformer_blocks[0].attn) < math.inf


def test_groups_of_a_lora_are_those_of_its_blocks(sd3):
    worn = inject_lora(sd3.pipe, {"transformer": lambda name, module: name.startswith("transformer_blocks")}, rank=2)
    lora = worn.lora(); worn.remove()
    groups = block_groups(lora, "block")
    assert sum(map(len, groups.values())) == len(lora) and len(groups) == len(sd3.denoiser.transformer_blocks)
