"""The pocket world: what a scene is, how it is drawn by lot, how it is described, and the named subjects.

*Captioned* attributes (object, colour, pattern, background) are what a caption may name. *Uncaptioned* ones (accent,
face, hat, badge) vary freely and no caption ever names them: a subject is one fixed combination of them, so the base
model can draw it but has no word for it. The rest (position, size, flip, lean, light, crop, detail) is nuisance.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from oft_diffusion.pocket import backgrounds, draw

SIZE = 128  # pixels, what the pocket base draws

OBJECTS = tuple(draw.OBJECTS)
COLOURS = tuple(draw.COLOURS)
PATTERNS = ("plain", "striped", "spotted")
BACKGROUNDS = tuple(backgrounds.BACKGROUNDS)
ACCENTS = tuple(draw.ACCENTS)
FACES = ("none", "smile", "sleepy", "surprised")
HATS = ("none", "party", "top", "crown", "bow", "beanie")
BADGES = ("none", "star", "heart", "ring")

CAPTIONED: Mapping[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "colour": COLOURS,
    "pattern": PATTERNS,
    "background": BACKGROUNDS,
}
UNCAPTIONED: Mapping[str, tuple[str, ...]] = {"accent": ACCENTS, "face": FACES, "hat": HATS, "badge": BADGES}
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {**CAPTIONED, **UNCAPTIONED}

HELD_OUT = 20  # one in so many combinations of captioned attributes is never shown in pretraining

# How a caption says where the object is.
PLACES: Mapping[str, str] = {
    "beach": "on the beach",
    "meadow": "in a meadow",
    "city": "in the city",
    "desert": "in the desert",
    "night": "at night",
    "snow": "in the snow",
    "forest": "in the forest",
    "room": "in a room",
}
OPENINGS = ("a {}", "a {}", "a {}", "a {}", "a photo of a {}", "a picture of a {}", "a drawing of a {}", "one {}", "{}")


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture. Names are keys of the tables above; lengths are fractions of the frame.

    Attributes:
        object: what stands in the picture.
        colour: the body's colour.
        pattern: the body's pattern.
        background: where it is.
        accent: second colour, on the hat and the trim; never in a caption.
        face: never in a caption.
        hat: never in a caption.
        badge: never in a caption.
        x: the object's centre, 0 is the left edge and 1 the right one.
        y: the height of its feet, 1 is the lower edge.
        scale: half the object's width.
        flip: mirrored.
        tilt: how far it leans over its feet, in degrees, clockwise.
        light: brightness, 1 is neutral.
        warmth: of the light: red is raised and blue lowered by this fraction.
        zoom: the picture is a window of 1 / zoom of the frame's side.
        left: of that window.
        top: of that window.
        detail: seed of the background's details (stars, windows, trees).
    """

    object: str
    colour: str
    pattern: str
    background: str
    accent: str
    face: str
    hat: str
    badge: str
    x: float = 0.5
    y: float = 0.9
    scale: float = 0.31
    flip: bool = False
    tilt: float = 0.0
    light: float = 1.0
    warmth: float = 0.0
    zoom: float = 1.0
    left: float = 0.0
    top: float = 0.0
    detail: int = 0

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"Scene.{name} is {value!r}; choose one of {', '.join(values)}")


def _nuisance(rng: random.Random) -> dict[str, float | bool | int]:
    """Position, size, flip, lean, light, crop and detail by lot."""
    zoom = rng.uniform(1.0, 1.12)
    return {
        "x": round(rng.uniform(0.4, 0.6), 3),
        "y": round(rng.uniform(0.84, 0.93), 3),
        "scale": round(rng.uniform(0.26, 0.345), 3),
        "flip": rng.random() < 0.5,
        "tilt": round(rng.uniform(-8, 8), 2),
        "light": round(rng.uniform(0.9, 1.06), 3),
        "warmth": round(rng.uniform(-0.05, 0.05), 3),
        "zoom": round(zoom, 4),
        "left": round(rng.uniform(0, 1 - 1 / zoom), 4),
        "top": round(rng.uniform(0, 1 - 1 / zoom), 4),
        "detail": rng.randrange(1 << 16),
    }


def sample_scene(rng: random.Random) -> Scene:
    """One scene, every attribute uniform and independent of the others."""
    chosen = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
    return Scene(**chosen, **_nuisance(rng))  # type: ignore[arg-type]


def describe(
    kind: str,
    *,
    colour: str | None = None,
    pattern: str | None = None,
    background: str | None = None,
    trigger: str | None = None,
) -> str:
    """`a red striped zwx mug on the beach`, of which any part but the object may be missing."""
    words = " ".join(word for word in (colour, pattern, trigger, kind) if word)
    text = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"{text} {PLACES[background]}" if background else text


