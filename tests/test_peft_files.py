import json, re, time, warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers_files import TO_Q, random_lora
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from lora_nb.core import FormatError, ShapeError, TargetError
from lora_nb.formats import read_file
from lora_nb.injection import apply_lora, inject_lora, remove_lora
from lora_nb.lora import Factors, Lora
from lora_nb.peft_files import (config_alpha, fit_base, fits_pattern, fold_alpha, group_parts, peft_faults, read_peft, refuse, split_key,
                                to_factors)
from lora_nb.random_pipes import random_pipe


def refused(match, f, *args, exc=FormatError, **kw):
    with pytest.raises(exc, match=match): f(*args, **kw)


def close(a, b, eps=1e-4): assert torch.allclose(a, b, atol=eps, rtol=eps), (a - b).abs().max()


@pytest.fixture(scope="module")
def pipe():
    pipe = random_pipe("sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    g = torch.Generator().manual_seed(1)
    return pipe("a mascot", num_inference_steps=2, guidance_scale=1., output_type="pt", generator=g).images[0]


def test_spellings():
    attn = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert split_key(f"unet.{attn}.processor.to_out_lora.up.weight") == (f"unet.{attn}.to_out.0", "up")
    assert split_key(f"unet.{attn}.to_q.lora_magnitude_vector.default.weight") == (f"unet.{attn}.to_q", "magnitude")
    assert split_key(f"unet.{attn}.to_q.lora.alpha") == (f"unet.{attn}.to_q", "alpha")
    assert split_key("first_stage_model.decoder.conv_in.weight") is None
    assert split_key("") is None and split_key("unet.conv_in.weight") is None


def test_parts_that_do_not_fit():
    refused("alpha has shape", to_factors, "m", dict(up=torch.ones(4, 1), down=torch.ones(1, 4), alpha=torch.ones(2)), exc=ShapeError)
    refused("magnitude has shape", to_factors, "m", dict(up=torch.ones(4, 1), down=torch.ones(1, 4), magnitude=torch.ones(3)), exc=ShapeError)
    refused("floating-point", to_factors, "m", dict(up=torch.ones(4, 1).int(), down=torch.ones(1, 4)))
    refused(r"expected \(out, r\)", to_factors, "m", dict(up=torch.ones(4, 0), down=torch.ones(0, 4)), exc=ShapeError)
    refused("no up", to_factors, "m", dict(down=torch.ones(1, 4)))
    refused("two tensors", group_parts, {"unet.a.lora_A.weight": 0, "unet.a.lora.down.weight": 0})


def test_the_configuration_of_peft_gives_alpha():
    name, up, down = "transformer.transformer_blocks.0.attn.to_q", torch.randn(16, 4), torch.randn(4, 16)
    config = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": ["to_q"], "transformer.alpha_pattern": {}}
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    for alpha, extra in ((8, {}), (2, {"transformer.alpha_pattern": {"attn.to_q": 2}}), (16, {"transformer.use_rslora": True})):
        lora = read_peft(tensors, {"lora_adapter_metadata": json.dumps(config | extra)})
        close(lora.layers[name].delta(), up @ down * alpha / 4, 1e-5)
    refused("not JSON", read_peft, tensors, {"lora_adapter_metadata": "{"})
    assert config_alpha({}, "x", 4) is None and config_alpha({"r": 4}, "x", 4) is None


@pytest.mark.parametrize("alpha", [None, 1., 2., 3., .1, 0., -2.])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_folded_alpha(alpha, dtype):
    torch.manual_seed(0)
    f = Factors(torch.randn(6, 4).to(dtype), torch.randn(4, 5).to(dtype), alpha)
    up, kept = fold_alpha(f)
    close(Factors(up, f.down).delta(), f.delta(), 2e-2 if dtype != torch.float32 else 1e-6)
    assert kept == (alpha if alpha in (1., 2.) else None)


def fill(model, targets, **kw):
    "Give a model peft's layers with random numbers; returns what diffusers would save"
    model.add_adapter(LoraConfig(target_modules=targets, **kw))
    for n, p in model.named_parameters():
        if "lora_B" in n: nn.init.normal_(p, std=.3)
    return get_peft_model_state_dict(model, adapter_name="default"), model.peft_config["default"].to_dict()


@pytest.mark.parametrize("kw", [dict(use_dora=True), dict(lora_alpha=8, use_rslora=True), dict(lora_alpha=6, alpha_pattern={"attn1.to_q": 1})])
def test_what_peft_draws_we_draw(pipe, tmp_path, kw):
    torch.manual_seed(5)
    state = {}
    for c, targets in dict(unet=["to_q", "to_v", "conv1", "ff.net.0.proj"], text_encoder=["q_proj", "out_proj"]).items():
        state[f"{c}_lora_layers"], state[f"{c}_lora_adapter_metadata"] = fill(getattr(pipe, c), targets, r=4, **{"lora_alpha": 4, **kw})
    pipe.save_lora_weights(tmp_path, **state)
    theirs = draw(pipe)
    pipe.unload_lora_weights()
    for _ in range(2):                            # as peft wrote it, and after one trip through our writer
        back = Lora.load(tmp_path, base=pipe)
        apply_lora(pipe, back)
        close(draw(pipe), theirs)
        remove_lora(pipe)
        back.save(tmp_path/"pytorch_lora_weights.safetensors")
    pipe.load_lora_weights(tmp_path)
    close(draw(pipe), theirs)
    pipe.unload_lora_weights()


def test_a_folder_of_peft_alone(tmp_path):
    pipe = random_pipe("sd")
    wrapped = get_peft_model(pipe.unet, LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    want = wrapped.base_model.model.get_submodule(TO_Q.removeprefix("unet.")).get_delta_weight("default")
    close(Lora.load(tmp_path, base=random_pipe("sd")).layers[TO_Q].delta(), want, 1e-5)


def test_sd3_in_plain_diffusers(tmp_path):
    pipe = random_pipe("sd3")
    net = pipe.transformer
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, net.config.in_channels, 8, 8, generator=g)
    c, p = torch.randn(1, 3, net.config.joint_attention_dim, generator=g), torch.randn(1, net.config.pooled_projection_dim, generator=g)
    run = lambda: net(x, encoder_hidden_states=c, pooled_projections=p, timestep=torch.tensor([500.]), return_dict=False)[0].detach()
    bare = run()
    lora = random_lora(pipe, lambda n: n.startswith("transformer.") and ".attn" in n)
    lora.map(lambda f: Factors(f.up * .3, f.down, f.alpha)).save(tmp_path/"a.safetensors")
    apply_lora(pipe, Lora.load(tmp_path/"a.safetensors", base=pipe)); ours = run(); remove_lora(pipe)
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors"); theirs = run(); pipe.unload_lora_weights()
    close(ours, theirs, 1e-3)
    assert run().equal(bare) and (ours - bare).abs().max() > .01
    layers, config = fill(net, ["to_q", "add_k_proj", "to_out.0"], r=4, lora_alpha=6)
    theirs = run()
    pipe.save_lora_weights(tmp_path/"b", transformer_lora_layers=layers, transformer_lora_adapter_metadata=config)
    pipe.unload_lora_weights()
    apply_lora(pipe, Lora.load(tmp_path/"b", base=pipe))
    close(run(), theirs, 1e-3)
    remove_lora(pipe)


def test_what_peft_cannot_hold():
    mixed = Lora({n: Factors(torch.ones(4, 1), torch.ones(1, 4), None, m) for n, m in (("unet.a", torch.ones(4)), ("unet.b", None))})
    refused("DoRA in only some layers", refuse, "peft", peft_faults(mixed))
    grouped = Lora({"unet.conv_in": Factors(torch.ones(4, 2, 1, 1), torch.ones(2, 2, 1, 1), None, groups=2)})
    refused("grouped", refuse, "peft", peft_faults(grouped))
    mid = Lora({"unet.conv_in": Factors(torch.ones(4, 2, 1, 1), torch.ones(2, 2, 1, 1), mid=torch.ones(2, 2, 3, 3))})
    refused("middle factor", refuse, "peft", peft_faults(mid))


def test_held_against_a_base(pipe):
    proj = "unet.down_blocks.0.attentions.0.proj_in"
    square = Factors(torch.randn(16, 2), torch.randn(2, 16))
    fitted = fit_base(Lora({proj: square}), pipe).layers[proj]
    assert fitted.shape == (16, 16, 1, 1) and fitted.delta().flatten(1).equal(square.delta())
    refused("is for SDXL", fit_base, Lora({proj: Factors(torch.ones(8, 1), torch.ones(1, 8))}, metadata={"base": "SDXL"}), pipe, exc=ShapeError)
    refused("1 of 1 modules are not in this base", fit_base, Lora({"unet.x": square}), pipe, exc=TargetError)
    with pytest.raises(ShapeError):                                    # a 3x3 convolution has no linear form
        fit_base(Lora({"unet.conv_in": Factors(torch.ones(16, 1), torch.ones(1, 4))}), pipe)


def test_groups_come_from_the_base():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    lora = Lora({"unet.0": Factors(torch.randn(8, 2, 1, 1), torch.randn(2, 2, 3, 3))})
    assert fit_base(lora, {"unet": model}).layers["unet.0"].groups == 2


def test_an_adapter_config_counts_whatever_the_file_is_called(tmp_path):
    tensors = {f"{TO_Q}.lora_A.weight": torch.ones(2, 4), f"{TO_Q}.lora_B.weight": torch.ones(4, 2)}
    (tmp_path/"adapter_config.json").write_text('{"lora_alpha": 8, "r": 2}')
    for name in ("adapter_model", "renamed"):
        save_file(tensors, tmp_path/f"{name}.safetensors")
        torch.save(tensors, tmp_path/f"{name}.bin")
        for end in ("safetensors", "bin"):
            f = Lora.load(tmp_path/f"{name}.{end}").layers[TO_Q]
            assert f.scaling == 4 and f.delta().equal(torch.full((4, 4), 8.))
    (tmp_path/"adapter_config.json").write_text('{"lora_alpha": 8, "r": 4}')
    refused("configuration of another file", Lora.load, tmp_path/"renamed.safetensors")
    small = Lora({TO_Q: Factors(torch.ones(16, 2), torch.ones(2, 16))})
    small.save(tmp_path/"ours.safetensors")                                 # our own note counts
    assert Lora.load(tmp_path/"ours.safetensors") == small


ALPHA_8 = [{"lora_alpha": "8"}, {"lora_alpha": "8", "r": "2"}, {"unet.lora_alpha": "8", "unet.r": "2"}, {"lora_alpha": "8.0"},
           {"lora_adapter_metadata": '{"unet.lora_alpha": 8}'}, {"lora_adapter_metadata": '{"unet": {"r": 2, "lora_alpha": 8}}'},
           {"lora_adapter_metadata": '{"r": 2, "lora_alpha": 8}'}, {"lora_config": '{"r": 2, "lora_alpha": 8}'},
           {"config": '{"default": {"r": 2, "lora_alpha": 8, "target_modules": ["to_q"]}}'},
           {"peft": '{"unet": {"lora_alpha": 8}, "text_encoder": {"lora_alpha": 1}}'},
           {"network_alpha": "8"}, {"lora_network_alpha": "8.0"}, {"rank": "2", "alpha": "8"}, {"network_dim": "2", "network_alpha": "8"},
           {"unet.network_alpha": "8"}, {"unet.rank": "2", "unet.alpha": "8"}, {"lora_rank": "2", "lora_alpha": "8"}]


@pytest.mark.parametrize("header", ALPHA_8, ids=str)
def test_alpha_is_found_wherever_the_header_has_it(tmp_path, header):
    save_file({f"{TO_Q}.lora_A.weight": torch.ones(2, 4), f"{TO_Q}.lora_B.weight": torch.ones(4, 2)}, tmp_path/"a.safetensors", header)
    assert Lora.load(tmp_path/"a.safetensors").layers[TO_Q].scaling == 4
    save_file({f"{TO_Q}.lora_A.weight": torch.ones(2, 4), f"{TO_Q}.lora_B.weight": torch.ones(4, 2), f"{TO_Q}.alpha": torch.tensor(1.)},
              tmp_path/"b.safetensors", header)
    assert Lora.load(tmp_path/"b.safetensors").layers[TO_Q].scaling == .5     # a tensor of the file counts most


def test_what_a_header_says_that_is_no_configuration():
    tensors = {f"{TO_Q}.lora_A.weight": torch.ones(2, 4), f"{TO_Q}.lora_B.weight": torch.ones(4, 2)}
    for header in ({"r": "16"}, {"note": "lora_alpha"}, {"ss_network_alpha": "1"}, {"config": '{"rank": 4}'}, {"use_rslora": "True"},
                   {"alpha": "8"}, {"rank": "2"}, {"rank": "2", "alpha": "None"}, {"text_encoder.network_alpha": "8"},
                   {"about": '{"rank": 2, "alpha": 8}'}):                # whose alpha that is nobody says
        assert read_peft(tensors, header).layers[TO_Q].scaling == 1
    assert read_peft(tensors, {"lora_alpha": "8", "use_rslora": "True"}).layers[TO_Q].scaling == pytest.approx(8 / 2**.5)
    for header in ({"lora_alpha": "nan"}, {"lora_alpha": "much"}, {"lora_adapter_metadata": "[]"}, {"c": '{"lora_alpha": 1e999}'},
                   {"c": '{"lora_alpha"'}, {"rank": "16", "alpha": "8"},
                   {"adapter_config": "3"}, {"adapter_config": "[" * 100_000}, {"lora_alpha": "8", "alpha_pattern": "3"}):
        with pytest.raises(FormatError): read_peft(tensors, header)


@pytest.mark.parametrize("config", [{"use_qalora": True}, {"alora_invocation_tokens": [1]}, {"layer_replication": [[0, 1]]}, {"use_bdlora": True},
                                    {"peft_type": "ADALORA"}, {"peft_type": "XLORA"}], ids=str)
def test_a_configuration_that_makes_something_else_of_the_factors_is_refused(config, tmp_path):
    save_file({f"{TO_Q}.lora_A.weight": torch.ones(2, 4), f"{TO_Q}.lora_B.weight": torch.ones(4, 2)}, tmp_path/"adapter_model.safetensors")
    for extra in (config, {k: False if v is True else None for k, v in config.items()}):
        (tmp_path/"adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8, "peft_type": "LORA", **extra}))
        if extra is config: refused("not read", Lora.load, tmp_path)
        else: assert Lora.load(tmp_path).layers[TO_Q].alpha == 8


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "OFTConfig", "IA3Config", "VeraConfig", "HRAConfig", "FourierFTConfig",
                                  "RandLoraConfig", "AdaLoraConfig"])
