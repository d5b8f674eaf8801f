"""Drawing the pocket world with Pillow: objects, faces, hats, badges (places are in `backgrounds.py`).

Everything is drawn at `SUPERSAMPLE` times the size and averaged down. Objects are described in local units: x from -1
to 1, feet at y = 1, top near y = -0.75 (y points down), so one table entry serves every size, position and flip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]

SUPERSAMPLE = 4
INK: RGB = (38, 30, 46)
WHITE: RGB = (255, 255, 255)

COLOURS: Mapping[str, RGB] = {
    "red": (222, 48, 48),
    "orange": (246, 136, 32),
    "yellow": (250, 214, 50),
    "green": (62, 170, 70),
    "teal": (28, 160, 160),
    "blue": (52, 104, 226),
    "purple": (138, 74, 200),
    "pink": (248, 136, 186),
    "brown": (150, 98, 58),
    "white": (240, 244, 246),
}
ACCENTS: Mapping[str, RGB] = {
    "white": (252, 252, 246),
    "gold": (255, 200, 36),
    "cyan": (70, 210, 245),
    "magenta": (226, 40, 150),
    "lime": (160, 226, 50),
    "violet": (122, 76, 226),
}


def _mix(a: RGB, b: RGB, t: float) -> RGB:
    """The colour at fraction t of the way from a to b."""
    return (round(a[0] + (b[0] - a[0]) * t), round(a[1] + (b[1] - a[1]) * t), round(a[2] + (b[2] - a[2]) * t))


def _luma(c: RGB) -> float:
    return 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2]


class Primitive(NamedTuple):
    """One geometric primitive in local units: a filled polygon (width 0), or a thick line with round ends."""

    points: tuple[Point, ...]
    width: float = 0.0


def _curve(x: float, y: float, rx: float, ry: float, start: float, end: float, steps: int) -> list[Point]:
    """Points on an ellipse, angles in degrees, clockwise from the right (as Pillow has them)."""
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def poly(*points: Point) -> Primitive:
    """A filled polygon."""
    return Primitive(points)


def ell(x: float, y: float, rx: float, ry: float | None = None) -> Primitive:
    """A filled ellipse around (x, y)."""
    return poly(*_curve(x, y, rx, rx if ry is None else ry, 0, 360, 40))


def box(x0: float, y0: float, x1: float, y1: float, radius: float = 0.0) -> Primitive:
    """A filled rectangle with rounded corners."""
    corners = ((x1, y1, 0), (x0, y1, 90), (x0, y0, 180), (x1, y0, 270))
    if not radius:
        return poly(*((x, y) for x, y, _ in corners))
    r = min(radius, (x1 - x0) / 2, (y1 - y0) / 2)
    inner = [(x - r if x == x1 else x + r, y - r if y == y1 else y + r, start) for x, y, start in corners]
    return poly(*(p for x, y, start in inner for p in _curve(x, y, r, r, start, start + 90, 8)))


def line(width: float, *points: Point) -> Primitive:
    """A thick line with round ends."""
    return Primitive(points, width)


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float, width: float) -> Primitive:
    """A thick part of an ellipse, angles as `_curve` has them."""
    return line(width, *_curve(x, y, rx, ry, start, end, 16))


class Painter:
    """Puts outlined shapes, given in local units, on a picture: mirrored first, then turned about the origin."""

    def __init__(self, image: Image.Image, origin: Point, unit: float, flip: bool, tilt: float) -> None:
        self.image, self.origin, self.unit, self.flip, self.tilt = image, origin, unit, flip, tilt
        self.outline = max(1, round(0.045 * unit))

    def place(self, p: Point) -> Point:
        """Local units to pixels."""
        x, y = (-p[0] if self.flip else p[0]) * self.unit, p[1] * self.unit
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        return self.origin[0] + cos * x - sin * y, self.origin[1] + sin * x + cos * y

    def at(self, x: float, y: float, size: float = 1.0) -> Painter:
        """A painter for a part whose origin is at (x, y) and whose unit is `size` of this one's."""
        part = Painter(self.image, self.place((x, y)), self.unit * size, self.flip, self.tilt)
        part.outline = self.outline
        return part

    def on(self, image: Image.Image) -> Painter:
        """This painter on another picture."""
        return Painter(image, self.origin, self.unit, self.flip, self.tilt)

    def mask(self, *shapes: Primitive) -> Image.Image:
        """The union of the shapes, mode L, 0 or 255, of the picture's size."""
        mask = Image.new("L", self.image.size)
        pen = ImageDraw.Draw(mask)
        for shape in shapes:
            points = [self.place(p) for p in shape.points]
            if not shape.width:
                pen.polygon(points, fill=255)
                continue
            width = max(1.0, shape.width * self.unit)
            pen.line(points, fill=255, width=round(width), joint="curve")
            for x, y in (points[0], points[-1]):
                pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
        return mask

    def paint(self, fill: RGB | Image.Image, *shapes: Primitive, outline: bool = True) -> None:
        """Fills the union of the shapes with a colour or another picture, with a dark line around it."""
        mask = self.mask(*shapes)
        if (bounds := mask.getbbox()) is None:
            return
        mask = mask.crop(bounds)
        left, top = bounds[:2]
        if outline:  # pasted in eight directions: several times as fast as a maximum filter
            d = self.outline
            e = round(d * 0.7)
            for dx, dy in ((-d, 0), (d, 0), (0, -d), (0, d), (-e, -e), (e, -e), (-e, e), (e, e)):
                self.image.paste(INK, (left + dx, top + dy), mask)
        if isinstance(fill, Image.Image):
            self.image.paste(fill.crop(bounds), (left, top), mask)
        else:
            self.image.paste(fill, (left, top), mask)


