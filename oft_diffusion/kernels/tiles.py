"""How the kernels cut their work, by block size and dtype: `tiles.json`, written by `python -m benchmarks.tune_rotate`.

Data alone: no Triton needed to read it. Measured in bfloat16 and float32; float16 has the rows of bfloat16.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch

FILE = Path(__file__).with_name("tiles.json")
# Others take the pure-torch form.
SIZES = (8, 16, 32, 64, 128)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Kernel = Literal["rotate", "delta_grad"]


class Tile(NamedTuple):
    """One row of the table; rows and width are powers of two."""

    rows: int  # of x in one product; at least 16
    steps: int  # how many such, one after another, in a program
    width: int  # columns of x: a multiple of b, at least the 16 that `tl.dot` takes everywhere
    warps: int
    stages: int  # of the loads' pipeline


@functools.cache
def table() -> dict[str, dict[str, list[int]]]:
    """`{kernel: {"b dtype": [rows, steps, width, warps, stages]}}`."""
    return json.loads(FILE.read_text(encoding="utf-8"))["tiles"]


@functools.cache
def tile_of(kernel: Kernel, block_size: int, dtype: torch.dtype) -> Tile:
    """The committed choice.

    Raises:
        KeyError: the table has no such row; `SIZES` and `DTYPES` are what it has.
    """
    return Tile(*table()[kernel][f"{block_size} {str(dtype).removeprefix('torch.')}"])
