import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers_files import small_lora
from hypothesis import HealthCheck, given, settings, strategies as st

from lora_nb.core import FormatError, LoraError
from lora_nb.formats import FORMATS, Format, format_of, load_lora, read_file, save_lora
from lora_nb.lora import Factors, Lora
from lora_nb.peft_files import base_layers, fold_alpha
from lora_nb.random_pipes import random_pipe

PIPE = random_pipe("sd")
SHAPES = {n: tuple(m.weight.shape) for n, m in base_layers(PIPE).items() if min(m.weight.shape[:2]) >= 4}


def refused(match, f, *args, exc=LoraError, **kw):
    with pytest.raises(exc, match=match): f(*args, **kw)


@st.composite
def loras(draw):
    "LoRAs of a few layers, of any rank, alpha and type, with words and metadata"
    dtype, dora = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])), draw(st.booleans())
    g, layers = torch.Generator().manual_seed(draw(st.integers(0, 99))), {}
    for n in sorted(draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=5))):
        r, w = draw(st.integers(1, 4)), SHAPES[n]
        up, down = torch.randn(w[0], r, *(1,)*(len(w)-2), generator=g), torch.randn(r, *w[1:], generator=g)
        alpha = draw(st.sampled_from([None, 1., float(r), r / 8, 3.]))
        layers[n] = Factors(up.to(dtype), down.to(dtype), alpha, torch.rand(w[0], generator=g) if dora else None)
    words = draw(st.sets(st.sampled_from(["<a>", "é b"])))
    return Lora(layers, {t: {"text_encoder": torch.randn(1, 32, generator=g)} for t in words}, {"trigger": draw(st.text(max_size=9))})


def equal(a, b):
    "Names, words and differences are the same; so are the bits where alpha/r is a power of two"
    exact = lambda f: f.alpha is None or (fold_alpha(f)[1] is not None and f.up.dtype != torch.float16)
    if all(map(exact, a.layers.values())): return a == b
    delta = lambda f: replace(f, magnitude=None).delta()
    close = all(torch.allclose(delta(f), delta(b.layers[n]), rtol=.02, atol=.02) for n, f in a.layers.items())
    return close and set(a.layers) == set(b.layers) and a.metadata == b.metadata


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(loras())
def test_peft_round_trips(tmp_path, lora):
    path = tmp_path/"h.safetensors"
    save_lora(lora, path)
    back = load_lora(path, base=PIPE)
    assert equal(lora, back)
    save_lora(back, path)                                     # a second trip changes nothing
    assert load_lora(path) == back


def test_damaged_files_say_so(tmp_path):
    save_lora(small_lora(), tmp_path/"good.safetensors")
    good, path = (tmp_path/"good.safetensors").read_bytes(), tmp_path/"bad.safetensors"
    def bad(match, data):
        path.write_bytes(data)
        refused(match, load_lora, path)
    flipped = bytearray(good); flipped[-5] ^= 0x10
    bad("checksum|NaN", bytes(flipped))
    bad("NaN", safetensors.torch.save({k: t.fill_(float("nan")) for k, t in read_file(tmp_path/"good.safetensors")[0].items()}))
    bad("twice", good[:8] + good[8:].replace(b'"unet.conv_in.lora_B.weight"', b'"unet.conv_in.lora_A.weight"', 1))
    bad("cut short", (1 << 60).to_bytes(8, "little") + good[8:])
    bad("no known place", safetensors.torch.save({"lora_unet_x.lora_down.weight": torch.ones(1, 2)}))
    bad("do not fit together", safetensors.torch.save({"unet.conv_in.hada_w1_a": torch.ones(1, 2)}))
    bad("whole model", safetensors.torch.save({"model.diffusion_model.x.weight": torch.ones(1, 2)}))
    bad("no known format", safetensors.torch.save({"a.weight": torch.ones(1, 2)}))
    bad("holds no tensors", safetensors.torch.save({}))
    bad("should be a JSON object", safetensors.torch.save({"unet.conv_in.lora_A.weight": torch.ones(1, 2), "unet.conv_in.lora_B.weight":
                                                     torch.ones(2, 1)}, {"lora_adapter_metadata": "[1]"}))


