"""Where an export goes: files of the right kind, folders that appear whole, numbers that their dtype can hold."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from oft_diffusion.disk import umask, unwritable
from oft_diffusion.errors import AdapterFileError, TargetError


def safetensors_path(path: str | Path) -> Path:
    """A path of that kind.

    Raises:
        AdapterFileError: its name says something else.
    """
    if Path(path).suffix != ".safetensors":
        raise AdapterFileError(
            f"{Path(path).name} is no name of a safetensors file",
            expected="a name that ends in .safetensors",
            fix=f"use {Path(path).stem}.safetensors",
        )
    return Path(path)


def check_new(folder: Path) -> None:
    """Refuse a folder that something would have to be replaced for.

    Raises:
        AdapterFileError: there is something of that name.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise AdapterFileError(f"{folder} is there already", expected="a new folder", fix="choose another name")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when all is in it, synced; after any error there is none.

    Raises:
        AdapterFileError: there is something of that name, or it cannot be made or written.
    """
    check_new(folder)
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        temporary.chmod(0o777 & ~umask())  # temporary folders are private
        temporary.replace(folder)
        temporary = None
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def as_stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as a file holds it, on the CPU.

    Raises:
        AdapterFileError: it reaches further than its dtype.
    """
    stored = tensor.to("cpu", dtype).contiguous()
    if not torch.isfinite(stored).all():
        raise AdapterFileError(
            f"{name} reaches {float(tensor.abs().max()):.3g}, which {dtype} cannot hold",
            expected=f"numbers up to {torch.finfo(dtype).max:.3g}",
            fix="write bfloat16 or float32, or take a smaller strength",
        )
    return stored


class Owners:
    """Which component each name of a file is of: two components' layers may have the same, and one would be lost."""

    def __init__(self) -> None:
        self._parts: dict[str, str] = {}

    def claim(self, name: str, part: str) -> None:
        """Note a name down.

        Raises:
            TargetError: it is another component's.
        """
        first = self._parts.setdefault(name, part)
        if first != part:
            raise TargetError(
                f"{name} is a name of a layer of {first} and of {part}",
                expected="a file for each of them",
                fix=f'write them one by one: convert --only {first}, or components=["{first}"] for an export in Python',
            )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
