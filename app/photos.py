"""Pictures of a subject, as somebody uploads them: checked, re-encoded without what cameras write, and captioned."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from oft_diffusion.disk import write_atomically
from oft_diffusion.errors import DataError
from oft_diffusion.images import FORMATS, IMAGE_KINDS, read_picture, save_png

from .workspace import Workspace, new_id

MOST, LARGEST_FILE, MOST_PIXELS = 40, 50_000_000, 40_000_000
LONGEST_CAPTION = 500
_SIDE = 2048  # of what is kept
_DECODING = threading.Lock()  # one picture at a time: each may take some hundred megabytes
_FULL = f"{MOST} pictures are the most"
_BLURRED, _ALIKE = 25.0, 6  # variance of the Laplacian; differing bits of 64


@dataclass(frozen=True)
class Photo:
    """An uploaded picture.

    Attributes:
        id: its name in the folder.
        path: of the re-encoded picture.
        caption: its own, or empty for the prompt of all.
        size: width and height in pixels.
        notes: what may be wrong with it, in words.
    """

    id: str
    path: Path
    caption: str
    size: tuple[int, int]
    notes: tuple[str, ...]


class Photos:
    """One person's pictures for the next training."""

    def __init__(self, workspace: Workspace, token: str) -> None:
        self.owner, self.folder = workspace.person(token), workspace.uploads(token)

    def add(self, files: Iterable[Path]) -> list[str]:
        """Take pictures in; what could not be taken, in sentences. Texts beside pictures are their captions.

        Pictures are decoded, turned upright, shrunk to 2048 pixels a side at most and written anew, so that nothing of
        the file but its pixels is kept.
        """
        problems, files = [], list(files)
        texts = {path.stem: path for path in files if path.suffix.lower() == ".txt"}
        pictures = [path for path in files if path.suffix.lower() != ".txt"]
        for number, path in enumerate(pictures):
            if self.count() >= MOST:
                rest = len(pictures) - number
                problems.append(f"{path.name} {f'and {rest - 1} more were' if rest > 1 else 'was'} left out: {_FULL}")
                break
            try:
                photo = self._take(path)
            except DataError as error:
                problems.append(f"{path.name} was left out: {error.problem}")
                continue
            if path.stem in texts:
                self.describe(photo, texts[path.stem].read_text(encoding="utf-8", errors="replace"))
        return problems

    def look(self, resolution: int) -> list[Photo]:
        """All of them, with notes on those that will not train well at that resolution."""
        found: list[Photo] = []
        seen: list[tuple[str, int]] = []
        for number, path in enumerate(self._paths(), 1):
            with Image.open(path) as picture:
                gray = np.asarray(picture.convert("L").resize((256, 256)), dtype=np.float64)
                size = picture.size
            notes = []
            if min(size) < resolution:
                notes.append(f"smaller than {resolution} pixels: it will be enlarged")
            if _sharpness(gray) < _BLURRED:
                notes.append("it looks blurred")
            mark = _mark(gray)
            if same := next((name for name, other in seen if (mark ^ other).bit_count() <= _ALIKE), None):
                notes.append(f"nearly the same as {same}")
            seen.append((f"picture {number}", mark))
            text = path.with_suffix(".txt")
            caption = text.read_text(encoding="utf-8") if text.is_file() else ""
            found.append(Photo(path.stem, path, caption, size, tuple(notes)))
        return found

    def describe(self, photo_id: str, caption: str) -> None:
        """Give a caption, or take it away.

        Raises:
            DataError: there is no such picture.
        """
        path = self._path(photo_id).with_suffix(".txt")
        text = " ".join(caption.split())[:LONGEST_CAPTION]
        if text:
            write_atomically(path, text.encode())
        else:
            path.unlink(missing_ok=True)

    def remove(self, photo_id: str) -> None:
        """Take a picture out.

        Raises:
            DataError: there is no such picture.
        """
        path = self._path(photo_id)
        path.with_suffix(".txt").unlink(missing_ok=True)
        path.unlink()

    def clear(self) -> None:
        """Take all out."""
        for path in self._paths():
            self.remove(path.stem)

    def count(self) -> int:
        """How many there are."""
        return len(self._paths())

    def copy_to(self, folder: Path) -> None:
        """Copy pictures and captions into a folder, numbered."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(self._paths(), 1):
            for source in (path, path.with_suffix(".txt")):
                if source.is_file():
                    shutil.copyfile(source, folder / f"{number:02d}{source.suffix}")

    def _take(self, path: Path) -> str:
        picture = uploaded(path)
        photo_id = new_id()
        save_png(picture, self.folder / f"{photo_id}.png")
        return photo_id

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.png"))

    def _path(self, photo_id: str) -> Path:
        path = next((path for path in self._paths() if path.stem == photo_id), None)
        if path is None:
            raise DataError("there is no such picture", expected="one of yours", fix="reload the page")
        return path


def uploaded(path: Path) -> Image.Image:
    """The pixels of a file that somebody sent, upright, at most 2048 a side.

    Raises:
        DataError: it is no picture, or a larger one than this machine should hold.
    """
    check_upload(path)
    with _DECODING:
        picture = read_picture(path)
        picture.thumbnail((_SIDE, _SIDE))
    return picture


def check_upload(path: Path) -> Path:
    """A file that somebody sent, unless it must not be decoded; its header tells.

    Raises:
        DataError: it is no picture, or a larger one than this machine should hold.
    """
    if path.stat().st_size > LARGEST_FILE:
        raise DataError("it is larger than 50 MB", expected="a photograph", fix="shrink it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=FORMATS) as unread:
                pixels = unread.width * unread.height
        except Image.DecompressionBombError as error:
            raise DataError("it has too many pixels", expected="at most 40 million", fix="shrink it") from error
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"it is no {IMAGE_KINDS} picture", expected="one", fix="leave it out") from error
    if pixels > MOST_PIXELS:
        raise DataError(f"it has {pixels:,} pixels", expected="at most 40 million", fix="shrink it")
    return path


def _sharpness(gray: np.ndarray) -> float:
    """Variance of the Laplacian: low where nothing has an edge."""
    laplacian = (
        gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * gray[1:-1, 1:-1]
    )  # fmt: skip
    return float(laplacian.var())


def _mark(gray: np.ndarray) -> int:
    """64 bits that are alike for pictures that are: whether each of 8 x 8 cells is darker than its right neighbour."""
    small = gray[:, :252].reshape(8, 32, 9, 28).mean((1, 3))
    bits = (small[:, 1:] > small[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)
