"""Choose the tiles of the rotation kernels on this machine's card: oft_diffusion/kernels/tiles.json.

python -m benchmarks.tune_rotate                  # measures, prints what it would choose
python -m benchmarks.tune_rotate --write FILE     # and writes the table

Times are medians of Triton's own `do_bench`, which empties the cache between calls; the form to beat, batched products
of torch, is printed beside them. Most of the time goes into compiling: several processes do that side by side, and only
one of them measures at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import torch

from oft_diffusion.kernels.tiles import DTYPES, FILE, SIZES, Kernel, Tile, table, tile_of

# What SDXL's widest attention and Flux's blocks rotate: (rows, columns).
SHAPE = (4096, 3072)
_NUMBERS = 16384  # of x at once
_card: Any = nullcontext()


def values(size: int) -> dict[str, list[int]]:
    """What each part of a tile may be; of a width, one to four blocks side by side."""
    return {
        "rows": [16, 32, 64, 128, 256],
        "width": [width for width in (size, 2 * size, 4 * size) if 16 <= width <= 128],
        "steps": [1, 4, 16],
        "warps": [2, 4, 8],
        "stages": [1, 2, 3],
    }


def descended(tile: Tile, size: int, seconds: Callable[[Tile], float]) -> tuple[Tile, float]:
    """The best tile that is reached from one by changing a part at a time, and its time; not of all 405.

    Args:
        tile: where to begin.
        size: of the blocks.
        seconds: times a tile; infinity where it does not fit the card.
    """
    known: dict[Tile, float] = {}

    def took(candidate: Tile) -> float:
        if candidate not in known:
            known[candidate] = seconds(candidate)
        return known[candidate]

    while True:
        begun = tile
        for part, choices in values(size).items():
            near = [tile, *(tile._replace(**{part: value}) for value in choices)]
            tile = min((t for t in near if t.rows * t.width <= _NUMBERS), key=took, default=tile)
        if tile == begun:
            return tile, took(tile)


def fastest(kernel: Kernel, size: int, dtype: torch.dtype) -> tuple[Tile, float, float]:
    """(tile, its milliseconds, those of the pure-torch form)."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    from oft_diffusion.kernels import triton_rotate
    from oft_diffusion.kernels.block_rotate import delta_grad_in_torch, rotate_in_torch

    rows, columns = SHAPE
    x, grad = (torch.randn(rows, columns, device="cuda").to(dtype) for _ in range(2))
    delta = torch.zeros(columns // size, size, size, device="cuda", dtype=dtype)
    shape = list(delta.shape)
    ways: dict[Kernel, tuple[Callable[[Tile], object], Callable[[], object]]] = {
        "rotate": (
            lambda tile: triton_rotate.rotate(x, delta, tile),
            lambda: rotate_in_torch(x, delta),
        ),
        "delta_grad": (
            lambda tile: triton_rotate.delta_grad(x, grad, shape, tile),
            lambda: delta_grad_in_torch(x, grad, shape),
        ),
    }
    ours, torchs = ways[kernel]

    def timed(tile: Tile) -> float:
        try:
            ours(tile)  # compiles
        except OutOfResources:
            return math.inf
        return alone(lambda: ours(tile))

    def alone(call: Callable[[], object]) -> float:
        with _card:
            return float(do_bench(call, warmup=5, rep=20, return_mode="median"))

    best, least = descended(tile_of(kernel, size, dtype), size, timed)
    return best, least, alone(torchs)


def _hold(lock: Any) -> None:
    """Have a process measure only where it holds this."""
    global _card
    _card = lock


def tuned(job: tuple[Kernel, int, str]) -> tuple[Kernel, int, str, Tile, float, float]:
    """`fastest` of a job, beside that."""
    kernel, size, name = job
    return (*job, *fastest(kernel, size, DTYPES[name]))


def tuned_on() -> str:
    """The card that the committed table was measured on; empty: none."""
    return json.loads(FILE.read_text(encoding="utf-8"))["tuned_on"]


def written(rows: Mapping[str, Mapping[str, list[int]]], card: str) -> str:
    """The table as a file, one line per tile."""
    lines = [
        "{",
        f'  "tuned_on": {json.dumps(card)},',
        f'  "columns": {json.dumps(list(Tile._fields))},',
        '  "tiles": {',
    ]
    kernels = []
    for kernel, of in rows.items():
        body = ",\n".join(f'      "{key}": {json.dumps(list(tile))}' for key, tile in of.items())
        kernels.append(f'    "{kernel}": {{\n{body}\n    }}')
    return "\n".join([*lines, ",\n".join(kernels), "  }", "}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help=f"write the table here ({FILE.name} is what the kernels read)")
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=SIZES, help="block sizes (default: all)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES), help="default: all")
    parser.add_argument("--jobs", type=int, default=min(15, os.cpu_count() or 1), help="processes that compile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: tiles are chosen on a card")
    rows: dict[str, dict[str, Any]] = {kernel: dict(of) for kernel, of in table().items()}
    jobs = list(itertools.product(get_args(Kernel), options.sizes, options.dtypes))
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(options.jobs, _hold, (spawn.Lock(),)) as pool:
        for kernel, size, name, tile, took, torchs in pool.imap_unordered(tuned, jobs):
            rows[kernel][f"{size} {name}"] = list(tile)
            print(f"{kernel} {size} {name}: {tile}, {took:.4f} ms; torch {torchs:.4f} ms", flush=True)
            if options.write:  # each time, so that what is cut off leaves what it has found
                options.write.write_text(written(rows, torch.cuda.get_device_name()), encoding="utf-8")


if __name__ == "__main__":
    main()