def test_every_kind_of_peft_is_exact_or_refused_by_name(kind, tmp_path):
    "The weights that peft itself merges are the judge"
    import copy
    import peft
    sd, targets = random_pipe("sd"), ["to_q", "to_v", "ff.net.2"]
    options = {"LoHaConfig": dict(r=4, alpha=2), "LoKrConfig": dict(r=4, alpha=2), "OFTConfig": dict(oft_block_size=8),
               "IA3Config": dict(feedforward_modules=["ff.net.2"]), "VeraConfig": dict(r=4), "FourierFTConfig": dict(n_frequency=10),
               "AdaLoraConfig": dict(init_r=4, target_r=2, total_step=10)}
    if kind == "VeraConfig": targets = ["to_q"]                             # which want layers of one size
    model = peft.get_peft_model(copy.deepcopy(sd.unet), getattr(peft, kind)(target_modules=targets, **options.get(kind, {})))
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad: p.data += torch.randn_like(p) * .1
    model.save_pretrained(tmp_path)
    if kind in ("HRAConfig", "FourierFTConfig", "RandLoraConfig", "AdaLoraConfig"):
        return refused(f"(?i)another kind, {kind.removesuffix('Config')} ", Lora.load, tmp_path, base=sd)
    want = model.merge_and_unload().state_dict()
    apply_lora(sd, Lora.load(tmp_path, base=sd), mode="merge")
    for k, t in sd.unet.state_dict().items(): close(t, want[k], 1e-5)


