"Families judged by the layers of diffusers' own model classes."
import re

import diffusers
import pytest
import torch
from helpers_files import pair
from torch import nn

from lora_nb.architectures import family_of, family_of_keys, refuse_strange, strange_paths, training_metadata
from lora_nb.core import FormatError
from lora_nb.formats import load_lora, read_file
from lora_nb.lora import Factors, Lora

ATTENTION = r"(to_[qkv]|to_out\.0)$"


def thin(component, model):
    "A LoRA of rank 1 for every linear of a model without weights"
    new = lambda *shape: torch.empty(*shape, device="meta")
    return Lora({f"{component}.{n}": Factors(new(m.weight.shape[0], 1), new(1, m.weight.shape[1]))
                 for n, m in model.named_modules() if isinstance(m, nn.Linear)})


def where(lora, pattern): return Lora({n: f for n, f in lora.layers.items() if re.search(pattern, n)})


# of true size, but few layers: class -> (family, family from attention alone, options)
MODELS = {"FluxTransformer2DModel": ("FLUX", "FLUX or Chroma", dict(num_layers=2, num_single_layers=2)),
          "Flux2Transformer2DModel": ("FLUX.2", "FLUX.2", dict(num_layers=1, num_single_layers=1)),
          "ChromaTransformer2DModel": ("Chroma", "FLUX or Chroma", dict(num_layers=2, num_single_layers=2)),
          "WanTransformer3DModel": ("Wan", "Wan", dict(num_layers=2)),
          "QwenImageTransformer2DModel": ("Qwen-Image", "Qwen-Image", dict(num_layers=60)),
          "PixArtTransformer2DModel": ("PixArt", "PixArt", dict(num_layers=2, caption_channels=4096)),
          "SanaTransformer2DModel": ("Sana", "Sana", dict(num_layers=2)),
          "Lumina2Transformer2DModel": ("Lumina 2", "Lumina 2", dict(num_layers=2)),
          "ZImageTransformer2DModel": ("Z-Image", "Z-Image", dict(n_layers=2)),
          "HunyuanVideoTransformer3DModel": ("HunyuanVideo", "HunyuanVideo", dict(num_layers=1, num_single_layers=1)),
          "AuraFlowTransformer2DModel": ("AuraFlow", "AuraFlow", dict(num_mmdit_layers=1, num_single_dit_layers=1)),
          "LTXVideoTransformer3DModel": ("LTX-Video", "LTX-Video", dict(num_layers=2)),
          "CogVideoXTransformer3DModel": ("CogVideoX", "CogVideoX", dict(num_layers=2)),
          "CogView4Transformer2DModel": ("unknown", "unknown", dict(num_layers=2)),
          "SD3Transformer2DModel": ("SD3.5 Large", "SD3.5 Large", dict(num_layers=2, num_attention_heads=38, caption_projection_dim=2432))}


@pytest.mark.parametrize("model", MODELS)
def test_transformers(model):
    if not hasattr(diffusers, model): pytest.skip(f"this diffusers has no {model}")
    family, by_attention, options = MODELS[model]
    with torch.device("meta"): lora = thin("transformer", getattr(diffusers, model)(**options))
    assert family_of(lora) == family
    assert family_of(where(lora, ATTENTION)) == by_attention
    refuse_strange(lora.layers)


UNETS = {"SD1": dict(cross_attention_dim=768), "SD2": dict(cross_attention_dim=1024, use_linear_projection=True),
         "SDXL": dict(block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048,
                      down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
                      up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))}
TE = {f"text_encoder.encoder.layers.{i}.self_attn.{x}_proj": pair(768, 1, 768) for i in range(2) for x in "qkv"}


@pytest.fixture(scope="module")
def unets():
    with torch.device("meta"): return {f: thin("unet", diffusers.UNet2DConditionModel(**k)) for f, k in UNETS.items()}


def test_unets(unets):
    for f, lora in unets.items(): assert family_of(lora) == f
    for f in unets: assert family_of(where(unets[f], "attn2")) == f


