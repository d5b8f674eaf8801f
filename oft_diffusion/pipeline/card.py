"""The model card of an adapter: a README.md that the hub renders, and the pictures that it shows."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

from huggingface_hub import ModelCard, ModelCardData
from PIL import Image, ImageOps

from oft_diffusion.disk import write_atomically
from oft_diffusion.errors import AdapterFileError, ConfigError, DataError, OFTError
from oft_diffusion.files import FILE_NAME, AdapterFile, load_adapter_file, resolve_adapter_path
from oft_diffusion.images import read_picture, read_settings, save_png
from oft_diffusion.metadata import HEADER_KEY, AdapterMetadata

CARD_NAME = "README.md"
_LONGEST = 1000  # characters of a text in a card
_MARK = "<!-- oft-diffusion "

# By the first that the class of a family, a pipeline or a denoiser begins with.
_FAMILIES = {
    "StableDiffusionXL": "stable-diffusion-xl", "StableDiffusion3": "stable-diffusion-3", "SD3": "stable-diffusion-3",
    "StableDiffusion": "stable-diffusion", "Flux2": "flux-2", "Flux": "flux", "Chroma": "chroma", "Krea2": "krea-2",
    "QwenImage": "qwen-image", "ZImage": "z-image", "Lumina2": "lumina-2", "HiDream": "hidream", "PixArt": "pixart",
    "Sana": "sana", "Wan": "wan",
}  # fmt: skip
# What the hub knows by name; it refuses a card with any other, but "other" with a license_name.
_LICENSES = frozenset(
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 "
    "lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail "
    "openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib".split()
)
# Of the training settings, those that a reader of the card has a use for. Never a path.
_TRAINING = {
    "imported_from": "imported from", "combined": "several adapters as one, by", "steps_done": "steps",
    "learning_rate": "learning rate", "text_encoder_learning_rate": "learning rate of the text encoder",
    "batch_size": "batch size", "accumulation": "accumulation", "resolution": "resolution",
    "prior_preservation": "prior preservation", "prior_weight": "weight of the prior", "clip_skip": "clip skip",
    "min_snr_gamma": "min-SNR gamma", "mixed_precision": "mixed precision", "seed": "seed",
}  # fmt: skip
# A path that begins a text or follows a space, a quotation mark or the like; its last part is a group.
_PATH = re.compile(
    r"""(?<![^\s"'`(=,;\[])(?:file://)?(?:[A-Za-z]:[\\/]|\\\\|/)[^\s"'`,;)\]]*[\\/]([^\s"'`,;)\]\\/]*)"""
)


class Drawn(Protocol):
    """A picture and the settings that made it, as `generate` returns them."""

    @property
    def image(self) -> Image.Image: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...


SampleImage = str | Path | Image.Image | Drawn


@dataclass(frozen=True)
class Sample:
    """A picture for the card: pixels without EXIF data, settings without paths."""

    image: Image.Image
    settings: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        """What was drawn; "" where nobody tells."""
        return _line(self.settings.get("prompt") or "")


def write_model_card(
    path: str | Path, repo_id: str, *, license: str | None = None, sample_images: Sequence[SampleImage] = ()
) -> Path:
    """Write `README.md` beside an adapter, and the pictures that it shows.

    Base, trigger, recommended strength and settings are read from the adapter's file. An earlier card is replaced,
    but not one that was edited, or that is not ours.

    Args:
        path: a folder with an `oft_adapter.safetensors`, as training and `save_oft_weights` leave it.
        repo_id: the hub repository that it will be in, "user/name": the card says how to load it from there.
        license: the adapter's: one of the hub's identifiers ("mit", "creativeml-openrail-m", ...), or any other name.
        sample_images: pictures to show, as `generate` returns them, as PIL has them, or files. They are written as PNG,
            with the settings that a picture of ours has inside; of these prompt, seed, ... are in the card.

    Returns:
        The card's path.

    Raises:
        AdapterFileError: the folder has no adapter, or a README.md that must not be replaced, or cannot be written.
        ConfigError: `repo_id` is no repository's, or `license` says nothing.
        DataError: a picture cannot be read.

    Either all of it is written, or nothing.
    """
    check_repo_id(repo_id)
    file = load_adapter_file(adapter_in(path))
    folder = file.path.parent
    check_replaceable(folder)
    samples = read_samples(sample_images)
    pictures = {_picture_name(i, sample): sample for i, sample in enumerate(samples, 1)}
    body = _body(file, repo_id, license, pictures)
    card = str(ModelCard(f"---\n{_front_matter(file, license, pictures).to_yaml()}\n---\n\n{body}"))
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


# -- what is checked before anything is written ------------------------------------------------------------------------


def check_repo_id(repo_id: object) -> None:
    """Refuse what names no repository.

    Raises:
        ConfigError: it is not "user/name".
    """
    if not isinstance(repo_id, str) or not _is_repo_id(repo_id):
        raise ConfigError(
            f"{repo_id!r} names no repository on the hub",
            expected='"user/name", of letters, digits, "-", "_" and "."',
            fix='write your account and a name, for example "me/mug-oft"',
        )


def adapter_in(path: str | Path) -> Path:
    """The adapter's file in a folder, under the name that it must have on the hub.

    Raises:
        AdapterFileError: there is none.
    """
    found = resolve_adapter_path(path)
    if found.name != FILE_NAME:
        raise AdapterFileError(
            f"{found.name} is not what an adapter is called on the hub",
            expected=f"a folder with an {FILE_NAME}, which is found there by the repository's name alone",
            fix="rename the file, or save the adapter into a folder",
        )
    return found


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a README.md that nobody could write again.

    Raises:
        AdapterFileError: there is one that is not as `write_model_card` left it.
    """
    card = folder / CARD_NAME
    if card.is_file() and not is_untouched(card.read_text(encoding="utf-8", errors="replace")):
        raise AdapterFileError(
            f"{card} is no card that oft-diffusion wrote, or was edited since",
            expected="none, or one as it was written",
            fix="move it away, or push the folder as it is with push_oft_weights",
        )


def is_untouched(card: str) -> bool:
    """Whether a card's text is as `write_model_card` left it."""
    text, _, mark = card.replace("\r\n", "\n").rpartition(_MARK)
    return mark == f"{_digest(text)} -->\n"


def read_samples(sample_images: Sequence[SampleImage] | SampleImage) -> list[Sample]:
    """Pictures, decoded.

    Raises:
        DataError: one is no picture.
    """
    several = isinstance(sample_images, Sequence) and not isinstance(sample_images, str)
    return [_sample(given) for given in (sample_images if several else [sample_images])]


def _sample(given: object) -> Sample:
    told: Any = None
    if isinstance(given, (str, Path)):
        image = read_picture(Path(given))
        with suppress(OFTError):
            told = read_settings(given)
    elif isinstance(given, Image.Image):
        image = ImageOps.exif_transpose(given)
        with suppress(ValueError, TypeError, RecursionError):
            told = json.loads(given.info[HEADER_KEY]) if HEADER_KEY in given.info else None
    else:
        image, told = getattr(given, "image", None), getattr(given, "settings", None)
        if not isinstance(image, Image.Image):
            raise DataError(
                f"sample_images has a {type(given).__name__}, which is no picture",
                expected="what generate returns, PIL pictures, or paths of files",
                fix="pass a list of these",
            )
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.info = {}  # a camera's data and another tool's workflow are nobody's business
    return Sample(image, without_local_paths(told) if isinstance(told, Mapping) else {})


def _picture_name(number: int, sample: Sample) -> str:
    """By its content, so that no picture ever replaces another one's file."""
    content = hashlib.sha256(sample.image.tobytes() + json.dumps(sample.settings).encode())
    return f"sample-{number}-{content.hexdigest()[:8]}.png"


# -- texts of others ---------------------------------------------------------------------------------------------------


def without_local_paths(value: Any) -> Any:
    """Plain JSON types, of whose texts each absolute path is reduced to its last part."""
    if isinstance(value, Mapping):
        return {_pathless(str(key)): without_local_paths(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_local_paths(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float)) else _pathless(str(value))


def _pathless(text: str) -> str:
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute():
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return _PATH.sub(r"\1", text)


def _line(text: object) -> str:
    """One line of printable characters: no control, surrogate or direction mark. Emoji keep their joiners."""
    shown = "".join(c if c.isprintable() or c in "\u200c\u200d" else " " for c in str(text)[: 4 * _LONGEST])
    return " ".join(shown.split())[:_LONGEST]


def _code(text: object) -> str:
    """Markdown that shows a text as it is, whatever it holds: a code span between enough backticks."""
    line = _line(text) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if "`" in (line[0], line[-1]) else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _plain(text: object) -> str:
    """Markdown that shows a text in running letters: what could be markup becomes an entity."""
    return "".join(f"&#{ord(c)};" if c in string.punctuation and c not in ",-.'!?/" else c for c in _line(text))


def _python(value: object) -> str:
    return json.dumps(_line(value), ensure_ascii=False) if isinstance(value, str) else repr(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_repo_id(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9_][\w.\-]{0,95}", text, re.ASCII) is not None
