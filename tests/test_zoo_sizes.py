"The recipes of the zoo at 128 pixels with a codec of factor 16: each takes two steps, goes on where it stopped, and draws."
import pytest, torch
from lora_nb.zoo import mmdit as M, scenes as sc, unet as U, vae as V, world as w

pytestmark = pytest.mark.skipif(not w.have_font(), reason="needs fonts-noto-color-emoji")
FEW = dict(list(w.OBJECTS.items())[:6])

@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(w, "all_glyphs", lambda: list(FEW.values()))
    monkeypatch.setattr(w, "OBJECTS", FEW)

def codec(out, steps=2):
    vae = V.make_vae(8, (16, 16, 32, 32, 32), 128)
    signs = sc.Signs(px=128)
    still, plain = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    more = lambda n: signs.draw(["A"] * n, w.backgrounds(plain.expand(n), plain.expand(n), 128), still.expand(n), still.expand(n))
    return V.train_vae(out, vae=vae, more=more, batch=8, steps=steps)

def test_a_codec_of_128_pixels_goes_on_where_it_stopped(few, tmp_path):
    codec(tmp_path)
    vae = codec(tmp_path, steps=3)
    run = torch.load(tmp_path / "vae-run/checkpoint.pt", weights_only=True)
    assert run["n"] == 3 and vae.config.sample_size == 128
    x = torch.zeros(1, 3, 128, 128)
    assert vae.encode(x).latent_dist.mode().shape == (1, 8, 8, 8) and V.reconstruct(vae, x).shape == x.shape

def test_the_unet_learns_on_its_latents(few, tmp_path):
    from transformers import CLIPModel, CLIPTokenizer
    from lora_nb.core import data_path
    clip, tok = CLIPModel.from_pretrained(data_path("clip")).float(), CLIPTokenizer.from_pretrained(data_path("clip"))
    pipe = U.train_unet(tmp_path, codec(tmp_path), clip, tok, 0, batch=4, pool=1024, previews=2, steps=2)
    assert pipe.unet.config.in_channels == 8 and torch.load(tmp_path / "unet-run/checkpoint.pt", weights_only=True)["n"] == 2
    assert U.draw_prompts(pipe, ["an owl"], steps=2).shape == (1, 3, 128, 128)

def test_the_mmdit_learns_on_its_latents(few, tmp_path):
    vae = M._standardise(M.widen_vae(codec(tmp_path), 8), sc.Scenes(px=128), tmp_path / "vae16")
    pipe = M.train_mmdit(tmp_path, vae, 0, batch=4, pool=64, previews=1, steps=2)
    assert M.draw_prompts(pipe, ["an owl"], steps=2).shape == (1, 3, 128, 128)
    assert M.draw_prompts(pipe, ["an owl"], steps=2, size=(128, 192)).shape == (1, 3, 128, 192)