def test_the_checksum_can_be_ignored(tmp_path):
    lora, path = small_lora(), tmp_path/"a.safetensors"
    save_lora(lora, path)
    data = bytearray(path.read_bytes()); data[-5] ^= 1
    path.write_bytes(data)
    refused("verify=False", load_lora, path)
    other = load_lora(path, verify=False)
    assert set(other.layers) == set(lora.layers) and other != lora


def test_pickles(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path/'ran'}",)
    torch.save([Evil()], tmp_path/"evil.pt")
    refused("holds code", load_lora, tmp_path/"evil.pt")
    assert not (tmp_path/"ran").exists()
    torch.save(3, tmp_path/"number.pt")
    refused("holds a int", load_lora, tmp_path/"number.pt")
    torch.save([1, 2], tmp_path/"list.pt")
    refused("should be tensors", load_lora, tmp_path/"list.pt")
    torch.save({"state_dict": {"<w>": torch.ones(8)}}, tmp_path/"nested.ckpt")
    assert [*load_lora(tmp_path/"nested.ckpt").embeddings] == ["<w>"]


def test_wishes_that_cannot_be_met(tmp_path):
    refused("expected one of", save_lora, small_lora(), tmp_path/"x.safetensors", "webp")
    refused("cannot write 'checkpoint'", save_lora, small_lora(), tmp_path/"x.safetensors", "checkpoint")
    refused("end in .safetensors", save_lora, small_lora(), tmp_path/"x.pt")
    refused("end in .pt", save_lora, small_lora(), tmp_path/"x.safetensors", "a1111")
    nan = Lora({"unet.conv_in": Factors(torch.full((4, 1), float("nan")), torch.ones(1, 4), None)})
    refused("NaN", save_lora, nan, tmp_path/"x.safetensors")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    save_lora(small_lora(), tmp_path/"mascot.safetensors")
    for place in (tmp_path/"mascot.safetensors"/"x.safetensors", Path("/proc/none/x.safetensors")):
        refused("x.safetensors", save_lora, small_lora(), place)


@pytest.mark.parametrize("error", [OSError("No space left on device"), safetensors.SafetensorError("broken")])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path/"mascot.safetensors"
    save_lora(small_lora(), path)
    def full(*args): raise error
    monkeypatch.setattr("safetensors.torch.save_file", full)
    refused("unchanged", save_lora, small_lora(1), path)
    assert os.listdir(tmp_path) == [path.name] and load_lora(path) == small_lora()


def test_casting_on_the_way(tmp_path):
    save_lora(small_lora(), tmp_path/"half.safetensors", dtype=torch.float16)
    back = load_lora(tmp_path/"half.safetensors")
    assert {t.dtype for t in back.tensors} == {torch.float16}


def test_a_lora_on_views_and_gradients_can_be_saved(tmp_path):
    up = torch.randn(4, 8, requires_grad=True).T
    save_lora(Lora({"unet.conv_in": Factors(up, torch.randn(4, 3))}), tmp_path/"a.safetensors")
    assert load_lora(tmp_path/"a.safetensors").layers["unet.conv_in"].up.equal(up)


def test_a_new_format_is_one_entry(tmp_path, monkeypatch):
    knows = lambda tensors, metadata: metadata.get("made_by") == "me"
    read = lambda tensors, metadata, base: Lora({"unet.conv_in": Factors(tensors["u.weight"], tensors["d.weight"])})
    monkeypatch.setitem(FORMATS, "mine", Format(knows, read))
    safetensors.torch.save_file({"u.weight": torch.ones(8, 1), "d.weight": torch.ones(1, 4)}, tmp_path/"m.safetensors", {"made_by": "me"})
    assert format_of({}, {"made_by": "me"}) == "mine" and len(load_lora(tmp_path/"m.safetensors")) == 1
    refused("cannot write 'mine'", save_lora, small_lora(), tmp_path/"x.safetensors", "mine", exc=FormatError)