class Look(NamedTuple):
    """The paints of one object: body (a patterned picture), its plain and dark shades, and the accent."""

    body: Image.Image
    shade: RGB
    accent: RGB


class Anchors(NamedTuple):
    """Where an object carries its face, hat and badge: (x, y, size) in local units, and what the face lies on."""

    face: tuple[float, float, float]
    hat: tuple[float, float, float]
    badge: tuple[float, float, float]
    face_on_accent: bool = False


def _body_picture(painter: Painter, colour: RGB, pattern: str) -> Image.Image:
    """The pattern over the whole frame, fixed to the object's own axes, lit from above."""
    second = _mix(colour, INK, 0.42) if _luma(colour) > 105 else _mix(colour, WHITE, 0.5)
    image = Image.new("RGB", painter.image.size, colour)
    marks: list[Primitive] = []
    if pattern == "striped":
        marks = [line(0.17, (x / 10 - 0.25, -1.1), (x / 10 + 0.25, 1.1)) for x in range(-14, 16, 4)]
    elif pattern == "spotted":
        marks = [ell((i + (j % 2) / 2) * 0.4, j * 0.3, 0.1) for i in range(-4, 5) for j in range(-4, 5)]
    if marks:
        painter.on(image).paint(second, *marks, outline=False)
    return image


def _mug(p: Painter, k: Look) -> None:
    p.paint(k.accent, arc(0.5, 0.2, 0.48, 0.42, -90, 90, 0.2))
    p.paint(k.body, box(-0.72, -0.6, 0.55, 1, 0.2))
    p.paint(k.shade, ell(-0.085, -0.58, 0.63, 0.15))


def _car(p: Painter, k: Look) -> None:
    p.paint(k.body, poly((-0.8, 0.2), (-0.58, -0.62), (0.5, -0.62), (0.78, 0.2)), box(-1.08, 0.1, 1.1, 0.78, 0.22))
    p.paint((206, 236, 250), poly((-0.6, 0.14), (-0.46, -0.48), (0.4, -0.48), (0.58, 0.14)))
    p.paint(k.accent, box(-1.08, 0.58, 1.1, 0.76, 0.08))
    for x in (-0.6, 0.62):
        p.paint((60, 58, 66), ell(x, 0.72, 0.29))
        p.paint(k.accent, ell(x, 0.72, 0.12), outline=False)


def _boat(p: Painter, k: Look) -> None:
    p.paint((140, 96, 60), box(-0.06, -0.75, 0.06, 0.4))
    p.paint(k.accent, poly((0.1, -0.68), (0.95, 0.16), (0.1, 0.16)))
    p.paint((250, 246, 236), poly((-0.1, -0.55), (-0.1, 0.16), (-0.75, 0.16)))
    p.paint(k.body, poly((-1.08, 0.24), (1.08, 0.24), (0.72, 0.98), (-0.72, 0.98)))


