from dataclasses import replace

import pytest
import torch
from helpers_files import pair, random_lora
from safetensors.torch import load_file, save_file

from lora_nb.containers import read_safetensors
from lora_nb.core import FormatError, LoraError, ShapeError
from lora_nb.kohya import (assemble, at_alpha, common_alpha, exact_rank, family_of, fuse_projections, kohya_name, split_fused, to_sgm,
                           with_one_alpha)
from lora_nb.lora import Factors, Lora
from lora_nb.random_pipes import random_pipe

torch.manual_seed(0)
Q, K, V = (f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv")
SHARED = Factors(torch.randn(48, 3), torch.randn(3, 16), 1.5)
COMMON = Lora(dict(zip((Q, K, V), split_fused(SHARED))))


def refused(match, f, *args, exc=LoraError, **kw):
    with pytest.raises(exc, match=match): f(*args, **kw)


def close(a, b, eps=1e-5): assert torch.allclose(a, b, atol=eps, rtol=eps), (a - b).abs().max()


@pytest.fixture(scope="module")
def sd(): return random_pipe("sd")


@pytest.fixture
def written(tmp_path):
    "Load a file of these tensors"
    def load(tensors, **kw):
        save_file(tensors, tmp_path/"w.safetensors")
        return Lora.load(tmp_path/"w.safetensors", **kw)
    return load


def trip(lora, tmp_path, base=None, **kw):
    lora.save(tmp_path/"t.safetensors", "kohya", base=base, **kw)
    return Lora.load(tmp_path/"t.safetensors", base=base)


def test_fused_projections():
    shared = Factors(torch.randn(24, 2), torch.randn(2, 8), 1.)
    assert [f.rank for f in split_fused(shared)] == [2, 2, 2]
    back, none = fuse_projections(dict(enumerate(split_fused(shared))))
    assert back.up.equal(shared.up) and none is None
    qkv = {i: pair(8, r, 8, r / 2) for i, r in enumerate((1, 3, 2))}
    kv, two = fuse_projections({1: qkv[1], 2: qkv[2]})
    assert kv.delta()[:8].eq(0).all() and two == [0, 3, 2]
    assert split_fused(kv, two)[0] is None
    assert [f.rank for f in split_fused(replace(shared, up=torch.zeros(24, 2)))] == [2, 2, 2]
    refused("three equal", split_fused, Factors(torch.ones(4, 1), torch.ones(1, 4)), exc=ShapeError)


def test_fused_files(tmp_path):
    assert trip(COMMON, tmp_path) == COMMON
    dora = COMMON.map(lambda f: replace(f, magnitude=torch.rand(len(f.up))))
    assert trip(dora, tmp_path) == dora
    strengths = Lora({n: replace(f, alpha=a * f.rank) for (n, f), a in zip(COMMON.layers.items(), (.5, 1., 4.))})
    assert trip(strengths, tmp_path) == strengths
    types = (torch.float16, torch.float32, torch.float32)
    mixed = Lora({n: f.to(dtype=d) for (n, f), d in zip(strengths.layers.items(), types)})
    for n, f in trip(mixed, tmp_path).layers.items(): close(f.delta(), mixed.layers[n].delta(), 1e-6)
    for drop in ({Q}, {K}, {Q, V}):
        fewer = Lora({n: f for n, f in COMMON.layers.items() if n not in drop})
        assert trip(fewer, tmp_path) == fewer
        refused("query, key and value", trip, fewer.map(lambda f: replace(f, magnitude=torch.ones(len(f.up)))), tmp_path)
    torn = Lora({n: replace(f, magnitude=torch.ones(16) if n == Q else None) for n, f in COMMON.layers.items()})
    refused("query, key and value", trip, torn, tmp_path)


def test_what_a_kohya_file_cannot_hold(tmp_path):
    refused("without a name", trip, Lora({"unet.conv_in.x": pair(4, 1, 4)}), tmp_path)
    refused("'diffusers' or 'sgm'", trip, COMMON, tmp_path, dialect="sd3")
    refused("grouped", trip, Lora({"unet.conv_in": Factors(torch.ones(4, 2, 1, 1), torch.ones(2, 2, 1, 1), None, groups=2)}), tmp_path)
    refused("dot", trip, Lora({}, {"a.b": {"text_encoder": torch.ones(1, 2)}}), tmp_path, bundle=True)
    assert not list(tmp_path.iterdir())


def test_a_middle_factor(sd, written, tmp_path):
    name, ours, mid = "lora_unet_down_blocks_0_resnets_0_conv1", "unet.down_blocks.0.resnets.0.conv1", torch.randn(4, 4, 3, 3)
    cp = {f"{name}.lora_up.weight": torch.randn(16, 4, 1, 1), f"{name}.lora_down.weight": torch.randn(4, 16, 1, 1),
          f"{name}.lora_mid.weight": mid, f"{name}.alpha": torch.tensor(2.)}
    f = written(cp, base=sd).layers[ours]
    up, down = (cp[f"{name}.lora_{x}.weight"].flatten(1) for x in ("up", "down"))
    close(f.delta(), torch.einsum("nmkl,in,mj->ijkl", mid, up, down) / 2, 1e-4)
    assert trip(Lora({ours: f}), tmp_path) == Lora({ours: f})
    refused("lora_mid", written, {**cp, f"{name}.lora_mid.weight": torch.ones(3, 4, 3, 3)})
    refused("no known place", written, {**cp, f"{name}.lora_mid.bias": torch.ones(3)})


def test_broken_modules(written):
    half = lambda n, out: {f"{n}.lora_up.weight": torch.ones(out, 1), f"{n}.lora_down.weight": torch.ones(1, 4)}
    refused("expected the parts", written, {"lora_unet_conv_in.alpha": torch.ones(1)})
    refused("no known place", written, {"lora_unet_x.lora_up.weight": torch.ones(1, 1)})
    big, q = torch.ones(700, 700), "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    refused("GB", written, {f"{q}.lokr_w1": big, f"{q}.lokr_w2": big.clone()})
    fused, alone = "lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_transformer_transformer_blocks_0_attn_to_q"
    refused("twice", written, half(fused, 12) | half(alone, 4))
    te = "text_model_encoder_layers_0_mlp_fc1"
    refused("two tensors", written, half(f"lora_te_{te}", 4) | half(f"lora_te1_{te}", 4))
    refused("one number", written, half("lora_unet_conv_in", 4) | {"lora_unet_conv_in.alpha": torch.ones(2)})
    refused("do not fit together", assemble, "m", dict(hada_w1_a=torch.ones(4, 2), hada_w1_b=torch.ones(3, 4), hada_w2_a=torch.ones(4, 2),
                                                       hada_w2_b=torch.ones(2, 4)), exc=ShapeError)
    refused("no whole number of 3x3 kernels", assemble, "m", dict(lokr_w1=torch.ones(2, 2), lokr_w2=torch.ones(2, 4)), (3, 3), exc=ShapeError)


@pytest.mark.parametrize("part, what", [("oft_R.weight", "OFT"), ("boft_R", "OFT"), ("scalar", "training state")])
def test_adapters_that_cannot_be_read_are_named(part, what, written):
    refused(what, written, {f"lora_unet_conv_in.{part}": torch.ones(2, 2)}, exc=FormatError)


def test_words_in_bundles(sd, tmp_path):
    attn = random_lora(sd, lambda n: "unet" in n and ".attn" in n)
    one = Lora(attn.layers, {"cat": {"text_encoder": torch.randn(2, 32)}})
    assert trip(one, tmp_path, sd, bundle=True) == one
    assert "bundle_emb.cat.string_to_param.*" in read_safetensors(tmp_path/"t.safetensors")[0]
    assert trip(one, tmp_path, sd) == one
    xl = Lora(attn.layers, {"cat": {"text_encoder": torch.randn(2, 32), "text_encoder_2": torch.randn(2, 40)}})
    assert trip(xl, tmp_path, sd, bundle=True) == xl


def test_a_word_that_is_no_tensor_of_vectors(written):
    for bad in (torch.ones(1, 2, 8), torch.ones(2, 8).int()): refused(r"expected one \(n, d\) tensor", written, {"bundle_emb.cat.clip_l": bad})
    refused("expected one", written, {"bundle_emb.cat.clip_l": torch.ones(1, 8), "bundle_emb.cat.string_to_param.*": torch.ones(1, 8)})


def test_alpha_keeps_its_digits(tmp_path):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for alpha in (.1, 1 / 3, 1e-12, 16.): assert trip(Lora({name: pair(8, 2, 8, alpha)}), tmp_path).layers[name].alpha == alpha


def test_families_from_text_encoders():
    text = lambda c, w: Lora({f"{c}.encoder.layers.0.self_attn.q_proj": pair(w, 1, w)})
    told = {("text_encoder", 768): "SD1", ("text_encoder", 1024): "SD2", ("text_encoder_2", 1280): "SDXL", ("text_encoder_3", 4096): "SD3",
            ("text_encoder", 32): "unknown"}
    assert {k: family_of(text(*k)) for k in told} == told
    assert family_of(Lora({"unet.mid_block.attentions.0.transformer_blocks.7.ff.net.2": pair(8, 1, 8)})) == "SDXL"
    assert family_of(Lora({"unet.x.proj_in": Factors(torch.ones(4, 1, 1, 1), torch.ones(1, 4, 1, 1))})) == "SD1"
    assert family_of(Lora()) == "unknown"


def test_names_of_text_encoders():
    q = "encoder.layers.0.self_attn.q_proj"
    assert kohya_name(f"text_encoder.{q}") == "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert kohya_name(f"text_encoder.{q}", many=True).startswith("lora_te1_")
    assert kohya_name(f"text_encoder_2.{q}").startswith("lora_te2_text_model_")
    assert kohya_name("text_encoder_2.text_projection") == "lora_te2_text_projection"
    assert kohya_name("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q") == "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    assert to_sgm("up_blocks_0_upsamplers_0_conv", attentive=(1, 2, 3)) == "output_blocks_2_1_conv"     # SD1


def test_a_file_of_lora_te1_alone_is_of_sdxl(tmp_path):
    "SD1 and SD2 have `lora_te_`"
    key = "text_model_encoder_layers_0_self_attn_q_proj"
    half = lambda te: {f"{te}{key}.lora_down.weight": torch.ones(2, 768), f"{te}{key}.lora_up.weight": torch.ones(768, 2)}
    for te, family in (("lora_te1_", "SDXL"), ("lora_te_", "SD1")):
        save_file(half(te), tmp_path/"x.safetensors")
        lora = Lora.load(tmp_path/"x.safetensors")
        assert family_of(lora) == family
        lora.save(tmp_path/"y.safetensors", "kohya")
        tensors, metadata = read_safetensors(tmp_path/"y.safetensors")
        assert all(k.startswith(te) for k in tensors) and ("v1-5" in str(metadata) or "sd_v1" in str(metadata)) == (family == "SD1")
        assert family_of(Lora.load(tmp_path/"y.safetensors")) == family
    sd1 = {k.replace("lora_te_", "text_encoders.clip_l.transformer.").replace(key, "text_model.encoder.layers.0.self_attn.q_proj"): t
           for k, t in half("lora_te_").items()}
    save_file(sd1, tmp_path/"comfy.safetensors")
    assert family_of(Lora.load(tmp_path/"comfy.safetensors")) == "SD1"


ATTN = "unet.mid_block.attentions.0.transformer_blocks.0.attn{}.to_{}"


def odd_ranks(dtype=torch.float32):
    "Layers as `resize(energy=...)` leaves them, and as LoCon's programs train them"
    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    sizes = [(3, None), (5, None), (8, None), (12, None), (13, None), (4, 1.), (4, 16.), (8, .5)]
    names = [ATTN.format(i, x) for i in (1, 2) for x in ("q", "k", "v", "out.0")]
    return Lora({n: Factors(rand(32, r), rand(r, 32), a) for n, (r, a) in zip(names, sizes)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_alpha_and_back(dtype, tmp_path):
    "The file has one alpha and the same differences; our reader finds every bit, also where the ranks are no powers of two"
    lora = odd_ranks(dtype)
    assert trip(lora, tmp_path) == lora
    raw, metadata = read_safetensors(tmp_path/"t.safetensors")
    alphas = {t.item() for k, t in raw.items() if k.endswith(".alpha")}
    assert len(alphas) == 1 and metadata["ss_network_alpha"] == f"{alphas.pop():g}" and metadata["ss_network_dim"] == "Dynamic"
    save_file(raw, tmp_path/"bare.safetensors")                            # without the note, the same LoRA in other numbers
    bare = Lora.load(tmp_path/"bare.safetensors")
    for n, f in lora.layers.items(): close(bare.layers[n].delta(), f.delta(), 0 if dtype == torch.float32 else 1e-6)
    assert all(f.rank <= bare.layers[n].rank < 2 * f.rank for n, f in lora.layers.items())
    assert trip(lora * -1., tmp_path) == lora * -1.                        # a sign costs nothing
    assert trip(bare, tmp_path) == bare


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_one_alpha_of_eight_bits(dtype, tmp_path):
    "Its range is too narrow for some powers of two: the difference stays, the numbers may become wider"
    lora = odd_ranks(dtype)
    for n, f in trip(lora, tmp_path).layers.items():
        assert (f.delta() - lora.layers[n].delta()).norm() < .005 * lora.layers[n].delta().norm()


def test_one_alpha_is_left_alone_where_it_is_one_or_nobody_gains(tmp_path):
    lora = odd_ranks()
    same = lora.map(lambda f: replace(f, alpha=4.))
    assert with_one_alpha(same) == (same, {})
    assert with_one_alpha(Lora({Q: pair(16, 2, 16), K: pair(16, 3, 16)}))[1] == {}             # SD3, which diffusers does not read
    mid = Lora({**lora.layers, "unet.conv_in": Factors(torch.ones(8, 2, 1, 1), torch.ones(2, 4, 1, 1), 1., mid=torch.ones(2, 2, 3, 3))})
    assert with_one_alpha(mid) == (mid, {})
    trip(lora, tmp_path, one_alpha=False)
    assert len({t.item() for k, t in read_safetensors(tmp_path/"t.safetensors")[0].items() if k.endswith(".alpha")}) == 3


def test_one_alpha_with_odd_strengths(tmp_path):
    "Negative, zero, and thirds: rounded at most to the layer's precision; magnitudes stay"
    for alpha in (-1., 0., 1 / 3, 7., 1e-30, 1e30):
        lora = Lora({ATTN.format(1, "q"): pair(16, 4, 16, alpha), ATTN.format(1, "k"): pair(16, 4, 16)})
        for n, f in trip(lora, tmp_path).layers.items(): close(f.delta(), lora.layers[n].delta(), 1e-6)
    f, exact = at_alpha(replace(pair(8, 3, 8), magnitude=torch.ones(8)), 4.)
    assert exact and f.rank == 4 and f.magnitude.eq(1).all()
    half = Factors(torch.full((8, 2), 6e-8).half(), torch.ones(2, 8).half(), 2.)             # too small for a quarter of it
    f, exact = at_alpha(half, 8.)
    assert not exact and f.up.dtype == torch.float32
    close(f.delta(), half.delta(), 1e-12)
    assert common_alpha([pair(8, 4, 8, 0.)]) == 1. and exact_rank(4, 0., 1.) is None and exact_rank(6, 6, 16) == 8


def test_a_files_sizes_are_true(tmp_path):
    "Rank and alpha that another program noted are corrected when no layer has them any more"
    from lora_nb.extraction import resize
    lora = Lora({ATTN.format(1, "q"): pair(32, 16, 32, 8.)}, {}, {"ss_network_dim": "16", "ss_network_alpha": "8.0", "ss_steps": "9"})
    for format in ("kohya", "peft", "comfy"):
        lora.save(tmp_path/"a.safetensors", format)
        assert Lora.load(tmp_path/"a.safetensors").metadata == lora.metadata
        resize(Lora.load(tmp_path/"a.safetensors"), rank=4).save(tmp_path/"b.safetensors", format)
        for about in (read_safetensors(tmp_path/"b.safetensors")[1], Lora.load(tmp_path/"b.safetensors").metadata):
            assert (about["ss_network_dim"], about["ss_network_alpha"], about["ss_steps"]) == ("4", "4", "9")


def test_a_transformer_of_another_family_gets_no_names_of_sd3(tmp_path):
    "FLUX's double blocks have SD3's paths in diffusers"
    name = "transformer.transformer_blocks.0.attn.to_q"
    flux = Lora({name: pair(3072, 1, 3072), name.replace("attn.to_q", "ff_context.net.2"): pair(3072, 1, 12288)})
    for format, key in (("kohya", "lora_unet_double_blocks_0_img_attn_qkv"), ("comfy", "diffusion_model.double_blocks.0.img_attn.qkv")):
        flux.save(tmp_path/"a.safetensors", format)
        assert f"{key}.lora_up.weight" in load_file(tmp_path/"a.safetensors") and Lora.load(tmp_path/"a.safetensors").layers == flux.layers
    qwen = Lora({f"transformer.transformer_blocks.{b}.attn.{m}": pair(3072, 1, 3072) for b in (0, 59) for m in ("to_q", "add_q_proj")})
    for format in ("kohya", "comfy"):
        refused("transformer of Qwen-Image", qwen.save, tmp_path/"a.safetensors", format, overwrite=True)
    flux.save(tmp_path/"a.safetensors")
    assert trip(Lora({name: pair(1536, 1, 1536)}), tmp_path).layers.keys() == {name}