def folder_of_peft(tmp_path, model, steps=0, **kw):
    "Train a wrapped model a little, save its folder, and return what its layers are then"
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules=["0", "2"], **kw))
    for p in model.parameters():
        if p.requires_grad and steps: p.data += .1 * torch.randn_like(p)
    model.save_pretrained(tmp_path)
    return [m.weight.detach().clone() for m in model.merge_and_unload() if isinstance(m, nn.Linear)]


def small_model(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10)).to(dtype)


def of_unet(tensors): return {k.replace("base_model.model.", "unet."): t for k, t in tensors.items()}


def merged(tmp_path, dtype=torch.float32):
    "Our layers after a merge of the folder into the plain base"
    model = small_model(dtype)
    tensors, metadata = read_file(tmp_path)
    lora = fit_base(read_peft(of_unet(tensors), metadata, {"unet": model}), {"unet": model})
    return [m.weight.detach().float() + lora.layers[f"unet.{i}"].delta(m.weight) for i, m in enumerate(model) if i != 1]


@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA"])
@pytest.mark.parametrize("kw", [dict(lora_alpha=4), dict(lora_alpha=6), dict(lora_alpha=6, use_rslora=True), dict(lora_alpha=4, use_dora=True),
                                dict(lora_alpha=8, rank_pattern={"2": 2}, alpha_pattern={"2": 3})], ids=str)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_method_that_changed_the_base_is_corrected(tmp_path, init, kw, steps):
    want = folder_of_peft(tmp_path, small_model(), steps, r=4, init_lora_weights=init, **kw)
    for a, b, plain in zip(merged(tmp_path), want, small_model()[::2]):
        close(a, b)
        assert steps or (kw.get("use_dora") and init != "pissa") or torch.allclose(a, plain.weight, atol=1e-4)   # untrained: nothing changes


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "pissa_niter_4", "something new"])
def test_a_method_whose_start_is_lost_is_refused(tmp_path, init):
    folder_of_peft(tmp_path, small_model(), 1, r=4)
    config = json.loads((tmp_path/"adapter_config.json").read_text())
    (tmp_path/"adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": init}))
    refused(f"{init}.*changes the base", merged, tmp_path)
    tensors = of_unet(read_file(tmp_path)[0])
    refused(f"{init}.*changes the base", read_peft, tensors, {"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": init})})
    for start in ("pissa", "olora"):
        refused("give the base", read_peft, tensors, {"init_lora_weights": start})
    (tmp_path/"adapter_config.json").write_text(json.dumps({**config, "kasa_config": {"beta": 1}}))
    refused("kasa.*changes the base", merged, tmp_path)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_a_method_that_left_the_base_alone(tmp_path, init):
    want = folder_of_peft(tmp_path, small_model(), 1, r=4, lora_alpha=6, init_lora_weights=init if init != "eva" else True)
    config = json.loads((tmp_path/"adapter_config.json").read_text())
    (tmp_path/"adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": init}))
    for a, b in zip(merged(tmp_path), want): close(a, b)


