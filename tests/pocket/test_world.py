import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from oft_diffusion.pocket.world import (
    ACCENTS,
    BACKGROUNDS,
    CAPTIONED,
    SUBJECTS,
    UNCAPTIONED,
    Scene,
    caption,
    render,
    sample_scene,
    subject_scenes,
    subjects_path,
)


def difference(a: Image.Image, b: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(a, dtype=np.int16) - np.asarray(b, dtype=np.int16))


@pytest.fixture
def scene() -> Scene:
    return Scene("mug", "red", "plain", "meadow", "gold", "smile", "party", "star")


def test_same_seed_gives_the_same_scene_caption_and_pixels():
    first, second = (sample_scene(random.Random(7)) for _ in range(2))
    assert first == second
    assert caption(first, random.Random(1)) == caption(second, random.Random(1))
    assert render(first).tobytes() == render(second).tobytes()


@pytest.mark.parametrize("size", [64, 128])
def test_a_picture_has_the_size_asked_for(scene, size):
    assert render(scene, size).size == (size, size)
    assert render(scene, size).mode == "RGB"


def test_sizes_show_the_same_picture(scene):
    assert difference(render(scene, 128).reduce(2), render(scene, 64)).mean() < 4


@pytest.mark.parametrize("name", [*CAPTIONED, *UNCAPTIONED])
def test_every_value_of_every_attribute_gives_its_own_picture(scene, name):
    values = {**CAPTIONED, **UNCAPTIONED}[name]
    pictures = [render(replace(scene, **{name: value})) for value in values]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            changed = (difference(a, b).max(axis=2) > 40).sum()
            assert changed > 20, f"{name}: two values look the same"


@pytest.mark.parametrize(
    "change",
    [
        {"x": 0.45},
        {"y": 0.88},
        {"scale": 0.29},
        {"flip": True},
        {"light": 0.9},
        {"tilt": 6.0},
        {"warmth": 0.05},
        {"zoom": 1.1},
        {"zoom": 1.1, "left": 0.05},
        {"zoom": 1.1, "top": 0.05},
    ],
)
def test_nuisance_attributes_change_the_picture(scene: Scene, change: dict[str, Any]) -> None:
    assert difference(render(scene), render(replace(scene, **change))).max() > 10


@pytest.mark.thinned(5)
@pytest.mark.parametrize("kind", CAPTIONED["object"])
def test_uncaptioned_attributes_are_visible_on_every_object(kind):
    bare = Scene(kind, "teal", "plain", "snow", ACCENTS[0], "none", "none", "none")
    for name, values in UNCAPTIONED.items():
        for value in values[1:]:
            other: dict[str, Any] = {name: value}
            changed = (difference(render(bare), render(replace(bare, **other))).max(axis=2) > 40).sum()
            assert changed >= 15, f"{name}={value} hardly shows on a {kind}"


def test_captions_name_the_object_and_never_an_uncaptioned_attribute():
    secret = {v for name in ("face", "hat", "badge") for v in UNCAPTIONED[name] if v != "none"}
    secret |= set(ACCENTS) - set(CAPTIONED["colour"])
    rng = random.Random(0)
    for _ in range(2000):
        scene = sample_scene(rng)
        words = caption(scene, rng).split()
        assert scene.object in words
        assert not secret & set(words)
        # White is both a colour and an accent: a caption may only mean the colour.
        assert {w for w in words if w in CAPTIONED["colour"]} <= {scene.colour}
        assert {w for w in words if w in CAPTIONED["pattern"]} <= {scene.pattern}


def test_a_caption_does_not_depend_on_uncaptioned_attributes():
    rng = random.Random(0)
    for i in range(200):
        scene, other = sample_scene(rng), sample_scene(rng)
        twin = replace(scene, **{name: getattr(other, name) for name in UNCAPTIONED})
        assert caption(scene, random.Random(i)) == caption(twin, random.Random(i))


def test_captions_leave_parts_out():
    rng = random.Random(0)
    texts = {caption(Scene("mug", "red", "striped", "snow", "gold", "none", "none", "none"), rng) for _ in range(500)}
    assert {"a mug", "a red mug", "a mug in the snow", "a red striped mug in the snow"} <= texts


def test_a_wrong_name_is_refused_and_the_right_ones_are_listed(scene):
    with pytest.raises(ValueError, match="mushroom"):
        replace(scene, object="submarine")
    with pytest.raises(ValueError, match="captain_mug"):
        subjects_path("nobody")


def test_there_are_enough_subjects_and_no_two_look_alike():
    assert len(SUBJECTS) >= 8
    looks = {(s.object, s.accent, s.face, s.hat, s.badge) for s in SUBJECTS.values()}
    assert len(looks) == len(SUBJECTS)


@pytest.mark.parametrize("name", SUBJECTS)
def test_subject_scenes_keep_the_subject_and_leave_three_backgrounds_unseen(name):
    subject = SUBJECTS[name]
    scenes = subject_scenes(subject, 5)
    assert len({scene.background for scene in scenes}) == 5
    assert len({(scene.x, scene.y, scene.scale) for scene in scenes}) == 5
    for scene in subject_scenes(subject, 12):
        assert {n: getattr(scene, n) for n in UNCAPTIONED} == {n: getattr(subject, n) for n in UNCAPTIONED}
        assert (scene.object, scene.colour, scene.pattern) == (subject.object, subject.colour, subject.pattern)
    assert len(set(BACKGROUNDS) - {s.background for s in subject_scenes(subject, 12)}) >= 3


@pytest.mark.parametrize("name", SUBJECTS)
def test_shipped_pictures_are_what_the_world_draws(name):
    files = sorted(subjects_path(name).glob("*.png"))
    assert [file.name for file in files] == ["01.png", "02.png", "03.png", "04.png", "05.png"]
    for file, scene in zip(files, subject_scenes(SUBJECTS[name], 5), strict=True):
        # Another Pillow may round an edge otherwise; another world would differ by far more.
        assert difference(Image.open(file), render(scene, 256)).mean() < 0.5
        caption = file.with_suffix(".txt").read_text(encoding="utf-8").split()
        assert {scene.object, scene.colour} <= set(caption)
        assert (scene.pattern in caption) is (scene.pattern != "plain")
