"""Pictures: read from files and folders, put into labelled grids, written with generation settings inside."""

from __future__ import annotations

import bisect
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from oft_diffusion.disk import write_atomically
from oft_diffusion.errors import DataError, OFTError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
IMAGE_KINDS = "PNG, JPEG or WebP"
FORMATS = ("PNG", "JPEG", "WEBP")  # of Pillow; it knows more, and for one of them runs another program

_KEY = "oft_diffusion"
_PAPER, _INK, _GAP = (255, 255, 255), (24, 24, 27), 6


def image_files(folder: Path, knob: str) -> list[Path]:
    """Image files directly in a folder, by name.

    Raises:
        DataError: the folder is missing.
    """
    if not folder.is_dir():
        raise DataError(
            f"{knob} = {str(folder)!r} is no folder",
            expected="a folder with images",
            fix="correct the path; relative ones start at the working directory",
        )
    visible = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    return sorted(p for p in visible if p.suffix.lower() in IMAGE_SUFFIXES)


def read_picture(path: Path) -> Image.Image:
    """Decode an image: upright by its EXIF orientation, RGB, transparency on white.

    Raises:
        DataError: it cannot be decoded, or is larger than Pillow's limit against decompression bombs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                file.load()
                image = ImageOps.exif_transpose(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(
            f"{path.name} has more pixels than {Image.MAX_IMAGE_PIXELS:,}",
            expected="a photograph",
            fix="scale it down first",
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(
            f"{path.name} cannot be decoded ({error})", expected=f"a whole {IMAGE_KINDS} image", fix="replace it"
        ) from error
    if image.mode.startswith("I"):  # 16-bit grayscale, which convert() would clip instead of scale
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int | None = None,
) -> Image.Image:
    """One picture of rows of pictures.

    Args:
        rows: pictures, row by row; rows may differ in length.
        row_labels: written above each row, so that a long prompt has the whole width; "" for none.
        column_labels: written once, above the first row.
        cell: side of a cell in pixels; the first picture's width if None. Enlarged without smoothing by whole
            factors, so that small pictures stay crisp.

    Returns:
        An RGB picture.
    """
    cell = cell or rows[0][0].width
    font_size = max(11, min(20, cell // 9))
    font = ImageFont.load_default(size=font_size)
    line = int(font_size * 1.7)
    width = max(len(row) for row in rows) * (cell + _GAP) + _GAP
    row_line = [line if row_labels and row_labels[i] else 0 for i in range(len(rows))]
    height = _GAP + (line if column_labels else 0) + sum(cell + _GAP + extra for extra in row_line)
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    y = _GAP
    if column_labels:
        for column, label in enumerate(column_labels):
            pen.text((_GAP + column * (cell + _GAP), y), _fitted(label, font, cell), _INK, font)
        y += line
    for index, row in enumerate(rows):
        if row_line[index]:
            pen.text((_GAP, y), _fitted(row_labels[index], font, width - 2 * _GAP), _INK, font)
            y += row_line[index]
        for column, picture in enumerate(row):
            sheet.paste(_resized(picture, cell), (_GAP + column * (cell + _GAP), y))
        y += cell + _GAP
    return sheet


def free_path(folder: Path, stem: str) -> Path:
    """`folder/stem.png`, or `stem_2.png`, `stem_3.png`, ... where those are taken: no picture replaces another."""
    numbered = (folder / f"{stem}{end}.png" for end in ("", *(f"_{i}" for i in range(2, 100_000))))
    return next(path for path in numbered if not path.exists())


def save_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any] | None = None) -> Path:
    """Write a PNG, whole or not at all, with its generation settings inside.

    Args:
        image: the picture.
        path: where to.
        settings: plain JSON types. Written twice: as JSON for `read_settings`, and under `parameters` in the text
            form that Stable Diffusion UIs read.

    Raises:
        AdapterFileError: the file cannot be written.
    """
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt(_KEY, json.dumps(settings, ensure_ascii=False))
        info.add_itxt("parameters", parameters_text(settings))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    path = Path(path)
    write_atomically(path, buffer.getvalue())
    return path


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` wrote into a picture.

    Raises:
        OFTError: the picture has none, or cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            picture.load()
            text = picture.info.get(_KEY) if isinstance(picture, PngImagePlugin.PngImageFile) else None
        settings = json.loads(text) if text else None
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError) as error:
        # Pillow's own words for what it does not know have the whole path in them.
        why = (
            "it is no picture" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", 0) or error
        )
        raise OFTError(
            f"{Path(path).name} cannot be read ({why})", expected="a PNG picture", fix="check the file"
        ) from error
    if not isinstance(settings, dict):
        raise OFTError(
            f"{Path(path).name} holds no oft-diffusion settings",
            expected="a PNG that `oft-diffusion generate` wrote",
            fix="use the original file: most sites strip such data on upload",
        )
    return settings


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The text that A1111-style UIs show and read: prompt, negative prompt, then `Key: value` pairs."""
    names = {"steps": "Steps", "scheduler": "Sampler", "guidance": "CFG scale", "seed": "Seed", "model": "Model"}
    pairs = [f"{shown}: {_quoted(settings[key])}" for key, shown in names.items() if settings.get(key) is not None]
    if settings.get("clip_skip") is not None:
        pairs.append(f"Clip skip: {settings['clip_skip'] + 1}")  # these count the last layer, too
    if "width" in settings and "height" in settings:
        pairs.append(f"Size: {settings['width']}x{settings['height']}")
    pairs += [f"OFT {a['name']}: {a['strength']:g}" for a in settings.get("adapters", ())]
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    return "\n".join([*lines, ", ".join(pairs)])


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def _resized(picture: Image.Image, cell: int) -> Image.Image:
    picture = picture.convert("RGB")
    if picture.size == (cell, cell):
        return picture
    if picture.width == picture.height and cell % picture.width == 0:
        return picture.resize((cell, cell), Image.Resampling.NEAREST)
    scale = cell / max(picture.size)
    small = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS
    )
    square = Image.new("RGB", (cell, cell), _PAPER)
    square.paste(small, ((cell - small.width) // 2, (cell - small.height) // 2))
    return square


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    lengths = [font.getlength(text[:count] + "…") for count in range(len(text))]
    return text[: max(0, bisect.bisect(lengths, width) - 1)] + "…"


def pictures_of(output: Any) -> list[Image.Image]:
    """The pictures in what a diffusers pipeline returned; of videos the first frames."""
    if hasattr(output, "images"):
        return list(output.images)
    return [Image.fromarray((frames[0] * 255).round().astype("uint8")) for frames in output.frames]