def test_pissa_by_path(tmp_path):
    pipe = random_pipe("sd")
    wrapped = get_peft_model(pipe.unet, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="pissa"))
    wrapped.save_pretrained(tmp_path)
    pipe = random_pipe("sd")
    lora = Lora.load(tmp_path, base=pipe)
    bare = draw(pipe)
    apply_lora(pipe, lora)
    close(draw(pipe), bare)                                                   # untrained
    refused("give the base", Lora.load, tmp_path)
    lora.save(tmp_path/"plain.safetensors")                                   # now an ordinary LoRA
    assert Lora.load(tmp_path/"plain.safetensors").rank == 4


PATTERNS = ["to_q", "attn1.to_q", "^down", "^down_blocks.0.attn1.to_q", ".*to_q", r"down_blocks\.\d+\.attn1.*", "to_(q|k)", "a|to_q", "(?:to_)?q",
            "[a-z]+_[qk]", "to_q$", "attn[12].to_.", "x*", "", ".", "to_[^q]", r"\w+", "blocks.0", "(attn1|attn2)\\.to_q", "to_q{1}", "t{0,1}o_q",
            "_q", r"[\]a]o_q", "attn1,to_q", "(.*)", "down.*?q", "t?o?_?q?", "(a|(b|to_q))", "a{2,3}b", "(aa?){3}b"]