def test_self_attention_alone_shows_the_levels(unets):
    "SDXL's first text encoder is as wide as SD1's: it does not make an SD1 of SDXL"
    attn1 = {f: where(l, r"attn1\.to_q") for f, l in unets.items()}
    assert {f: family_of(l) for f, l in attn1.items()} == {"SD1": "SD1 or SD2", "SD2": "SD1 or SD2", "SDXL": "SDXL"}
    with_te = lambda lora: Lora({**lora.layers, **TE})
    assert family_of(with_te(attn1["SDXL"])) == "SDXL" and family_of(with_te(attn1["SD1"])) == "SD1"
    first = where(attn1["SDXL"], r"transformer_blocks\.0\.")                           # no second layer to show it
    for side, family in {"up_blocks.0": "SDXL", "up_blocks.1": "SDXL", "down_blocks.1": "SD1 or SDXL", "mid_block": "SD1 or SDXL"}.items():
        assert family_of(with_te(where(first, re.escape(side)))) == family, side
    assert family_of(where(first, "mid_block")) == "unknown"
    two = Lora({**where(first, "mid_block").layers, "text_encoder_2.encoder.layers.0.self_attn.q_proj": pair(1280, 1, 1280)})
    assert family_of(two) == "SDXL"


def test_attention_of_sd3_and_of_others():
    q = lambda w, i=0: family_of(Lora({f"transformer.transformer_blocks.{i}.attn.to_q": pair(w, 1, w)}))
    assert (q(1536), q(2432), q(16)) == ("SD3 or SD3.5 Medium", "SD3.5 Large", "SD3")
    assert (q(3072), q(3072, 40), q(3584), q(6144)) == ("FLUX or Qwen-Image", "Qwen-Image", "unknown", "FLUX.2")


def test_names_of_their_authors():
    assert family_of_keys(["lora_unet_input_blocks_4_1_proj_in.alpha", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"]) == ""


@pytest.mark.parametrize("name", ["unet.output_blocks.5.1.proj_in", "unet.down_blocks.0.attention.0.to_q", "transformer.foo.0.to_q",
                                  "text_encoder.layer.0.q_proj", "text_encoder_2.foo"])
def test_strange_paths(name):
    with pytest.raises(FormatError, match=re.escape(name)): refuse_strange([name])


@pytest.mark.parametrize("name", ["unet.conv_in", "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q",
                                  "text_encoder_2.text_projection",
                                  "text_encoder.model.layers.3.self_attn.q_proj", "unet.mid_block.attentions.0.proj_in"])
def test_paths_of_known_models(name): refuse_strange([name])


OTHERS = {"HiDreamImageTransformer2DModel": dict(
    patch_size=2, in_channels=16, out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=20,
    caption_channels=[4096, 4096], text_emb_dim=2048, num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(64, 32, 32),
    max_resolution=(128, 128), llama_layers=[0, 1, 2, 3])}
NOT_FOR_PICTURES = ("UNet1DModel", "I2VGenXLUNet")


def test_every_architecture_of_diffusers_is_alive():
    "All layers and norms of each class at its own size; half of the numbers of its blocks doubled are not"
    seen = 0
    for name in sorted(n for n in dir(diffusers) if re.search(r"(Transformer\w*Model|UNet\w*Model|UNet)$", n) and "ControlNet" not in n):
        if name in NOT_FOR_PICTURES or name.startswith("Flax"): continue
        try:
            with torch.device("meta"): model = getattr(diffusers, name)(**OTHERS.get(name, {}))
        except Exception: continue                                          # it has no size of its own
        component = "unet" if "UNet" in name else "transformer"
        names = [f"{component}.{n}" for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), torch.Tensor)]
        assert strange_paths(names) == [], name
        moved = [n.replace("blocks.", "blocks.9", 1) for n in names if "blocks.0" in n]
        assert strange_paths(moved) == moved, name
        lost = [n.replace("attn", "attn7", 1) for n in names if re.search(r"\.attn\d?\.", n)]
        assert strange_paths(lost) == lost, name
        seen += 1
    assert seen > 30


def test_every_text_encoder_is_alive():
    import transformers as t
    clip = t.CLIPTextConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=32)
    configs = dict(clip=(t.CLIPTextModelWithProjection, clip),
                   t5=(t.T5EncoderModel, t.T5Config(d_model=8, d_kv=8, d_ff=8, num_layers=24, num_heads=1, feed_forward_proj="gated-gelu")),
                   gemma=(t.Gemma2Model, t.Gemma2Config(hidden_size=8, intermediate_size=8, num_hidden_layers=26, vocab_size=8)),
                   qwen=(t.Qwen3ForCausalLM, t.Qwen3Config(hidden_size=8, intermediate_size=8, num_hidden_layers=36, vocab_size=8)),
                   bert=(t.BertModel, t.BertConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=24)))
    for kind, (cls, config) in configs.items():
        with torch.device("meta"): model = cls(config)
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "pooler" not in n]
        names = [f"text_encoder.{n.removeprefix('text_model.')}" for n in linears]
        assert names and strange_paths(names) == [], kind
        moved = [n.replace(".0.", ".90.", 1) for n in names if ".0." in n]
        assert strange_paths(moved) == moved, kind