def _teapot(p: Painter, k: Look) -> None:
    p.paint(k.accent, arc(-0.68, 0.25, 0.36, 0.4, 80, 280, 0.17))
    p.paint(k.body, poly((0.45, 0.55), (0.92, -0.2), (1.14, -0.14), (0.62, 0.85)))
    p.paint(k.body, ell(0, 0.3, 0.76, 0.7))
    p.paint(k.accent, ell(0, -0.38, 0.42, 0.13))


def _house(p: Painter, k: Look) -> None:
    p.paint((150, 84, 70), box(0.42, -0.72, 0.64, -0.1))
    p.paint(k.body, box(-0.76, -0.1, 0.76, 1))
    p.paint(k.accent, poly((-1.05, 0), (0, -0.82), (1.05, 0)))
    p.paint((92, 60, 48), box(-0.17, 0.66, 0.17, 1, 0.08))


def _mushroom(p: Painter, k: Look) -> None:
    p.paint(k.accent, box(-0.36, 0.05, 0.36, 1, 0.2))
    dome = [(0.98 * math.cos(math.pi * i / 16), 0.24 - 0.98 * math.sin(math.pi * i / 16)) for i in range(17)]
    p.paint(k.body, poly(*dome), ell(0, 0.24, 0.98, 0.14))


def _robot(p: Painter, k: Look) -> None:
    p.paint(k.accent, line(0.2, (-0.6, 0.3), (-0.9, 0.7)), line(0.2, (0.6, 0.3), (0.9, 0.7)))
    p.paint(k.accent, box(-0.48, 0.78, -0.1, 1, 0.08), box(0.1, 0.78, 0.48, 1, 0.08))
    p.paint(k.accent, box(-0.74, -0.42, 0.74, -0.12, 0.06))
    p.paint(k.body, box(-0.58, 0.16, 0.58, 0.86, 0.1))
    p.paint(k.body, box(-0.6, -0.66, 0.6, 0.14, 0.16))


def _tree(p: Painter, k: Look) -> None:
    p.paint((112, 76, 48), box(-0.13, 0.3, 0.13, 0.75))
    p.paint(k.accent, poly((-0.42, 0.66), (0.42, 0.66), (0.32, 1), (-0.32, 1)))
    p.paint(k.body, ell(0, -0.25, 0.62, 0.5), ell(-0.46, 0.12, 0.46, 0.4), ell(0.46, 0.12, 0.46, 0.4))


def _cat(p: Painter, k: Look) -> None:
    p.paint(k.body, arc(0.55, 0.6, 0.38, 0.42, -60, 110, 0.17))
    p.paint(k.body, ell(0, 0.56, 0.54, 0.46))
    p.paint(k.body, poly((-0.62, -0.1), (-0.62, -0.78), (-0.08, -0.5)), poly((0.62, -0.1), (0.62, -0.78), (0.08, -0.5)))
    p.paint(k.accent, poly((-0.54, -0.3), (-0.54, -0.62), (-0.28, -0.46)), outline=False)
    p.paint(k.accent, poly((0.54, -0.3), (0.54, -0.62), (0.28, -0.46)), outline=False)
    p.paint(k.body, ell(0, -0.12, 0.66, 0.48))
    p.paint(k.accent, box(-0.4, 0.28, 0.4, 0.44, 0.07))


def _rocket(p: Painter, k: Look) -> None:
    p.paint((255, 150, 40), poly((-0.26, 0.75), (0.26, 0.75), (0, 1.12)))
    p.paint(k.accent, poly((-0.3, 0.2), (-0.9, 0.92), (-0.25, 0.75)), poly((0.3, 0.2), (0.9, 0.92), (0.25, 0.75)))
    side = [(0.52 * math.cos(a) ** 0.8, 0.25 - 1.05 * math.sin(a)) for a in (math.pi / 2 * i / 12 for i in range(12))]
    p.paint(k.body, poly((-0.36, 0.8), (0.36, 0.8), *side, (0, -0.8), *[(-x, y) for x, y in reversed(side)]))


def _flower(p: Painter, k: Look) -> None:
    p.paint((58, 148, 62), line(0.13, (0, 0.4), (0, 0.95)))
    p.paint((58, 148, 62), ell(-0.34, 0.78, 0.3, 0.13), ell(0.34, 0.78, 0.3, 0.13))
    p.paint(
        k.body, *(ell(0.5 * math.cos(t), 0.5 * math.sin(t) - 0.2, 0.3) for t in (math.tau * i / 8 for i in range(8)))
    )
    p.paint(k.accent, ell(0, -0.2, 0.46))


