from types import SimpleNamespace as N

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from lora_nb.bases import Base
from lora_nb.families import FAMILIES, SD3Base, SDBase, SDXLBase, as_base, spelled
from lora_nb.core import LoraError
from lora_nb.random_pipes import RANDOM, random_pipe


def close(a, b, eps=1e-5): assert (torch.as_tensor(a) - torch.as_tensor(b)).abs().max() <= eps
def mean_square(predicted, truth): return (predicted - truth).square().mean((1, 2, 3))


@pytest.fixture(scope="module")
def bases(): return {f: as_base(random_pipe(f), f) for f in RANDOM}


@pytest.fixture
def sd(): return SDBase(random_pipe("sd"))


@pytest.fixture
def sd3(): return SD3Base(random_pipe("sd3"))


@pytest.mark.parametrize("zero", (False, True))
@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction"))
def test_noise_target_and_weights_are_those_of_diffusers(prediction, zero):
    z, noise = torch.randn(2, 3, 4, 8, 8)
    t, pipe = torch.tensor([0, 500, 999]), random_pipe("sd")
    changes = dict(prediction_type=prediction, rescale_betas_zero_snr=zero)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    b, s = SDBase(pipe), DDPMScheduler.from_config(pipe.scheduler.config)
    close(b.add_noise(z, noise, t), s.add_noise(z, noise, t))
    close(b.target(z, noise, t), noise if prediction == "epsilon" else s.get_velocity(z, noise, t))
    for soft in (False, True):
        w = b.loss_weight(t, 5., soft)
        assert w.isfinite().all() and (w >= 0).all() and (w <= 1.).all()
    snr = (s.alphas_cumprod / (1 - s.alphas_cumprod))[t]
    if prediction == "v_prediction": close(b.loss_weight(t, 1., True), snr / (1 + snr)**2, 1e-6)
    hard, w = b.loss_weight(t, 5.), b.loss_weight(t, 5., True)      # never above the corner, and near it far off
    assert (w <= hard + 1e-6).all() and (w >= hard / 2 - 1e-6).all()


def test_a_flow_mixes_as_diffusers_does(sd3):
    z, noise = torch.randn(2, 3, 16, 8, 8)
    t = sd3.timesteps_at(torch.tensor([.1, .5, .9]))
    # scale_noise accepts timesteps of its table only
    s = FlowMatchEulerDiscreteScheduler(shift=3.); known = s.timesteps[[100, 500, 900]]
    close(sd3.add_noise(z, noise, known), s.scale_noise(z, known, noise), 1e-4)
    close(sd3.add_noise(z, noise, t) - sd3.sigma(t) * sd3.target(z, noise, t), z)
    assert sd3.loss_weight(t, 5.).isfinite().all() and (sd3.loss_weight(t, 5., True) < sd3.loss_weight(t, 5.)).all()


def test_weighting_of_a_flow_is_the_error_of_the_other_answer(sd3):
    z, noise, said = torch.randn(3, 4, 16, 8, 8)
    t = sd3.timesteps_at(torch.tensor([.05, .3, .7, .95])); s = sd3.sigma(t)
    noisy, v = sd3.add_noise(z, noise, t), sd3.target(z, noise, t)
    weights = sd3.loss_weight(t, weighting="epsilon")
    close(mean_square(noisy + (1 - s) * said, noise), mean_square(said, v) * weights, 1e-4)
    assert sd3.loss_weight(t, weighting="v").equal(sd3.loss_weight(t))


def test_weighting_of_a_schedule_is_the_error_of_the_other_answer(sd):
    sd.prediction, t = "v_prediction", torch.tensor([0, 500, 999])
    (signal, sigma), answer, (z, noise) = sd.mix(t), torch.randn(3, 4, 8, 8), torch.randn(2, 3, 4, 8, 8)
    noisy = sd.add_noise(z, noise, t); wrong = mean_square(answer, sd.target(z, noise, t))
    close(mean_square(signal * noisy - sigma * answer, z), wrong * sd.loss_weight(t, weighting="x0"), 1e-4)
    close(mean_square(sigma * noisy + signal * answer, noise), wrong * sd.loss_weight(t, weighting="epsilon"), 1e-4)


def test_impossible_weightings(sd, sd3):
    t = torch.tensor([500])
    assert sd.loss_weight(t, weighting="epsilon").equal(sd.loss_weight(t))
    with pytest.raises(LoraError, match="expected 'v', 'x0'"): sd3.loss_weight(t, weighting="w")
    with pytest.raises(LoraError, match="two weights"): sd3.loss_weight(t, 5., weighting="x0")
    with pytest.raises(LoraError, match="has no bound"): sd.loss_weight(t, weighting="x0")


def test_each_tokenizer_of_sd3_gets_its_own_words(sd3):
    tok = sd3.pipe.tokenizer; tok.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
    assert spelled(["a <cat>, <dog>", "<cat>_1"], tok) == ["a <cat> <cat>_1 <cat>_2, <dog>", "<cat>_1"]
    assert sd3.spell(["a <cat>"], "negative_prompt")["negative_prompt_3"] == ["a <cat>"]       # T5 has not learned it
    given = dict(prompt_2="b")
    assert sd3.prompt_arguments(["a <cat>"], given)[0] == dict(prompt=["a <cat>"])             # the caller's own texts


