"Adapters that are no pair of thin matrices: against peft and against their formulas, from files under every name, worn and taken off."
import json
import math
import warnings

import peft
import pytest
import torch
from helpers_ground import fingerprint
from safetensors.torch import load_file, save_file

from lora_nb import mixing  # noqa: F401 - enters its methods
from lora_nb.composition import compose
from lora_nb.conversion import convert_lora, lora_file_info
from lora_nb.core import FormatError, LoraError, ShapeError
from lora_nb.extraction import resize
from lora_nb.formats import load_lora, save_lora
from lora_nb.injection import apply_lora, extract_lora, inject_lora, remove_lora, set_scale
from lora_nb.kinds import OFT, Difference, InputRotation, Scale
from lora_nb.lora import Factors, Lora
from lora_nb.products import LoKr, ThinPair
from lora_nb.random_pipes import random_pipe
from lora_nb.scheduling import scheduled

torch.manual_seed(0)
Q, CONV, NORM = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in", "conv_norm_out"
FLAT = {p: "lora_unet_" + p.replace(".", "_") for p in (Q, CONV, NORM)}


def rand(*shape): return .1 * torch.randn(*shape)


def close(a, b, eps=1e-5): assert torch.allclose(a.float(), b.float(), atol=eps, rtol=eps), (a - b).abs().max()


def refused(match, f, *args, exc=LoraError, **kw):
    with pytest.raises(exc, match=match): f(*args, **kw)


@pytest.fixture(scope="module")
def sd(): return random_pipe("sd")


@pytest.fixture
def written(tmp_path):
    "Load a file of these tensors"
    def load(tensors, **kw):
        save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path/"w.safetensors")
        return load_lora(tmp_path/"w.safetensors", **kw)
    return load