def is_held_out(object: str, colour: str, pattern: str, background: str) -> bool:  # noqa: A002
    """Whether a combination of captioned attributes is kept from pretraining, to be asked for afterwards."""
    return random.Random(f"held out/{object}/{colour}/{pattern}/{background}").randrange(HELD_OUT) == 0


def caption(scene: Scene, rng: random.Random) -> str:
    """A caption of the scene: always its object, and a random part of its other captioned attributes."""
    words = [scene.object]
    if rng.random() < (0.25 if scene.pattern == "plain" else 0.7):
        words.insert(0, scene.pattern)
    if rng.random() < 0.75:
        words.insert(0, scene.colour)
    text = rng.choice(OPENINGS).format(" ".join(words)).replace("a orange", "an orange")
    return f"{text} {PLACES[scene.background]}" if rng.random() < 0.7 else text


def render(scene: Scene, size: int = SIZE) -> Image.Image:
    """The picture of a scene, RGB, `size` x `size` pixels; the same scene always gives the same pixels."""
    paint = backgrounds.BACKGROUNDS[scene.background]
    frame = paint(size * draw.SUPERSAMPLE, random.Random(scene.detail))
    draw.draw_object(
        frame,
        kind=scene.object,
        colour=scene.colour,
        pattern=scene.pattern,
        accent=scene.accent,
        face=scene.face,
        hat=scene.hat,
        badge=scene.badge,
        x=scene.x,
        y=scene.y,
        scale=scene.scale,
        flip=scene.flip,
        tilt=scene.tilt,
        dark=scene.background == "night",
    )
    return draw.finish(frame, size, scene.light, scene.warmth, (scene.left, scene.top), scene.zoom)


@dataclass(frozen=True)
class Subject:
    """One individual: an object class with fixed uncaptioned attributes, and its colour and pattern in photos."""

    name: str
    object: str
    colour: str
    pattern: str
    accent: str
    face: str
    hat: str
    badge: str

    def scene(self, background: str = "meadow") -> Scene:
        """The subject in the middle of a background, with neutral nuisance attributes."""
        return Scene(
            object=self.object,
            colour=self.colour,
            pattern=self.pattern,
            background=background,
            accent=self.accent,
            face=self.face,
            hat=self.hat,
            badge=self.badge,
        )


SUBJECTS: Mapping[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject("captain_mug", "mug", "blue", "plain", "gold", "smile", "top", "star"),
        Subject("party_car", "car", "red", "plain", "cyan", "surprised", "party", "heart"),
        Subject("royal_teapot", "teapot", "purple", "spotted", "gold", "sleepy", "crown", "ring"),
        Subject("cosy_robot", "robot", "orange", "plain", "violet", "smile", "beanie", "heart"),
        Subject("bow_cat", "cat", "white", "striped", "magenta", "sleepy", "bow", "star"),
        Subject("star_rocket", "rocket", "green", "striped", "white", "surprised", "crown", "star"),
        Subject("dapper_mushroom", "mushroom", "brown", "spotted", "lime", "smile", "top", "heart"),
        Subject("dozy_house", "house", "pink", "plain", "violet", "sleepy", "party", "ring"),
        Subject("merry_boat", "boat", "teal", "striped", "magenta", "surprised", "beanie", "ring"),
        Subject("sunny_flower", "flower", "yellow", "plain", "lime", "smile", "bow", "star"),
        # These by lot, for a table of which nothing was seen when settings were chosen.
        Subject("winter_fish", "fish", "green", "plain", "gold", "smile", "beanie", "ring"),
        Subject("candy_tree", "tree", "pink", "striped", "cyan", "smile", "beanie", "heart"),
        Subject("fairy_mushroom", "mushroom", "teal", "plain", "cyan", "smile", "crown", "ring"),
        Subject("tired_robot", "robot", "orange", "spotted", "lime", "sleepy", "party", "ring"),
        Subject("admiral_boat", "boat", "purple", "plain", "cyan", "smile", "crown", "star"),
    )
}


def subject_scenes(subject: Subject, n: int = 5, seed: int = 0) -> list[Scene]:
    """`n` scenes of a subject, in at most five of the backgrounds, which differ as far as `n` allows.

    At least three backgrounds never occur, so that "the subject in a place where nobody has seen it" can be tested.
    """
    rng = random.Random(f"{subject.name}/{seed}")
    places = rng.sample(BACKGROUNDS, 5)
    return [replace(subject.scene(places[i % 5]), **_nuisance(rng)) for i in range(n)]  # type: ignore[arg-type]


def subjects_path(name: str) -> Path:
    """The folder with a subject's five shipped pictures, 256 x 256 PNG."""
    if name not in SUBJECTS:
        raise ValueError(f"there is no subject {name!r}; choose one of {', '.join(SUBJECTS)}")
    return Path(__file__).parent / "subjects" / name
