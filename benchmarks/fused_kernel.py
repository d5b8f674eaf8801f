"""A candidate: the rotation and the linear in one kernel, `y = (x + x blockdiag(D)) W^T + bias`, for inference.

python -m benchmarks.fused_kernel 90    # compile every configuration, without a card: what each takes of one

x is not written rotated and read again, and there is one launch; but each program rotates its own tiles of x, once
for every column tile of the output. `benchmarks.fused_linear` decides where that wins. One kernel serves one layer and
up to three layers of one input, each with its own D, W and bias: a program's column tile says whose it computes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from oft_diffusion.kernels.launch import again, key_of, launch, precision, upcast

GROUP = 8  # row tiles whose programs are neighbours in time, so that they find W's tiles in the card's cache


class Config(NamedTuple):
    """How the product is cut; all powers of two, inner a multiple of b."""

    rows: int
    columns: int
    inner: int  # columns of x, rotated and multiplied, in one step
    warps: int
    stages: int


# A rotation costs inner / columns of the product's own arithmetic, and the product waits for it, whatever the stages:
# Triton puts a wait after every product that is read in the same step. What hides that is another program on the same
# multiprocessor, for which 4 warps leave room. What spills registers (128 x 128 x 64 in 4 warps) is not among these.
CONFIGS = (
    Config(128, 256, 64, 8, 3),
    Config(128, 256, 32, 8, 4),
    Config(64, 256, 32, 4, 4),
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 4, 4),
    Config(128, 64, 64, 4, 3),
    Config(64, 128, 64, 4, 3),
    Config(64, 64, 64, 4, 3),
    Config(64, 32, 64, 4, 4),
)
SHARED = 227 << 10  # bytes that one program can have on a Hopper
SIZES = (16, 32, 64)


def configs_for(block_size: int) -> list[Config]:
    """Those that can take it."""
    return [config for config in CONFIGS if config.inner % block_size == 0]


def fused_linear(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, config: Config) -> Tensor:
    """`linear(x + x blockdiag(D))`, x rotated in float32 and rounded once, as `triton_rotate.rotate` does.

    Args:
        x: `(..., r * b)`; copied where its rows are not one stride apart.
        delta: `(r, b, b)`, x's dtype.
        weight: `(out, r * b)`, x's dtype.
        bias: `(out,)`, x's dtype, or None.
        config: one of `CONFIGS`, or another.
    """
    return fused_linears(x, [delta], [weight], [bias], config)[0]


def fused_linears(
    x: Tensor, deltas: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None], config: Config
) -> list[Tensor]:
    """As `fused_linear`, for one to three layers of one input in one launch.

    Args:
        x: their input.
        deltas: one a layer, all of one shape.
        weights: one a layer, all of one shape.
        biases: one a layer, or None for each.
        config: for all of them.

    Returns:
        An output a layer, parts of one tensor.
    """
    columns, inner = weights[0].shape
    flat = x.reshape(-1, inner)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows, count, has_bias = len(flat), len(deltas), biases[0] is not None
    size = deltas[0].shape[-1]
    deltas, weights = [d.contiguous() for d in deltas], [w.contiguous() for w in weights]
    given = [bias if bias is not None else weights[0] for bias in biases]  # of what is not there nothing is read
    out = flat.new_empty((count, rows, columns))
    made = [part.view(*x.shape[:-1], columns) for part in out]
    if not out.numel():
        return made
    tensors = (flat, *_three(deltas), *_three(weights), *_three(given), out)
    key = key_of(f"fused {count} {has_bias}", flat, *deltas, *weights, *given)
    key = (config, key) if key is not None else None
    if again(key, tensors):
        return made
    launch(
        _fused_kernel,
        triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns) * count,
        tensors,
        (rows, columns, inner, count, flat.stride(0)),
        key,
        SIZE=size, ROWS=config.rows, COLUMNS=config.columns, INNER=config.inner, GROUP_ROWS=GROUP, BIAS=has_bias,
        EVEN=inner % config.inner == 0, PRECISION=precision(x), UPCAST=upcast(x),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return made


def _three(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return tensors[0], tensors[min(1, len(tensors) - 1)], tensors[-1]


@triton.jit
def _one_of(which, first, second, third):
    chosen = first
    if which == 1:
        chosen = second
    if which == 2:
        chosen = third
    return chosen


# How many rows and layers there are changes nothing of the code: no compiling anew for 16 rows, or for 1 layer.
@triton.jit(do_not_specialize=["rows", "count"])  # type: ignore[untyped-decorator]
def _fused_kernel(
    x_ptr, d0_ptr, d1_ptr, d2_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, out_ptr,
    rows, columns, inner, count, x_row,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Each program: one tile of one layer's output."""
    own_tiles = tl.cdiv(columns, COLUMNS)
    row_tiles = tl.cdiv(rows, ROWS)
    in_group = GROUP_ROWS * own_tiles * count
    first = tl.program_id(0) // in_group * GROUP_ROWS
    height = tl.minimum(row_tiles - first, GROUP_ROWS)
    row_tile = first + tl.program_id(0) % in_group % height
    column_tile = tl.program_id(0) % in_group // height
    which = column_tile // own_tiles
    column_tile = column_tile % own_tiles
    delta_ptr = _one_of(which, d0_ptr, d1_ptr, d2_ptr)
    weight_ptr = _one_of(which, w0_ptr, w1_ptr, w2_ptr)

    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    # What is beyond the last row or column is never stored: rather than a mask, it reads the last one again.
    x_at = x_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_row + k[None, :]
    weight_at = weight_ptr + tl.minimum(column, columns - 1).to(tl.int64)[None, :] * inner + k[:, None]
    # D lies as (r b, b). Neighbouring blocks are one block-diagonal matrix, as in `triton_rotate.delta_tile`.
    delta_at = delta_ptr + k[:, None] * SIZE + (k % SIZE)[None, :]
    diagonal = (k // SIZE)[:, None] == (k // SIZE)[None, :]

    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, inner, INNER):
        if EVEN:
            x = tl.load(x_at)
            weight = tl.load(weight_at)
            delta = tl.load(delta_at, mask=diagonal, other=0.0)
        else:
            kept = k < inner - start
            x = tl.load(x_at, mask=kept[None, :], other=0.0)
            weight = tl.load(weight_at, mask=kept[:, None], other=0.0)
            delta = tl.load(delta_at, mask=diagonal & kept[:, None], other=0.0)
        own = x.to(tl.float32)
        if UPCAST:
            x, weight, delta = own, weight.to(tl.float32), delta.to(tl.float32)
        turned = tl.dot(x, delta, acc=own, input_precision=PRECISION).to(x_ptr.dtype.element_ty)
        total = tl.dot(turned.to(weight.dtype), weight, acc=total, input_precision=PRECISION)
        x_at += INNER
        weight_at += INNER
        delta_at += INNER * SIZE

    if BIAS:
        bias_ptr = _one_of(which, b0_ptr, b1_ptr, b2_ptr)
        total += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    out_at = (which * rows + row).to(tl.int64)[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=mask)


