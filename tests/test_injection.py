import pytest
import torch
from torch import nn
from helpers_ground import fingerprint, look, random_lora, tiny_clip, tiny_mmdit, tiny_pipe, tiny_unet

from lora_nb.core import LoraError
from lora_nb.injection import (apply_lora, disabled, extract_lora, find_targets, inject_lora, remove_lora, set_scale)
from lora_nb.lora import Lora
from lora_nb.names import stream_of
from lora_nb.worn import branches

close = lambda a, b, eps=1e-5: torch.allclose(a, b, atol=eps, rtol=eps)


def test_targets_match_whole_words():
    blocks = nn.Module(); blocks.transformer_blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))
    assert list(find_targets(blocks, ["transformer_blocks.1"])) == ["transformer_blocks.1"]
    assert list(find_targets(blocks, ["unet.transformer_blocks.11"])) == ["transformer_blocks.11"]


@pytest.mark.parametrize("targets", [lambda n, m: False, []])
def test_targets_that_match_nothing(targets):
    unet = tiny_unet(); before = fingerprint(unet)
    with pytest.raises(ValueError, match="match no linear"): find_targets(unet, targets)
    assert fingerprint(unet) == before


def test_half_precision_base_trains_in_single_precision():
    worn = inject_lora(tiny_unet().half())
    assert {p.dtype for p in worn.params()} == {torch.float32}


def test_two_in_training_at_once():
    unet = tiny_unet(); before = fingerprint(unet)
    a, b = inject_lora(unet, ["attn1"], name="a"), inject_lora(unet, ["attn2"], name="b")
    assert all(p.requires_grad for p in a.params() + b.params())
    a.remove()
    assert not unet.conv_in.weight.requires_grad
    b.remove()
    assert fingerprint(unet) == before


def test_a_name_is_worn_once():
    unet = tiny_unet(); before = fingerprint(unet)
    inject_lora(unet)
    with pytest.raises(ValueError, match="'default' already"): inject_lora(unet)
    remove_lora(unet)
    assert fingerprint(unet) == before


def test_load_needs_the_same_layers_ranks_and_sizes():
    unet = tiny_unet(); taught = random_lora(unet, rank=4)
    with pytest.raises(ValueError, match="differ in"): inject_lora(unet).load(Lora())
    remove_lora(unet)
    with pytest.raises(ValueError, match="has rank 2 here and 4"): inject_lora(unet, rank=2).load(taught)
    remove_lora(unet)
    n, f = next(iter(taught.layers.items()))
    wide = Lora({**taught.layers, n: type(f)(torch.ones(99, 4), torch.ones(4, 77))})
    with pytest.raises(ValueError, match="another base"): inject_lora(unet).load(wide)


@pytest.mark.parametrize("options", [dict(dora=True), dict(rslora=True, alpha=2), dict(init="kaiming"), dict(init="pissa"),
                                     dict(dropout=.3)], ids=str)
def test_every_option_goes_the_whole_round(options):
    unet = tiny_unet(); before, fresh = fingerprint(unet), look(unet)
    worn = inject_lora(unet, "extended", rank=4, **options)
    assert close(look(unet), fresh, 1e-4)
    for p in worn.params(): p.data += torch.randn_like(p) * .1
    want, value = look(unet), worn.lora()
    worn.remove()
    assert fingerprint(unet) == before and not close(want, fresh, 1e-3)
    for mode in ("inject", "merge"):
        apply_lora(unet, value, mode=mode)
        assert close(look(unet), want, 1e-4)
        remove_lora(unet)
    assert fingerprint(unet) == before


@pytest.mark.parametrize("options", [dict(dora=True), dict(init="kaiming"), dict(rslora=True, alpha=2)], ids=str)
def test_load_restores_what_was_learned(options):
    unet = tiny_unet()
    worn = inject_lora(unet, "extended", rank=4, **options)
    for p in worn.params(): p.data += torch.randn_like(p) * .1
    want, value = look(unet), worn.lora()
    worn.remove()
    again = inject_lora(unet, "extended", rank=4, **options)
    again.load(value)
    assert close(look(unet), want)


def test_block_scales_of_a_unet():
    unet = tiny_unet(); apply_lora(unet, random_lora(unet, "extended"), mode="inject")
    set_scale(unet, {"down_blocks": 0, "down_blocks.1": .5, "mid_block": 2})
    for n, stack in branches(unet).items():
        want = .5 if "down_blocks.1." in n else 0 if "down_blocks" in n else 2 if "mid_block" in n else 1
        assert stack[0].scale == want
    set_scale(unet, 1.)
    with pytest.raises(ValueError, match="match no layer"): set_scale(unet, {"down_blocks": 0, "down_blocks.17": 1})
    assert {stack[0].scale for stack in branches(unet).values()} == {1.}