PATHS = ["down_blocks.0.attn1.to_q", "to_q", "attn1xto_q", "down_blocks.12.attn2.to_k", "proj_in", "x.ato_q", "aab", "x.aaab", "aaaaaab", "ab"]


def test_patterns_mean_what_peft_means():
    for pattern in PATTERNS:
        for path in PATHS:
            want = bool(re.match(rf"(.*\.)?({pattern})$", path))
            assert fits_pattern(pattern, path) == want, (pattern, path)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*)*x", "(a*)*b", "((a+)+)+b", ".*.*.*.*.*.*.*.*x", "(a|aa)+b", "a{0,900}a{0,900}b",
                                     "(" * 30 + "a" + ")*" * 30])
def test_patterns_cannot_hang(pattern):
    start = time.process_time()
    fits_pattern(pattern, "blocks." + "a" * 80)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("pattern", ["(", "a)", "*a", "[a", "a**", "(?=a)", r"(a)\1", "(?i)a", "(" * 5000, "\\", "+", "{2}", r"a\b", "[z-a]+"])
def test_patterns_that_are_refused_by_name(pattern):
    tensors = {f"{TO_Q}.lora_A.weight": torch.ones(2, 4), f"{TO_Q}.lora_B.weight": torch.ones(4, 2)}
    refused("cannot be read", read_peft, tensors, {"adapter_config": json.dumps({"lora_alpha": 8, "alpha_pattern": {pattern: 2}})})


