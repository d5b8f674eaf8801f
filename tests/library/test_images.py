import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from oft_diffusion.errors import AdapterFileError, OFTError
from oft_diffusion.images import labelled_grid, parameters_text, read_settings, save_png
from tests.library.support import assert_one_sentence

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
WHITE = (255, 255, 255)
SETTINGS = {
    "prompt": "a photo of sks mug",
    "negative_prompt": "blurry",
    "steps": 20,
    "guidance": 7.5,
    "scheduler": "DDIMScheduler",
    "model": "sd15",
    "adapters": [{"name": "mug", "strength": 0.8}, {"name": "style", "strength": -1.0}],
    "seed": 42,
    "width": 64,
    "height": 48,
}


def square(colour, side=16, mode="RGB"):
    return Image.new("RGB", (side, side), colour).convert(mode)


def colours_of(picture: Image.Image) -> dict[Any, int]:
    """How many pixels each colour has."""
    found = picture.getcolors(maxcolors=100_000)
    assert found is not None
    return {colour: count for count, colour in found}


# Settings inside PNG files

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@given(
    settings=st.dictionaries(_text, _plain | st.lists(_plain, max_size=3), max_size=4),
    prompt=_text,
)
def test_settings_come_back_whatever_their_script(folder, settings, prompt):
    settings = {**settings, "prompt": prompt, "adapters": [{"name": "mug", "strength": 0.5}]}
    path = save_png(square(RED), folder / "any.png", settings)
    assert read_settings(path) == settings
    with Image.open(path) as picture:
        assert picture.convert("RGB").getpixel((3, 3)) == RED


@pytest.mark.parametrize("prompt", ["кот в шляпе 🐈", "two\nlines", "日本語、カンマ", 'quotes " and \\ and $x', ""])
def test_unicode_and_odd_prompts(tmp_path, prompt):
    path = save_png(square(GREEN), tmp_path / "a" / "b.png", {**SETTINGS, "prompt": prompt})
    assert read_settings(str(path)) == {**SETTINGS, "prompt": prompt}
    with Image.open(path) as picture:
        assert picture.info["parameters"].startswith(prompt)


def test_a_picture_without_settings_is_saved_plain(tmp_path):
    path = save_png(square(RED), tmp_path / "plain.png")
    with Image.open(path) as picture:
        assert picture.info == {}


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = save_png(square(RED), tmp_path / "a.png", SETTINGS)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(AdapterFileError) as error:
        save_png(square(BLUE), path, SETTINGS)
    assert_one_sentence(error, "a.png", "No space")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# The text that Stable Diffusion UIs read

A1111_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # their parser's expression


def a1111(text):
    """What A1111's parser makes of it: prompt, negative prompt, settings."""
    *lines, last = text.strip().split("\n")
    if len(A1111_PAIR.findall(last)) < 3:
        lines, last = [*lines, last], ""
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            target, line = negative, line[16:].strip()
        target.append(line)
    pairs = {k: json.loads(v) if v.startswith('"') else v for k, v in A1111_PAIR.findall(last)}
    return "\n".join(prompt), "\n".join(negative), pairs


def test_the_text_is_what_other_tools_show():
    assert parameters_text(SETTINGS) == (
        "a photo of sks mug\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DDIMScheduler, CFG scale: 7.5, Seed: 42, Model: sd15, Size: 64x48, "
        "OFT mug: 0.8, OFT style: -1"
    )


@pytest.mark.parametrize("negative", [None, "", "blurry, dark"])
@pytest.mark.parametrize("prompt", ["a mug", "a mug, red: (very:1.2)\nsecond line"])
@pytest.mark.parametrize("model", ["sd15", "my model, v2: final"])
def test_their_parser_understands_it(prompt, negative, model):
    text = parameters_text({**SETTINGS, "prompt": prompt, "negative_prompt": negative, "model": model})
    assert a1111(text) == (
        prompt,
        negative or "",
        {"Steps": "20", "Sampler": "DDIMScheduler", "CFG scale": "7.5", "Seed": "42", "Model": model, "Size": "64x48",
         "OFT mug": "0.8", "OFT style": "-1"},
    )  # fmt: skip


def test_a_seed_of_zero_is_written_and_missing_settings_are_not():
    assert parameters_text({"prompt": "a", "seed": 0, "guidance": 0.0}) == "a\nCFG scale: 0.0, Seed: 0"


# Pictures without settings of ours


def refused(path, *words):
    with pytest.raises(OFTError) as error:
        read_settings(path)
    assert_one_sentence(error, path.name, *words)


def test_pictures_of_others(tmp_path):
    square(RED).save(tmp_path / "plain.png")
    refused(tmp_path / "plain.png", "no oft-diffusion settings")
    square(RED).save(tmp_path / "photo.jpg", comment=b"oft_diffusion")
    refused(tmp_path / "photo.jpg", "no oft-diffusion settings")
    refused(tmp_path / "none.png", "cannot be read")
    (tmp_path / "text.png").write_text("not a picture")
    refused(tmp_path / "text.png", "cannot be read")


