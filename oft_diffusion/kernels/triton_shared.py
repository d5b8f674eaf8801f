"""Two or three layers' rotations of one input (arXiv 2506.19847, section 3.2) as Triton kernels.

x is read once for all of them, dx is written once, and all dD come of one pass over x and the gradients. Beside
`triton_rotate.py`, with its tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from oft_diffusion.kernels.launch import again, key_of, launch, precision, upcast
from oft_diffusion.kernels.tiles import Tile, tile_of
from oft_diffusion.kernels.triton_rotate import (
    add_blocks,
    delta_tile,
    offsets,
    ordered,
    parts_of,
    rows_of,
    steps_of,
    summed,
    sums,
    turns_first,
)

COUNTS = (2, 3)  # of layers
_NARROW = 32  # columns of a program that keeps a sum for each layer


def rotate(x: Tensor, deltas: Sequence[Tensor], tile: Tile | None = None) -> list[Tensor]:
    """`x + x blockdiag(D)` for each D, summed in float32 and rounded once.

    Args:
        x: `(..., r * b)`, as `triton_rotate.rotate` takes it.
        deltas: two or three, `(r, b, b)` each, x's dtype.
        tile: instead of the committed one.
    """
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in deltas]
    _rotate([x], deltas, made, tile)
    return made


def input_grad(x: Tensor, deltas: Sequence[Tensor], grads: Sequence[Tensor], tile: Tile | None = None) -> Tensor:
    """dx: the sum of `g + g blockdiag(D)^T` over the layers.

    Args:
        x: the input, for its shape.
        deltas: as `rotate` takes them.
        grads: of the outputs, x's shape and dtype.
        tile: instead of the committed one.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _rotate([grad.contiguous() for grad in grads], deltas, [out], tile)
    return out