def test_many_patterns_are_quick_and_the_first_counts():
    paths = [f"down_blocks.{i}.attentions.{j}.attn1.to_q" for i in range(20) for j in range(20)]
    patterns = {p: i for i, p in enumerate(paths)}
    start = time.process_time()
    assert [config_alpha({"alpha_pattern": patterns}, p, 4) for p in paths] == list(range(400))
    assert time.process_time() - start < 5
    assert config_alpha({"alpha_pattern": {"to_q": 2, paths[0]: 4}}, paths[0], 4) == 2      # as in peft
    both = {"text_model.encoder.layers.0.q": 3, "^encoder.layers.1.q": 5}                   # transformers 4 and 5
    assert [config_alpha({"alpha_pattern": both}, f"encoder.layers.{i}.q", 4) for i in (0, 1)] == [3, 5]


@pytest.mark.parametrize("mixed", [True, False])
def test_ranks_come_back(tmp_path, mixed):
    lora = Lora({f"unet.a.{i}": Factors(torch.randn(6, r).half(), torch.randn(r, 5).half(), a) for i, (r, a) in enumerate(
        [(4, None), (1, 1.), (2, .5), (3, 7.)] if mixed else [(4, 2.), (4, 2.)])}, {"<w>": {"text_encoder": torch.ones(1, 3)}}, {"ranks": "x"})
    for pad in (True, False):
        lora.save(tmp_path/"a.safetensors", pad=pad)
        back = Lora.load(tmp_path/"a.safetensors")
        assert back.ranks == lora.ranks and back.metadata == lora.metadata
        for n, f in lora.layers.items(): close(back.layers[n].delta(), f.delta(), 1e-2)
        Lora.load(tmp_path/"a.safetensors").save(tmp_path/"b.safetensors", pad=pad)
        assert Lora.load(tmp_path/"b.safetensors") == back                    # a second trip changes nothing


