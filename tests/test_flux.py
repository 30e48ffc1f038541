"FLUX.1, FLUX.2 [klein] and Z-Image: what every family does, on random models of the real classes."
import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers_ground import fingerprint
from lora_nb.core import LoraError
from lora_nb.dataset import ConceptDataset, encode, tokenizers_of
from lora_nb.dreambooth import DreamBooth
from lora_nb.families import FAMILIES, as_base
from lora_nb.injection import apply_lora, inject_lora, remove_lora
from lora_nb.loading import load_base
from lora_nb.lora import Lora
from lora_nb.random_pipes import random_pipe
from lora_nb.recipe import Recipe, recipe_for
from lora_nb.textual_inversion import NewWords
from lora_nb.training import Stream, Trainer

NEW = ("flux", "flux_schnell", "flux2", "zimage")
SWATCHES = ConceptDataset([Image.new("RGB", (64, 64), c) for c in ("red", "green", "blue")])
SWATCHES.captions = [f"a {c} wall" for c in ("red", "green", "blue")]


@pytest.fixture(scope="module")
def bases(): return {f: as_base(random_pipe(f), f) for f in NEW}


def strong(base, targets="feed-forward", rank=2):
    "A LoRA that does something"
    torch.manual_seed(0)
    worn = inject_lora(base.pipe, targets, rank)
    for p in worn.params(): p.data.normal_(std=.3)
    lora = worn.lora(); worn.remove()
    return lora


def difference(a, b): return np.abs(np.asarray(a, float) - np.asarray(b, float)).max()


@pytest.mark.parametrize("family", NEW)
def test_presets_reach_all_blocks(family, bases):
    blocks = {n.rsplit(".", 1)[0].split(".")[0] for n, m in bases[family].denoiser.named_modules() if ".attn" in n or ".attention" in n}
    worn = inject_lora(bases[family].pipe, "attention", 2)
    assert blocks == {n.split(".")[1] for n in worn.layers} and len(blocks) >= 2
    worn.remove()
    feed = strong(bases[family]); attention = strong(bases[family], "attention")
    assert set(attention.layers) < set(feed.layers)
    if family != "zimage": assert all("single" in n for n in strong(bases[family], "single-stream").layers)


@pytest.mark.parametrize("family", NEW)
def test_worn_and_taken_off(family, bases):
    b = bases[family]; lora = strong(b); was = fingerprint(b.denoiser)
    plain = b.generate("a cat", seeds=1, steps=2)[0]
    pictures = []
    for mode in ("merge", "inject"):
        apply_lora(b.pipe, lora, mode=mode); pictures += b.generate("a cat", seeds=1, steps=2); remove_lora(b.pipe)
        assert fingerprint(b.denoiser) == was
    assert difference(*pictures) <= 2 and difference(pictures[0], plain) > 3
    assert b.generate("a cat", seeds=1, steps=2)[0].tobytes() == plain.tobytes()


@pytest.mark.parametrize("family", NEW)
def test_a_file_gives_the_same_picture_in_plain_diffusers(family, bases, tmp_path):
    b = bases[family]; lora = strong(b)
    lora.save(tmp_path / "pytorch_lora_weights.safetensors")
    apply_lora(b.pipe, lora, mode="inject"); mine = b.generate("a cat", seeds=1, steps=2)[0]; remove_lora(b.pipe)
    plain = random_pipe(family); plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(tmp_path)
    theirs = plain(prompt=["a cat"], height=64, width=64, num_inference_steps=2, guidance_scale=b.sampling["guidance_scale"],
                   max_sequence_length=b.text_length, generator=torch.Generator().manual_seed(1)).images[0]
    assert difference(mine, theirs) <= 1
    assert Lora.load(tmp_path / "pytorch_lora_weights.safetensors", base=b.pipe) == lora