def kohya_files(unet):
    "kind -> (tensors of a file, name of a parameter -> what it becomes), by formulas written here"
    m = {p: unet.get_submodule(p) for p in (Q, CONV, NORM)}
    w, c, b = m[Q].weight.detach().clone(), m[CONV].weight.detach().clone(), m[CONV].bias.detach().clone()
    (o, n), q, v = w.shape, FLAT[Q], FLAT[CONV]
    a1, b1, a2, b2 = rand(o, 2), rand(2, n), rand(o, 2), rand(2, n)
    k1, k2, up, down, norms, d, db = rand(4, 4), rand(o // 4, n // 4), rand(o, 2), rand(2, n), 1 + rand(1, n).abs(), rand(*c.shape), rand(len(c))
    blocks, g1, g2, g3, g4, s, t = rand(o // 4, 4, 4), rand(n, 2), rand(2, n), rand(o, 2), rand(2, n), rand(n), rand(1, len(c), 1, 1)
    cu, cd, ub, nw, nb = rand(len(c), 2, 1, 1), rand(2, *c.shape[1:]), rand(len(c)), rand(len(m[NORM].weight)), rand(len(m[NORM].weight))
    full, skew = w + up @ down / 4, blocks - blocks.mT
    turn = (torch.eye(4) + skew) @ torch.linalg.inv(torch.eye(4) - skew)
    alpha = torch.tensor(.5)
    return {
        "LoHa": ({f"{q}.hada_w1_a": a1, f"{q}.hada_w1_b": b1, f"{q}.hada_w2_a": a2, f"{q}.hada_w2_b": b2, f"{q}.alpha": alpha},
                 {f"{Q}.weight": w + (a1 @ b1) * (a2 @ b2) / 4}),
        "LoKr": ({f"{q}.lokr_w1": k1, f"{q}.lokr_w2": k2, f"{q}.alpha": alpha}, {f"{Q}.weight": w + torch.kron(k1, k2)}),
        "LoRA with DoRA by inputs": ({f"{q}.lora_up.weight": up, f"{q}.lora_down.weight": down, f"{q}.alpha": alpha, f"{q}.dora_scale": norms},
                                     {f"{Q}.weight": norms * full / full.norm(dim=0, keepdim=True)}),
        "whole difference": ({f"{v}.diff": d, f"{v}.diff_b": db, f"{FLAT[NORM]}.w_norm": nw, f"{FLAT[NORM]}.b_norm": nb},
                             {f"{CONV}.weight": c + d, f"{CONV}.bias": b + db, f"{NORM}.weight": m[NORM].weight.detach() + nw,
                              f"{NORM}.bias": m[NORM].bias.detach() + nb}),
        "OFT": ({f"{q}.oft_blocks": blocks}, {f"{Q}.weight": torch.cat([r.T @ x for r, x in zip(turn, w.split(4))])}),
        "GLoRA": ({f"{q}.a1.weight": g1, f"{q}.a2.weight": g2, f"{q}.b1.weight": g3, f"{q}.b2.weight": g4, f"{q}.alpha": alpha},
                  {f"{Q}.weight": w + (w @ g1 @ g2 + g3 @ g4) / 4}),
        "IA3": ({f"{q}.weight": s, f"{q}.on_input": torch.tensor(True), f"{v}.weight": t, f"{v}.on_input": torch.tensor(0)},
                {f"{Q}.weight": w * (1 + s), f"{CONV}.weight": c * (1 + t.view(-1, 1, 1, 1))}),
        "LoRA": ({f"{v}.lora_up.weight": cu, f"{v}.lora_down.weight": cd, f"{v}.lora_up.bias": ub, f"{v}.lora_down.bias": ub[:2].clone()},
                 {f"{CONV}.weight": c + (cu.flatten(1) @ cd.flatten(1)).view(c.shape), f"{CONV}.bias": b + ub + cu.flatten(1) @ ub[:2]})}


KINDS = ["LoHa", "LoKr", "LoRA with DoRA by inputs", "whole difference", "OFT", "GLoRA", "IA3", "LoRA"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_worn_exactly_and_taken_off(kind, sd, written, tmp_path):
    tensors, wanted = kohya_files(sd.unet)[kind]
    whole, before = fingerprint(sd.unet), {n: p.detach().clone() for n, p in sd.unet.named_parameters()}
    for base in (None, sd):
        lora = written(tensors, base=base)
        assert kind in {f.kind for f in lora.layers.values()}
        apply_lora(sd, lora)
        for n, p in sd.unet.named_parameters(): close(p, wanted.get(n, before[n]), 1e-5 if n in wanted else 0)
        worn = extract_lora(sd)
        assert worn.layers == lora.layers
        set_scale(sd, .5)
        for n, w in wanted.items(): close(sd.unet.get_parameter(n), (before[n] + w) / 2)
        remove_lora(sd)
        assert fingerprint(sd.unet) == whole
        assert lora.report(sd).ok and not any("never trained" in a for a in lora.report(sd).advice)
        save_lora(lora, tmp_path/"again.safetensors", "kohya")
        assert load_lora(tmp_path/"again.safetensors", base=base).layers == lora.layers


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_shown_and_refused_by_name_where_it_cannot_be(kind, sd, written, tmp_path):
    lora = written(kohya_files(sd.unet)[kind][0])
    info = lora_file_info(tmp_path/"w.safetensors")
    assert kind in info.kinds and repr(info) and lora.content_hash() and repr(lora) and lora._repr_markdown_()
    whole = fingerprint(sd.unet)
    if kind in ("LoHa", "LoKr"):
        for mode in ("merge", "inject"):
            apply_lora(sd, lora, mode=mode)
            close(extract_lora(sd).layers[f"unet.{Q}"].delta(), lora.layers[f"unet.{Q}"].delta())
            remove_lora(sd)
        save_lora(lora, tmp_path/"p.safetensors", "peft")
        close(load_lora(tmp_path/"p.safetensors").layers[f"unet.{Q}"].delta(), lora.layers[f"unet.{Q}"].delta())
        close((lora + lora).layers[f"unet.{Q}"].delta(), 2 * lora.layers[f"unet.{Q}"].delta())
        assert resize(lora, rank=1).rank == 1
    else:
        refused("depends on the base|has no branch", apply_lora, sd, lora, mode="inject")
        refused("no pair of thin matrices", save_lora, lora, tmp_path/"p.safetensors", "peft")
        if kind not in ("LoRA", "whole difference"): refused("depend", lambda: lora + lora)
        kept = convert_lora(lora, tmp_path/"p.safetensors", "peft", drop=True) if kind == "LoRA" else None
        assert kept is None or "bias" in " ".join(kept.lost)
    assert fingerprint(sd.unet) == whole


@pytest.mark.parametrize("kind", ["OFT", "LoKr", "LoRA with DoRA by inputs"])
def test_kinds_are_scheduled(kind, sd, written):
    tensors, wanted = kohya_files(sd.unet)[kind]
    lora, whole = written(tensors), fingerprint(sd.unet)
    seen = []
    hook = sd.unet.get_submodule(Q).register_forward_pre_hook(lambda m, a: seen.append(m.weight.detach().clone()))
    with scheduled(sd, {lora: 1.}): sd("a", num_inference_steps=2, output_type="latent", height=16, width=16)
    hook.remove()
    for w in seen[:1]: close(w, wanted[f"{Q}.weight"], 1e-4)
    assert seen and fingerprint(sd.unet) == whole


def test_two_changes_of_one_norm_add_up(sd, written):
    lora = written(kohya_files(sd.unet)["whole difference"][0])
    whole, before = fingerprint(sd.unet), sd.unet.conv_norm_out.weight.detach().clone()
    d = lora.layers["unet.conv_norm_out"].delta()
    apply_lora(sd, lora, name="a"); apply_lora(sd, lora, .5, name="b")
    close(sd.unet.conv_norm_out.weight, before + 1.5 * d)
    remove_lora(sd, "a")
    close(sd.unet.conv_norm_out.weight, before + .5 * d)
    remove_lora(sd)
    assert fingerprint(sd.unet) == whole
    close((lora + lora.scaled(.5)).layers["unet.conv_norm_out"].delta(), 1.5 * d)


def test_norms_and_biases_where_they_cannot_be(sd, written, tmp_path):
    "Methods that compose matrices, schedules and ComfyUI's names refuse them by name; nothing is changed"
    lora, whole = written(kohya_files(sd.unet)["whole difference"][0]), fingerprint(sd.unet)
    pair = Lora({f"unet.{Q}": Factors(rand(16, 2), rand(2, 16))})
    for method in ("svd", "ties", "dare"): refused("norms and biases are no matrices", compose, [lora, pair], [1, 1], method)
    close(compose([lora, pair], [2, 1]).layers[f"unet.{NORM}"].delta(), 2 * lora.layers[f"unet.{NORM}"].delta())
    refused("norms and biases are not scheduled", scheduled(sd, {lora: 1.}).__enter__)
    assert fingerprint(sd.unet) == whole
    for kind in ("whole difference", "IA3"):
        refused("norms and IA3", save_lora, written(kohya_files(sd.unet)[kind][0]), tmp_path/"c.safetensors", "comfy")
        assert not (tmp_path/"c.safetensors").exists()


@pytest.mark.parametrize("path", [Q, CONV, "down_blocks.0.resnets.0.conv1", NORM])
def test_against_lycoris_itself(path, sd, written):
    "Its own modules, filled with random numbers: the file that they make changes the weight as they do"
    pytest.importorskip("lycoris")
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.ia3 import IA3Module
    from lycoris.modules.norms import NormModule
    layer = sd.unet.get_submodule(path)
    ways = [(NormModule, {})] if path == NORM else [
        (GLoRAModule, dict(lora_dim=2, alpha=3.)), (IA3Module, dict(train_on_input=True)), (IA3Module, dict(train_on_input=False)),
        (DiagOFTModule, dict(lora_dim=4, constraint=.01, rescaled=True))]
    for make, how in ways:
        theirs = make("x", layer, **how)
        for p in theirs.parameters(): p.data = p.data + .3 * torch.randn_like(p)
        weight, bias = theirs.get_merged_weight(shape=tuple(layer.weight.shape))
        name = apply_lora(sd, written({f"lora_unet_{path.replace('.', '_')}.{k}": t.detach() for k, t in theirs.state_dict().items()}))
        close(layer.weight, weight.view_as(layer.weight), 2e-5)
        if bias is not None: close(layer.bias, bias)
        remove_lora(sd, name)


# ---- the size of a LoKr

def test_a_full_lokr_stays_as_small_as_its_file(tmp_path):
    sides = {1: (16, 16), 2: (384, 96)}
    w = {f"lycoris_transformer_blocks_{i}_ff_net_0_proj.lokr_w{k}": torch.randn(*s) for i in range(24) for k, s in sides.items()}
    save_file(w, tmp_path/"k.safetensors")
    lora = load_lora(tmp_path/"k.safetensors")
    assert len(lora) == 24 and lora.bytes == sum(t.numel() * 4 for t in w.values())
    assert lora.layers["transformer.transformer_blocks.3.ff.net.0.proj"].shape == (6144, 1536)
    big = Lora({n.replace("proj", f"proj{i}"): f for n, f in lora.layers.items() for i in range(3)})
    assert sum(f.pair_bytes for f in big.layers.values()) > 2 * 2**30
    refused("GB as pairs", lambda: big + big)
    refused("gigabytes as pairs", save_lora, big, tmp_path/"p.safetensors", "peft")
    assert not (tmp_path/"p.safetensors").exists()
    save_lora(lora, tmp_path/"again.safetensors", "kohya")
    assert load_lora(tmp_path/"again.safetensors").layers == lora.layers


def test_stabilitys_fused_matrices_are_cut(written):
    whole = LoKr(dict(lokr_w1=torch.randn(6, 2), lokr_w2=torch.randn(8, 8)), (48, 16))
    fused = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    found = written({f"{fused}.{k}": t for k, t in whole.parts.items()}).layers
    names = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    assert [type(found[n]) for n in names] == [LoKr] * 3
    close(torch.cat([found[n].delta() for n in names]), whole.delta())
    odd = LoKr(dict(lokr_w1=torch.randn(4, 2), lokr_w2=torch.randn(12, 8)), (48, 16))      # blocks that a third cuts through
    found = written({f"{fused}.{k}": t for k, t in odd.parts.items()}).layers
    assert [type(found[n]) for n in names] == [Factors] * 3
    close(torch.cat([found[n].delta() for n in names]), odd.delta())
    refused("belong to all of its rows", written, {f"{fused}.lora_up.weight": rand(48, 2), f"{fused}.lora_down.weight": rand(2, 16),
                                                   f"{fused}.dora_scale": torch.ones(1, 16)})


# ---- peft's names

def peft_file(config, sd, tmp_path, name="adapter_model.safetensors"):
    "Train nothing, but give an adapter of peft's numbers; save it as peft does. Returns what peft's merge makes of the UNet"
    unet = random_pipe("sd").unet
    unet.load_state_dict(sd.unet.state_dict())
    model = peft.get_peft_model(unet, config)
    for n, p in model.named_parameters():
        if p.requires_grad: p.data = (1 if "ia3" in n or "boft_s" in n else 0) + .1 * torch.randn_like(p)
    model.save_pretrained(tmp_path)
    return {n: p.detach().clone() for n, p in model.merge_and_unload().named_parameters()}


@pytest.mark.parametrize("config", [
    peft.LoHaConfig(target_modules=["to_q", "conv1"], r=3, alpha=2), peft.LoHaConfig(target_modules=["conv1"], r=2, use_effective_conv2d=True),
    peft.LoKrConfig(target_modules=["to_q", "conv1"], r=3, alpha=5), peft.LoKrConfig(target_modules=["to_q"], r=64, alpha=16),
    peft.LoKrConfig(target_modules=["to_q", "to_k"], r=2, alpha=4, rank_pattern={"to_k": 3}, alpha_pattern={"to_k": 1}),
    peft.OFTConfig(target_modules=["to_q", "conv_shortcut"], oft_block_size=4, r=0),
    peft.OFTConfig(target_modules=["to_q"], oft_block_size=4, r=0, use_cayley_neumann=False),
    peft.BOFTConfig(target_modules=["to_q"], boft_block_size=4, boft_n_butterfly_factor=2), peft.VeraConfig(target_modules=["to_q", "to_k"], r=4),
    peft.IA3Config(target_modules=["to_q", "to_out.0"], feedforward_modules=["to_q"]),
    peft.LoraConfig(target_modules=["to_out.0"], r=2, lora_alpha=6, lora_bias=True)],
    ids=lambda c: f"{c.peft_type.value}")
def test_what_peft_saves_is_what_peft_merges(config, sd, tmp_path):
    wanted, whole = peft_file(config, sd, tmp_path), fingerprint(sd.unet)
    name = apply_lora(sd, load_lora(tmp_path, base=sd))
    for n, p in sd.unet.named_parameters(): close(p, wanted[n], 1e-5)
    changed = sum(not torch.equal(p, wanted[n]) for n, p in random_pipe("sd").unet.named_parameters())
    assert changed
    remove_lora(sd, name)
    assert fingerprint(sd.unet) == whole


def test_peft_kinds_that_lack_what_explains_them(sd, tmp_path):
    peft_file(peft.OFTConfig(target_modules=["to_q"], oft_block_size=4, r=0), sd, tmp_path)
    (tmp_path/"adapter_config.json").unlink()
    refused("adapter_config.json", load_lora, tmp_path/"adapter_model.safetensors")
    peft_file(peft.VeraConfig(target_modules=["to_q", "to_k"], r=4), sd, tmp_path)
    refused("base=", load_lora, tmp_path)
    peft_file(peft.VeraConfig(target_modules=["to_q", "to_k"], r=4, save_projection=False), sd, tmp_path)
    refused("save_projection=True", load_lora, tmp_path, base=sd)


def test_diffusers_names(written):
    full = f"unet.{Q}"
    lora = written({f"{full}.hada_w1_a": rand(16, 2), f"{full}.hada_w1_b": rand(2, 16), f"{full}.hada_w2_a": rand(16, 2),
                    f"{full}.hada_w2_b": rand(2, 16), f"{full}.alpha": torch.tensor(1.)})
    assert lora.layers[full].kind == "LoHa" and lora.layers[full].strength == .5
    lora = written({f"transformer.transformer_blocks.0.attn.to_out.0.lokr_w{i}": rand(4, 4) for i in (1, 2)})
    assert lora.layers["transformer.transformer_blocks.0.attn.to_out.0"].shape == (16, 16)
    lora = written({f"{full}.lora_A.weight": rand(2, 16), f"{full}.lora_B.weight": rand(16, 2), f"{full}.dora_scale": torch.ones(1, 16)})
    assert lora.layers[full].kind == "LoRA with DoRA by inputs"


# ---- damage

@pytest.mark.parametrize("parts, match", [
    (dict(hada_w1_a=(4, 2), hada_w1_b=(3, 4), hada_w2_a=(4, 2), hada_w2_b=(2, 4)), "do not fit together"),
    (dict(lokr_w1=(2, 2)), "do not fit together"),
    (dict(oft_blocks=(2, 4, 3)), "do not fit together"), (dict(oft_blocks=(4, 4)), "do not fit together"),
    (dict(weight=(4,)), "expected the parts"),
    ({"a1.weight": (4, 2)}, "do not fit together"), (dict(lokr_w1=(700, 700), lokr_w2=(700, 700)), "GB"), (dict(alpha=()), "expected the parts"),
    (dict(diff=(4, 4), hada_w1_a=(4, 2)), "parts of one"), (dict(diff=(4, 4), alpha=(2,)), "one number")])
def test_parts_that_are_no_module(parts, match, written):
    refused(match, written, {f"{FLAT[Q]}.{k}": torch.ones(s) for k, s in parts.items()}, exc=(FormatError, ShapeError))


def test_a_change_for_another_base(sd, written):
    for t in ({f"{FLAT[Q]}.oft_blocks": rand(3, 4, 4)}, {f"{FLAT[Q]}.diff": rand(4, 4)}, {f"{FLAT[NORM]}.w_norm": rand(5)},
              {f"{FLAT[Q]}.weight": rand(5), f"{FLAT[Q]}.on_input": torch.tensor(1)}):
        refused("differ in size", written, t, base=sd)
        whole = fingerprint(sd.unet)
        refused("another shape", apply_lora, sd, written(t))
        assert fingerprint(sd.unet) == whole
    refused("not in this base", written, {f"{FLAT[Q]}.diff_b": rand(16)}, base=sd)                # to_q has no bias
    assert not Lora({f"unet.{Q}": OFT(dict(oft_blocks=rand(3, 4, 4)), (12, 0))}).report(sd).ok


def test_numbers_that_are_no_numbers(written):
    refused("NaN", written, {"lora_unet_conv_in.diff": torch.full((4, 4, 3, 3), math.nan)})
    refused("NaN", Lora({"unet.conv_in": Difference(dict(diff=torch.tensor([math.inf])), (1,))}).check)


def test_an_oft_with_a_bound():
    w, q = torch.randn(8, 3), torch.randn(2, 4, 4)
    free, tight = (OFT(dict(oft_blocks=q, alpha=torch.tensor(a)), (8, 0)) for a in (0., .01))
    skew = q - q.mT
    skew = skew * (.01 * 8 / skew.norm())
    turn = (torch.eye(4) + skew) @ torch.linalg.inv(torch.eye(4) - skew)
    close(w + tight.delta(w), torch.cat([r.T @ x for r, x in zip(turn, w.split(4))]))
    assert free.delta(w).norm() > 5 * tight.delta(w).norm()


def test_equal_and_moved():
    a = LoKr(dict(lokr_w1=rand(2, 2), lokr_w2=rand(3, 3)), (6, 6))
    assert a == LoKr(dict(a.parts), (6, 6)) and a != a.scaled(2.) and a != Factors(rand(6, 1), rand(1, 6)) and a.scaled(1) is a
    assert a.to(dtype=torch.float16).dtype == torch.float16 and a.to("cpu") == a
    pair = {"lora_up.weight": rand(4, 1), "lora_down.weight": rand(1, 4)}
    for f in (Scale(dict(weight=rand(4)), (4, 0)), ThinPair(pair, (4, 4), magnitude=torch.ones(1, 4)),
              InputRotation(dict(rotation=rand(4, 4)), (0, 4))):
        refused("cannot be scaled", f.scaled, 2.)
        refused("depends on the base", f.delta)
        refused("depends on the base", getattr, f, "up")


# ---- keys without a place

def test_unknown_keys_are_left_out_on_request_and_listed(written, tmp_path):
    pair = {"lora_unet_conv_in.lora_up.weight": rand(16, 1, 1, 1), "lora_unet_conv_in.lora_down.weight": rand(1, 4, 3, 3)}
    strange = {"lora_unet_conv_in.rank_mask": rand(1), "optimizer.step": rand(1)}
    refused("2 keys have no known place", written, pair | strange)
    out = []
    lora = written(pair | strange, left_out=out)
    assert sorted(out) == sorted(strange) and list(lora.layers) == ["unet.conv_in"]
    refused("no known", written, {"lora_unet_conv_in.rank_mask": rand(1)}, left_out=[])
    save_file(pair | strange, tmp_path/"w.safetensors")
    done = convert_lora(tmp_path/"w.safetensors", tmp_path/"p.safetensors", drop=True)
    assert "rank_mask" in " ".join(done.lost) and len(load_file(tmp_path/"p.safetensors")) == 2
    out = []
    peft_pair = {f"unet.{Q}.lora_A.weight": rand(1, 16), f"unet.{Q}.lora_B.weight": rand(16, 1), "unet.step": rand(1)}
    lora = written(peft_pair, left_out=out)
    assert len(lora) == 1 and out == ["unet.step"]
    assert lora.metadata["left_out"] == "1 keys of the file it was read from: unet.step" and "unet.step" in lora._repr_markdown_()
    lora.save(tmp_path/"rest.safetensors")
    assert "left_out" in repr(lora_file_info(tmp_path/"rest.safetensors"))


def test_a_config_beside_the_file(tmp_path):
    (tmp_path/"adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": 2, "alpha": 1}))
    full = f"base_model.model.{Q}"
    save_file({f"{full}.hada_{k}": rand(*s) for k, s in dict(w1_a=(16, 2), w1_b=(2, 16), w2_a=(16, 2), w2_b=(2, 16)).items()},
              tmp_path/"adapter_model.safetensors")
    assert load_lora(tmp_path/"adapter_model.safetensors").layers[f"unet.{Q}"].strength == .5


# ---- precisions that cannot compute

@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_factors_in_float8(dtype, sd, tmp_path):
    g = torch.Generator().manual_seed(0)
    small = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    lora = Lora({f"unet.{Q}": Factors(small(16, 3), small(3, 16), 1.5), "unet.conv_in": Factors(small(16, 2, 1, 1), small(2, 4, 3, 3)),
                 f"unet.{Q.replace('to_q', 'to_k')}": LoKr(dict(lokr_w1=small(4, 4), lokr_w2=small(4, 4)), (16, 16))})
    wide, whole = lora.to(dtype=torch.float32), fingerprint(sd.unet)
    assert lora == lora.to("cpu") and lora.check() is lora and lora.norms() == wide.norms() and lora.content_hash() != wide.content_hash()
    for mode in ("merge", "inject"):
        apply_lora(sd, lora, mode=mode)
        for n, f in extract_lora(sd).layers.items(): close(f.delta(), wide.layers[n].delta(), 1e-4)
        remove_lora(sd)
    assert fingerprint(sd.unet) == whole
    for format in ("peft", "kohya"):
        save_lora(lora, tmp_path/"f.safetensors", format)
        assert repr(lora_file_info(tmp_path/"f.safetensors"))
        back = load_lora(tmp_path/"f.safetensors", base=sd)
        for n, f in back.layers.items():
            close(f.delta(), wide.layers[n].delta(), 1e-4)
            assert f.dtype == dtype or format == "peft"
    small_one = resize(lora, rank=1)
    assert small_one.layers["unet.conv_in"].dtype == torch.float16           # new numbers, not rounded to eight bits
    close(small_one.layers["unet.conv_in"].delta(), resize(wide, rank=1).layers["unet.conv_in"].delta(), 1e-2)
    close((lora + lora).layers[f"unet.{Q}"].delta(), 2 * wide.layers[f"unet.{Q}"].delta(), 1e-4)
    assert lora.report(sd).ok


def test_a_base_in_float8(sd):
    base = random_pipe("sd")
    base.unet.get_submodule(Q).to(torch.float8_e4m3fn)
    whole, w = fingerprint(base.unet), base.unet.get_submodule(Q).weight.detach().clone()
    lora = Lora({f"unet.{Q}": Factors(torch.randn(16, 2), torch.randn(2, 16))})
    with pytest.warns(UserWarning, match="1 weights .* stored in float8: a merge is rounded"): apply_lora(base, lora)
    merged = base.unet.get_submodule(Q).weight
    want = (w.float() + lora.layers[f"unet.{Q}"].delta()).to(torch.float8_e4m3fn)
    assert merged.dtype == want.dtype and torch.equal(merged.float(), want.float())
    assert lora.report(base).ok
    remove_lora(base)
    with warnings.catch_warnings(action="error"):
        apply_lora(base, lora, mode="inject")
        assert base.unet.get_submodule(Q).lora_up.weight.dtype == torch.float32
        remove_lora(base)
        apply_lora(base, lora, requantize=True)
    remove_lora(base)
    assert fingerprint(base.unet) == whole


def test_a_base_in_whole_numbers_is_not_rounded(sd):
    base = random_pipe("sd")
    layer = base.unet.get_submodule(Q)
    layer.weight.requires_grad_(False)
    layer.weight.data = (layer.weight.data * 100).to(torch.int8)
    lora, whole = Lora({f"unet.{Q}": Factors(.1 * torch.randn(16, 2), torch.randn(2, 16))}), fingerprint(base.unet)
    refused("int8", apply_lora, base, lora)
    refused("int8", apply_lora, base, Lora({f"unet.{Q}": LoKr(dict(lokr_w1=rand(4, 4), lokr_w2=rand(4, 4)), (16, 16))}))
    assert fingerprint(base.unet) == whole
    apply_lora(base, lora, mode="inject")
    close(base.unet.get_submodule(Q).lora_up.weight, lora.layers[f"unet.{Q}"].up, 0)             # not rounded to zeros
    remove_lora(base)
    assert fingerprint(base.unet) == whole
    refused("whole numbers", inject_lora, base, {"unet": [Q]}, init="pissa", rank=2)
    assert fingerprint(base.unet) == whole


# Strengths that a file does not show

WHOLE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"

def whole_lokr(path, alpha, header=None, w2=(4, 4), stem=WHOLE):
    from safetensors.torch import save_file
    g = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(2, 2, generator=g), torch.randn(*w2, generator=g)
    save_file({f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2} | ({} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}), path, header)
    return w1, w2

