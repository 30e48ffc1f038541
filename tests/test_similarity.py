import json
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from lora_nb.core import DataError, data_path, quiet
from lora_nb.similarity import (Clip, Describer, Dino, cut_out, diversity, diversity_marks, drift, measure_masks, overfitting,
                                similarity, thumbnails, to_batch, to_masks, to_tensor)

bears = to_batch(data_path("subjects", "teddy_bear"), 64)
small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
large = small | dict(image_size=224, patch_size=56)
some = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)


def disc(radius):
    y, x = torch.meshgrid(torch.arange(64.), torch.arange(64.), indexing="ij")
    return ((x - 31.5) ** 2 + (y - 31.5) ** 2).sqrt() <= radius


def test_pictures_of_any_kind():
    assert to_batch(bears).equal(bears)
    assert to_batch([Image.new("L", (10, 20), 255)], 8).equal(torch.ones(1, 3, 8, 8))
    files = sorted(data_path("subjects", "teddy_bear").glob("*.jpg"))
    assert to_batch(files, 64).equal(bears) and to_batch(list(map(str, files)), 64).equal(bears)
    assert to_tensor(bears[0].half(), 32).shape == (3, 32, 32) and to_tensor(bears[0].half()).dtype == torch.float32
    with pytest.raises(DataError, match="at least one"): to_batch([])


def test_a_photograph_that_lies_on_its_side_is_turned(tmp_path):
    im = Image.new("RGB", (40, 20), "white"); im.paste("black", (0, 0, 20, 20))
    exif = Image.Exif(); exif[0x0112] = 6                                            # turn by 90 degrees to see it upright
    im.save(tmp_path/"a.jpg", exif=exif, quality=95)
    x = to_tensor(tmp_path/"a.jpg")
    assert x.shape == (3, 40, 20) and x[:, :15].mean() < -.9 and x[:, 25:].mean() > .9


def test_other_files_of_a_folder_are_left_alone(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path/"a.PNG"); (tmp_path/"a.txt").write_text("a caption")
    Image.new("L", (8, 8)).save(tmp_path/"a.mask.png")
    assert to_batch(tmp_path).shape == to_batch(str(tmp_path)).shape == (1, 3, 8, 8)
    with pytest.raises(DataError, match="No folder"): to_batch(tmp_path/"b")


def test_masks_of_any_kind():
    png = Image.fromarray(disc(16).numpy().astype("uint8") * 255)
    masks = to_masks([png, disc(16), disc(16).numpy(), disc(16)[None].float()])
    assert all(m.equal(masks[0]) for m in masks) and masks.shape == (4, 1, 64, 64)
    with pytest.raises(DataError, match="outside 0..1"): to_masks([torch.full((4, 4), 7.)])
    with pytest.raises(DataError, match="1 masks for 5"): cut_out(bears, [png])
    assert cut_out([png], [torch.zeros(8, 8)]).equal(torch.zeros(1, 3, 64, 64))
    assert cut_out([png], [torch.zeros(8, 8)], ground=-1.).equal(torch.full((1, 3, 64, 64), -1.))


def test_an_empty_mask_has_no_size():
    assert {k: v.tolist() for k, v in measure_masks([torch.zeros(64, 64)]).items()} == dict(size=[0], right=[0], down=[0])


def test_a_clip_without_a_tokenizer():
    bare = Clip(CLIPModel(CLIPConfig(text_config=small, vision_config=large, projection_dim=8)))
    assert torch.allclose(bare.images(bears).norm(dim=1), torch.ones(5), atol=1e-5) and bare.size == 224
    assert abs(bare.mean.mean() - .45) < .02                                          # normalised as OpenAI's models are
    with pytest.raises(DataError, match="cannot read"): bare.texts(["a bear"])


@pytest.mark.parametrize("make", [lambda: Dinov2Model(Dinov2Config(**large)), lambda: ViTModel(ViTConfig(**large), add_pooling_layer=False)],
                         ids=["DINOv2", "DINO"])
