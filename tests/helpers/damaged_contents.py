"""Damage to what a safetensors file holds, tensors and texts, and to JSON beside it, see `mutations`.

The file itself is sound: only what it says has changed.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.helpers.damaged_bytes import DEEP, Damage
from tests.helpers.safetensors_bytes import NUMPY, Entry, built, entries, join, split

KINDS: list[Damage] = []
CONFIG_KINDS: list[Damage] = []
HOSTILE_JSON = (
    "1" + "0" * 400, "9" * 5000, "1e30", "NaN", "Infinity", "-Infinity", "1e999", "-1", "0", "true", "false", "null",
    "[]", "{}", '""', '"x"', '"\\ud800"', '"\\u0000\\n\\u001b[2J"', '"True"', '"-5"', '"nan"', "1e-400", "0.5", "33",
    "34", "[[1]]", '{"a": 1}', json.dumps("x" * 20_000), "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP,
)  # fmt: skip
HOSTILE_NAMES = (
    "../../../etc/passwd", "/dev/null", "C:\\con", "\x00", "a\nb", "\x1b[2J", "\u202egnp.exe", "", ".", "..", "unet",
    "__metadata__ ", "__class__", "x" * 251, "x" * 100_000, "😀" * 60, "%s%n{0}",
)  # fmt: skip
# What may follow a layer's key in some tool's file.
SUFFIXES = (
    "lora_down.weight", "dora_scale", "oft_R.clipped_oft", "alpha", "rescale", "oft_diag", "oft_blocks.0", "weight",
    "oft_R.weight", "oft_rotation.weight", "oft_blocks", "oft_R.scaled_oft", "oft_scale.weight", "boft_R",
)  # fmt: skip


def _kind(damage: Damage) -> Damage:
    KINDS.append(damage)
    return damage


def _config_kind(damage: Damage) -> Damage:
    CONFIG_KINDS.append(damage)
    return damage


# -- tensors -----------------------------------------------------------------------------------------------------------


def _changed(data: bytes, draw: random.Random, change: Callable[[Entry], Entry], *, large: bool = True) -> bytes:
    """One tensor otherwise, in a file that is sound else; one of the larger, or of the smallest."""
    texts, tensors = entries(data)
    sizes = sorted(len(entry.data) for entry in tensors.values())
    fitting = [n for n, e in tensors.items() if (len(e.data) >= sizes[-1] // 4 if large else len(e.data) == sizes[0])]
    name = draw.choice(fitting)
    tensors[name] = change(tensors[name])
    return built(texts, tensors)


@_kind
def converted(data: bytes, draw: random.Random) -> bytes:
    dtype = draw.choice(
        ["F64", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "U16", "C64", "F8_E4M3", "F8_E8M0", "F4"]
    )
    if dtype in NUMPY:
        return _changed(data, draw, lambda entry: entry.holding(entry.array(), dtype))

    def in_bytes(entry: Entry) -> Entry:
        return Entry(dtype, entry.shape, draw.randbytes(math.prod(entry.shape) // (2 if dtype == "F4" else 1)))

    return _changed(data, draw, in_bytes)


def _poisoned(data: bytes, draw: random.Random, values: tuple[float, ...], *, wide: bool = False) -> bytes:
    def change(entry: Entry) -> Entry:
        array = entry.array().astype("<f8" if wide else "<f4")
        array.reshape(-1)[draw.randrange(array.size)] = draw.choice(values)
        with np.errstate(over="ignore"):
            return entry.holding(array, "F64" if wide else None)

    return _changed(data, draw, change)


@_kind
def not_finite(data: bytes, draw: random.Random) -> bytes:
    return _poisoned(data, draw, (math.nan, math.inf, -math.inf))


@_kind
def enormous(data: bytes, draw: random.Random) -> bytes:
    return _poisoned(data, draw, (1e2, 1e4, 1e10, -1e20, 1e30, 3.4e38))


@_kind
def enormous_float64(data: bytes, draw: random.Random) -> bytes:
    return _poisoned(data, draw, (1e39, -1e300, 1.7e308), wide=True)


@_kind
def tiny(data: bytes, draw: random.Random) -> bytes:
    return _poisoned(data, draw, (1e-40, -0.0, 1e-30))


@_kind
def all_zero(data: bytes, draw: random.Random) -> bytes:
    return _changed(data, draw, lambda entry: entry.holding(np.zeros(entry.shape)))


@_kind
def reshaped(data: bytes, draw: random.Random) -> bytes:
    def change(entry: Entry) -> Entry:
        count = math.prod(entry.shape)
        shapes = [
            (count,),
            (1, count),
            (count, 1),
            (1, 1, count),
            (1, *entry.shape),
            (*entry.shape, 1),
            entry.shape[::-1],
        ]
        return entry._replace(shape=draw.choice(shapes))

    return _changed(data, draw, change)


@_kind
def emptied(data: bytes, draw: random.Random) -> bytes:
    shape = draw.choice([(), (0,), (0, 0), (0, 28), (2, 0), (0, 8, 8)])
    return _changed(data, draw, lambda entry: entry.holding(np.zeros(shape)))


@_kind
def rows_lost(data: bytes, draw: random.Random) -> bytes:
    keep = draw.choice([1, 2, -1])
    return _changed(data, draw, lambda entry: entry.holding(entry.array()[:keep]))


@_kind
def rows_added(data: bytes, draw: random.Random) -> bytes:
    return _changed(data, draw, lambda entry: entry.holding(np.concatenate([entry.array()] * draw.choice([2, 3]))))


@_kind
def block_huge(data: bytes, draw: random.Random) -> bytes:
    """A block of 10 MB, which as a matrix or its inverse would be many times as much."""
    side = draw.choice([1500, 2300])
    return _changed(
        data, draw, lambda e: e.holding(np.zeros((1, side, side) if len(e.shape) == 3 else (1, side * (side - 1) // 2)))
    )


@_kind
def setting_in_several(data: bytes, draw: random.Random) -> bytes:
    return _changed(data, draw, lambda e: e.holding(np.concatenate([e.array().reshape(-1)] * 2)), large=False)


@_kind
def setting_changed(data: bytes, draw: random.Random) -> bytes:
    value = draw.choice([0, 1, 2, 3, -1, 0.25, 5, 33, 34, 1e9])
    return _changed(data, draw, lambda e: e.holding(np.full(e.shape, value)), large=False)


@_kind
def tensor_lost(data: bytes, draw: random.Random) -> bytes:
    texts, tensors = entries(data)
    del tensors[draw.choice(list(tensors))]
    return built(texts, tensors)


@_kind
def tensor_added(data: bytes, draw: random.Random) -> bytes:
    texts, tensors = entries(data)
    name = draw.choice(list(tensors))
    key = name.partition(".oft_")[0]
    added = draw.choice(
        [*(f"{key}.{end}" for end in SUFFIXES), "bundle_emb.sks.clip_l", "alpha", f"{key}_9.oft_R.weight"]
    )
    return built(texts, {added: tensors[name], **tensors})


@_kind
def many_tensors(data: bytes, draw: random.Random) -> bytes:
    texts, tensors = entries(data)
    empty = Entry("F32", (0, 1), b"")
    count = draw.choice([2_000, 19_000, 21_000])
    return built(texts, tensors | {f"lora_unet_{i}.oft_R.weight": empty for i in range(count)})


def _renamed(data: bytes, draw: random.Random, names: tuple[str, ...]) -> bytes:
    texts, tensors = entries(data)
    old, new = draw.choice(list(tensors)), draw.choice(names)
    suffix = "." + old.rpartition(".oft_")[2]
    renamed = draw.choice([new, f"{new}.oft_R.weight", f"{old.partition('.oft_')[0]}.{new}.oft{suffix}"])
    return built(texts, [(renamed if name == old else name, entry) for name, entry in tensors.items()])


@_kind
def name_hostile(data: bytes, draw: random.Random) -> bytes:
    return _renamed(data, draw, HOSTILE_NAMES)


@_kind
def name_mistyped(data: bytes, draw: random.Random) -> bytes:
    texts, tensors = entries(data)
    old = draw.choice(list(tensors))
    place = draw.randrange(len(old))
    new = old[:place] + draw.choice(["", "x", ".", "_", "0", old[place].upper()]) + old[place + 1 :]
    return built(texts, [(new if name == old else name, entry) for name, entry in tensors.items()])


@_kind
def names_swapped(data: bytes, draw: random.Random) -> bytes:
    texts, tensors = entries(data)
    a, b = draw.sample(list(tensors), 2)
    tensors[a], tensors[b] = tensors[b], tensors[a]
    return built(texts, tensors)


# -- texts -------------------------------------------------------------------------------------------------------------


@_kind
def texts_lost(data: bytes, draw: random.Random) -> bytes:
    return built({}, entries(data)[1])


@_kind
def text_lost(data: bytes, draw: random.Random) -> bytes:
    texts, tensors = entries(data)
    return built({name: texts[name] for name in draw.sample(list(texts), max(0, len(texts) - 1))}, tensors)


@_kind
def text_added(data: bytes, draw: random.Random) -> bytes:
    texts, tensors = entries(data)
    return built(
        texts | {draw.choice(["note", "é😀", "licence", "../x"]): draw.choice(["", "x", "y" * 100_000])}, tensors
    )


@_kind
def text_renamed(data: bytes, draw: random.Random) -> bytes:
    texts, tensors = entries(data)
    old = draw.choice(list(texts) or ["format"])
    return built({(name[:-1] + "_" if name == old else name): text for name, text in texts.items()}, tensors)


@_kind
def text_changed(data: bytes, draw: random.Random) -> bytes:
    """One character of a text."""
    texts, tensors = entries(data)
    if written := [name for name, text in texts.items() if text]:
        name = draw.choice(written)
        place = draw.randrange(len(texts[name]))
        texts[name] = (
            texts[name][:place] + chr(ord(texts[name][place]) ^ 1 << draw.randrange(6)) + texts[name][place + 1 :]
        )
    return built(texts, tensors)


@_kind
def text_hostile(data: bytes, draw: random.Random) -> bytes:
    texts, tensors = entries(data)
    return built(texts | {draw.choice([*texts, "ss_network_args", "ot_config"]): draw.choice(HOSTILE_JSON)}, tensors)


@_kind
def text_no_string(data: bytes, draw: random.Random) -> bytes:
    header, body = split(data)
    texts = header.get("__metadata__", {})
    odd: list[Any] = [
        {**texts, "format": 1},
        {**texts, "x": None},
        {**texts, "x": {}},
        [],
        "x",
        1,
        {**texts, "x": ["y"]},
    ]
    return join({**header, "__metadata__": draw.choice(odd)}, body)


@_kind
def many_texts(data: bytes, draw: random.Random) -> bytes:
    texts, tensors = entries(data)
    if draw.random() < 0.5:
        return built(texts | {str(i): "" for i in range(200_000)}, tensors)
    return built(texts | {"x": draw.choice("x😀") * 1_000_000}, tensors)


@_kind
def json_in_text_changed(data: bytes, draw: random.Random) -> bytes:
    """A text that is JSON gets another value somewhere, or loses, doubles or gains a key."""
    texts, tensors = entries(data)
    objects = [name for name, text in texts.items() if text.startswith("{")]
    if not objects:
        told = draw.choice(
            [{"oft_coft": "True"}, {"coft": "True", "coft_eps": draw.choice(["nan", "0", "1e400", "x"])}]
        )
        return built(texts | {"ss_network_args": json.dumps(told)}, tensors)
    name = draw.choice(objects)
    damage = draw.choice([config_value_hostile, config_value_hostile, config_key_lost, config_key_twice])
    return built(texts | {name: damage(texts[name].encode(), draw).decode("utf-8", "replace")}, tensors)


# -- JSON beside -------------------------------------------------------------------------------------------------------


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in JSON, and the short ones most often."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in below] + [p for key, inner in below for p in _places(inner, (*path, key))][:200]


@_config_kind
def config_value_hostile(data: bytes, draw: random.Random) -> bytes:
    told = json.loads(data)
    place, inner = draw.choice(_places(told)), told
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "<here>"
    return json.dumps(told).replace('"<here>"', draw.choice(HOSTILE_JSON), 1).encode()


@_config_kind
def config_key_lost(data: bytes, draw: random.Random) -> bytes:
    told = json.loads(data)
    del told[draw.choice(list(told))]
    return json.dumps(told).encode()


@_config_kind
def config_key_twice(data: bytes, draw: random.Random) -> bytes:
    told = json.loads(data)
    name = draw.choice(list(told))
    pieces = [json.dumps(told)[1:-1], json.dumps({name: draw.choice([told[name], None, True, False, 3])})[1:-1]]
    return ("{" + ", ".join(draw.sample(pieces, 2)) + "}").encode()


@_config_kind
def config_key_added(data: bytes, draw: random.Random) -> bytes:
    return json.dumps(
        {draw.choice(["note", "é", "x" * 1000]): draw.choice([1, None, [[]]]), **json.loads(data)}
    ).encode()


@_config_kind
def config_spaced(data: bytes, draw: random.Random) -> bytes:
    return json.dumps(json.loads(data), indent=draw.choice([None, 7]), sort_keys=True).encode() + b"\n"


@_config_kind
def config_encoded(data: bytes, draw: random.Random) -> bytes:
    return data.decode().replace('"bias"', '"é"').encode(draw.choice(["utf-16", "utf-8-sig", "latin-1", "utf-32"]))


@_config_kind
def config_huge(data: bytes, draw: random.Random) -> bytes:
    return data[:-1].rstrip() + b', "x": [' + draw.choice([b"[],", b"{},", b"1,"]) * 800_000 + b"1]}"


@_config_kind
def config_replaced(data: bytes, draw: random.Random) -> bytes:
    return draw.choice([*HOSTILE_JSON, "", "{", "[{}]", "\x00"]).encode("utf-8", "surrogatepass")
