"""A layer with the rotation and the linear in one kernel, beside one after the other: benchmarks/data/fused_linear.csv.

python -m benchmarks.fused_linear            # measures a CUDA card and appends; under a minute on a Hopper
python -m benchmarks.fused_linear --table    # the newest run of each machine as Markdown

At inference, in bfloat16, with b = 32 and biases. `plain` is `F.linear`, `rotated` is what the package does
(`block_rotate` or, for several layers of one input, `block_rotate_shared`; then `F.linear`), `fused` is the candidate
of `benchmarks.fused_kernel`, in the fastest of its configurations for each size. Each is timed in a CUDA graph, again
and again, so that only the kernels count, and what fits into the card's cache lies there; and in eager calls one after
another, as a sampler makes them, which small layers' launches bound. Ways are taken in turn, figures are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.command import run
from benchmarks.records import DATA, append, load
from oft_diffusion.kernels import block_rotate, block_rotate_shared
from oft_diffusion.kernels.block_rotate import triton_kernels

FILE = DATA / "fused_linear.csv"
BLOCK_SIZE, DTYPE = 32, torch.bfloat16
WAYS, MODES = ("plain", "rotated", "fused"), ("graph", "eager")
CALLS = 100  # between two looks at the clock
# Of two ways to compute the same; each is off by about 2^-9 per rotated number and output.
TOLERANCE = 0.01


class Size(NamedTuple):
    """Layers of one input."""

    rows: int
    inner: int
    columns: int
    layers: int


# 1024 x 1024 pixels but for SD 1.5, 512 x 512; two images at once, as guidance takes, but for Flux.1, which needs none.
SIZES = {
    "SD 1.5, 64 x 64": Size(8192, 320, 320, 1),
    "SD 1.5, 64 x 64, q k v": Size(8192, 320, 320, 3),
    "SDXL, 64 x 64": Size(8192, 640, 640, 1),
    "SDXL, 64 x 64, q k v": Size(8192, 640, 640, 3),
    "SDXL, 32 x 32": Size(2048, 1280, 1280, 1),
    "SDXL, 32 x 32, q k v": Size(2048, 1280, 1280, 3),
    "SDXL, text": Size(154, 2048, 1280, 1),
    "SDXL, text, k v": Size(154, 2048, 1280, 2),
    "SD 3.5": Size(8500, 1536, 1536, 1),
    "SD 3.5, q k v": Size(8500, 1536, 1536, 3),
    "Flux.1": Size(4608, 3072, 3072, 1),
    "Flux.1, q k v": Size(4608, 3072, 3072, 3),
    "Flux.1, out of a single block": Size(4608, 15360, 3072, 1),
}


class Inputs(NamedTuple):
    """What is multiplied."""

    x: Tensor
    deltas: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor]


def draw(size: Size, device: str) -> Inputs:
    """Of the magnitudes that models have; rotations far from none."""
    drawn = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=drawn, device=device) * scale).to(DTYPE)

    blocks, each = size.inner // BLOCK_SIZE, range(size.layers)
    return Inputs(
        normal(size.rows, size.inner),
        [normal(blocks, BLOCK_SIZE, BLOCK_SIZE, scale=0.5 * BLOCK_SIZE**-0.5) for _ in each],
        [normal(size.columns, size.inner, scale=size.inner**-0.5) for _ in each],
        [normal(size.columns) for _ in each],
    )


def plain(inputs: Inputs) -> list[Tensor]:
    """The layers without an adapter."""
    return [F.linear(inputs.x, weight, bias) for weight, bias in zip(inputs.weights, inputs.biases, strict=True)]


def rotated(inputs: Inputs) -> list[Tensor]:
    """As the package has them."""
    x, deltas, weights, biases = inputs
    turned = [block_rotate(x, deltas[0])] if len(deltas) == 1 else block_rotate_shared(x, deltas)
    return [F.linear(own, weight, bias) for own, weight, bias in zip(turned, weights, biases, strict=True)]


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of a layer, relative, by norms."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def in_graph(call: Callable[[], object], milliseconds: int = 5) -> float:
    """Seconds of a call without its launch."""
    from triton.testing import do_bench_cudagraph

    return 1e-3 * do_bench_cudagraph(call, rep=milliseconds, return_mode="median")


def eagerly(call: Callable[[], object]) -> float:
    """Seconds of a call among others."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / CALLS


