"""Files that are whole or not there: atomic writing, and reading of safetensors that trusts nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oft_diffusion.errors import AdapterFileError, first_line

SEAL_KEY = "oft_diffusion_file_sha256"
_SEAL = re.compile(rb'"' + SEAL_KEY.encode() + rb'"\s*:\s*"([0-9a-f]{64})"')
_UNSEALED = "0" * 64
# safetensors' own limit is 100 MB, of which it makes gigabytes. An adapter of 10,000 layers needs 2.5 MB, and one of
# the tool with the most tensors per layer, for the largest denoisers, has 12,000.
_MAX_HEADER_BYTES = 5_000_000
_MAX_TENSORS = 20_000
_MAX_TEXTS = 1_000
_MAX_NAME = 250
_MAX_AXES = 8


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def parse_json(text: str) -> Any:
    """JSON that says one thing: a key that is there twice is refused, where parsers choose the first or the last.

    Raises:
        ValueError: it is no such JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_only_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _only_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"{name[:80]!r} is there twice")
        seen.add(name)
    raise AssertionError


def sealed(data: bytes) -> bytes:
    """A safetensors file with the SHA-256 of all its bytes in its header's entry `SEAL_KEY`.

    It is taken with 64 zeros in its own place. Unlike a digest of what the file means it sees every bit: order,
    padding, other entries.

    Args:
        data: a file with that entry, whatever digest is in it.
    """
    changed = bytearray(data)
    place = _place_of_seal(data[: 8 + int.from_bytes(data[:8], "little")])
    assert place is not None
    changed[place] = _UNSEALED.encode()
    changed[place] = hashlib.sha256(changed).hexdigest().encode()
    return bytes(changed)


def is_sealed(path: Path) -> bool:
    """Whether a file's bytes are those that `sealed` returned."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            header = bytearray(start + file.read(min(int.from_bytes(start, "little"), _MAX_HEADER_BYTES)))
            place = _place_of_seal(header)
            if place is None:
                return False
            told, header[place] = bytes(header[place]).decode(), _UNSEALED.encode()
            digest = hashlib.sha256(header)
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == told


def _place_of_seal(header: bytes | bytearray) -> slice | None:
    # No text in the header can hold the pattern: there, its quotation marks would be escaped.
    found = [match.span(1) for match in _SEAL.finditer(header)]
    return slice(*found[0]) if len(found) == 1 else None


def is_writable(folder: Path) -> bool:
    """Whether files can be written into a folder, or it can be made. Nothing is made here."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


@contextmanager
def writing_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name when it is whole, synced; after any error there is none.

    Raises:
        AdapterFileError: the folder cannot be made or written, or the disk is full.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~umask())  # mkstemp makes files private; a shared one gets the usual permissions
        Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if temporary is not None:  # Ctrl-C leaves nothing behind either
            Path(temporary).unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        AdapterFileError: as `writing_atomically`.
    """
    with writing_atomically(path) as file:
        file.write(data)


def unwritable(path: Path, error: OSError) -> AdapterFileError:
    """The error about a file or folder that cannot be written."""
    return AdapterFileError(
        f"{path} cannot be written ({error.strerror or error})",
        expected="a writable folder with enough space",
        fix="free some space, or choose another folder",
    )


def umask() -> int:
    """The permissions that this process takes away from new files."""
    found = os.umask(0)
    os.umask(found)
    return found


def read_safetensors(path: Path, check: Callable[[Sequence[str]], None]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, on the CPU, and the texts in its header.

    Args:
        path: the file.
        check: is given the tensors' names before any is read, and may raise.

    Raises:
        AdapterFileError: the file is missing, truncated or corrupt, its header is too large to be true, or says
            something twice.
    """
    names, texts = _read_header(path)
    check(names)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}, texts
    # safetensors lets through what torch then refuses, in exceptions of its own.
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise _corrupt(path, first_line(error)) from error


def has_metadata(path: Path, entry: str) -> bool:
    """Whether a safetensors file's header has this text; False also where it cannot be read."""
    try:
        return entry in _read_header(path)[1]
    except AdapterFileError:
        return False


def _read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            return check_header(path, start + file.read(min(int.from_bytes(start, "little"), _MAX_HEADER_BYTES)))
    except OSError as error:
        raise _corrupt(path, error.strerror or first_line(error)) from error


def check_header(path: Path, data: bytes) -> tuple[list[str], dict[str, str]]:
    """The names of a file's tensors, and the texts beside them.

    Args:
        path: for messages.
        data: the file, or what of it is before its tensors.

    Raises:
        AdapterFileError: it cannot be read; or safetensors would spend much on it, or choose between two meanings.
    """
    size = int.from_bytes(data[:8], "little")
    if size > _MAX_HEADER_BYTES:
        raise _hostile(path, f"a header of {size:,} bytes", f"at most {_MAX_HEADER_BYTES:,} bytes")
    if len(data) < 8 + size:
        raise _corrupt(path, f"its header ends after {len(data):,} bytes of {8 + size:,}")
    try:
        entries = parse_json(data[8 : 8 + size].decode())
    except ValueError as error:
        raise _corrupt(path, first_line(error)) from error
    texts = entries.pop("__metadata__", None) or {} if isinstance(entries, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise _corrupt(path, "its header is no table of tensors and texts")
    if len(entries) > _MAX_TENSORS or len(texts) > _MAX_TEXTS:
        found = f"{len(entries):,} tensors and {len(texts):,} texts"
        raise _hostile(path, found, f"at most {_MAX_TENSORS:,} tensors and {_MAX_TEXTS:,} texts")
    for name, entry in entries.items():
        if len(name) > _MAX_NAME or not name.isprintable():
            raise _hostile(path, f"a tensor named {name[:80]!r}, {len(name):,} characters", "the name of a layer")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise _corrupt(path, f"{name} is described by something else than dtype, shape and data_offsets")
        shape, dtype, offsets = entry["shape"], entry["dtype"], entry["data_offsets"]
        if not all(isinstance(told, list) and all(type(n) is int for n in told) for told in (shape, offsets)):
            raise _corrupt(path, f"the shape or place of {name} are no integers")
        if not isinstance(dtype, str) or len(shape) > _MAX_AXES:
            raise _corrupt(path, f"{name} is a {str(dtype)[:20]} with {len(shape)} axes")
    return list(entries), texts


def _hostile(path: Path, claim: str, expected: str) -> AdapterFileError:
    return AdapterFileError(
        f"{path.name} claims {claim}",
        expected=expected,
        fix="do not trust this file; get it again from its author",
    )


def _corrupt(path: Path, why: str) -> AdapterFileError:
    return AdapterFileError(
        f"{path.name} is truncated or corrupt ({why[:200]})",
        expected="a whole safetensors file",
        fix="download or copy the file again",
    )
