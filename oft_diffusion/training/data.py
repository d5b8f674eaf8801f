"""Pictures and captions from folders, and every random draw of a run.

All randomness of sample number n is a pure function of (seed, stream, n), where the stream is "instance" or "class":
which picture, whether mirrored, which noise, which timestep. So nothing needs to be saved to resume exactly, batches
may be cut over processes or accumulation steps without changing what is learned from, and a reader can repeat any
sample in three lines (train_scripts/train_dreambooth_minimal.py does).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oft_diffusion.errors import DataError
from oft_diffusion.images import IMAGE_KINDS, IMAGE_SUFFIXES, image_files, read_picture
from oft_diffusion.training.checks import contains
from oft_diffusion.training.config import TrainConfig

_STRATA = 4  # of times
_CROPS = 8  # of each picture


@dataclass(frozen=True)
class Picture:
    """An image file and the prompt that it is trained with."""

    path: Path
    prompt: str


def instance_pictures(config: TrainConfig) -> tuple[list[Picture], list[str]]:
    """The subject's pictures with their prompts, every file decoded once, and notes on what was unusual.

    Raises:
        DataError: the folder is missing or has fewer than two images, or any image or caption is unusable.
    """
    folder = Path(config.instance_dir)
    paths = image_files(folder, "instance_dir")
    if not paths:
        raise DataError(
            f"{folder} holds no images{_others(folder)}",
            expected=f"3 to 8 pictures of the subject ({IMAGE_KINDS})",
            fix="put them into that folder, or correct instance_dir",
        )
    if len(paths) == 1:
        raise DataError(
            f"{folder} holds one image only ({paths[0].name})",
            expected="3 to 8 pictures of the subject; from one, a model learns that picture instead of the subject",
            fix="add two or more pictures from other sides, with other backgrounds",
        )
    notes = [f"{folder} holds two images; from 3 to 8 the subject is learned better"] if len(paths) == 2 else []
    if ignored := _ignored(folder):
        notes.append(f"not {IMAGE_KINDS}, hence ignored: {', '.join(ignored)}")
    problems, small = [], []
    for path in paths:
        try:
            side = min(read_picture(path).size)
        except DataError as error:
            problems.append(error.problem)
            continue
        if side < config.resolution / 2:
            problems.append(f"{path.name} is {side} pixels on its shorter side")
        elif side < config.resolution:
            small.append(f"{path.name} ({side})")
    if problems:
        raise DataError(
            f"{len(problems)} of {len(paths)} images in {folder} cannot be used: {'; '.join(problems)}",
            expected=f"whole {IMAGE_KINDS} images of at least {config.resolution // 2} pixels (half the resolution)",
            fix="replace or delete them, or lower the resolution if all are small",
        )
    if small:
        notes.append(f"enlarged to {config.resolution} pixels, hence soft: {', '.join(small)}")
    pictures, caption_notes = _with_prompts(paths, config)
    return pictures, notes + caption_notes


def _ignored(folder: Path) -> list[str]:
    known = (*IMAGE_SUFFIXES, ".txt")
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() not in known and not p.name.startswith("."))


def _others(folder: Path) -> str:
    """What lies there instead, for a message."""
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return f"; it holds {', '.join(names[:4])}" + (", ..." if len(names) > 4 else "") if names else " at all"


# -- captions ----------------------------------------------------------------------------------------------------------


def _with_prompts(paths: Sequence[Path], config: TrainConfig) -> tuple[list[Picture], list[str]]:
    default = config.fill(config.instance_prompt)
    pictures, placed, empty = [], [], []
    for path in paths:
        caption = read_caption(path.with_suffix(".txt"))
        if caption == "":
            empty.append(path.with_suffix(".txt").name)
        prompt = place_trigger(caption, config.trigger, config.class_word) if caption else default
        if caption and prompt != caption:
            placed.append(f"{path.with_suffix('.txt').name}: {prompt!r}")
        pictures.append(Picture(path, prompt))
    notes = []
    if placed:
        notes.append(f"captions that lack the trigger {config.trigger!r} are read with it: {'; '.join(placed)}")
    if empty:
        notes.append(f"empty captions count as {default!r}: {', '.join(empty)}")
    return pictures, notes


def read_caption(path: Path) -> str | None:
    """A caption's text in one line, or None where there is no such file.

    Raises:
        DataError: it is no UTF-8.
    """
    if not path.is_file():
        return None
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise DataError(
            f"the caption {path} is not UTF-8 text", expected="plain text", fix="save it again as UTF-8, or delete it"
        ) from None


def place_trigger(caption: str, trigger: str, class_word: str) -> str:
    """The caption with the trigger: as it is, or before the class word, or both in front where neither occurs."""
    words = re.sub(r"[^\w\s-]", " ", caption).lower().split()
    if contains(words, trigger.lower().split()):
        return caption
    if contains(words, class_word.lower().split()):
        pattern = r"\b" + r"\s+".join(map(re.escape, class_word.split())) + r"\b"
        return re.sub(pattern, lambda m: f"{trigger} {m[0]}", caption, count=1, flags=re.IGNORECASE)
    return f"{trigger} {class_word}, {caption}"


# -- pixels ------------------------------------------------------------------------------------------------------------


Crop = tuple[float, float, float]  # left, top and side, as parts of the central square's side
WHOLE: Crop = (0.0, 0.0, 1.0)


def square_pixels(image: Image.Image, resolution: int, crop: Crop = WHOLE) -> Tensor:
    """A part of an image's central square, resized, uint8 `(3, resolution, resolution)`."""
    left, top, part = crop
    side = min(image.size)
    x, y = (image.width - side) / 2 + left * side, (image.height - side) / 2 + top * side
    box = (x, y, x + part * side, y + part * side)
    resized = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def crops(seed: int, path: Path, smallest: float) -> list[Crop]:
    """The crops of one picture that a run learns from: the whole square, and a few random ones beside it.

    A fixed few, so that their latents can be cached. `smallest` bounds their sides from below; 1 is the whole alone.
    """
    if smallest == 1.0:
        return [WHOLE]
    rng = random.Random(f"{seed} crops {path.name}")
    found = [WHOLE]
    for _ in range(_CROPS - 1):
        side = rng.uniform(smallest, 1.0)
        found.append((rng.uniform(0.0, 1.0 - side), rng.uniform(0.0, 1.0 - side), side))
    return found