def test_what_others_noted_keeps_its_place(tmp_path):
    "ss_*, modelspec.* and the like stand at the top level, whatever the trip"
    about = {"ss_tag_frequency": '{"10_cat": {"cat": 9}}', "modelspec.title": "Néon \U0001f431", "ss_network_dim": "2", "sshs_model_hash": "ab",
             "software": "x", "trigger": "<neon>", "base": "random", "recipe": "{}"}
    theirs = {k: v for k, v in about.items() if k != "sshs_model_hash"}                # a hash of other bytes
    names = "unet.conv_in", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layers = {n: Factors(torch.randn(4, 2), torch.randn(2, 4)) for n in names}
    for first in ("peft", "kohya", "comfy"):
        save_lora(Lora(layers, metadata=about), tmp_path/"a.safetensors", first)
        for second in ("peft", "kohya", "comfy"):
            save_lora(load_lora(tmp_path/"a.safetensors"), tmp_path/"b.safetensors", second)
            metadata = read_file(tmp_path/"b.safetensors")[1]
            assert {k: metadata.get(k) for k in theirs} == theirs
            assert "sshs_model_hash" not in metadata
            assert load_lora(tmp_path/"b.safetensors").metadata == about


def test_a_foreign_files_metadata_survives_conversion(tmp_path):
    te = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{te}.lora_up.weight": torch.randn(8, 2), f"{te}.lora_down.weight": torch.randn(2, 8)}
    about = {"ss_output_name": "cat", "ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    safetensors.torch.save_file(tensors, tmp_path/"a.safetensors", about)
    lora = load_lora(tmp_path/"a.safetensors")
    for format in ("peft", "kohya", "comfy", "kohya"):
        save_lora(lora, tmp_path/"b.safetensors", format)
        assert about.items() <= read_file(tmp_path/"b.safetensors")[1].items()      # what the file says wins over what we would guess
        lora = load_lora(tmp_path/"b.safetensors")
        assert lora.metadata == about


@pytest.mark.parametrize("key, value", [("format", "x"), ("lora_nb", "y"), ("adapter_config", "{}"), ("unet:0:rank", "3"), ("", "empty"),
                                        ("lone", "\ud800"), ("\ud800", "lone"), ("nested", '{"content_hash": "0", "a": 1}'), ("line", "a\nb\0")])
def test_metadata_that_has_no_place_at_the_top_stays_in_the_note(tmp_path, key, value):
    lora = Lora(small_lora().layers, metadata={key: value, "ss_x": "1"})
    for format in ("peft", "kohya", "comfy"):
        save_lora(lora, tmp_path/"m.safetensors", format)
        assert load_lora(tmp_path/"m.safetensors").metadata == lora.metadata


def peft_folder(model, folder, targets=("to_q", "q_proj"), **kw):
    "What peft leaves when it saves an adapter of a model; the adapter has random factors"
    import peft
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=list(targets), **kw))
    for n, p in wrapped.named_parameters():
        if "lora_" in n: torch.nn.init.normal_(p)
    wrapped.save_pretrained(folder)
    return {n.split(".default")[0].removeprefix("base_model.model."): p.detach().clone() for n, p in wrapped.named_parameters() if "lora_" in n}


def spelled(parts, component): # our names of peft's modules
    return {f"{component}.{n.rsplit('.lora_', 1)[0].removeprefix('text_model.')}" for n in parts}


@pytest.fixture
def peft_pipes(): return {f: random_pipe(f) for f in ("sdxl", "sd3")}


def test_a_folder_for_each_component(tmp_path, peft_pipes):
    "unet/, text_encoder/ and text_encoder_2/ are one LoRA, each with its own alpha"
    pipe, names = peft_pipes["sdxl"], set()
    for c in ("unet", "text_encoder", "text_encoder_2"): names |= spelled(peft_folder(getattr(pipe, c), tmp_path/c), c)
    lora = load_lora(tmp_path)
    assert set(lora.layers) == names and {f.scaling for f in lora.layers.values()} == {4.}
    alone = load_lora(tmp_path/"text_encoder_2")
    assert {n.split(".")[0] for n in alone.layers} == {"text_encoder_2"} and {f.scaling for f in alone.layers.values()} == {4.}
    from lora_nb.conversion import lora_file_info
    info = lora_file_info(tmp_path)
    assert sum(info.components.values()) == len(names) and info.size == sum(p.stat().st_size for p in tmp_path.glob("*/*.safetensors"))


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_a_peft_folder_of_an_sd3_transformer(end, tmp_path, peft_pipes):
    "proj_out and norm_out have no block before them"
    parts = peft_folder(peft_pipes["sd3"].transformer, tmp_path, ("to_q", "proj_out", "norm_out.linear", "context_embedder"))
    if end == "bin":
        torch.save(safetensors.torch.load_file(tmp_path/"adapter_model.safetensors"), tmp_path/"adapter_model.bin")
        (tmp_path/"adapter_model.safetensors").unlink()
    lora = load_lora(tmp_path)
    assert set(lora.layers) == spelled(parts, "transformer") and {"transformer.proj_out", "transformer.norm_out.linear"} <= set(lora.layers)
    assert {f.scaling for f in lora.layers.values()} == {4.}
    for n, f in lora.layers.items(): assert f.up.equal(parts[f"{n.removeprefix('transformer.')}.lora_B"])


