import math

import pytest
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from lora_nb.core import LoraError, TargetError
from lora_nb.lora import Lora
from lora_nb.names import BLOCK_LISTS, block_positions, parse_blocks
from lora_nb.schedule import (LoraSchedule, Moment, as_plan, as_schedule, interpolate, lora_switch, parse_lora, parse_schedule, ramp,
                              rank_at, trained_schedule)
from lora_nb.worn import places


def positions_of(model): return block_positions(model, places(model))

def unet(**kw):
    "A narrow UNet with the blocks of SD1.5"
    return UNet2DConditionModel(**{**dict(block_out_channels=(8,) * 4, norm_num_groups=4, attention_head_dim=2,
                                          cross_attention_dim=8), **kw})

@pytest.fixture(scope="module")
def at(): return positions_of(unet())

@pytest.fixture(scope="module")
def xl():
    return positions_of(unet(
        block_out_channels=(8,) * 3, down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), transformer_layers_per_block=(1, 2, 10)))


def test_windows_and_keyframes():
    assert LoraSchedule(2., start=.5, stop=1.).values(3) == [0, 2, 2]                    # the last step is inside
    assert LoraSchedule({0: 1, .5: 0}, "step").values(5) == [1, 1, 0, 0, 0]
    assert math.isclose(ramp(0, 1, "cosine").values(5)[1], (1 - math.cos(math.pi / 4)) / 2)
    assert LoraSchedule(turn=(1, 2, 2)).values(8) == [0, 0, 1, 1, 0, 0, 1, 1]
    assert ramp(0, 1).scaled(2).values(3) == [0, 1, 2] and ramp(0, 1).values(1) == [0]
    assert [interpolate(((.2, 1.), (.6, 3.)), p) for p in (0, .2, .4, .6, 1)] == [1, 1, pytest.approx(2), 3, 3]


def test_what_is_constant():
    assert LoraSchedule(.5).constant
    assert not any(s.constant for s in (ramp(0, 1), LoraSchedule(stop=3), LoraSchedule(rank_min=2), LoraSchedule(turn=(0, 2, 1))))


@pytest.mark.parametrize("bad", [
    dict(course="x"), dict(course={0: math.nan}), dict(course={2: 1}), dict(course={}), dict(ease="bounce"),
    dict(start=.8, stop=.2), dict(stop=1.5), dict(turn=(2, 2, 1)), dict(rank_min=-1), dict(blocks={"IN01": "a"}),
    dict(scale=math.inf), dict(start=-1), dict(rank_power=0), dict(components={"unett": 1})], ids=str)
def test_schedules_without_meaning(bad):
    with pytest.raises(LoraError): LoraSchedule(**bad)


def test_a_function_must_give_numbers():
    with pytest.raises(LoraError, match="finite number"): LoraSchedule(lambda p: math.nan).values(2)


def test_positions_of_sdxl(at, xl):
    assert sorted({p for n, p in xl.items() if "attentions" in n}) == \
        ["IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{i:02}" for i in range(6))]
    assert max(xl.values()) == "OUT08" and at["time_embedding.linear_1"] == "" and at["down_blocks.3.resnets.1.conv2"] == "IN11"


def test_lists_of_numbers(at, xl):
    assert len({len(v) for v in BLOCK_LISTS.values()} & set(BLOCK_LISTS)) == 4
    for n, names in BLOCK_LISTS.items():
        assert len(names) == n
        LoraSchedule(blocks=",".join(["1"] * n)).check_blocks(at if n in (17, 26) else xl)
    assert parse_blocks(",".join(map(str, range(17))))["OUT03"] == 8 and parse_blocks("0," * 12)["MID"] == 0
    weights = LoraSchedule(blocks=",".join(map(str, range(17)))).block_weights(at)
    assert {at[n]: w for n, w in weights.items() if "attentions" in n} == {n: i for i, n in enumerate(BLOCK_LISTS[17]) if i}


