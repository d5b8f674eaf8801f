"""Class images for prior preservation: made once by the base, before it is adapted, and reused.

`class_images.json` beside them says by what they were made. A folder of images without that file holds the user's own,
which are used as they are.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from oft_diffusion.disk import write_atomically
from oft_diffusion.errors import DataError
from oft_diffusion.images import image_files, read_picture
from oft_diffusion.training.base import Base
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.data import Picture, read_caption
from oft_diffusion.training.families import AT_ONCE, Family

_CONSONANTS = "bcdfghjklmnpqrstvwxz"
RECORD = "class_images.json"


@dataclass(frozen=True)
class ClassImages:
    """The folder's state.

    Attributes:
        paths: every image of the full set, made or not.
        prompts: of each of them: the user's captions, or `class_prompts` in turn.
        missing: indices into `paths` of those still to be made.
        own: whether they are the user's, not ours.
        record: what `class_images.json` says, or shall say.
    """

    paths: tuple[Path, ...]
    prompts: tuple[str, ...]
    missing: tuple[int, ...]
    own: bool
    record: dict[str, Any]


def class_record(config: TrainConfig, base: Base) -> dict[str, Any]:
    """What makes class images what they are, but for their number. Runs of equal records may share a `class_dir`."""
    return {
        "prompts": [config.fill(prompt) for prompt in config.class_prompts],
        "base": base.fingerprint(),
        "seed": config.seed,
        "resolution": config.resolution,
        "sampling_steps": config.sampling_steps,
        "guidance_scale": config.guidance_scale,
        "clip_skip": config.clip_skip,
    }


def look_at_class_images(config: TrainConfig, base: Base) -> ClassImages:
    """What lies in the class folder, and what is missing; nothing is written.

    Raises:
        DataError: the images there were made by another model, prompt, seed or sampling, or the record is broken; it
            is the instance images' folder, or some of the user's own images or captions cannot be read.
    """
    folder, record = config.class_folder, class_record(config, base)
    if folder.is_file():
        raise DataError(f"class_dir = {str(folder)!r} is a file", expected="a folder", fix="choose another class_dir")
    present = image_files(folder, "class_dir") if folder.is_dir() else []
    if folder.resolve() == Path(config.instance_dir).resolve():
        raise DataError(
            f"class_dir and instance_dir are the same folder, {folder}",
            expected="class images that show other things of the class than the subject",
            fix="choose another class_dir, or leave it out to have them made",
        )
    if present and not (folder / RECORD).is_file():
        _decode_all(present)
        own = tuple(read_caption(path.with_suffix(".txt")) or record["prompts"][0] for path in present)
        return ClassImages(tuple(present), own, (), own=True, record=record)
    if present:
        _compare(folder, record)
    paths = tuple(folder / f"class_{i:05d}.png" for i in range(config.num_class_images))
    prompts = tuple(islice(cycle(record["prompts"]), len(paths)))
    missing = tuple(i for i, path in enumerate(paths) if not path.is_file())
    return ClassImages(paths, prompts, missing, own=False, record=record)


def _decode_all(paths: list[Path]) -> None:
    """Find unusable images of the user's own now; ours were written whole."""
    problems = []
    for path in paths:
        try:
            read_picture(path)
        except DataError as error:
            problems.append(error.problem)
    if problems:
        raise DataError(
            f"{len(problems)} of {len(paths)} class images in {paths[0].parent} cannot be used: {'; '.join(problems)}",
            expected="whole images",
            fix="replace or delete them",
        )


def _compare(folder: Path, record: dict[str, Any]) -> None:
    try:
        found = dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{folder / RECORD} cannot be read ({error})",
            expected="the JSON record that was written with the class images",
            fix="delete that file to use the images as they are, or the folder to have them made again",
        ) from error
    names = {"base": "model"}
    differing = [
        f"{names.get(key, key)}" + ("" if key == "base" else f" {found.get(key)!r}, now {value!r}")
        for key, value in record.items()
        if found.get(key) != value
    ]
    if differing:
        raise DataError(
            f"the class images in {folder} were made with other settings: {'; '.join(differing)}",
            expected="the same settings as now",
            fix=f"choose another class_dir, delete this one to have them made again, or delete its {RECORD} to use "
            "them as they are",
        )


def make_class_images(
    images: ClassImages, family: Family, progress: Callable[[Iterable[list[int]], str], Iterable[list[int]]],
    process: int = 0, processes: int = 1,
) -> None:  # fmt: skip
    """Make this process's share of the missing images. Each has its own seed, so the set can grow or be cut short.

    Raises:
        AdapterFileError: the disk is full or the folder cannot be written.
    """
    if not images.missing:
        return
    record = images.record
    if process == 0:
        write_atomically(images.paths[0].parent / RECORD, json.dumps(record, indent=1).encode())
    mine = list(images.missing[process::processes])
    chunks = [mine[i : i + AT_ONCE] for i in range(0, len(mine), AT_ONCE)]
    for chunk in progress(chunks, "class images"):
        seeds = [random.Random(f"{record['seed']} class image {i}").getrandbits(32) for i in chunk]
        made = family.sample(
            [images.prompts[i] for i in chunk], seeds, record["resolution"], record["sampling_steps"],
            record["guidance_scale"],
        )  # fmt: skip
        for index, image in zip(chunk, made, strict=True):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            write_atomically(images.paths[index], buffer.getvalue())


def class_pictures(images: ClassImages) -> list[Picture]:
    """The class images with their prompts."""
    return [Picture(path, prompt) for path, prompt in zip(images.paths, images.prompts, strict=True)]


def twin_pictures(instances: Sequence[Picture], config: TrainConfig) -> list[Picture]:
    """The instance images under `prior_twins` other prompts each: without the trigger, then with made-up words for it.

    With what the base answers as their target, nothing but the trigger can tell the subject from the rest. Every
    second word begins as the trigger does, or a part of it, or its length alone, would be enough.
    """
    rng = random.Random(f"{config.seed} twins")
    trigger = re.compile(rf"\b{re.escape(config.trigger)}\b", re.IGNORECASE)
    twins = []
    for picture in instances:
        for i in range(config.prior_twins):
            if i == 0:
                word = ""
            elif i % 2:
                word = _other(rng, config.trigger, 0, rng.choice((2, 3, 3, 4)))
            else:
                kept = rng.randrange(len(config.trigger) // 2, len(config.trigger))
                word = _other(rng, config.trigger, kept, len(config.trigger))
            twins.append(Picture(picture.path, " ".join(trigger.sub(word, picture.prompt).split())))
    return twins


def _other(rng: random.Random, trigger: str, kept: int, length: int) -> str:
    """A made-up word that begins with some of a trigger's letters, and is not the trigger."""
    while True:
        word = trigger[:kept] + "".join(rng.choices(_CONSONANTS, k=length - kept))
        if word.lower() != trigger.lower():
            return word
