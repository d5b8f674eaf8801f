"""The model card of an adapter: a README.md that the hub renders, and the pictures that it shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import ModelCard
from PIL import Image, ImageOps

from oft_diffusion.disk import write_atomically
from oft_diffusion.errors import AdapterFileError, ConfigError, DataError, OFTError
from oft_diffusion.files import FILE_NAME, load_adapter_file, resolve_adapter_path
from oft_diffusion.images import parameters_text, read_picture, read_settings, save_png
from oft_diffusion.metadata import HEADER_KEY
from oft_diffusion.pipeline.card_text import body, front_matter
from oft_diffusion.pipeline.escaping import is_repo_id, without_local_paths

CARD_NAME = "README.md"
_MARK = "<!-- oft-diffusion "


class Drawn(Protocol):
    """A picture and the settings that made it, as `generate` returns them."""

    @property
    def image(self) -> Image.Image: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...


SampleImage = str | Path | Image.Image | Drawn


@dataclass(frozen=True)
class Sample:
    """A picture for the card: pixels without a camera's data, settings without paths."""

    image: Image.Image
    settings: Mapping[str, Any]


def write_model_card(
    path: str | Path,
    repo_id: str,
    *,
    license: str | None = None,  # noqa: A002 - what the hub calls it
    sample_images: Iterable[SampleImage] = (),
) -> Path:
    """Write `README.md` beside an adapter, and the pictures that it shows: all of it, or nothing.

    Base, trigger, recommended strength and settings are read from the adapter's file. An earlier card is replaced,
    but not one that was edited, or that is not ours.

    Args:
        path: a folder with an `oft_adapter.safetensors`, as training and `save_oft_weights` leave it.
        repo_id: the hub repository that it will be in, "user/name": the card says how to load it from there.
        license: the adapter's: one of the hub's identifiers ("mit", "creativeml-openrail-m", ...), or any other name.
        sample_images: pictures to show, as `generate` returns them, as PIL has them, or files. They are written as PNG,
            with the settings that a picture of ours has inside; the card tells prompt, seed, ... of these.

    Returns:
        The card's path.

    Raises:
        AdapterFileError: the folder has no adapter, or a README.md that must not be replaced, or cannot be written.
        ConfigError: `repo_id` is no repository's, or `license` says nothing.
        DataError: a picture cannot be read.
    """
    check_card(repo_id, license)
    file = load_adapter_file(adapter_in(path))
    folder = file.path.parent
    check_replaceable(folder)
    pictures = {_picture_name(i, sample): sample for i, sample in enumerate(read_samples(sample_images), 1)}
    told = {name: sample.settings for name, sample in pictures.items()}
    head = front_matter(file.metadata, license, told).to_yaml()
    card = str(ModelCard(f"---\n{head}\n---\n\n{body(file, repo_id, license, told)}"))
    made: list[Path] = []
    try:
        for name, sample in pictures.items():
            if not (folder / name).exists():
                made.append(folder / name)
            save_png(sample.image, folder / name, sample.settings or None)
        write_atomically(folder / CARD_NAME, f"{card}{_MARK}{_digest(card)} -->\n".encode())
    except BaseException:  # Ctrl-C, too
        for picture in made:
            picture.unlink(missing_ok=True)
        raise
    return folder / CARD_NAME


def check_card(repo_id: object, terms: object) -> None:
    """Refuse what names no repository, or no license.

    Raises:
        ConfigError: it does not.
    """
    if not isinstance(repo_id, str) or not is_repo_id(repo_id):
        raise ConfigError(
            f"{repo_id!r} names no repository on the hub",
            expected='"user/name", of letters, digits, "-", "_" and "."',
            fix='write your account and a name, for example "me/mug-oft"',
        )
    if terms is not None and not (isinstance(terms, str) and terms.strip()):
        raise ConfigError(
            f"license={terms!r} names none",
            expected='an identifier of the hub such as "mit", or any other name',
            fix="leave it out to state none",
        )


def adapter_in(path: str | Path) -> Path:
    """The adapter's file in a folder, under the name that it must have on the hub.

    Raises:
        AdapterFileError: there is none.
    """
    found = resolve_adapter_path(path)
    refuse_other_name(found)
    return found


def refuse_other_name(path: Path) -> None:
    """Refuse a file that a repository's name alone would not find.

    Raises:
        AdapterFileError: it is one.
    """
    if path.suffix == ".safetensors" and path.name != FILE_NAME:
        raise AdapterFileError(
            f"{path.name} is not what an adapter is called on the hub",
            expected=f"a folder, in which it is called {FILE_NAME} and found by the repository's name alone",
            fix="rename the file, or save the adapter into a folder",
        )


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a README.md that nobody could write again.

    Raises:
        AdapterFileError: there is one that is not as `write_model_card` left it.
    """
    card = read_card(folder)
    if card is not None and not is_untouched(card):
        raise AdapterFileError(
            f"{folder / CARD_NAME} is no card that oft-diffusion wrote, or was edited since",
            expected="none, or one as it was written",
            fix="move it away, or push the folder as it is with push_oft_weights",
        )


def read_card(folder: Path) -> str | None:
    """A folder's card; None where there is none.

    Raises:
        AdapterFileError: it cannot be read.
    """
    card = folder / CARD_NAME
    try:
        return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    except OSError as error:
        raise AdapterFileError(
            f"{card} cannot be read ({error.strerror or error})",
            expected="a readable card, or none",
            fix="correct its permissions",
        ) from error


def is_untouched(card: str) -> bool:
    """Whether a card's text is as `write_model_card` left it."""
    text, _, mark = card.replace("\r\n", "\n").rpartition(_MARK)
    return mark == f"{_digest(text)} -->\n"


def read_samples(sample_images: Iterable[SampleImage]) -> list[Sample]:
    """Pictures, decoded; a single one may stand for a list.

    Raises:
        DataError: one is no picture.
    """
    if isinstance(sample_images, (str, Path, Image.Image)) or not isinstance(sample_images, Iterable):
        return [_sample(sample_images)]
    return [_sample(given) for given in sample_images]


def _sample(given: object) -> Sample:
    told: Any = None
    image: Any
    if isinstance(given, (str, Path)):
        image = read_picture(Path(given))
        with suppress(OFTError):
            told = read_settings(given)
    elif isinstance(given, Image.Image):
        image = ImageOps.exif_transpose(given)
        with suppress(ValueError, TypeError, RecursionError):
            told = json.loads(given.info.get(HEADER_KEY, "null"))
    else:
        image, told = getattr(given, "image", None), getattr(given, "settings", None)
        if not isinstance(image, Image.Image):
            raise DataError(
                f"sample_images has {given!r:.80}, which is no picture",
                expected="what generate returns, PIL pictures, or paths of files",
                fix="pass a list of these",
            )
    bare = image.convert("RGBA" if image.has_transparency_data else "RGB")
    bare.info = {}  # where a camera was, or another tool's workflow, is nobody's business
    return Sample(bare, _settings(told))


def _settings(told: Any) -> dict[str, Any]:
    """Settings without paths; none where they are not of the form that ours have."""
    with suppress(LookupError, TypeError, ValueError, AttributeError, RecursionError):
        settings: dict[str, Any] = without_local_paths(dict(told or {}))
        parameters_text(settings)  # as save_png will
        return settings
    return {}


def _picture_name(number: int, sample: Sample) -> str:
    """By its content, so that no picture ever replaces another one's file."""
    content = hashlib.sha256(sample.image.tobytes() + json.dumps(sample.settings).encode())
    return f"sample-{number}-{content.hexdigest()[:8]}.png"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