@torch.inference_mode()
def measure(device: str, rounds: int) -> None:
    """Append one run, a size at a time.

    Raises:
        RuntimeError: the candidate computes something else.
    """
    if triton_kernels() is None:
        raise SystemExit("no kernels to measure: it takes Triton, a C compiler and no OFT_DIFFUSION_KERNELS=0")
    from benchmarks.fused_kernel import Config, configs_for, fused_linears

    for name, size in SIZES.items():
        inputs = draw(size, device)

        def fused(config: Config, inputs: Inputs = inputs) -> list[Tensor]:
            return fused_linears(*inputs, config)

        expected, errors, took = rotated(inputs), [], {}
        for config in configs_for(BLOCK_SIZE):
            errors.append(off(fused(config), expected))
            took[config] = in_graph(lambda config=config: fused(config), milliseconds=2)  # type: ignore[misc]
        if not all(error < TOLERANCE for error in errors):  # NaN, too
            raise RuntimeError(f"{name}: the candidate is off by {errors}")
        best = min(took, key=lambda config: took[config])
        ways = (lambda: plain(inputs), lambda: rotated(inputs), lambda: fused(best))  # noqa: B023 - called here
        calls = dict(zip(WAYS, ways, strict=True))
        times: dict[tuple[str, str], list[float]] = {(way, mode): [] for way in WAYS for mode in MODES}
        for _ in range(rounds):
            for way, call in calls.items():
                times[way, "graph"].append(in_graph(call))
                times[way, "eager"].append(eagerly(call))
        rows = [
            {
                "size": name, **size._asdict(), "dtype": str(DTYPE).removeprefix("torch."), "block_size": BLOCK_SIZE,
                "way": way, "mode": mode, "rounds": rounds, "microseconds": f"{1e6 * statistics.median(seconds):.2f}",
                "config": "x".join(map(str, best)) if way == "fused" else "",
                "error": f"{max(errors):.2g}" if way == "fused" else "",
            }
            for (way, mode), seconds in times.items()
        ]  # fmt: skip
        append(FILE, rows, device)


def table() -> str:
    """The newest run of each machine."""
    rows = load(FILE)
    newest = {row["hardware"]: row["date"] for row in rows}
    parts = []
    for machine, date in newest.items():
        own = [row for row in rows if (row["hardware"], row["date"]) == (machine, date)]
        found = {(row["size"], row["mode"], row["way"]): row for row in own}
        lines = [
            "| | rows × in → out | plain, graph, µs | rotated | fused | plain, eager, µs | rotated | fused | tile |",
            "|---" * 9 + "|",
        ]
        for name in dict.fromkeys(row["size"] for row in own):
            about = found[name, "graph", "fused"]
            times = str(about["layers"]) + " × " if about["layers"] != "1" else ""
            cells = [name, f"{about['rows']} × {about['inner']} → {times}{about['columns']}"]
            for mode in MODES:
                least, *others = (float(found[name, mode, way]["microseconds"]) for way in WAYS)
                cells += [f"{least:.1f}", *(f"{other / least:.2f}" for other in others)]
            lines.append(f"| {' | '.join([*cells, about['config']])} |")
        about = own[-1]
        lines += [
            "",
            (
                f"Times over the plain linear's. {about['dtype']}, b = {about['block_size']}; tile: rows, columns, "
                f"inner, warps, stages. {machine}, torch {about['torch']}; {date}."
            ),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Not measured yet: no card was there."


if __name__ == "__main__":
    run(__doc__, measure, table, rounds=3, devices=["cuda"])