@pytest.mark.parametrize("family", NEW)
def test_training_lowers_the_loss_of_a_fixed_batch(family):
    b = as_base(random_pipe(family)); coded = encode(b, SWATCHES)
    worn = inject_lora(b.pipe, "feed-forward", rank=4)
    t = Trainer(b, worn, [Stream("subject", coded, 3)], Recipe(rank=4, steps=12, learning_rate=1e-2, warmup=0, lr_schedule="constant"))
    with t.session():
        before = t.loss(0)[0].item()
        optimizer = torch.optim.AdamW(worn.params(), 1e-2)
        for _ in range(12): optimizer.zero_grad(); t.loss(0)[0].backward(); optimizer.step()
        after = t.loss(0)[0].item()
    assert after < .97 * before


@pytest.mark.parametrize("family", NEW)
def test_checkpointing_changes_no_gradient(family):
    b = as_base(random_pipe(family)); coded = encode(b, SWATCHES)
    worn = inject_lora(b.pipe, "feed-forward", rank=2)
    for m in worn.layers.values(): torch.nn.init.constant_(m.lora_up.weight, .02)
    grads = []
    for on in (False, True):
        t = Trainer(b, worn, [Stream("subject", coded, 3)], Recipe(rank=2, gradient_checkpointing=on))
        with t.session(): t.loss(0)[0].backward(); grads.append([p.grad.clone() for p in t.all_params()])
        for p in t.all_params(): p.grad = None
    assert all(x.allclose(y, atol=1e-6) for x, y in zip(*grads)) and max(g.abs().max() for g in grads[0]) > 1e-5


@pytest.mark.parametrize("prior", ("images", "prediction"))
@pytest.mark.parametrize("family", ("flux", "flux2", "zimage"))
def test_dreambooth_with_a_prior(family, prior, tmp_path):
    b = as_base(random_pipe(family), family)
    pictures = [Image.effect_noise((64, 64), 40 + 20 * i) for i in range(2)]
    run = DreamBooth(b, pictures, "a sks toy", "a toy", tmp_path / "toys" if prior == "images" else None, prior, steps=2, batch_size=1,
                     prior_batch=1, rank=2, num_class_images=2, sampling=dict(steps=1))
    lora = run.fit()
    assert sorted(s.name for s in run.streams) == ["prior", "subject"]
    assert all(f.up.abs().max() > 0 for f in lora.layers.values()) and lora.metadata["base"] == family
    assert json.loads(lora.metadata["recipe"])["steps"] == 2


def test_the_prior_prediction_is_that_of_the_bare_base():
    b = as_base(random_pipe("flux")); run = DreamBooth(b, [Image.effect_noise((64, 64), 50)], "a sks toy", "a toy", None, "prediction",
                                                       steps=1, batch_size=1, prior_batch=1, rank=2)
    first = {n: v.item() for n, v in run.trainer.loss(0)[1].items()}      # a LoRA that does nothing yet differs by nothing
    run.remove()
    assert first["prior"] < 1e-10 < first["subject"]


def test_a_word_has_a_row_in_the_clip_of_flux():
    b = as_base(random_pipe("flux")); was = fingerprint(b.pipe.text_encoder)
    words = NewWords(b, {"<x>": "<rand>"}, vectors=2)
    assert sorted(words.embeddings()["<x>"]) == ["text_encoder"]
    a, c = (b.encode_prompts([p])["pooled"] for p in ("a <x>", "a y"))
    assert (a - c).abs().max() > 1e-4
    b.encode_prompts(["a <x>"])["pooled"][:, 0].sum().backward()
    assert words.params()["text_encoder.words"][0].grad.abs().sum() > 0
    words.remove()
    assert fingerprint(b.pipe.text_encoder) == was
    with pytest.raises(LoraError, match="no CLIP text encoder"): NewWords(as_base(random_pipe("zimage")), {"<x>": "<rand>"})


def test_a_word_in_a_language_model_when_it_is_named():
    b = as_base(random_pipe("zimage")); was = fingerprint(b.pipe.text_encoder)
    words = NewWords(b, {"<x>": "<rand>"}, components=["text_encoder"])
    b.encode_prompts(["a <x>"])["prompt_embeds"].sum().backward()
    assert words.params()["text_encoder.words"][0].grad.abs().sum() > 0
    words.remove(); assert fingerprint(b.pipe.text_encoder) == was


