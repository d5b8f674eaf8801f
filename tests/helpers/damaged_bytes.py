"""Damage to a safetensors file's bytes and to its header, see `mutations`."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

from tests.helpers.safetensors_bytes import join, split

Damage = Callable[[bytes, random.Random], bytes]
KINDS: list[Damage] = []
DEEP = 30_000  # levels of nesting, far more than any parser takes


def kind(damage: Damage) -> Damage:
    """Note down a kind of damage."""
    KINDS.append(damage)
    return damage


def _flipped(data: bytes, places: list[int], draw: random.Random) -> bytes:
    damaged = bytearray(data)
    for place in places:
        damaged[place] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def _header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


# -- bytes -------------------------------------------------------------------------------------------------------------


@kind
def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


@kind
def cut_in_header(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(_header_end(data))]


@kind
def longer(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randint(1, 64))


@kind
def bit_flipped(data: bytes, draw: random.Random) -> bytes:
    return _flipped(data, [draw.randrange(len(data))], draw)


@kind
def bit_flipped_in_header(data: bytes, draw: random.Random) -> bytes:
    return _flipped(data, [draw.randrange(8, _header_end(data))], draw)


@kind
def bit_flipped_in_length(data: bytes, draw: random.Random) -> bytes:
    return _flipped(data, [draw.randrange(8)], draw)


@kind
def bit_flipped_in_tensors(data: bytes, draw: random.Random) -> bytes:
    return _flipped(data, [draw.randrange(_header_end(data), len(data))], draw)


@kind
def bits_flipped(data: bytes, draw: random.Random) -> bytes:
    return _flipped(data, draw.sample(range(len(data)), draw.randint(2, 64)), draw)


@kind
def run_overwritten(data: bytes, draw: random.Random) -> bytes:
    size = draw.choice([1, 16, 512])
    start = draw.randrange(len(data))
    run = draw.choice([bytes(size), b"\xff" * size, draw.randbytes(size)])
    return data[:start] + run[: len(data) - start] + data[start + size :]


@kind
def bytes_lost(data: bytes, draw: random.Random) -> bytes:
    start, size = draw.randrange(len(data)), draw.choice([1, 4, 512])
    return data[:start] + data[start + size :]


@kind
def bytes_inserted(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + draw.randbytes(draw.choice([1, 4, 512])) + data[start:]


@kind
def runs_swapped(data: bytes, draw: random.Random) -> bytes:
    start, size = _header_end(data), (len(data) - _header_end(data)) // 4
    a, b, rest = data[start : start + size], data[start + size : start + 2 * size], data[start + 2 * size :]
    return data[:start] + b + a + rest


@kind
def noise(data: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(draw.choice([0, 1, 8, 9, 300, len(data)]))


@kind
def another_kind_of_file(data: bytes, draw: random.Random) -> bytes:
    starts = (b"PK\x03\x04", b"\x80\x02}q\x00.", b"<!doctype html>", b"GGUF\x03\0\0\0", b"version https://git-lfs", b"")
    return draw.choice(starts) + data[draw.randrange(len(data)) :]


@kind
def length_lies(data: bytes, draw: random.Random) -> bytes:
    size = _header_end(data) - 8
    lie = draw.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1, 4_999_999])
    return lie.to_bytes(8, "little") + data[8:]


# -- the header --------------------------------------------------------------------------------------------------------


@kind
def header_replaced(data: bytes, draw: random.Random) -> bytes:
    deep = "[" * DEEP + "]" * DEEP
    texts = (
        "",
        "null",
        "[]",
        "{",
        "{}",
        '"x"',
        deep,
        '{"a":' * DEEP + "1" + "}" * DEEP,
        "\ufeff{}",
        '{"__metadata__": {}}',
    )
    text = draw.choice([*(text.encode() for text in texts), b"\xff\xfe{}", b"{" + b" " * 2_000_000 + b"}"])
    return join(text, split(data)[1])


def _tensor(header: dict[str, Any], draw: random.Random) -> str:
    return draw.choice([name for name in header if name != "__metadata__"])


def _told_otherwise(data: bytes, draw: random.Random, change: dict[str, Any]) -> bytes:
    header, body = split(data)
    header[_tensor(header, draw)].update(change)
    return join(header, body)


def _with_pair(header: dict[str, Any], pair: dict[str, Any], body: bytes, *, first: bool) -> bytes:
    pieces = [json.dumps(header)[1:-1], json.dumps(pair)[1:-1]]
    return join(("{" + ", ".join(pieces[::-1] if first else pieces) + "}").encode(), body)


@kind
def tensor_twice(data: bytes, draw: random.Random) -> bytes:
    header, body = split(data)
    name = _tensor(header, draw)
    other = draw.choice([{}, {"dtype": "I32"}, {"shape": [math.prod(header[name]["shape"]), 1]}])
    return _with_pair(header, {name: header[name] | other}, body, first=draw.random() < 0.5)


@kind
def texts_twice(data: bytes, draw: random.Random) -> bytes:
    header, body = split(data)
    return _with_pair(header, {"__metadata__": {"format": "pt"}}, body, first=draw.random() < 0.5)


@kind
def text_twice(data: bytes, draw: random.Random) -> bytes:
    header, body = split(data)
    texts = header.pop("__metadata__", {"format": "pt"})
    again = json.dumps({draw.choice(list(texts)): draw.choice(["", "other"])})[1:-1]
    return join(f'{{"__metadata__": {{{json.dumps(texts)[1:-1]}, {again}}}, {json.dumps(header)[1:]}'.encode(), body)


@kind
def entry_with_more(data: bytes, draw: random.Random) -> bytes:
    return _told_otherwise(
        data, draw, {draw.choice(["stride", "", "requires_grad"]): draw.choice([[], True, [[]] * 1000])}
    )


@kind
def shape_huge(data: bytes, draw: random.Random) -> bytes:
    huge = draw.choice(
        [[2**40, 2**40], [2**63, 0], [2**62, 4, 0], [10**10], [2**31, 2**31], [1, 50_000_000], [0, 2**50]]
    )
    return _told_otherwise(data, draw, {"shape": huge})


@kind
def shape_strange(data: bytes, draw: random.Random) -> bytes:
    odd: list[Any] = [
        [-2, -28],
        [2.0, 28],
        ["2", 28],
        [],
        [[2], 28],
        [1] * 70,
        [1] * 100_000,
        "2,28",
        None,
        True,
        {"a": 1},
    ]
    return _told_otherwise(data, draw, {"shape": draw.choice(odd)})


@kind
def place_strange(data: bytes, draw: random.Random) -> bytes:
    size = len(split(data)[1])
    odd: list[Any] = [
        [-8, 8],
        [0, 10**18],
        [size, 0],
        [8, size + 8],
        [0, size, size],
        "0,8",
        [0],
        None,
        [0, 2**64],
        [0, 4],
    ]
    return _told_otherwise(data, draw, {"data_offsets": draw.choice(odd)})


@kind
def tensors_overlap(data: bytes, draw: random.Random) -> bytes:
    header, body = split(data)
    a, b = draw.sample([name for name in header if name != "__metadata__"], 2)
    header[a] = header[b]
    return join(header, body)


@kind
def dtype_relabelled(data: bytes, draw: random.Random) -> bytes:
    """The same bytes under a dtype of the same width, where there is one."""
    header, body = split(data)
    told = header[_tensor(header, draw)]
    same = {"F32": ("I32", "U32"), "F64": ("I64", "U64"), "I64": ("F64",), "BOOL": ("U8", "I8", "F8_E5M2")}
    told["dtype"] = draw.choice(same.get(told["dtype"], ("F16", "BF16", "I16")))
    return join(header, body)


@kind
def dtype_strange(data: bytes, draw: random.Random) -> bytes:
    odd: list[Any] = ["F7", "f32", "C128", "F4", "F6_E2M3", "", "F32 ", None, 32, ["F32"], "x" * 10_000, "O"]
    return _told_otherwise(data, draw, {"dtype": draw.choice(odd)})


@kind
def header_reordered(data: bytes, draw: random.Random) -> bytes:
    header, body = split(data)
    names = list(header)
    draw.shuffle(names)
    return join({name: header[name] for name in names}, body)


@kind
def header_spaced(data: bytes, draw: random.Random) -> bytes:
    header, body = split(data)
    spaced = json.dumps(header, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5)
    return join(spaced.encode() + b" " * draw.randrange(1, 9), body)
