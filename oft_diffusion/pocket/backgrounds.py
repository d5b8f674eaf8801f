"""The eight places of the pocket world. Lengths are fractions of the frame; details are drawn by lot."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]


class Frame:
    """A square picture and a pen that counts in fractions of its side."""

    def __init__(self, side: int, sky: tuple[RGB, RGB]) -> None:
        ramp = Image.linear_gradient("L").resize((side, side))  # 0 at the top, 255 at the bottom
        self.image = Image.composite(
            Image.new("RGB", (side, side), sky[1]), Image.new("RGB", (side, side), sky[0]), ramp
        )
        self.pen, self.side = ImageDraw.Draw(self.image), side

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: RGB) -> None:
        """A filled rectangle."""
        s = self.side
        self.pen.rectangle((x0 * s, y0 * s, x1 * s, y1 * s), fill=fill)

    def dot(self, x: float, y: float, rx: float, fill: RGB, ry: float | None = None) -> None:
        """A filled ellipse."""
        s, ry = self.side, rx if ry is None else ry
        self.pen.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=fill)

    def poly(self, fill: RGB, *points: tuple[float, float]) -> None:
        """A filled polygon."""
        self.pen.polygon([(x * self.side, y * self.side) for x, y in points], fill=fill)


def _cloud(f: Frame, x: float, y: float, fill: RGB = (250, 252, 255)) -> None:
    for dx, dy, r in ((-0.07, 0.01, 0.045), (0.0, -0.015, 0.06), (0.075, 0.01, 0.045)):
        f.dot(x + dx, y + dy, r, fill)


def _beach(side: int, rng: random.Random) -> Image.Image:
    f = Frame(side, ((104, 196, 250), (214, 240, 255)))
    f.dot(rng.uniform(0.12, 0.88), rng.uniform(0.1, 0.2), 0.085, (255, 232, 110))
    f.box(0, 0.5, 1, 0.72, (46, 142, 206))
    for _ in range(4):
        x, y = rng.uniform(0, 1), rng.uniform(0.53, 0.62)
        f.box(x - 0.07, y, x + 0.07, y + 0.014, (150, 212, 240))
    f.dot(0.5, 0.79, 0.9, (236, 246, 250), 0.13)
    f.box(0, 0.72, 1, 1, (242, 218, 158))
    f.dot(0.5, 0.8, 0.9, (242, 218, 158), 0.12)
    return f.image


def _meadow(side: int, rng: random.Random) -> Image.Image:
    f = Frame(side, ((126, 206, 252), (228, 246, 255)))
    _cloud(f, rng.uniform(0.1, 0.9), rng.uniform(0.12, 0.22))
    f.dot(rng.uniform(0.1, 0.9), 0.86, 0.6, (150, 210, 104), 0.3)
    f.box(0, 0.68, 1, 1, (118, 194, 82))
    for _ in range(16):
        fill = rng.choice(((255, 255, 255), (255, 226, 90), (255, 170, 200)))
        f.dot(rng.uniform(0, 1), rng.uniform(0.71, 0.98), 0.015, fill)
    return f.image


def _city(side: int, rng: random.Random) -> Image.Image:
    f = Frame(side, ((168, 182, 206), (216, 222, 232)))
    x = -rng.uniform(0, 0.1)
    while x < 1:
        width, top = rng.uniform(0.13, 0.2), rng.uniform(0.14, 0.42)
        f.box(x, top, x + width - 0.012, 0.75, rng.choice(((104, 112, 138), (120, 126, 150), (92, 100, 126))))
        for i in range(2):
            for j in range(6):
                wx, wy = x + width * (0.2 + 0.4 * i), top + 0.05 + 0.085 * j
                f.box(wx, wy, wx + 0.03, wy + 0.035, (252, 230, 150))
        x += width
    f.box(0, 0.72, 1, 1, (98, 98, 106))
    f.box(0, 0.72, 1, 0.76, (168, 168, 172))
    return f.image


def _desert(side: int, rng: random.Random) -> Image.Image:
    f = Frame(side, ((250, 176, 100), (255, 226, 170)))
    f.dot(rng.uniform(0.15, 0.85), 0.22, 0.1, (255, 244, 206))
    for x in (rng.uniform(0.05, 0.35), rng.uniform(0.65, 0.95)):
        f.poly((214, 140, 84), (x - 0.3, 0.72), (x, rng.uniform(0.4, 0.5)), (x + 0.3, 0.72))
    f.box(0, 0.68, 1, 1, (232, 172, 104))
    f.dot(rng.uniform(0.2, 0.8), 1.0, 0.6, (222, 158, 92), 0.14)
    x = rng.choice((rng.uniform(0.06, 0.14), rng.uniform(0.86, 0.94)))
    for part in ((-0.022, 0.46, 0.022, 0.76), (-0.075, 0.54, -0.045, 0.63), (-0.075, 0.61, 0.0, 0.64)):
        f.box(x + part[0], part[1], x + part[2], part[3], (84, 150, 90))
    return f.image


def _night(side: int, rng: random.Random) -> Image.Image:
    f = Frame(side, ((12, 14, 50), (54, 52, 112)))
    for _ in range(26):
        f.dot(rng.uniform(0, 1), rng.uniform(0, 0.66), rng.choice((0.008, 0.013)), (250, 248, 214))
    x, y = rng.uniform(0.12, 0.88), rng.uniform(0.1, 0.2)
    f.dot(x, y, 0.085, (255, 246, 190))
    f.dot(x + 0.04, y - 0.02, 0.075, (18, 20, 58))
    f.box(0, 0.72, 1, 1, (32, 34, 66))
    f.dot(rng.uniform(0.2, 0.8), 0.78, 0.6, (32, 34, 66), 0.12)
    return f.image


def _snow(side: int, rng: random.Random) -> Image.Image:
    f = Frame(side, ((178, 200, 230), (224, 234, 246)))
    for _ in range(3):
        x, h = rng.uniform(0, 1), rng.uniform(0.2, 0.32)
        for k in range(3):
            top, w = 0.74 - h + h * k / 4, 0.05 + 0.035 * k
            f.poly((108, 146, 150), (x, top), (x - w, top + h / 2.2), (x + w, top + h / 2.2))
    f.box(0, 0.7, 1, 1, (244, 248, 252))
    f.dot(rng.uniform(0.2, 0.8), 0.74, 0.5, (244, 248, 252), 0.08)
    for _ in range(22):
        f.dot(rng.uniform(0, 1), rng.uniform(0, 0.7), rng.choice((0.011, 0.016)), (255, 255, 255))
    return f.image


def _forest(side: int, rng: random.Random) -> Image.Image:
    f = Frame(side, ((120, 166, 116), (176, 208, 150)))
    for x, fill in (
        (0.06, (94, 72, 56)),
        (0.3, (112, 94, 74)),
        (0.52, (112, 94, 74)),
        (0.74, (94, 72, 56)),
        (0.95, (112, 94, 74)),
    ):
        at, w = x + rng.uniform(-0.07, 0.07), rng.uniform(0.028, 0.05)
        f.box(at - w, 0, at + w, 0.76, fill)
    for i in range(9):
        f.dot(i / 8 + rng.uniform(-0.03, 0.03), rng.uniform(-0.02, 0.05), 0.1, (54, 106, 62))
    f.box(0, 0.71, 1, 1, (72, 118, 66))
    for i in range(7):
        f.dot(i / 6 + rng.uniform(-0.05, 0.05), 0.72, 0.07, (72, 118, 66), 0.035)
    return f.image


def _room(side: int, rng: random.Random) -> Image.Image:
    f = Frame(side, ((240, 222, 196), (230, 208, 180)))
    x = rng.choice((rng.uniform(0.04, 0.16), rng.uniform(0.64, 0.74)))
    f.box(x, 0.1, x + 0.24, 0.36, (255, 255, 252))
    f.box(x + 0.022, 0.122, x + 0.218, 0.338, (150, 208, 242))
    f.box(x + 0.11, 0.1, x + 0.13, 0.36, (255, 255, 252))
    f.box(0, 0.66, 1, 0.7, (250, 242, 228))
    f.box(0, 0.7, 1, 1, (170, 114, 76))
    for i in range(3):
        f.box(0, 0.775 + 0.075 * i, 1, 0.781 + 0.075 * i, (144, 94, 62))
    return f.image


BACKGROUNDS: Mapping[str, Callable[[int, random.Random], Image.Image]] = {
    "beach": _beach,
    "meadow": _meadow,
    "city": _city,
    "desert": _desert,
    "night": _night,
    "snow": _snow,
    "forest": _forest,
    "room": _room,
}