def normalise(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1], as a VAE takes them."""
    return pixels.float() / 127.5 - 1.0


# -- randomness --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """All that is random about one sample.

    Attributes:
        index: which picture.
        posterior_noise, noise: float32 of the latents' shape; for the VAE's posterior, and for diffusion.
        time: from 0 (a picture) to below 1 (noise), uniform.
        flip: whether the picture is mirrored.
        crop: which of its crops is taken, as a place in their list from 0 to below 1.
    """

    index: int
    posterior_noise: Tensor
    noise: Tensor
    time: float
    flip: bool
    crop: float


def draw(seed: int, stream: str, number: int, pictures: int, shape: Sequence[int]) -> Draw:
    """The draw of sample `number`: pictures in a new order every epoch, the rest from a generator of its own.

    The generator's numbers are taken in this order: posterior noise, noise, time, flip, crop. Times are stratified: any
    four samples in a row have one in each quarter, so that batches differ less.
    """
    epoch, place = divmod(number, pictures)
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {stream} {number}").getrandbits(63))
    return Draw(
        index=epoch_order(seed, stream, epoch, pictures)[place],
        posterior_noise=torch.randn(*shape, generator=generator),
        noise=torch.randn(*shape, generator=generator),
        time=_time(number, generator),
        flip=bool(torch.rand((), generator=generator) < 0.5),
        crop=float(torch.rand((), generator=generator)),
    )


def _time(number: int, generator: torch.Generator) -> float:
    return (number % _STRATA + float(torch.rand((), generator=generator, dtype=torch.float64))) / _STRATA


@lru_cache(maxsize=8)
def epoch_order(seed: int, stream: str, epoch: int, pictures: int) -> tuple[int, ...]:
    """The order of the pictures in one epoch."""
    order = list(range(pictures))
    random.Random(f"{seed} {stream} epoch {epoch}").shuffle(order)
    return tuple(order)


def pictures_digest(pictures: Sequence[Picture]) -> str:
    """SHA-256 over names, prompts and contents, by which a resumed run knows its pictures."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(f"{picture.path.name}|{picture.prompt}|".encode())
        digest.update(hashlib.sha256(picture.path.read_bytes()).digest())
    return digest.hexdigest()