def test_block_scales_of_an_mmdit():
    mmdit = tiny_mmdit(12, attention_head_dim=4, num_attention_heads=1)
    worn = inject_lora(mmdit, "feed-forward", rank=1)
    set_scale(mmdit, {"transformer_blocks.1": .5, "B03-11": .25, "B4": 3, "text": 0, "B11.text": 2})
    for n, m in worn.layers.items():
        i, s = int(n.split(".")[2]), stream_of(n)
        assert m.scale == (2 if i == 11 and s == "text" else 3 if i == 4 else .25 if i >= 3 else .5 if i == 1 else
                           0 if s == "text" else 1)
    with pytest.raises(ValueError, match="match no layer"): set_scale(mmdit, {"B12": 0})
    worn.remove()
    only = inject_lora(mmdit, ["B10-11.picture"], rank=1)
    assert {(n.split(".")[2], stream_of(n)) for n in only.layers} == {("10", "picture"), ("11", "picture")}


def test_scales_find_what_came_later_and_not_what_went():
    unet = tiny_unet(); before = fingerprint(unet); other = random_lora(unet, "extended")
    scales = lambda name=None: {m.scale for stack in branches(unet, name).values() for m in stack}
    apply_lora(unet, other, mode="inject")
    set_scale(unet, 1.)
    apply_lora(unet, other, mode="inject", name="late")
    set_scale(unet, .25, "late")
    assert (scales("late"), scales("lora")) == ({.25}, {1.})
    remove_lora(unet, "lora")
    set_scale(unet, .75)
    assert scales() == {.75}
    remove_lora(unet)
    assert fingerprint(unet) == before


def test_words_of_several_loras():
    pipe = tiny_pipe(); tokenizer = pipe.tokenizer
    state = lambda: (fingerprint(pipe.unet), fingerprint(pipe.text_encoder), tokenizer.get_vocab(),
                     pipe.text_encoder.config.vocab_size)
    start, vectors = state(), torch.randn(2, 24)
    wordy = Lora(random_lora(pipe.unet).layers, {"<octopus>": {"text_encoder": vectors}})
    one = Lora(embeddings={"<one>": {"text_encoder": torch.randn(24)}})
    apply_lora(pipe, one, name="one"); apply_lora(pipe, wordy, name="two")
    with pytest.raises(ValueError, match="rename_token"): apply_lora(pipe, wordy, name="three")
    remove_lora(pipe, "one")
    assert "<one>" not in tokenizer.get_vocab() and "<octopus>_1" in tokenizer.get_vocab()
    ids = tokenizer.convert_tokens_to_ids(["<octopus>", "<octopus>_1"])
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], vectors)
    remove_lora(pipe)
    assert state() == start
    assert tokenizer("a <octopus>").input_ids == tiny_clip()[1]("a <octopus>").input_ids


@pytest.mark.parametrize("component, width, says", [("text_encoder", 768, "vectors of 768 numbers"),
                                                    ("text_encoder_2", 24, "learned for text_encoder_2")])
def test_words_without_a_place(component, width, says):
    pipe = tiny_pipe(); vocabulary = pipe.tokenizer.get_vocab()
    with pytest.raises(ValueError, match=says): apply_lora(pipe, Lora(embeddings={"<x>": {component: torch.randn(1, width)}}))
    assert pipe.tokenizer.get_vocab() == vocabulary


def test_a_bare_model_has_no_vocabulary():
    with pytest.raises(ValueError, match="holds nothing for unet"):
        apply_lora(tiny_unet(), Lora(embeddings={"<one>": {"text_encoder": torch.randn(24)}}))


@pytest.mark.parametrize("target", ["attention", "extended", "all-linear", "picture", "text@0", "joint-attention", "details"])
def test_an_mmdit_wears_and_takes_off(target):
    mmdit = tiny_mmdit()
    def answer():
        g = torch.Generator().manual_seed(0); r = lambda *s: torch.randn(*s, generator=g)
        with torch.no_grad(): return mmdit(r(1, 4, 8, 8), r(1, 5, 16), r(1, 16), torch.tensor([3.])).sample
    was, said = fingerprint(mmdit), answer()
    wanted = {f"transformer.{n}" for n in find_targets(mmdit, target)}
    worn = inject_lora(mmdit, target, rank=2)
    assert set(worn.layers) == wanted and torch.equal(answer(), said)
    for p in worn.params(): p.data.normal_(std=.2)
    want, value = answer(), worn.lora()
    worn.remove()
    assert not torch.equal(want, said) and value.components == ["transformer"]
    for mode in ("merge", "inject"):
        apply_lora(mmdit, value, mode=mode)
        assert close(answer(), want, 1e-4)
        remove_lora(mmdit)
    assert fingerprint(mmdit) == was


