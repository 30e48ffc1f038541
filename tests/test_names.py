import pytest

from lora_nb.names import (BLOCK_LISTS, block_numbers, block_positions, fits_block, longest_key, named_positions, on_path,
                           parse_blocks, parse_pattern, stream_of)

layer = "transformer.transformer_blocks.{}.attn.{}".format
known = [layer(i, n) for i in (1, 3, 10, 11) for n in ("to_q", "add_q_proj")]
on = lambda pattern: [n for n in known if on_path(pattern, n)]


def test_whole_words(): assert on("transformer_blocks.1") == known[:2]              # and not blocks 10 and 11


def test_short_forms_of_blocks():
    assert on("B1-3") == on("transformer_blocks.1-3") == known[:4]
    assert on("B01") == known[:2] and on("B3-1") == []


@pytest.mark.parametrize("pattern", ["B0", "picture"])
def test_a_unet_has_no_streams(pattern):
    assert not on_path(pattern, "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    assert stream_of("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q") == ""


def test_text_is_no_part_of_text_encoder(): assert not on_path("text", "text_encoder.encoder.layers.0.self_attn.q_proj")


def test_two_streams_are_no_pattern(): assert parse_pattern("text.picture") is None


@pytest.mark.parametrize("keys, path, want", [
    ({"B03-11", "B4"}, "transformer_blocks.4.attn.to_q", "B4"),
    ({"B03-11", "transformer_blocks.1"}, "transformer_blocks.1.ff", "transformer_blocks.1"),
    ({"text", "B11.text"}, "transformer_blocks.11.attn.add_q_proj", "B11.text"),
    ({"text"}, "transformer_blocks.11.attn.to_q", None)])
def test_longest_key(keys, path, want): assert longest_key(keys, path) == want


@pytest.mark.parametrize("blocks, says", [("22-24", "numbers from 0 to 23"), ("detials", "Did you mean 'details'"),
                                          ("3-1", "numbers"), ("", "numbers")])
def test_blocks_that_are_not_there(blocks, says):
    with pytest.raises(ValueError, match=says): block_numbers(blocks, 24)


@pytest.mark.parametrize("depth", [1, 2, 5, 24, 38])
def test_named_blocks_at_any_depth(depth):
    for name in ("composition", "details"):
        found = block_numbers(name, depth)
        assert found and set(found) <= set(range(depth))


@pytest.fixture(scope="module")
def unets():
    from diffusers import UNet2DConditionModel
    sizes = dict(norm_num_groups=4, attention_head_dim=2, cross_attention_dim=8)
    sd = UNet2DConditionModel(block_out_channels=(8,) * 4, **sizes)
    xl = UNet2DConditionModel(block_out_channels=(8,) * 3, down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), transformer_layers_per_block=(1, 2, 10), **sizes)
    return [block_positions(m, [n for n, x in m.named_modules() if hasattr(x, "weight")]) for m in (sd, xl)]


def test_positions_of_sdxl(unets):
    sd, xl = unets
    attention = ["IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{i:02}" for i in range(6))]
    assert sorted({p for n, p in xl.items() if "attentions" in n}) == attention
    assert (max(xl.values()), sd["time_embedding.linear_1"], sd["down_blocks.3.resnets.1.conv2"]) == ("OUT08", "", "IN11")


@pytest.mark.parametrize("n", BLOCK_LISTS)
def test_each_list_names_blocks_of_its_family(unets, n):
    at = unets[n in (12, 20)]
    for pattern in BLOCK_LISTS[n][1:]: assert any(fits_block(pattern, *i) for i in at.items()), pattern


def test_lists_of_numbers():
    assert parse_blocks(",".join(map(str, range(17))))["OUT03"] == 8
    assert parse_blocks("0," * 12)["MID"] == 0


@pytest.mark.parametrize("bad", ["", "1,2,3", "IN01", "IN01=a", "IN01=1=2", "=1", "IN01=nan"])
def test_texts_that_are_no_block_weights(bad):
    with pytest.raises(ValueError): parse_blocks(bad)


def test_positions_in_patterns():
    assert named_positions("m00") == {"MID"} and named_positions("base") == set()
    assert named_positions("IN04-IN06") == {"IN04", "IN05", "IN06"} and len(named_positions("OUT")) > 100
    assert named_positions("up_blocks.1") is None


def test_names_itself_needs_no_torch():
    import lora_nb.names
    assert "torch" not in open(lora_nb.names.__file__).read().replace("no torch", "")
