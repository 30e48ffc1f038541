"The picture that is shown where somebody links to the site, from the picture of the demo: python tools/card.py"
from pathlib import Path
import matplotlib
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"


def card(demo, size=(1200, 630), tile=190, gap=10):
    "Title on the left; on the right three rows of the demo's picture, before and after."
    picture, at = Image.new("RGB", size, "#1b2330"), lambda name, px: ImageFont.truetype(FONTS / f"{name}.ttf", px)
    draw = ImageDraw.Draw(picture)
    draw.text((70, 150), "lora_nb", "#ffffff", at("DejaVuSansMono-Bold", 96))
    words = "The book on LoRA of\ntext-to-image models\nthat you can run"
    draw.multiline_text((74, 290), words, "#c9d4e5", at("DejaVuSans", 44), spacing=16)
    draw.rectangle((74, 510, 194, 518), "#f28c28")
    left, top = size[0] - 2 * tile - gap - 50, (size[1] - 3 * tile - 2 * gap) // 2
    for row, y in enumerate((174, 24, 474)):                # rows of before_after.jpg, 144 pixels each
        for col, x in enumerate((206, 806)):                # its first and last column
            part = demo.crop((x, y, x + 144, y + 144)).resize((tile, tile), Image.LANCZOS)
            picture.paste(part, (left + col * (tile + gap), top + row * (tile + gap)))
    return picture


if __name__ == "__main__":
    images = ROOT / "nbs/images"
    card(Image.open(images / "before_after.jpg")).save(images / "card.jpg", quality=80, optimize=True)