def _fish(p: Painter, k: Look) -> None:
    p.paint(k.accent, poly((0.5, 0.22), (1.08, -0.28), (0.98, 0.24), (1.08, 0.76)))
    p.paint(k.accent, poly((-0.4, -0.2), (0.3, -0.5), (0.4, 0)), poly((-0.2, 0.7), (0.3, 0.96), (0.3, 0.5)))
    p.paint(k.body, ell(-0.12, 0.22, 0.82, 0.58))


OBJECTS: Mapping[str, tuple[Callable[[Painter, Look], None], Anchors]] = {
    "mug": (_mug, Anchors((-0.08, 0.06, 1.0), (-0.08, -0.56, 0.95), (-0.08, 0.68, 0.9))),
    "car": (_car, Anchors((0.0, -0.2, 0.9), (-0.04, -0.58, 0.9), (0.02, 0.44, 0.95))),
    "boat": (_boat, Anchors((0.0, 0.56, 0.95), (0.0, -0.7, 0.75), (0.38, -0.1, 0.9))),
    "teapot": (_teapot, Anchors((0.0, 0.16, 1.0), (0.0, -0.42, 0.9), (0.0, 0.73, 0.9))),
    "house": (_house, Anchors((0.0, 0.3, 0.95), (0.0, -0.7, 0.85), (0.0, -0.26, 0.95))),
    "mushroom": (_mushroom, Anchors((0.0, -0.1, 1.05), (0.0, -0.66, 0.95), (0.0, 0.66, 0.95))),
    "robot": (_robot, Anchors((0.0, -0.26, 1.0), (0.0, -0.62, 0.9), (0.0, 0.5, 1.0))),
    "tree": (_tree, Anchors((0.0, -0.2, 1.0), (0.0, -0.66, 0.9), (0.0, 0.32, 0.9))),
    "cat": (_cat, Anchors((0.0, -0.12, 1.0), (0.0, -0.52, 0.8), (0.0, 0.7, 0.95))),
    "rocket": (_rocket, Anchors((0.0, -0.14, 0.9), (0.0, -0.66, 0.75), (0.0, 0.46, 0.95))),
    "flower": (_flower, Anchors((0.0, -0.2, 0.9), (0.0, -0.86, 0.8), (0.0, 0.74, 0.95), True)),
    "fish": (_fish, Anchors((-0.36, 0.1, 0.95), (-0.3, -0.3, 0.9), (0.32, 0.3, 1.0))),
}


def _draw_face(p: Painter, face: str, ink: RGB) -> None:
    """A face in its own units: eyes 0.25 left and right of the origin."""
    for x in (-0.25, 0.25):
        if face == "smile":
            p.paint(WHITE, ell(x, -0.06, 0.17, 0.19))
            p.paint(INK, ell(x, -0.04, 0.1, 0.12), outline=False)
        elif face == "sleepy":
            p.paint(ink, arc(x, -0.1, 0.16, 0.14, 0, 180, 0.11), outline=False)
        elif face == "surprised":
            p.paint(WHITE, ell(x, -0.1, 0.22, 0.25))
            p.paint(INK, ell(x, -0.1, 0.07), outline=False)
    if face == "smile":
        p.paint(ink, arc(0, 0.14, 0.22, 0.17, 10, 170, 0.085), outline=False)
    elif face == "sleepy":
        p.paint(ink, line(0.1, (-0.08, 0.2), (0.08, 0.2)), outline=False)
    elif face == "surprised":
        p.paint((196, 40, 60), ell(0, 0.3, 0.11, 0.13))


