"""How near the rotation kernel comes to a plain copy: benchmarks/data/rotate_bandwidth.csv. Needs a CUDA card.

python -m benchmarks.rotate_bandwidth            # measures and appends
python -m benchmarks.rotate_bandwidth --table    # the newest run as Markdown

A rotation reads x once and writes it once, as `copy_` does; dD reads two tensors and is counted so. Each way runs in a
CUDA graph, again and again, so that it is the kernels that are timed, not their launches; what fits into the card's
cache lies there, for the copy, too. Ways are taken in turn, figures are medians. The aim is 80 % of the copy's
bandwidth.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.command import run
from benchmarks.records import DATA, append, load
from benchmarks.stamps import commits
from oft_diffusion.kernels import block_rotate
from oft_diffusion.kernels.block_rotate import triton_kernels

FILE = DATA / "rotate_bandwidth.csv"
# (rows, columns) of what is rotated in one image of 1024 x 1024 pixels.
SHAPES = {
    "SDXL, 64 x 64": (4096, 640),
    "SDXL, 32 x 32": (1024, 1280),
    "SDXL, 32 x 32, batch 8": (8192, 1280),
    "Flux.1, image and text": (4608, 3072),
    "Flux.1, batch 4": (18432, 3072),
    "Flux.1, out of a single block": (4608, 15360),
}
SIZES = (8, 16, 32, 64, 128)
DTYPES = ("bfloat16", "float16", "float32")
WAYS = ("rotate", "dx", "dD")  # beside a copy


def measure(device: str, rounds: int) -> None:
    """Append one run, a dtype and block size at a time."""
    from triton.testing import do_bench_cudagraph

    if triton_kernels() is None:
        raise SystemExit("no kernel to measure: it takes Triton, a C compiler and no OFT_DIFFUSION_KERNELS=0")
    for dtype, size in product(DTYPES, sorted(SIZES, key=lambda size: abs(size - 32))):  # the usual ones first
        kind: torch.dtype = getattr(torch, dtype)
        rows = []
        for shape, (n, columns) in SHAPES.items():
            x, grad = (torch.randn(n, columns, device=device).to(kind) for _ in range(2))
            delta = torch.zeros(columns // size, size, size, device="cuda", dtype=kind)
            ways = _ways(x, grad, delta)
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(rounds):
                for way, call in ways.items():
                    times[way].append(do_bench_cudagraph(call, rep=20, return_mode="median"))
            moved = 2 * x.numel() * x.element_size()
            rows += [
                {
                    "shape": shape, "rows": n, "columns": columns, "dtype": dtype, "block_size": size,
                    "way": way, "repeats": rounds,
                    "gigabytes_per_second": f"{moved / statistics.median(took) / 1e6:.1f}",
                    "of_copy": f"{statistics.median(times['copy']) / statistics.median(took):.3f}",
                }
                for way, took in times.items()
            ]  # fmt: skip
        append(FILE, rows, device)


def _ways(x: Tensor, grad: Tensor, delta: Tensor) -> dict[str, Callable[[], object]]:
    out, shape = torch.empty_like(x), list(delta.shape)
    return {
        "copy": lambda: out.copy_(x),
        "rotate": lambda: block_rotate(x, delta),
        "dx": lambda: block_rotate(x, delta.transpose(1, 2)),
        "dD": lambda: torch.ops.oft_diffusion.block_rotate_delta_grad.default(x, grad, shape),
    }


def table() -> str:
    """The newest day's figures, the last of each."""
    rows = load(FILE)
    if not rows:
        return "Not measured yet: no card was there."
    newest = [row for row in rows if (row["date"], row["hardware"]) == (rows[-1]["date"], rows[-1]["hardware"])]
    figures = {(row["shape"], row["dtype"], row["block_size"], row["way"]): row for row in newest}
    lines = ["| | dtype | b | copy, GB/s | " + " | ".join(f"{way}, of it" for way in WAYS) + " |"]
    lines.append("|---|---|---|---|---|---|---|")
    for shape, dtype, size in dict.fromkeys(key[:3] for key in figures):
        copy, *others = (figures[shape, dtype, size, way] for way in ("copy", *WAYS))
        shares = " | ".join(f"{100 * float(row['of_copy']):.0f} %" for row in others)
        lines.append(f"| {shape} | {dtype} | {size} | {float(copy['gigabytes_per_second']):.0f} | {shares} |")
    last = newest[-1]
    about = f"{last['hardware']}, torch {last['torch']}; commit {commits(figures.values())}."
    return "\n".join([*lines, "", *filter(None, [about, _measured_again(newest)])])


def _measured_again(rows: Sequence[Mapping[str, str]]) -> str:
    """What several runs of the day have measured, of which the last counts."""
    times = Counter((row["shape"], row["dtype"], row["block_size"], row["way"]) for row in rows)
    again: dict[str, dict[str, None]] = {}  # block sizes by input, each once
    for (shape, _, size, _), count in times.items():
        if count > 1:
            again.setdefault(shape, {})[size] = None
    told = "; ".join(f"{shape} (b = {', '.join(sizes)})" for shape, sizes in again.items())
    return f"Of another run, later on that day: {told}." if told else ""


if __name__ == "__main__":
    run(__doc__, measure, table, rounds=3, devices=["cuda"])