@pytest.mark.parametrize("family", NEW)
def test_loaded_from_a_folder(family, bases, tmp_path):
    bases[family].pipe.save_pretrained(tmp_path / "base")
    again = load_base(tmp_path / "base", device="cpu")
    assert type(again) is type(bases[family]) and again.resolution == 64
    assert difference(again.generate("a", seeds=2, steps=2)[0], bases[family].generate("a", seeds=2, steps=2)[0]) <= 1


@pytest.mark.parametrize("family", NEW)
def test_every_size_is_encoded_and_drawn(family, bases):
    b = bases[family]
    assert b.generate("a", steps=1, size=(96, 64))[0].size == (96, 64)
    z = b.encode_images(torch.rand(1, 3, 96, 64) * 2 - 1)
    assert b.predict(z, b.sample_timesteps(1), b.encode_prompts(["a"])).shape == z.shape
    assert b.decode_latents(z).shape == (1, 3, 96, 64)
    with pytest.raises(LoraError, match="multiples of 16"): b.generate("a", size=72)


@pytest.mark.parametrize("family", NEW)
def test_half_precision(family):
    b = as_base(random_pipe(family).to(dtype=torch.bfloat16))
    z = b.encode_images(torch.rand(1, 3, 64, 64) * 2 - 1)
    answer = b.predict(z, b.sample_timesteps(1), b.encode_prompts(["a"]).to(torch.bfloat16))
    assert answer.dtype == torch.float32 and answer.isfinite().all()


def test_settings_and_limits(bases):
    assert recipe_for(bases["zimage"], "face").train_text_encoder is False
    assert [tokenizers_of(bases[f])[n][1] for f, n in (("flux", "tokenizer"), ("flux", "tokenizer_2"), ("zimage", "tokenizer"))] == [77, 32, 48]


def test_single_files_are_told_apart():
    names = {"flux": {"double_blocks.0.img_mod.lin.weight", "single_blocks.0.linear1.weight"},
             "flux2": {"model.diffusion_model.double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"},
             "zimage": {"model.diffusion_model.cap_embedder.0.weight", "model.diffusion_model.layers.0.attention.qkv.weight"},
             "sd3": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"}}
    for family, keys in names.items(): assert [k.family for k in FAMILIES if k.owns_file(keys)] == [family]


def test_an_encoder_that_cannot_learn_is_named():
    with pytest.raises(LoraError, match="has no CLIP"):
        DreamBooth(as_base(random_pipe("zimage")), [Image.effect_noise((64, 64), 50)], "a sks toy", steps=1, train_text_encoder=True)


@pytest.mark.parametrize("family", NEW)
def test_memory_is_estimated_on_shapes_alone(family):
    from lora_nb.memory import estimate_memory, shapes_of
    pipe = as_base(random_pipe(family)).pipe; was = fingerprint(pipe.transformer)
    dense, packed = (estimate_memory(pipe, dtype=torch.float32, allowance=False, quantize=q) for q in (None, "nf4"))
    less = estimate_memory(pipe, dtype=torch.float32, allowance=False, gradient_checkpointing=True)
    weights = lambda m: m.phases["step"]["weights: transformer"]
    linear = sum(m.weight.numel() for m in pipe.transformer.modules() if isinstance(m, torch.nn.Linear))
    assert weights(dense) == 4 * sum(t.numel() for t in (*pipe.transformer.parameters(), *pipe.transformer.buffers()))
    assert weights(dense) - weights(packed) == pytest.approx(linear * (4 - .5 - 1/64 - 4/64/256), abs=2)
    assert less.phases["step"]["activations"] < dense.phases["step"]["activations"]
    assert fingerprint(pipe.transformer) == was and set(shapes_of(pipe)) >= {"transformer", "text_encoder", "vae"}


def test_true_shapes_have_the_published_sizes():
    from lora_nb.memory import meta_part
    count = lambda name, part="transformer": sum(p.numel() for p in meta_part(name, part).parameters())
    assert count("flux.1-dev") == 11_901_408_320 and count("flux.1-schnell") < count("flux.1-dev")
    assert 3.8e9 < count("flux.2-klein-4b") < 4e9 and 9e9 < count("flux.2-klein-9b") < 9.2e9 and 6.1e9 < count("z-image") < 6.2e9