def test_attention_includes_the_second_attention():
    assert len([n for n in find_targets(tiny_mmdit()) if "attn2" in n]) == 4


@pytest.mark.parametrize("target, says", [("attention@22-24", "numbers from 0 to 1"),
                                          ("attention@detials", "Did you mean 'details'")])
def test_blocks_that_are_not_there(target, says):
    with pytest.raises(ValueError, match=says): find_targets(tiny_mmdit(), target)


@pytest.mark.parametrize("target, says", [("details", "names blocks of an MMDiT"), ("picture", "match no linear")])
def test_a_unet_has_no_streams(target, says):
    with pytest.raises(ValueError, match=says): find_targets(tiny_unet(), target)


def test_text_encoders_of_transformers_4_and_5():
    text_encoder, _ = tiny_clip(); before = fingerprint(text_encoder)
    old = nn.Module(); old.__class__ = type("CLIPTextModel", (nn.Module,), {})          # paths with text_model.
    inner = getattr(text_encoder, "text_model", text_encoder)
    if inner is text_encoder: old.text_model = text_encoder
    else: old = text_encoder
    worn = inject_lora(text_encoder, rank=2); names = list(worn.layers)
    for p in worn.params(): p.data.normal_()
    value = worn.lora(); worn.remove()
    assert list(inject_lora(old, rank=2).layers) == names; remove_lora(old)
    older = Lora({n.replace("text_encoder.", "text_encoder.text_model."): f for n, f in value.layers.items()})
    for model in (text_encoder, old):
        for lora in (value, older): apply_lora(model, lora); remove_lora(model)
    assert fingerprint(text_encoder) == before


def test_t5():
    from transformers import T5Config, T5EncoderModel
    t5 = T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))
    worn = inject_lora(t5, "feed-forward", rank=2)
    assert len(worn.layers) > 4 and {n.split(".")[0] for n in worn.layers} == {"text_encoder"}
    t5(torch.tensor([[1, 2]]))


def test_disabled_restores_each_state():
    unet = tiny_unet(); fresh = look(unet); apply_lora(unet, random_lora(unet), mode="inject")
    first = next(iter(branches(unet).values()))[0]
    first.enabled = False
    with disabled(unet): assert torch.equal(look(unet), fresh)
    assert not first.enabled and all(s[0].enabled for s in list(branches(unet).values())[1:])


def test_extract_sums_what_is_worn():
    unet = tiny_unet(); a, b = random_lora(unet), random_lora(unet, "extended", seed=2)
    apply_lora(unet, a, .5, "inject"); apply_lora(unet, b)
    want, total = look(unet), extract_lora(unet)
    remove_lora(unet)
    apply_lora(unet, total)
    assert close(look(unet), want)


def test_magnitudes_are_never_lost_on_the_way_into_branches():
    unet = tiny_unet(); worn = inject_lora(unet, dora=True); taught = worn.lora(); worn.remove()
    worn = inject_lora(unet)
    with pytest.raises(ValueError, match="inject with dora=True"): worn.load(taught)
    assert all(not m.lora_up.weight.any() for m in worn.layers.values())          # nothing was written before the error

@pytest.mark.parametrize("kw, says", [(dict(dropout=float("nan")), "dropout"), (dict(dropout=1.), "dropout"), (dict(dropout=-1), "dropout"),
                                      (dict(targets=None), "targets=None"),
                                      (dict(targets={"unet": "attention"}, rank={"text_encoder": 4}), "nothing for unet")])
def test_injections_that_mean_nothing(kw, says):
    unet = tiny_unet(); bits = fingerprint(unet)
    with pytest.raises(LoraError, match=says): inject_lora(unet, **kw)
    assert fingerprint(unet) == bits

@pytest.mark.parametrize("lora, says", [(None, "found NoneType"), (3, "found int"), ([], "one by one")])
def test_what_cannot_be_worn(lora, says):
    with pytest.raises(LoraError, match=says): apply_lora(tiny_unet(), lora)