def _rotate(read: Sequence[Tensor], deltas: Sequence[Tensor], written: Sequence[Tensor], tile: Tile | None) -> None:
    """One tensor to one for each D, or one for each D to one."""
    x, gathers = read[0], len(written) == 1
    if not x.numel():
        return
    turned = gathers and not turns_first(x)
    deltas = [(d.transpose(1, 2) if gathers and not turned else d).contiguous() for d in deltas]
    key = key_of(f"shared {len(written)}", *read, *deltas) if tile is None else None
    if again(key, (*_three(read), *_three(deltas), *_three(written))):
        return
    blocks, size = deltas[0].shape[0], int(deltas[0].shape[1])
    tile = tile or tile_of("rotate", size, x.dtype)
    rows, lie = x.numel() // x.shape[-1], rows_of(x, 1)
    wide = triton.cdiv(blocks, tile.width // size)
    steps = steps_of(rows, wide, tile)
    launch(
        _shared_kernel,
        triton.cdiv(rows, tile.rows * steps) * wide,
        (*_three([lie.tensor, *read[1:]]), *_three(deltas), *_three(written)),
        (rows, blocks, lie.outer_stride, lie.inner, lie.inner_stride),
        key if lie.tensor is x else None,
        SIZE=size, WIDTH=tile.width, ROWS=tile.rows, STEPS=steps, LEVELS=1 + (lie.inner < rows),
        COUNT=len(deltas), GATHERS=gathers, TURNED=turned, PRECISION=precision(x), UPCAST=upcast(x),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def delta_grads(
    x: Tensor, grads: Sequence[Tensor], blocks: int, block_size: int, tile: Tile | None = None
) -> list[Tensor]:
    """Every dD, `(r, b, b)`, side by side in memory, added up as `triton_rotate.delta_grad` does.

    Args:
        x: the input, `(..., r * b)`.
        grads: of the outputs, x's shape and dtype.
        blocks: r.
        block_size: b.
        tile: instead of the committed one.
    """
    block_size = int(block_size)
    shape = (blocks, block_size, len(grads) * block_size)
    if not x.numel():
        return list(x.new_zeros(shape).split(block_size, dim=2))
    grads = [grad.contiguous() for grad in grads]
    key = key_of(f"delta_grads {block_size} {ordered()}", x, *grads) if tile is None else None
    tile = tile or tile_of("delta_grad", block_size, x.dtype)
    width = narrow(block_size, tile)
    rows = x.numel() // x.shape[-1]
    parts, part = parts_of(rows, tile)
    out = sums(x, parts, shape)
    if again(key, (x, *_three(grads), out)):
        return list(summed(out, x).split(block_size, dim=2))
    lie = rows_of(x, 1)
    launch(
        _delta_grads_kernel,
        parts * triton.cdiv(blocks, width // block_size),
        (lie.tensor, *_three(grads), out),
        (rows, blocks, parts, part, lie.outer_stride, lie.inner, lie.inner_stride),
        key if lie.tensor is x else None,
        SIZE=block_size, WIDTH=width, ROWS=tile.rows, LEVELS=1 + (lie.inner < rows), COUNT=len(grads),
        ATOMIC=parts > len(out), PRECISION=precision(x), UPCAST=upcast(x),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return list(summed(out, x).split(block_size, dim=2))


def narrow(block_size: int, tile: Tile) -> int:
    """The width of a program that keeps a sum for each layer."""
    return max(block_size, min(tile.width, _NARROW))


def _three(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel has three of each; of those that are not there it reads nothing."""
    return tensors[0], tensors[min(1, len(tensors) - 1)], tensors[-1]


@triton.jit  # type: ignore[untyped-decorator]
def _shared_kernel(  # type: ignore[no-untyped-def] # noqa: ANN202
    x0_ptr, x1_ptr, x2_ptr, d0_ptr, d1_ptr, d2_ptr, out0_ptr, out1_ptr, out2_ptr,  # noqa: ANN001
    rows, blocks, x_outer, x_inner_size, x_inner,  # noqa: ANN001
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, LEVELS: tl.constexpr,
    COUNT: tl.constexpr, GATHERS: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One x to an output for each D; or, where it gathers, a gradient for each D, by its transpose, to one sum."""
    tiles = tl.cdiv(blocks, WIDTH // SIZE)
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles
    column = tile * WIDTH + tl.arange(0, WIDTH)
    kept = column < blocks * SIZE
    d0 = delta_tile(d0_ptr, column, kept, SIZE * SIZE, SIZE, 1, SIZE, TURNED, UPCAST)
    d1 = delta_tile(d1_ptr, column, kept, SIZE * SIZE, SIZE, 1, SIZE, TURNED, UPCAST)
    d2 = delta_tile(d2_ptr, column, kept, SIZE * SIZE, SIZE, 1, SIZE, TURNED, UPCAST) if COUNT == 3 else d1

    for step in range(STEPS):
        row = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & kept[None, :]
        at = offsets(row, x_inner_size, x_outer, x_inner, LEVELS)[:, None] + column[None, :]
        out_at = row.to(tl.int64)[:, None] * (blocks * SIZE) + column[None, :]
        x = tl.load(x0_ptr + at, mask=mask, other=0.0)
        own = x.to(tl.float32)
        if UPCAST:
            x = own
        turned = tl.dot(x, d0, acc=own, input_precision=PRECISION)
        if GATHERS:
            x = tl.load(x1_ptr + at, mask=mask, other=0.0)
            turned += x.to(tl.float32)
            if UPCAST:
                x = x.to(tl.float32)
            turned = tl.dot(x, d1, acc=turned, input_precision=PRECISION)
            if COUNT == 3:
                x = tl.load(x2_ptr + at, mask=mask, other=0.0)
                turned += x.to(tl.float32)
                if UPCAST:
                    x = x.to(tl.float32)
                turned = tl.dot(x, d2, acc=turned, input_precision=PRECISION)
        tl.store(out0_ptr + out_at, turned.to(out0_ptr.dtype.element_ty), mask=mask)
        if not GATHERS:
            turned = tl.dot(x, d1, acc=own, input_precision=PRECISION)
            tl.store(out1_ptr + out_at, turned.to(out1_ptr.dtype.element_ty), mask=mask)
            if COUNT == 3:
                turned = tl.dot(x, d2, acc=own, input_precision=PRECISION)
                tl.store(out2_ptr + out_at, turned.to(out2_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _delta_grads_kernel(  # type: ignore[no-untyped-def] # noqa: ANN202
    x_ptr, g0_ptr, g1_ptr, g2_ptr, out_ptr, rows, blocks, parts, part, x_outer, x_inner_size, x_inner,  # noqa: ANN001
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr, COUNT: tl.constexpr,
    ATOMIC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Each program: `WIDTH // SIZE` neighbouring blocks of every layer, and one of `parts` parts of the rows."""
    tiles = tl.cdiv(blocks, WIDTH // SIZE)
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles
    column = tile * WIDTH + tl.arange(0, WIDTH)
    kept = column < blocks * SIZE

    total0 = tl.zeros((WIDTH, WIDTH), dtype=tl.float32)
    total1 = tl.zeros((WIDTH, WIDTH), dtype=tl.float32)
    total2 = tl.zeros((WIDTH, WIDTH), dtype=tl.float32)
    for start in range(chunk * part, tl.minimum(chunk * part + part, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & kept[None, :]
        at = offsets(row, x_inner_size, x_outer, x_inner, LEVELS)[:, None] + column[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        at = row.to(tl.int64)[:, None] * (blocks * SIZE) + column[None, :]
        g0 = tl.load(g0_ptr + at, mask=mask, other=0.0)
        g1 = tl.load(g1_ptr + at, mask=mask, other=0.0)
        if UPCAST:
            x, g0, g1 = x.to(tl.float32), g0.to(tl.float32), g1.to(tl.float32)
        x = tl.trans(x)
        total0 = tl.dot(x, g0, acc=total0, input_precision=PRECISION)
        total1 = tl.dot(x, g1, acc=total1, input_precision=PRECISION)
        if COUNT == 3:
            g2 = tl.load(g2_ptr + at, mask=mask, other=0.0)
            if UPCAST:
                g2 = g2.to(tl.float32)
            total2 = tl.dot(x, g2, acc=total2, input_precision=PRECISION)

    out_ptr += 0 if ATOMIC else chunk.to(tl.int64) * blocks * (COUNT * SIZE * SIZE)
    add_blocks(out_ptr, total0, column, kept, COUNT * SIZE, SIZE, ATOMIC)
    add_blocks(out_ptr + SIZE, total1, column, kept, COUNT * SIZE, SIZE, ATOMIC)
    if COUNT == 3:
        add_blocks(out_ptr + 2 * SIZE, total2, column, kept, COUNT * SIZE, SIZE, ATOMIC)