def _draw_hat(p: Painter, hat: str, accent: RGB) -> None:
    """A hat in its own units, which sits on the origin."""
    if hat == "party":
        p.paint(accent, poly((-0.36, 0.1), (0.36, 0.1), (0.04, -0.66)))
        p.paint(WHITE, poly((-0.25, -0.14), (-0.19, -0.26), (0.25, -0.12), (0.31, 0.02)), outline=False)
        p.paint(WHITE, ell(0.04, -0.66, 0.12))
    elif hat == "top":
        p.paint((58, 54, 66), box(-0.54, -0.06, 0.54, 0.1, 0.05), box(-0.34, -0.64, 0.34, 0.05, 0.04))
        p.paint(accent, box(-0.34, -0.26, 0.34, -0.06), outline=False)
    elif hat == "crown":
        top = ((-0.5, -0.46), (-0.24, -0.2), (0, -0.58), (0.24, -0.2), (0.5, -0.46))
        p.paint(accent, poly((-0.4, 0.1), *top, (0.4, 0.1)))
        p.paint((230, 50, 70), ell(0, -0.08, 0.09), outline=False)
    elif hat == "bow":
        p.paint(accent, poly((0, -0.1), (-0.5, -0.4), (-0.5, 0.16)), poly((0, -0.1), (0.5, -0.4), (0.5, 0.16)))
        p.paint(accent, ell(0, -0.1, 0.15))
    elif hat == "beanie":
        dome = [(0.46 * math.cos(math.pi * i / 12), -0.5 * math.sin(math.pi * i / 12)) for i in range(13)]
        p.paint(accent, poly(*dome))
        p.paint(WHITE, ell(0, -0.5, 0.15))
        p.paint(WHITE, box(-0.52, -0.08, 0.52, 0.12, 0.08))


def _draw_badge(p: Painter, badge: str) -> None:
    """A badge in its own units. Each has one colour of its own, so that it stands out on every body and accent."""
    if badge == "star":
        tips = [(0.27 * (1 - 0.55 * (i % 2)), math.pi * (i / 5 - 0.5)) for i in range(10)]
        p.paint((255, 226, 70), poly(*((r * math.cos(a), r * math.sin(a)) for r, a in tips)))
    elif badge == "heart":
        wings = (ell(-0.11, -0.07, 0.13), ell(0.11, -0.07, 0.13))
        p.paint((232, 44, 72), *wings, poly((-0.22, 0), (0.22, 0), (0, 0.26)))
    elif badge == "ring":
        p.paint(WHITE, ell(0, 0, 0.22))
        p.paint((60, 90, 200), ell(0, 0, 0.1))


def draw_object(
    frame: Image.Image,
    *,
    kind: str,
    colour: str,
    pattern: str,
    accent: str,
    face: str,
    hat: str,
    badge: str,
    x: float,
    y: float,
    scale: float,
    flip: bool,
    tilt: float,
    dark: bool,
) -> None:
    """Draws one object on a frame, in place. Lengths are fractions of the frame; it stands at `y`, turned by `tilt`."""
    side = frame.size[0]
    lean, unit = math.radians(tilt), scale * side
    feet = (x * side, y * side)
    # The painter's origin is one unit above the feet, about which the object is turned.
    origin = (feet[0] + math.sin(lean) * unit, feet[1] - math.cos(lean) * unit)
    painter = Painter(frame, origin, unit, flip, lean)
    ground = Painter(frame, feet, unit, flip, 0.0).mask(ell(0, 0, 1.02, 0.13))
    frame.paste((8, 8, 24) if dark else (40, 36, 52), (0, 0), ground.point([value * 90 // 255 for value in range(256)]))
    base, second = COLOURS[colour], ACCENTS[accent]
    paint_object, anchors = OBJECTS[kind]
    paint_object(painter, Look(_body_picture(painter, base, pattern), _mix(base, INK, 0.55), second))
    under = second if anchors.face_on_accent else base
    _draw_badge(painter.at(*anchors.badge), badge)
    _draw_face(painter.at(*anchors.face), face, WHITE if _luma(under) < 70 else INK)
    _draw_hat(painter.at(*anchors.hat), hat, second)


def finish(frame: Image.Image, size: int, light: float, warmth: float, corner: Point, zoom: float) -> Image.Image:
    """Cuts out a window of 1 / zoom of the side, averages it down to `size`, and sets brightness and warmth."""
    side = frame.size[0]
    left, top, width = corner[0] * side, corner[1] * side, side / zoom
    box = (left, top, min(side, left + width), min(side, top + width))
    image = frame.resize((size, size), Image.Resampling.BOX, box=box, reducing_gap=None)
    tables = [[min(255, round(v * light * (1 + sign * warmth))) for v in range(256)] for sign in (1, 0, -1)]
    return image.point([value for table in tables for value in table])