@pytest.mark.parametrize("text", ["[1]", "3", "null", "{", "", '"x"', "[" * 100_000])
def test_settings_that_are_not_ours(tmp_path, text):
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt("oft_diffusion", text)
    square(RED).save(tmp_path / "odd.png", pnginfo=info)
    refused(tmp_path / "odd.png")


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_picture_cut_anywhere_is_one_sentence_or_read_right(folder, share):
    data = save_png(square(RED, 64), folder / "cut.png", SETTINGS).read_bytes()
    (folder / "cut.png").write_bytes(data[: int(share * len(data))])
    try:
        assert read_settings(folder / "cut.png") == SETTINGS
    except OFTError as error:
        assert "cut.png" in str(error)  # noqa: PT017 - either is right


def test_a_damaged_picture_is_one_sentence_or_read_right(tmp_path):
    path = save_png(Image.effect_noise((8, 8), 50), tmp_path / "bad.png", {"prompt": "a"})
    data = path.read_bytes()
    for place in range(len(data)):
        for mask in (1, 0x80):
            path.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
            try:
                assert isinstance(read_settings(path), dict)
            except OFTError as error:
                assert "bad.png" in str(error)  # noqa: PT017 - either is right


def test_a_picture_that_would_fill_the_memory_is_not_opened(tmp_path, monkeypatch):
    path = save_png(square(RED, 64), tmp_path / "bomb.png", SETTINGS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused(path, "cannot be read")


# Grids


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (5, 2)])
def test_every_picture_is_on_the_grid_once_and_unchanged(rows, columns):
    colours = [[(20 + 40 * r, 30 * c, 77) for c in range(columns)] for r in range(rows)]
    grid = labelled_grid([[square(colour) for colour in row] for row in colours])
    assert grid.mode == "RGB"
    assert grid.size == (6 + columns * 22, 6 + rows * 22)
    counts = colours_of(grid)
    for r, row in enumerate(colours):
        for c, colour in enumerate(row):
            assert counts[colour] == 256
            assert grid.getpixel((6 + c * 22, 6 + r * 22)) == colour
            assert grid.getpixel((21 + c * 22, 21 + r * 22)) == colour


def test_labels_add_height_and_never_width():
    pictures = [[square(RED, 32), square(GREEN, 32)]] * 2
    plain = labelled_grid(pictures)
    columns = labelled_grid(pictures, column_labels=["base", "with"])
    rows = labelled_grid(pictures, row_labels=["one", "two"])
    first = labelled_grid(pictures, row_labels=["one", ""])
    both = labelled_grid(pictures, row_labels=["one", "two"], column_labels=["base", "with"])
    line = columns.height - plain.height
    assert line > 10
    assert rows.height == plain.height + 2 * line
    assert first.height == plain.height + line
    assert both.height == plain.height + 3 * line
    assert {g.width for g in (plain, columns, rows, first, both)} == {plain.width}
    for grid in (columns, rows, first, both):
        counts = colours_of(grid)
        assert counts[RED] == counts[GREEN] == 2 * 32 * 32


@pytest.mark.thinned(2)
@pytest.mark.parametrize("label", ["x" * 500, "кот в очень длинной шляпе " * 20, "日本" * 200, "one\nline", "‮", "🐈"])
def test_labels_of_any_length_and_script_stay_inside(label):
    pictures = [[square(RED, 64), square(GREEN, 64)]]
    grid = labelled_grid(pictures, row_labels=[label], column_labels=[label, label])
    assert grid.width == labelled_grid(pictures).width
    counts = colours_of(grid)
    assert counts[RED] == counts[GREEN] == 64 * 64


def test_rows_of_different_lengths():
    grid = labelled_grid([[square(RED)], [square(GREEN), square(BLUE), square(RED)]])
    assert grid.size == (6 + 3 * 22, 6 + 2 * 22)
    assert grid.getpixel((6 + 22, 6)) == WHITE


def test_small_pictures_are_enlarged_crisply():
    picture = Image.new("RGB", (2, 2), RED)
    picture.putpixel((1, 0), BLUE)
    grid = labelled_grid([[picture]], cell=64)
    assert grid.size == (76, 76)
    assert colours_of(grid.crop((6, 6, 70, 70))) == {RED: 3 * 32 * 32, BLUE: 32 * 32}


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (500, 3), (1, 1)])
def test_oblong_pictures_keep_their_shape_on_white(size):
    grid = labelled_grid([[Image.new("RGB", size, RED)]], cell=32)
    assert grid.size == (44, 44)
    inside = colours_of(grid.crop((6, 6, 38, 38)))
    width, height = (max(1, round(s * 32 / max(size))) for s in size)
    assert inside[RED] == width * height
    assert inside.get(WHITE, 0) == 32 * 32 - width * height


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1"])
def test_any_mode(mode):
    grid = labelled_grid([[square(WHITE, mode=mode)]])
    assert grid.getpixel((10, 10)) == WHITE
