"""Uploaded pictures: what is taken, what is left of a file, captions, and what is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.photos import MOST, Photos
from app.workspace import Workspace, new_token
from oft_diffusion.errors import DataError
from tests.helpers.hostile_files import hostile_pictures


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    return Photos(Workspace(tmp_path / "work"), new_token())


def noise(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, **options: Any) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_nothing_but_pixels_is_kept_and_pictures_are_upright(photos: Photos, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    exif[0x010F] = "A camera"
    path = noise(tmp_path / "a.jpg", (80, 40), exif=exif, comment=b"secret")
    assert photos.add([path]) == []
    [photo] = photos.look(16)
    assert photo.size == (40, 80)
    assert photo.path.suffix == ".png"
    with Image.open(photo.path) as picture:
        assert dict(picture.getexif()) == {}
        assert picture.info == {}
    assert b"secret" not in photo.path.read_bytes()


def test_large_pictures_are_shrunk(photos: Photos, tmp_path: Path) -> None:
    photos.add([noise(tmp_path / "large.png", (3000, 1500))])
    assert photos.look(16)[0].size == (2048, 1024)


def test_captions_come_with_files_and_are_edited(photos: Photos, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red\n  car")
    photos.add([noise(tmp_path / "a.png"), tmp_path / "a.txt", noise(tmp_path / "b.png", seed=1)])
    first, second = photos.look(16)
    assert (first.caption, second.caption) == ("a red car", "")
    photos.describe(second.id, "<script>")
    photos.describe(first.id, "  ")
    assert [photo.caption for photo in photos.look(16)] == ["", "<script>"]
    assert photos.count() == 2
    photos.copy_to(tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["01.png", "02.png", "02.txt"]
    photos.remove(first.id)
    assert [photo.id for photo in photos.look(16)] == [second.id]
    for act in (photos.remove, lambda name: photos.describe(name, "x")):
        for name in (first.id, "../other", ""):
            with pytest.raises(DataError):
                act(name)
    photos.clear()
    assert list(photos.folder.iterdir()) == []


def test_small_blurred_and_doubled_ones_are_noticed(photos: Photos, tmp_path: Path) -> None:
    sharp = noise(tmp_path / "1.png", (64, 64))
    flat = tmp_path / "2.png"
    Image.linear_gradient("L").convert("RGB").save(flat)
    again = tmp_path / "3.jpg"
    Image.open(sharp).save(again, quality=90)
    photos.add([sharp, flat, again])
    notes = [photo.notes for photo in photos.look(128)]
    assert notes[0] == ("smaller than 128 pixels: it will be enlarged",)
    assert notes[1] == ("it looks blurred",)
    assert "nearly the same as picture 1" in notes[2]


def test_what_is_no_picture_is_left_out(photos: Photos, tmp_path: Path) -> None:
    files = hostile_pictures(tmp_path)
    problems = photos.add([*files, noise(tmp_path / "good.png")])
    assert [problem.partition(" was left out: ")[0] for problem in problems] == [path.name for path in files]
    assert "too many pixels" in problems[0]
    assert "bomb.png was left out: it has 81,000,000 pixels" in problems
    assert "script.jpg was left out: it is no PNG, JPEG or WebP picture" in problems
    assert len(photos.look(16)) == 1
    assert {path.suffix for path in photos.folder.iterdir()} == {".png"}


def test_there_is_a_most(photos: Photos, tmp_path: Path) -> None:
    path = noise(tmp_path / "a.png", (16, 16))
    [problem] = photos.add([path] * (MOST + 3))
    assert problem == f"a.png and 2 more were left out: {MOST} pictures are the most"
    assert photos.add([path]) == [f"a.png was left out: {MOST} pictures are the most"]
    assert len(photos.look(16)) == MOST