def layer(key, n=8): return {f"{key}.lora_A.weight": torch.ones(2, n), f"{key}.lora_B.weight": torch.ones(n, 2)}


@pytest.mark.parametrize("key, name", [
    ("transformer.base_model.model.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q"),
    ("unet.base_model.model.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_in"),
    ("base_model.model.unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_in"),
    ("text_encoder_2.base_model.model.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.encoder.layers.0.mlp.fc1"),
    ("module.base_model.model.norm_out.linear", "transformer.norm_out.linear"), ("base_model.model.proj_out", "transformer.proj_out"),
    ("base_model.model.encoder.block.0.layer.0.SelfAttention.q", "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"),
    ("base_model.model.single_transformer_blocks.0.proj_mlp", "transformer.single_transformer_blocks.0.proj_mlp")])
def test_prefixes(key, name, tmp_path):
    safetensors.torch.save_file(layer(key), tmp_path/"p.safetensors")
    assert list(load_lora(tmp_path/"p.safetensors").layers) == [name]


@pytest.mark.parametrize("folder, key, width, config, component", [
    ("text_encoder_2", "text_model.encoder.layers.0.self_attn.q_proj", 32, "", "text_encoder_2"),
    ("text_encoder_2/final", "text_model.encoder.layers.0.self_attn.q_proj", 32, "", "text_encoder_2"),
    ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q", 8, "", "text_encoder_2"),                     # FLUX's T5
    ("lora", "text_model.encoder.layers.0.self_attn.q_proj", 1280, "", "text_encoder_2"),
    ("lora", "text_model.encoder.layers.0.self_attn.q_proj", 768, "CLIPTextModelWithProjection", "text_encoder"),
    ("text_encoder", "down_blocks.0.attentions.0.proj_in", 8, "", "unet"),                                      # the path knows better
    ("lora", "blocks.0.attn1.to_q", 8, "WanTransformer3DModel", "transformer"),
    ("transformer", "blocks.0.attn1.to_q", 8, "", "transformer")])
def test_which_component_an_adapter_is_for(folder, key, width, config, component, tmp_path):
    (tmp_path/folder).mkdir(parents=True)
    safetensors.torch.save_file(layer(f"base_model.model.{key}", width), tmp_path/folder/"adapter_model.safetensors")
    (tmp_path/folder/"adapter_config.json").write_text('{"auto_mapping": {"base_model_class": "%s"}, "r": 2, "lora_alpha": 2}' % config)
    assert list(load_lora(tmp_path/folder).layers) == [f"{component}.{key.removeprefix('text_model.')}"]


@pytest.mark.parametrize("wrapped", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "unet.module.{}", "unet._orig_mod.base_model.model.{}",
                                     "base_model.model._orig_mod.{}", "_fsdp_wrapped_module.{}", "diffusion_model._orig_mod.{}"])
def test_wrappers_of_torch_are_no_part_of_a_name(wrapped, tmp_path):
    path = "middle_block.1.proj_in" if "diffusion" in wrapped else "mid_block.attentions.0.proj_in"
    safetensors.torch.save_file(layer(wrapped.format(path)), tmp_path/"a.safetensors")
    assert [*load_lora(tmp_path/"a.safetensors").layers] == ["unet.mid_block.attentions.0.proj_in"]
    save_lora(small_lora(), tmp_path/"a.safetensors")                       # a LoRA may replace it
    safetensors.torch.save_file(layer("unet.module.conv_in") | layer("unet.conv_in"), tmp_path/"b.safetensors")
    refused("with and without its wrapper", load_lora, tmp_path/"b.safetensors", exc=FormatError)


