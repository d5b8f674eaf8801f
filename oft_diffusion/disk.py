"""Files that are whole or not there: atomic writing, and reading of safetensors that trusts nothing."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oft_diffusion.errors import AdapterFileError, OFTError

_MAX_HEADER_BYTES = 25_000_000  # safetensors' own limit is 100 MB; an adapter of 10,000 layers needs 2


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def is_writable(folder: Path) -> bool:
    """Whether files can be written into a folder, or it can be made. Nothing is made here."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: to a temporary name beside it, synced, then renamed.

    Raises:
        AdapterFileError: the folder cannot be made or written, or the disk is full.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a shared adapter gets the usual permissions instead.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        raise AdapterFileError(
            f"{path} cannot be written ({error.strerror or error})",
            expected=f"a writable folder with {len(data) / 1e6:.1f} MB free",
            fix="free some space, or choose another folder",
        ) from error
    finally:
        if temporary is not None:  # Ctrl-C leaves nothing behind either
            Path(temporary).unlink(missing_ok=True)


def read_safetensors(path: Path, check: Callable[[Sequence[str]], None]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, on the CPU, and the texts in its header.

    Args:
        path: the file.
        check: is given the tensors' names before any is read, and may raise.

    Raises:
        AdapterFileError: the file is missing, truncated or corrupt, or its header is too large to be true.
    """
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise AdapterFileError(
                f"{path.name} claims a header of {header_bytes:,} bytes",
                expected=f"at most {_MAX_HEADER_BYTES:,} bytes",
                fix="do not trust this file; get it again from its author",
            )
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            check(names)
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, OFTError):
            raise
        raise AdapterFileError(
            f"{path.name} is truncated or corrupt ({str(error)[:200]})",
            expected="a whole safetensors file",
            fix="download or copy the file again",
        ) from error


def has_metadata(path: Path, entry: str) -> bool:
    """Whether a safetensors file's header has this text; False also where it cannot be read."""
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > _MAX_HEADER_BYTES:
                return False
        with safe_open(path, framework="pt", device="cpu") as file:
            return entry in (file.metadata() or {})
    except (SafetensorError, OSError, UnicodeDecodeError, ValueError):
        return False