def test_sdxl_answers_as_diffusers_does(bases):
    xl = bases["sdxl"]; cond = xl.encode_prompts(["a red apple", "a cat"])
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 500])
    small = cond.also(time_ids=xl.time_ids(2, size=(64, 64), original=(20, 10), crop=(3, 0)))
    assert (xl.predict(z, t, cond) - xl.predict(z, t, small)).abs().max() > 1e-4
    with torch.no_grad():                               # diffusers' own call at the same prompt, ids and pooled vector
        ids = xl.pipe._get_add_time_ids((10, 20), (3, 0), (64, 64), torch.float32, cond["pooled"].shape[-1])
        e, _, pooled, _ = xl.pipe.encode_prompt(["a red apple", "a cat"], device="cpu",
                                                do_classifier_free_guidance=False)
        theirs = xl.pipe.unet(z, t, e, added_cond_kwargs=dict(text_embeds=pooled, time_ids=ids.expand(2, -1))).sample
    close(xl.predict(z, t, small), theirs)
    assert small["time_ids"][0].float().equal(ids[0])


def test_both_text_encoders_of_sdxl_count(bases):
    xl = bases["sdxl"]; prompts = ["a red apple", "a cat"]
    cond, width = xl.encode_prompts(prompts), xl.pipe.text_encoder.config.hidden_size
    for i, part in enumerate(xl.text_encoders.values()):
        w = part.get_input_embeddings().weight; kept = w.detach().clone(); w.data.add_(.1 * torch.randn_like(w))
        now = xl.encode_prompts(prompts); w.data.copy_(kept)
        changed = (now["prompt_embeds"] - cond["prompt_embeds"]).abs().amax((0, 1)) > 1e-4
        assert [changed[:width].any().item(), changed[width:].any().item()] == [i == 0, i == 1]
        assert ((now["pooled"] - cond["pooled"]).abs().max().item() > 1e-4) == (i == 1)


def test_an_inpainting_unet_is_told_the_hole_as_by_diffusers(bases):
    fill, sd = bases["sd_inpaint"], bases["sd"]
    px, part = torch.rand(2, 3, 64, 64) * 2 - 1, torch.zeros(2, 1, 64, 64); part[..., :32] = 1
    told = fill.conceal(px, part); assert told["hole"][0, 0, 0].tolist() == [1.] * 4 + [0.] * 4
    mask, _ = fill.pipe.prepare_mask_latents(part, px * (1 - part), 2, 64, 64, torch.float32, torch.device("cpu"),
                                             torch.Generator().manual_seed(0), False)
    assert mask.equal(told["hole"]) and fill.inpainting and not sd.inpainting
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]); c = fill.encode_prompts(["a", "b"])
    close(fill.predict(z, t, c), fill.predict(z, t, c.also(**fill.conceal(px, torch.ones(2, 1, 64, 64)))), 1e-3)
    assert (fill.predict(z, t, c) - fill.predict(z, t, c.also(**told))).abs().max() > 1e-3


def shaped(name="", **config):
    "A base of SD3 with a transformer of this shape and without weights"
    b = object.__new__(SD3Base); b.name = name
    net = N(config=N(sample_size=128, patch_size=2, pos_embed_max_size=384, **config))
    b.pipe = N(transformer=net, vae_scale_factor=8, config={}); return b


MEDIUM = dict(num_layers=24, dual_attention_layers=tuple(range(13)))


def test_large_bases_by_the_shape_of_their_transformer():
    bases = shaped(num_layers=38), shaped("x/sd-Turbo", num_layers=38), shaped(**MEDIUM), shaped(num_layers=24)
    assert [b.preset for b in bases] == ["sd3.5-large", "sd3.5-large-turbo", "sd3.5-medium", "sd3-medium"]


def test_skip_layer_guidance_as_the_authors_set_it():
    assert shaped(**MEDIUM).skipping(True)["guidance_scale"] == 4.
    assert shaped(**MEDIUM).skipping(True, 6.)["guidance_scale"] == 6.
    assert shaped(**MEDIUM).max_size == 6144


def test_everything_is_frozen_and_in_evaluation_mode(bases):
    nets = [m for b in bases.values() for m in b.parts().values()]
    assert not any(p.requires_grad for m in nets for p in m.parameters()) and not any(m.training for m in nets)


def test_each_pipeline_is_owned_by_one_family():
    for f in RANDOM:
        parts = random_pipe(f).components
        assert [k.family for k in FAMILIES if k.owns(parts)] == [f.split("_")[0]]


def test_no_family_is_an_error_that_names_what_was_found():
    with pytest.raises(LoraError, match="No known family: found Linear"): as_base(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_every_question(family):
    asked = ("timesteps_at", "mix", "target", "clean_and_noise", "min_snr", "encode_prompts", "predict")
    assert all(getattr(family, name) is not getattr(Base, name) for name in asked)
    assert all(getattr(family, name).__func__ is not getattr(Base, name).__func__ for name in ("owns", "owns_file"))


def test_sdxl_keeps_the_mathematics_of_sd(): assert issubclass(SDXLBase, SDBase) and SDXLBase.target is SDBase.target