def test_a_block_that_is_not_there(at):
    with pytest.raises(TargetError, match="a UNet lacks"): LoraSchedule(blocks={"OUT12": 0}).check_blocks(at, "a UNet")
    LoraSchedule(blocks={"BASE": 0}).check_blocks(at)                  # the text encoder: no block of the denoiser


def test_streams_of_an_mmdit():
    dit = positions_of(SD3Transformer2DModel(sample_size=8, num_layers=12, attention_head_dim=4, num_attention_heads=1,
        caption_projection_dim=4, joint_attention_dim=4, pooled_projection_dim=4, in_channels=4))
    assert dit["transformer_blocks.10.attn.to_q"] == "B10"
    w = LoraSchedule(blocks="B03-07.text=0,picture=0.5").block_weights(dit)
    assert [w[f"transformer_blocks.{b}.attn.{n}"] for b, n in ((3, "add_q_proj"), (8, "add_q_proj"), (3, "to_q"))] == [0, 1, .5]


@pytest.mark.parametrize("text, want", [
    ("0.5-", LoraSchedule(start=.5)), ("0.5-1", LoraSchedule(start=.5, stop=1.)),
    ("rank:4:2", LoraSchedule(rank_min=4, rank_power=2.)), ("-1", LoraSchedule(-1)), ("3-5", LoraSchedule(start=3, stop=5)),
    ("ramp:0:1@te:0.5", ramp(0, 1, components={f"text_encoder{i}": .5 for i in ("", "_2", "_3")}))])
def test_text_of_schedules(text, want): assert parse_schedule(text) == want == as_schedule(text)


def test_text_of_lists_and_text_encoders():
    assert parse_schedule(",".join(["1"] * 17)).blocks[0] == ("BASE", 1)
    assert dict(parse_schedule("te:0").components)["text_encoder"] == 0


@pytest.mark.parametrize("bad", ["", "1@", "0:0,,1:1", "0:a", "2:1", "ramp:0", "0.8-0.2", "1;2", "IN01=", "rank:-1", "nan"])
def test_texts_that_are_no_schedule(bad):
    with pytest.raises(LoraError): parse_schedule(bad)


@pytest.mark.parametrize("text, file", [("x.pt", "x.pt"), ("C:\\a\\b.safetensors:0.5", "C:\\a\\b.safetensors"), ("folder:0.5", "folder")])
def test_files_and_strengths(text, file):
    assert parse_lora(text) == (file, LoraSchedule(.5 if "0.5" in text else 1.))


def test_a_file_with_a_colon_and_nothing():
    with pytest.raises(LoraError, match="colon"): parse_lora("x.safetensors:")


def test_ranks_over_time():
    assert [rank_at(s, 16, 4) for s in (0, .5, 1)] == [4, 10, 16] and [rank_at(s, 2, 4) for s in (0, 1)] == [2, 2]
    assert LoraSchedule(rank_min=2, rank_power=2.).asked(Moment(1., 4, 5, .5)) == (1., .25)
    assert trained_schedule(Lora(metadata={"recipe": "no json"})) == LoraSchedule()


def test_text_encoders_keep_a_constant_weight():
    assert LoraSchedule(.5, blocks="BASE=.5", scale=2).text_weight("text_encoder") == .5
    assert ramp(0, 1, components={"text_encoder": .3}).text_weight("text_encoder_2") == 1


def test_turns_of_three():
    plan = lora_switch("abc", every=2, scale=.5)
    assert [s.values(7) for s in plan.values()] == [[.5, .5, 0, 0, 0, 0, .5], [0, 0, .5, .5, 0, 0, 0], [0, 0, 0, 0, .5, .5, 0]]


@pytest.mark.parametrize("kw", [dict(rank_power=float("nan")), dict(rank_min=float("nan")), dict(rank_min=1.5), dict(start="x"),
                                dict(turn=1)], ids=str)
def test_fields_that_are_no_numbers(kw):
    with pytest.raises(LoraError): LoraSchedule(**kw)

@pytest.mark.parametrize("x", [None, 3, object()])
def test_what_is_no_plan(x):
    with pytest.raises(LoraError, match="expected {lora: schedule}"): as_plan(x)
