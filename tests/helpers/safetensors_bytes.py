"""Safetensors files taken apart and put together byte by byte, without safetensors and without this package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "BOOL": "?", "U16": "<u2", "U32": "<u4", "C64": "<c8", "BF16": "<u2",
}  # fmt: skip


class Entry(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self) -> np.ndarray:
        """Its numbers; of bfloat16 as float32."""
        found = np.frombuffer(self.data, NUMPY[self.dtype])
        if self.dtype == "BF16":
            found = (found.astype("<u4") << 16).view("<f4")
        return found.reshape(self.shape)

    def holding(self, array: np.ndarray, dtype: str | None = None) -> Entry:
        """Other numbers, rounded to its dtype or another."""
        dtype = dtype or self.dtype
        if dtype == "BF16":
            stored = (np.ascontiguousarray(array, "<f4").view("<u4") >> 16).astype("<u2")
        else:
            stored = np.ascontiguousarray(array.astype(NUMPY[dtype]))
        return Entry(dtype, array.shape, stored.tobytes())


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A file's header and body."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join(header: Mapping[str, Any] | bytes, body: bytes) -> bytes:
    """A file of a header, however wrong, and a body. Where it is no text yet, it is padded as safetensors does."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text = text if isinstance(header, bytes) else text + b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def entries(data: bytes) -> tuple[dict[str, str], dict[str, Entry]]:
    """A sound file's texts and tensors."""
    header, body = split(data)
    texts = header.pop("__metadata__", None) or {}
    found = {}
    for name, told in header.items():
        start, end = told["data_offsets"]
        found[name] = Entry(told["dtype"], tuple(told["shape"]), body[start:end])
    return texts, found


def built(texts: Mapping[str, Any], tensors: Mapping[str, Entry] | Iterable[tuple[str, Entry]]) -> bytes:
    """A sound file, in the order of the tensors."""
    header: dict[str, Any] = {"__metadata__": dict(texts)} if texts else {}
    pieces, place = [], 0
    for name, entry in tensors.items() if isinstance(tensors, Mapping) else tensors:
        end = place + len(entry.data)
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [place, end]}
        pieces.append(entry.data)
        place = end
    return join(header, b"".join(pieces))


def tensors_of(data: bytes) -> dict[str, Tensor]:
    """A sound file's tensors in torch; bfloat16 as float32."""
    return {name: torch.from_numpy(entry.array().copy()) for name, entry in entries(data)[1].items()}