DEAD = """unet.down_blocks.7.resnets.0.conv1 unet.down_blocks.0.attentions.0.transformer_blocks.0.attn9.to_q
unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_zz unet.down_blocks.0.attentions.0.transformer_blocks.99.attn1.to_q
unet.down_blocks.0.attentions.9.proj_in unet.mid_block.attentions.0.foo unet.conv_in.x unet.up_blocks.1.resnets.0.conv3
transformer.layers.99.attention.to_q transformer.transformer_blocks.99.attn.to_q transformer.transformer_blocks.0.attn.to_zz
transformer.transformer_blocks.0.attn3.to_q transformer.transformer_blocks.0.to_q transformer.transformer_blocks.0.ff.to_q
transformer.attn.to_q transformer.transformer_blocks.0.foo.to_q text_encoder.encoder.layers.32.mlp.fc1 text_encoder.encoder.layers.0.mlp.fc3
text_encoder.encoder.layers.0.self_attn.x_proj text_encoder_3.encoder.block.24.layer.0.SelfAttention.q""".split()
FLAT = """lora_unet_input_blocks_4_1_transformer_blocks_0_attn7_to_q lora_unet_down_blocks_7_resnets_0_conv1
lora_unet_joint_blocks_99_x_block_attn_qkv lora_te_text_model_encoder_layers_99_mlp_fc1 lora_unet_down_blocks_0_attentions_9_proj_in
lora_transformer_transformer_blocks_99_attn_to_q
diffusion_model.input_blocks.4.1.transformer_blocks.0.attn7.to_q diffusion_model.joint_blocks.99.x_block.attn.qkv""".split()
ALIVE = {"unet": "unet.mid_block.attentions.0.proj_in", "lora": "lora_unet_conv_in", "diff": "diffusion_model.out.2"}


@pytest.mark.parametrize("name", [*DEAD, *FLAT])
def test_a_dead_path_is_refused_on_reading_or_left_out_on_request(name, tmp_path):
    from safetensors.torch import save_file
    up, down = ("lora_up.weight", "lora_down.weight") if name in FLAT else ("lora_B.weight", "lora_A.weight")
    half = lambda n: {f"{n}.{up}": torch.ones(24, 1), f"{n}.{down}": torch.ones(1, 8)}
    alive = ALIVE.get(name[:4], ALIVE["unet"])
    save_file(half(name) | half(alive), tmp_path/"a.safetensors")
    with pytest.raises(FormatError, match=re.escape(name) + "(?s:.*)left_out"): load_lora(tmp_path/"a.safetensors")
    left_out = []
    assert len(load_lora(tmp_path/"a.safetensors", left_out=left_out)) == 1
    assert sorted(left_out) == sorted(half(name))
    save_file(half(name), tmp_path/"a.safetensors")                       # nothing would be left
    with pytest.raises(FormatError): load_lora(tmp_path/"a.safetensors", left_out=[])


def test_a1111_would_list_it_under_its_family(tmp_path):
    "Its rule: sdxl_ in the base version, else ss_v2, else any metadata makes an SD1"
    def sorted_as(metadata):
        if metadata.get("ss_base_model_version", "").startswith("sdxl_"): return "SDXL"
        return "SD2" if metadata.get("ss_v2") == "True" else "SD1" if metadata else "unknown"
    for family, width in (("SD1", 768), ("SD2", 1024), ("SDXL", 2048)):
        lora = Lora({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": pair(1280, 2, width, 1.)}, metadata={"trigger": "x"})
        for format in ("kohya", "comfy"):
            lora.save(tmp_path/"x.safetensors", format)
            metadata = read_file(tmp_path/"x.safetensors")[1]
            assert sorted_as(metadata) == family and metadata["modelspec.architecture"].endswith("/lora")
            assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "1")
            assert load_lora(tmp_path/"x.safetensors") == lora                      # and the value is not changed by it


def test_several_ranks_are_dynamic():
    n = "unet.mid_block.attentions.0.transformer_blocks.0.attn{}.to_k"
    two = Lora({n.format(1): pair(1280, 2, 1280, 1.), n.format(2): pair(1280, 4, 2048)})
    assert training_metadata(two)["ss_network_dim"] == training_metadata(two)["ss_network_alpha"] == "Dynamic"
