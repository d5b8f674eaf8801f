"""Uploaded pictures: what is taken, what is left of a file, captions, and what is noticed."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.photos import MOST, Photos
from app.workspace import Workspace, new_token
from oft_diffusion.errors import DataError


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


def bomb(path: Path) -> Path:
    """A PNG of a few kilobytes that says it has 30,000 x 30,000 pixels."""
    Image.new("1", (30_000, 30_000)).save(path)
    return path


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../evil.txt", "x" * 1000)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_what_is_no_picture_is_left_out(photos: Photos, tmp_path: Path) -> None:
    cut = io.BytesIO()
    Image.new("RGB", (64, 64)).save(cut, "PNG")
    files = [
        bomb(tmp_path / "bomb.png"),
        zipped(tmp_path / "zip.png"),
        written(tmp_path / "pickle.png", b"\x80\x04cos\nsystem\n"),
        written(tmp_path / "page.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"),
        written(tmp_path / "cut.png", cut.getvalue()[:60]),
        written(tmp_path / "empty.png", b""),
        noise(tmp_path / "good.png"),
    ]
    problems = photos.add(files)
    assert len(problems) == 6
    assert all(" was left out: " in problem for problem in problems)
    assert "too many pixels" in problems[0]
    assert len(photos.look(16)) == 1
    assert {path.suffix for path in photos.folder.iterdir()} == {".png"}


def test_there_is_a_most(photos: Photos, tmp_path: Path) -> None:
    path = noise(tmp_path / "a.png", (16, 16))
    problems = photos.add([path] * (MOST + 2))
    assert len(problems) == 2
    assert len(photos.look(16)) == MOST
