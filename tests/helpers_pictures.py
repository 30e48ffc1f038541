"Pictures in every mode, broken files, and small models of the classes that mask and caption: for the tests of the data chapters."
import io, struct, zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from lora_nb.core import data_path
from lora_nb.pictures import open_picture


def scene(w=96, h=64):
    "Red above, blue below, a green square on the left: every flip and rotation shows"
    a = np.zeros((h, w, 3), np.uint8)
    a[:h//2] = 220, 40, 40; a[h//2:] = 40, 60, 200; a[h//4:3*h//4, w//8:w//3] = 60, 200, 80
    return Image.fromarray(a)


def bear(i=0): return open_picture(data_path("subjects", "teddy_bear", f"{i}.jpg"))


def sideways(im, path):
    "Save as a phone does: turned, with an EXIF note that says so"
    exif = Image.Exif(); exif[0x0112] = 6
    im.rotate(90, expand=True).save(path, quality=95, exif=exif)


def album(folder):
    "The scene in every mode"
    folder, im = Path(folder), scene(); folder.mkdir(exist_ok=True)
    im.save(folder/"a_plain.png"); im.save(folder/"b_photo.jpg", quality=95); im.save(folder/"c_web.webp", quality=95)
    im.quantize(16).save(folder/"d_palette.png"); im.convert("CMYK").save(folder/"e_print.jpg", quality=95)
    im.convert("RGBA").save(folder/"f_alpha.png"); im.convert("L").save(folder/"g_grey.png")
    Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257).save(folder/"h_16bit.png")
    sideways(im, folder/"i_sideways.jpg")
    return folder


def png_header(w, h):
    "The first bytes of a PNG of any claimed size"
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")


def broken_files(folder):
    "Files that look like pictures"
    folder = Path(folder); folder.mkdir(exist_ok=True)
    b = io.BytesIO(); scene(640, 480).save(b, "JPEG")
    (folder/"cut.jpg").write_bytes(b.getvalue()[:len(b.getvalue()) // 2])
    (folder/"text.jpg").write_text("not a picture"); (folder/"empty.png").write_bytes(b"")
    (folder/"phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    (folder/"bomb.png").write_bytes(png_header(100_000, 100_000))
    return folder


def messy(folder):
    "Raw pictures of a bear, and things that are not"
    folder = broken_files(folder)
    views = [bear(i) for i in range(5)]
    wall = Image.new("RGB", (420, 256), views[0].getpixel((2, 128))); wall.paste(views[0], (164, 0))
    wall.save(folder/"a_wide.png"); sideways(views[1], folder/"b_sideways.jpg")
    views[2].convert("CMYK").save(folder/"c_print.jpg", quality=95)
    (folder/"c_print.txt").write_text("a {trigger} in front of a wall\n")
    views[3].resize((128, 128)).save(folder/"d_small.webp", quality=95)
    views[4].quantize(64).save(folder/"e_palette.png")
    views[4].resize((200, 200)).save(folder/"f_again.jpg", quality=60)
    views[0].filter(ImageFilter.GaussianBlur(14)).save(folder/"g_blurred.png")
    Image.new("RGB", (300, 300), "teal").save(folder/"h_blank.png"); Image.new("RGB", (1, 1)).save(folder/"j_dot.png")
    views[1].point(lambda v: v * .1).save(folder/"i_dark.png")
    frames = [Image.new("RGB", (96, 96), c) for c in ("red", "green")]
    first = views[0].resize((96, 96)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    first.save(folder/"k_moving.gif", save_all=True, append_images=frames)
    return folder


def tiny_clipseg():
    "A CLIPSeg with random weights and a real tokenizer"
    from transformers import AutoTokenizer, CLIPSegConfig, CLIPSegForImageSegmentation
    torch.manual_seed(0)
    t = AutoTokenizer.from_pretrained(data_path("clip"))
    small = dict(hidden_size=32, intermediate_size=37, num_attention_heads=4)
    text = dict(vocab_size=len(t), num_hidden_layers=2, eos_token_id=t.eos_token_id, bos_token_id=t.bos_token_id, **small)
    vision = dict(num_hidden_layers=3, image_size=32, patch_size=8, **small)
    return CLIPSegForImageSegmentation(CLIPSegConfig(
        text_config=text, vision_config=vision, projection_dim=32, extract_layers=[0, 1, 2], reduce_dim=16,
        decoder_num_attention_heads=4, decoder_intermediate_size=32)), t


def tiny_blip(folder):
    "A BLIP with random weights and a vocabulary of twelve words"
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"a photo of cat dog bear".split()]
    Path(folder, "vocab.txt").write_text("\n".join(words))
    small = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4)
    text = dict(vocab_size=12, encoder_hidden_size=32, max_position_embeddings=64, bos_token_id=5, pad_token_id=0,
                eos_token_id=3, sep_token_id=3, **small)
    config = BlipConfig(text_config=text, vision_config=dict(image_size=32, patch_size=8, **small), projection_dim=32)
    return BlipForConditionalGeneration(config), BertTokenizer(str(Path(folder, "vocab.txt")), bos_token="[DEC]")


def tiny_swin():
    "A Swin2SR with random weights that doubles a picture's sides"
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution
    return Swin2SRForImageSuperResolution(Swin2SRConfig(image_size=16, embed_dim=16, depths=[1], num_heads=[2], window_size=8, upscale=2))
