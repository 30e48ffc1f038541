"Small models for the tests of names, layers, lora, worn, injection and report."
import hashlib, itertools, json, tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_nb.injection import inject_lora

torch.set_num_threads(1)


def tiny_unet(seed=0):
    "A UNet of Stable Diffusion's class with random weights"
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=24,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()


def tiny_mmdit(layers=2, **kw):
    "A transformer of Stable Diffusion 3's class with random weights"
    torch.manual_seed(0)
    sizes = dict(sample_size=8, patch_size=2, in_channels=4, num_layers=layers, attention_head_dim=8, num_attention_heads=2,
                 joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
                 pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm")
    return SD3Transformer2DModel(**{**sizes, **kw}).eval()


def tiny_clip():
    "A text encoder and a tokenizer that spells in letters"
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{c}</w>" for c in letters), "sks</w>", "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as d:
        Path(d, "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
        Path(d, "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(f"{d}/vocab.json", f"{d}/merges.txt", model_max_length=77)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1)
    return CLIPTextModel(config).eval(), tokenizer


def look(unet):
    "What a UNet makes of a fixed input"
    g, like = torch.Generator().manual_seed(0), unet.conv_in.weight
    x, words = torch.randn(1, 4, 8, 8, generator=g).to(like.dtype), torch.randn(1, 7, 24, generator=g).to(like.dtype)
    with torch.no_grad(): return unet(x, 5, words).sample


def fingerprint(model):
    "Names, bits, and which parameters learn"
    h = hashlib.sha256()
    for n, t in itertools.chain(model.named_parameters(), model.named_buffers()):
        h.update(f"{n}{t.requires_grad}{t.dtype}{tuple(t.shape)}".encode())
        h.update(t.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return h.hexdigest()


def random_lora(model, targets="attention", rank=2, seed=1):
    "A LoRA that does something"
    torch.manual_seed(seed)
    worn = inject_lora(model, targets, rank)
    for p in worn.params(): p.data.normal_(std=.1)
    lora = worn.lora()
    worn.remove()
    return lora


def close(a, b, eps=1e-5): return torch.allclose(a, b, atol=eps, rtol=eps)


def lora_for(pipe, rank, *components, seed=0):
    "A LoRA that does something, in the attention of some components of a pipeline"
    torch.manual_seed(seed)
    worn = inject_lora(pipe, {c: "attention" for c in components}, rank=rank)
    for m in worn.layers.values(): torch.nn.init.normal_(m.lora_up.weight, std=.1)
    lora = worn.lora(); worn.remove()
    return lora


def tiny_pipe():
    "What the toolbox sees of a pipeline: a UNet, a text encoder and its tokenizer"
    text_encoder, tokenizer = tiny_clip()
    return SimpleNamespace(unet=tiny_unet(), text_encoder=text_encoder, tokenizer=tokenizer)
