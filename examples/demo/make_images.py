"""Draw the demo's pictures: words on paper, turned a little and with noise, so that reading them takes a model.

The pictures are in the repository; this is how they were made (``python make_images.py``, with Pillow installed).
"""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
PICTURES = {
    "receipt": ["Harbour Bakery", "2 rye bread   6.40", "1 coffee      2.90", "Total         9.30", "Thank you!"],
    "sign": ["PLATFORM 7", "Night train to Lisbon", "departs 22:45"],
    "letter": ["Dear Ms. Okafor,", "your parcel number 48213", "is waiting at the post office", "until the 30th."],
}


def draw(lines: list[str], seed: int) -> Image.Image:
    """Return a picture of the lines."""
    dice = random.Random(seed)
    image = Image.new("RGB", (640, 60 + 56 * len(lines)), (246, 246, 242))
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        pen.text((40, 30 + 56 * number), line, font=ImageFont.load_default(34), fill=(dice.randint(10, 40),) * 3)
    image = image.rotate(dice.uniform(-0.8, 0.8), fillcolor=(246, 246, 242), resample=Image.Resampling.BICUBIC)
    for _ in range(200):
        image.putpixel((dice.randrange(image.width), dice.randrange(image.height)), (dice.randrange(120, 200),) * 3)
    return image


def main() -> None:
    """Write every picture."""
    (HERE / "images").mkdir(exist_ok=True)
    for seed, (name, lines) in enumerate(PICTURES.items()):
        draw(lines, seed).save(HERE / "images" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