@pytest.mark.parametrize("spelt", ["{}", "{}_lora", "lora_{}"])
def test_folders_named_for_what_they_hold(spelt, tmp_path):
    for component, key in {"unet": "mid_block.attentions.0.proj_in", "text_encoder_2": "encoder.layers.0.mlp.fc1"}.items():
        (tmp_path/spelt.format(component)).mkdir()
        safetensors.torch.save_file(layer(f"base_model.model.{key}"), tmp_path/spelt.format(component)/"adapter_model.safetensors")
        (tmp_path/spelt.format(component)/"adapter_config.json").write_text('{"r": 2, "lora_alpha": 6}')
    lora = load_lora(tmp_path)
    assert {n: f.alpha for n, f in lora.layers.items()} == {"unet.mid_block.attentions.0.proj_in": 6.,
                                                            "text_encoder_2.encoder.layers.0.mlp.fc1": 6.}


@pytest.mark.parametrize("key", ["diffusion_model.middle_block.1.proj_in.oft_R.weight", "lora_unet.middle_block.1.proj_in.boft_R",
                                 "unet.mid_block.attentions.0.proj_in.hra_u", "transformer.transformer_blocks.0.attn.to_q.on_input"])
def test_adapters_of_other_kinds_are_refused_by_name(key, tmp_path):
    safetensors.torch.save_file({key: torch.ones(2, 28)}, tmp_path/"a.safetensors")
    refused("another kind, (OFT|BOFT|hra|IA3) ", load_lora, tmp_path/"a.safetensors", exc=FormatError)


def test_a_component_that_nobody_names_is_an_error(tmp_path):
    safetensors.torch.save_file(layer("base_model.model.blocks.0.attn1.to_q"), tmp_path/"adapter_model.safetensors")
    refused("no known", load_lora, tmp_path)


def test_folders_of_bins(tmp_path):
    torch.save(layer("unet.mid_block.attentions.0.proj_in"), tmp_path/"any.bin")
    assert len(load_lora(tmp_path)) == 1
    torch.save(layer("unet.mid_block.attentions.0.proj_out"), tmp_path/"pytorch_lora_weights.bin")
    assert list(load_lora(tmp_path).layers) == ["unet.mid_block.attentions.0.proj_out"]
    (tmp_path/"empty").mkdir()
    refused("expected one", load_lora, tmp_path/"empty")


FULL = {"folder/": None, "base.safetensors": {"model.diffusion_model.out.2.bias": torch.ones(4)},
        "vae.safetensors": {"encoder.conv_in.weight": torch.ones(4, 3, 3, 3)},
        "text.safetensors": b"a letter", "link.safetensors": "link"}


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("format", ["peft", "kohya", "textual_inversion"])
def test_whatever_is_no_lora_is_never_replaced(tmp_path, name, format):
    path, held = tmp_path/name, FULL[name]
    if held is None: path.mkdir(); (path/"x").touch(); path = path.with_suffix(".safetensors"); (tmp_path/"folder").rename(path)
    elif held == "link": safetensors.torch.save_file(FULL["vae.safetensors"], tmp_path/"real"); path.symlink_to("real")
    elif isinstance(held, bytes): path.write_bytes(held)
    else: safetensors.torch.save_file(held, path)
    state = lambda: {p: p.is_dir() or p.read_bytes() for p in tmp_path.rglob("*")}
    kept, lora = state(), Lora({}, {"<w>": {"text_encoder": torch.ones(1, 4)}}) if format == "textual_inversion" else small_lora()
    refused("nothing was written", save_lora, lora, path, format)
    assert state() == kept
    if path.is_dir(): return
    save_lora(lora, path, format, overwrite=True)
    assert load_lora(path) == lora


def test_a_lora_replaces_a_lora_of_any_format(tmp_path):
    one = Lora({}, {"<w>": {"text_encoder": torch.ones(1, 4)}})
    for format, lora in (("peft", small_lora()), ("kohya", small_lora(1)), ("peft", small_lora(2))):
        save_lora(lora, tmp_path/"a.safetensors", format)
        assert load_lora(tmp_path/"a.safetensors") == lora
    for name in ("a.pt", "a.bin"):
        for _ in range(2): save_lora(one, tmp_path/name, "a1111")
    (tmp_path/"empty.safetensors").touch(); save_lora(one, tmp_path/"empty.safetensors", "textual_inversion")


@pytest.mark.parametrize("format, name", [("textual_inversion", "w.safetensors"), ("peft", "w.safetensors"), ("a1111", "w.pt"),
                                          ("a1111", "w.bin")])