def test_dino_of_the_hub(make, tmp_path):
    made = make()
    described = Dino(made).images(bears)
    assert described.shape == (5, 16)
    with quiet(): made.save_pretrained(tmp_path)
    assert torch.allclose(Dino(tmp_path).images(bears), described, atol=1e-5)
    about = dict(image_mean=[.5] * 3, image_std=[.5] * 3, size=dict(shortest_edge=256), crop_size=224)
    (tmp_path/"preprocessor_config.json").write_text(json.dumps(about))
    assert (Dino(tmp_path).size, Dino(tmp_path).mean.mean()) == (224, .5)


def test_what_is_no_dino():
    with pytest.raises(DataError, match="facebook/dino"): Dino("/no/such/folder")
    class Blind(torch.nn.Module):
        config = None
        def forward(self, pixel_values): return (pixel_values,)
    with pytest.raises(DataError, match="Blind gives no `last_hidden_state`"): Dino(Blind()).images(bears)


def test_a_describer_needs_an_encoder():
    with pytest.raises(NotImplementedError): Describer(torch.nn.Identity(), torch.nn.Identity(), 8, (.5,) * 3, (.5,) * 3).images(bears)


def test_a_mask_of_everything_changes_nothing():
    dino = Dino()
    assert torch.allclose(dino.images(bears[:2], masks=torch.ones(2, 64, 64)), dino.images(bears[:2]), atol=1e-5)


def test_similarity_is_a_mean_cosine():
    assert np.allclose(similarity(some[:2], some), (some[:2] @ some.T).mean(1))


def test_diversity():
    assert diversity(torch.tensor([[1., 0.], [0., 1.]])) == 1 and diversity(torch.tensor([[1., 0.], [1., 0.]])) == 0
    with pytest.raises(DataError, match="at least two pictures, not 1"): diversity(torch.ones(1, 2))
    assert abs(diversity_marks(some).mean() - diversity(some)) < 1e-6
    assert np.allclose(diversity_marks(some[:2]), [diversity(some[:2])] * 2)


def test_overfitting_and_drift_need_pairs():
    assert torch.allclose(thumbnails(bears).norm(dim=1), torch.ones(5), atol=1e-5)
    with pytest.raises(DataError, match="two training pictures, not 1"): overfitting(thumbnails(bears), thumbnails(bears[:1]))
    with pytest.raises(DataError, match="6 pictures before and 2 after"): drift(some, some[:2])


def test_tensors_are_cropped_as_pictures_are():
    x = torch.rand(3, 32, 48)
    assert to_tensor(x, 32).equal(x[:, :, 8:40]) and to_tensor(x, 16).shape == to_tensor(torch.rand(3, 32, 64), 16).shape == (3, 16, 16)


def test_evaluation_reads_files_as_training_does(tmp_path):
    from lora_nb.dataset import ConceptDataset, to_pixels
    a = np.random.default_rng(0).integers(0, 255, (70, 64, 4), np.uint8)
    Image.fromarray(a).save(tmp_path/"alpha.png"); Image.fromarray(a[..., 0].astype(np.uint16) * 257).save(tmp_path/"deep.png")
    Image.fromarray(a[..., :3]).quantize(8).save(tmp_path/"palette.png"); Image.fromarray(a).convert("CMYK").save(tmp_path/"ink.tiff")
    exif = Image.Exif(); exif[0x0112] = 6; Image.fromarray(a[..., :3]).save(tmp_path/"turned.jpg", exif=exif)
    data, seen = ConceptDataset(tmp_path, size=48), to_batch(tmp_path, 48)
    assert len(data) == 5 and all(to_pixels(im).equal(x) for im, x in zip(data.images, seen))
    assert to_tensor(Image.fromarray(a), 48).equal(seen[0])                                        # a picture in memory, too
    Image.fromarray(np.full((9, 9), 65535, np.uint16)).save(tmp_path/"m.png")
    assert to_masks([tmp_path/"m.png"], 4).min() == 1
    (tmp_path/"broken.png").write_bytes(b"x")
    with pytest.raises(DataError, match="broken.png"): to_batch([tmp_path/"broken.png"], 8)