def compiled(config: Config, capability: int, size: int, pointer: str = "*bf16", even: bool = True) -> Any:
    """Machine code, for sizes and strides that are multiples of 16, which models' are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        "SIZE": size, "ROWS": config.rows, "COLUMNS": config.columns, "INNER": config.inner, "GROUP_ROWS": GROUP,
        "BIAS": True, "EVEN": even, "PRECISION": "ieee", "UPCAST": False,
    }  # fmt: skip
    kinds = {
        name: "constexpr" if name in constants else pointer if name.endswith("_ptr") else "i32"
        for name in _fused_kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(kinds.items())
        if kind != "constexpr" and name not in ("rows", "count")
    }
    source = ASTSource(_fused_kernel, kinds, constexprs=constants, attrs=aligned)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel: Any) -> dict[str, int]:
    """Of one program: bytes of shared memory; registers of a thread, and bytes of those that did not fit."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return {
        "shared": kernel.metadata.shared,
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "wgmma": len(re.findall(r"wgmma\.mma_async", kernel.asm["ptx"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, help="of the card: 90 is Hopper")
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=SIZES)
    options = parser.parse_args()
    too_much = []
    for size in options.sizes:
        for config in configs_for(size):
            took = resources(compiled(config, options.capability, size))
            print(f"b {size}, {config}: " + ", ".join(f"{name} {value}" for name, value in took.items()))
            if took["shared"] > SHARED or took["spilled"]:
                too_much.append(f"b {size}, {config}")
    if too_much:
        raise SystemExit("too much for the card: " + "; ".join(too_much))


if __name__ == "__main__":
    main()