@pytest.mark.parametrize("alpha, header, strength", [
    (16., dict(ss_network_dim="16", ss_network_alpha="1"), 1.), (16., dict(ss_network_args='{"algo": "lokr"}'), 1.), (None, None, 1.),
    (64., dict(ss_network_dim="16", ss_network_args='{"rs_lora": "True"}'), 4.),        # LyCORIS 3: alpha * r / sqrt(r)
    (16., dict(ss_network_dim="16", ss_network_args='{"rs_lora": "True"}'), 4.),        # before: alpha
    (64., dict(ss_network_dim="16"), 4.)])
def test_the_strength_of_a_lokr_with_whole_sides(tmp_path, alpha, header, strength):
    w1, w2 = whole_lokr(tmp_path / "a.safetensors", alpha, header)
    with warnings.catch_warnings(action="error"): lora = Lora.load(tmp_path / "a.safetensors")
    (f,) = lora.layers.values()
    assert torch.allclose(f.delta(), strength * torch.kron(w1, w2)) and f.strength == strength
    for kind in ("kohya", "peft"):                                   # it stays so in whatever we write
        lora.save(tmp_path / "b.safetensors", format=kind, overwrite=True)
        with warnings.catch_warnings(action="error"): again = Lora.load(tmp_path / "b.safetensors")
        assert torch.allclose(next(iter(again.layers.values())).delta(), f.delta(), atol=1e-5)

def test_convolutions_of_a_whole_lokr_have_a_rank_of_their_own(tmp_path):
    header = dict(ss_network_dim="16", ss_network_args='{"rs_lora": "True", "conv_dim": "9"}')
    w1, w2 = whole_lokr(tmp_path / "a.safetensors", 27., header, (4, 4, 3, 3), "lora_unet_mid_block_resnets_0_conv1")
    (f,) = Lora.load(tmp_path / "a.safetensors").layers.values()
    assert f.strength == 3

@pytest.mark.parametrize("header", [None, dict(ss_network_dim="Dynamic"), dict(ss_network_args='{"rs_lora": "True"}')])
def test_an_unknown_strength_of_a_whole_lokr_is_reported(tmp_path, header):
    w1, w2 = whole_lokr(tmp_path / "a.safetensors", 64., header)
    with pytest.warns(UserWarning, match=r"1 LoKr modules .*alpha \(64\).*strength 1, as LyCORIS"): lora = Lora.load(tmp_path / "a.safetensors")
    assert torch.allclose(next(iter(lora.layers.values())).delta(), torch.kron(w1, w2))