def test_words_and_layers_do_not_replace_each_other(format, name, tmp_path):
    word, both = Lora({}, {"<w>": {"text_encoder": torch.ones(1, 4)}}), small_lora()
    layers = Lora(both.layers)
    save_lora(word, tmp_path/name, format)
    save_lora(word, tmp_path/name, format)
    if name.endswith(".safetensors"):
        kept = (tmp_path/name).read_bytes()
        refused("nothing was written", save_lora, layers, tmp_path/name)
        assert (tmp_path/name).read_bytes() == kept
        save_lora(both, tmp_path/name)                                      # what has words and layers replaces either
        save_lora(layers, tmp_path/name)
        refused("is not a file of words", save_lora, word, tmp_path/name, format)
        assert load_lora(tmp_path/name) == layers
        save_lora(word, tmp_path/name, format, overwrite=True)
    assert load_lora(tmp_path/name) == word


def test_a_pt_family_replaces_its_own_files_only(tmp_path):
    from lora_nb.positional import positional_slots, skeleton
    walk = positional_slots(skeleton("text_encoder", "SD1"), {"CLIPAttention"})
    family = lambda seed: Lora({f"text_encoder.{p}": Factors(torch.full((m.weight.shape[0], 1), float(seed)), torch.ones(1, m.weight.shape[1]))
                                for p, m in walk.items()}, {"<w>": {"text_encoder": torch.ones(1, 4)}})
    for seed in (1, 2): save_lora(family(seed), tmp_path/"a.pt", "pt")
    assert load_lora(tmp_path/"a.pt") == family(2)
    (tmp_path/"b.json").write_text('{"a": "setting of mine"}')
    refused("b.json exists", save_lora, family(1), tmp_path/"b.pt", "pt")
    torch.save({"state_dict": {"model.diffusion_model.out.2.bias": torch.ones(4)}}, tmp_path/"c.ckpt")
    refused("c.ckpt exists", save_lora, Lora({}, {"<w>": {"text_encoder": torch.ones(1, 4)}}), tmp_path/"c.ckpt", "a1111")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.pt", "a.text_encoder.pt", "a.ti.pt", "b.json", "c.ckpt"]


def test_a_pt_family_survives_a_kill_between_its_files(tmp_path):
    "Each time a process dies at another of its renames; the next reader finds one LoRA, whole"
    from lora_nb.positional import positional_slots, skeleton
    walk = positional_slots(skeleton("text_encoder", "SD1"), {"CLIPAttention"})
    family = lambda seed: Lora({f"text_encoder.{p}": Factors(torch.full((m.weight.shape[0], 1), float(seed)), torch.ones(1, m.weight.shape[1]))
                                for p, m in walk.items()}, {"<w>": {"text_encoder": torch.ones(1, 4)}})
    seen = []
    for step in range(1, 12):
        save_lora(family(0), tmp_path/"a.pt", "pt")
        if not (child := os.fork()):
            real, left = os.replace, [step]
            def replace(*args):
                left[0] -= 1
                if not left[0]: os._exit(9)
                real(*args)
            os.replace = replace
            save_lora(family(step), tmp_path/"a.pt", "pt"); os._exit(0)
        status = os.waitpid(child, 0)[1]
        back = load_lora(tmp_path/"a.pt")
        seen.append("new" if back == family(step) else "old")
        assert back in (family(0), family(step)) and not list(tmp_path.glob(".writing*"))
        if status == 0: break
    assert status == 0 and seen == sorted(seen, reverse=True) and {*seen} == {"old", "new"} and len(seen) > 4


@pytest.mark.parametrize("format", ["peft", "kohya", "pt", "a1111"])
def test_every_writer_names_a_full_disk(tmp_path, format):
    import resource
    lora = Lora({}, {"<w>": {"text_encoder": torch.ones(1, 4000)}}) if format == "a1111" else small_lora()
    if format == "pt": lora = Lora({}, {"<w>": {"text_encoder": torch.ones(1, 4000)}})
    was, path = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path/f"a{FORMATS[format].ends[0]}"
    save_lora(lora, path, format)
    kept = {p: p.read_bytes() for p in tmp_path.iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, was[1]))
    try: refused("cannot write .*unchanged", save_lora, lora, path, format)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == kept