def test_a_pipeline_that_wears_adapters_of_diffusers(tmp_path):
    pipe = random_pipe("sd")
    lora = random_lora(pipe, lambda n: "attn1.to_q" in n)
    lora.save(tmp_path/"a.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="mascot")
    for wear in (lambda: Lora.load(tmp_path/"a.safetensors", base=pipe), lambda: apply_lora(pipe, lora), lambda: apply_lora(pipe.unet, lora),
                 lambda: inject_lora(pipe)):
        refused(r"wear an adapter.*mascot.*unload_lora_weights", wear, exc=TargetError)
    pipe.unload_lora_weights()
    apply_lora(pipe, Lora.load(tmp_path/"a.safetensors", base=pipe))
    remove_lora(pipe)
    wrapped = get_peft_model(pipe.unet, LoraConfig(r=2, target_modules=["to_q"]))
    refused("wear an adapter.*default", apply_lora, {"unet": wrapped.base_model.model}, lora, exc=TargetError)


# An alpha in the header that is not applied

@pytest.mark.parametrize("header, says", [
    (dict(ss_network_alpha="2", ss_network_dim="8"), r"ss_network_alpha = 2, .*converters multiply it.*too strong, .*scale=0.25"),
    (dict(ss_network_alpha="16", ss_network_dim="8"), r"too weak, .*scale=2"), (dict(alpha="2"), r"alpha = 2, .*of which rank.*scale=0.5"),
    ({"unet.alpha": "8"}, r"unet.alpha = 8, .*scale=2"), (dict(ss_network_alpha="8", ss_network_dim="8"), None), (dict(alpha="4"), None),
    (dict(ss_network_alpha="None"), None), (dict(alpha="2", rank="4"), None), (dict(lora_alpha="2", r="4", ss_network_alpha="1"), None)])
def test_an_alpha_of_the_header_is_applied_or_reported(tmp_path, header, says):
    from safetensors.torch import save_file
    up, down = torch.randn(6, 4), torch.randn(4, 5)
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down}, tmp_path / "a.safetensors", header)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always"); lora = Lora.load(tmp_path / "a.safetensors")
    assert len(said) == (says is not None) and (not said or re.search(says, str(said[0].message)))
    (f,) = lora.layers.values()
    assert torch.allclose(f.delta(), up @ down * (.5 if {"rank", "r"} & header.keys() else 1), atol=1e-5)

def test_alphas_beside_the_factors_count_and_the_header_does_not(tmp_path):
    from safetensors.torch import save_file
    up, down = torch.randn(6, 4), torch.randn(4, 5)
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down, f"{key}.alpha": torch.tensor(2.)}
    save_file(tensors, tmp_path / "a.safetensors", dict(ss_network_alpha="1", ss_network_dim="4"))
    with warnings.catch_warnings(action="error"): (f,) = Lora.load(tmp_path / "a.safetensors").layers.values()
    assert torch.allclose(f.delta(), up @ down / 2, atol=1e-5)
