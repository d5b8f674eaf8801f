"""Real image files of every kind, captions, and the draws from which all randomness comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from oft_diffusion.errors import DataError
from oft_diffusion.images import read_picture
from oft_diffusion.training import TrainConfig
from oft_diffusion.training.data import (
    WHOLE,
    crops,
    draw,
    epoch_order,
    instance_pictures,
    normalise,
    place_trigger,
    square_pixels,
)
from tests.helpers.tiny_sd import draw_pictures

Config = Callable[..., TrainConfig]


def gradient(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    rgb = np.stack([x * 255 // size[0], y * 255 // size[1], np.full_like(x, 60)], -1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


WRITABLE = {
    ".png": ("RGB", "L", "RGBA", "LA", "P", "1"),
    ".jpg": ("RGB", "L", "CMYK"),
    ".JPEG": ("RGB", "L", "CMYK"),
    ".webp": ("RGB", "L", "RGBA"),
}


@pytest.mark.parametrize(("suffix", "mode"), [(s, m) for s, modes in WRITABLE.items() for m in modes])
def test_modes_and_formats(suffix: str, mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"image{suffix}"
    gradient(mode).save(path, quality=95)
    read = read_picture(path)
    assert (read.mode, read.size) == ("RGB", (40, 24))
    meant = np.asarray(gradient(mode).convert("RGB"), dtype=float)
    assert np.abs(np.asarray(read, dtype=float) - meant).mean() < 8


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 24 * 24).reshape(24, 24).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    read = np.asarray(read_picture(tmp_path / "deep.png"))[..., 0]
    assert np.abs(read.astype(int) - values // 256).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparency_becomes_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (24, 24), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 12, 24))
    image.convert(mode).save(tmp_path / "clear.png")
    read = read_picture(tmp_path / "clear.png")
    assert read.getpixel((20, 5)) == (255, 255, 255)
    assert read.getpixel((3, 5)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    # What a camera stores is the upright picture under the inverse of the operation that the tag asks a viewer for.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    upright = gradient()
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=98)
    read = read_picture(tmp_path / "photo.jpg")
    assert read.size == upright.size
    assert np.abs(np.asarray(read, dtype=float) - np.asarray(upright, dtype=float)).mean() < 4


@given(st.integers(20, 90), st.integers(20, 90))
def test_pixels_are_the_central_square(tmp_path_factory, width: int, height: int) -> None:
    path = tmp_path_factory.mktemp("square") / "x.png"
    image = Image.new("RGB", (width, height), "black")
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image.paste((255, 255, 255), (left, top, left + side, top + side))
    image.save(path)
    pixels = square_pixels(read_picture(path), 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.uint8
    assert (pixels[:, 3:-3, 3:-3] > 240).all()
    assert normalise(pixels).min() >= -1
    assert normalise(pixels).max() <= 1


# -- bad input: one sentence each -------------------------------------------------------------------------------------


def refused(config: TrainConfig) -> str:
    with pytest.raises(DataError) as caught:
        instance_pictures(config)
    assert "Expected:" in str(caught.value)
    assert "Fix:" in str(caught.value)
    return str(caught.value)


def test_folders_without_enough_pictures(config: Config, tmp_path: Path) -> None:
    assert "is no folder" in refused(config(instance_dir=str(tmp_path / "none")))
    (tmp_path / "x").mkdir()
    assert "holds no images at all" in refused(config(instance_dir=str(tmp_path / "x")))
    (tmp_path / "x" / "photo.heic").touch()
    assert "holds no images; it holds photo.heic" in refused(config(instance_dir=str(tmp_path / "x")))
    draw_pictures(tmp_path / "one", count=1)
    assert "holds one image only (picture_0.png)" in refused(config(instance_dir=str(tmp_path / "one")))


def test_two_pictures_are_few(config: Config, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "two", count=2)
    pictures, notes = instance_pictures(config(instance_dir=str(tmp_path / "two")))
    assert len(pictures) == 2
    assert "from 3 to 8" in notes[0]


def test_every_bad_picture_is_named(config: Config, tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "p", count=3)
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(40))
    whole = (folder / "picture_0.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.webp").touch()
    Image.new("RGB", (5, 90)).save(folder / "thin.png")
    message = refused(config(instance_dir=str(folder)))
    assert "4 of 7 images" in message
    assert all(name in message for name in ("cut.jpg", "half.png", "empty.webp", "thin.png is 5 pixels"))


def test_decompression_bomb(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw_pictures(tmp_path / "p", count=2)
    Image.new("L", (60, 60)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert "bomb.png has more pixels than 2,000" in refused(config(instance_dir=str(folder)))


def test_ignored_files_are_named(config: Config, tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "p", count=3)
    for name in ("raw.HEIC", ".DS_Store", "picture_0.txt", "other.txt"):
        (folder / name).write_text("sks")
    _, notes = instance_pictures(config(instance_dir=str(folder)))
    assert notes == ["not PNG, JPEG or WebP, hence ignored: raw.HEIC"]


def test_small_pictures_are_named_but_used(config: Config, tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "p", count=3, side=24)
    _, notes = instance_pictures(config(instance_dir=str(folder), resolution=32))
    assert "enlarged to 32 pixels" in notes[0]


# -- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a sks mug on a table", "a sks mug on a table"),
        ("a Mug on a table", "a sks Mug on a table"),
        ("a mug beside a mug", "a sks mug beside a mug"),
        ("something red, in a room", "sks mug, something red, in a room"),
        ("a smug cat", "sks mug, a smug cat"),
        ("the SKS mug", "the SKS mug"),
        ("a mug, sks", "a mug, sks"),
    ],
)
def test_place_trigger(caption: str, expected: str) -> None:
    assert place_trigger(caption, "sks", "mug") == expected


def test_class_of_several_words() -> None:
    assert place_trigger("a coffee  mug", "sks", "coffee mug") == "a sks coffee  mug"
    assert place_trigger("a mug of coffee", "sks", "coffee mug") == "sks coffee mug, a mug of coffee"


def test_captions_beside_the_pictures(config: Config, tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "p", count=3)
    (folder / "picture_0.txt").write_text("﻿a mug\non a table\n", encoding="utf-8")
    (folder / "picture_1.txt").write_text("  \n")
    pictures, notes = instance_pictures(config(instance_dir=str(folder)))
    assert [p.prompt for p in pictures] == ["a sks mug on a table", "a photo of sks mug", "a photo of sks mug"]
    assert any("lack the trigger 'sks'" in note and "picture_0.txt" in note for note in notes)
    assert any("empty captions" in note and "picture_1.txt" in note for note in notes)
    (folder / "picture_2.txt").write_bytes(b"caf\xe9 sks")
    assert "is not UTF-8" in refused(config(instance_dir=str(folder)))


# -- draws ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(0, 20))
def test_an_epoch_shows_every_picture_once(seed: int, pictures: int, epoch: int) -> None:
    order = epoch_order(seed, "instance", epoch, pictures)
    assert sorted(order) == list(range(pictures))
    numbers = [epoch * pictures + i for i in range(pictures)]
    indices = [draw(seed, "instance", n, pictures, (1, 2, 2)).index for n in numbers]
    assert tuple(indices) == order


def test_draws_depend_on_seed_stream_and_number_only() -> None:
    def one(seed: int = 1, stream: str = "instance", number: int = 5) -> torch.Tensor:
        return draw(seed, stream, number, 3, (4, 8, 8)).noise

    torch.manual_seed(0)
    first = one()
    torch.manual_seed(1)
    assert first.equal(one())
    # neighbouring seeds must not share noise, shifted by one: runs with several seeds are to be independent
    for other in (one(seed=2), one(number=6), one(stream="class"), one(seed=2, number=4), one(seed=0, number=6)):
        assert abs(float((first * other).mean())) < 0.3


def test_crops_lie_within_the_square_and_depend_on_seed_and_name_only() -> None:
    assert crops(0, Path("a.png"), 1.0) == [WHOLE]
    found = crops(0, Path("a.png"), 0.7)
    assert found[0] == WHOLE
    assert len(set(found)) == 8
    for left, top, side in found:
        assert 0.7 <= side <= 1.0
        assert min(left, top) >= 0.0
        assert max(left, top) + side <= 1.0 + 1e-9
    assert found == crops(0, Path("elsewhere/a.png"), 0.7)
    assert found[1:] != crops(1, Path("a.png"), 0.7)[1:]
    assert found[1:] != crops(0, Path("b.png"), 0.7)[1:]


def test_a_crop_is_that_part_of_the_central_square(tmp_path: Path) -> None:
    columns = np.arange(64, dtype=np.uint8) * 4
    Image.fromarray(np.stack([np.tile(columns, (32, 1))] * 3, axis=-1)).save(tmp_path / "wide.png")
    image = read_picture(tmp_path / "wide.png")
    whole = square_pixels(image, 32)
    assert whole[0, 0].tolist() == columns[16:48].tolist()
    part = square_pixels(image, 16, (0.25, 0.0, 0.5))
    assert part[0, 0].tolist() == columns[24:40].tolist()


def test_draws_are_distributed_as_they_should() -> None:
    draws = [draw(0, "instance", n, 3, (1, 2, 2)) for n in range(3000)]
    counts = Counter(int(10 * d.time) for d in draws)
    assert all(230 < counts[bucket] < 370 for bucket in range(10))
    quarters = [int(4 * d.time) for d in draws]
    assert all(sorted(quarters[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 200, 3))
    noise = torch.stack([d.noise for d in draws])
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    assert 1350 < sum(d.flip for d in draws) < 1650
