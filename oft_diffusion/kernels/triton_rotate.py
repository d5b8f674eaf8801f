"""The block rotation (arXiv 2506.19847, section 3.2) as Triton kernels: x is read once and written once.

Imported only where it is to run: nothing else of the package needs Triton. Under `TRITON_INTERPRET=1` the same kernels
run on the CPU, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from oft_diffusion.kernels.launch import again, capability, key_of, launch, precision, upcast
from oft_diffusion.kernels.tiles import DTYPES, SIZES, Tile, tile_of

# Rows are summed in at most so many parts, which bounds the partial buffer: 32 r b^2 floats, beside x's r b per row.
PARTS = 32
PROGRAMS = 1024  # a few for each of a large card's multiprocessors


class Rows(NamedTuple):
    """Where the rows of one group lie: row i at `(i // inner) * outer_stride + (i % inner) * inner_stride`."""

    tensor: Tensor
    group_stride: int
    outer_stride: int
    inner: int
    inner_stride: int


def fits(x: Tensor, block_size: int) -> bool:
    """Whether the kernels can take it: b in 8 ... 128, x in float32, bfloat16 or float16, below 2^31 rows.

    Not on cards before Ampere, whose tensor cores know no bfloat16 and which Triton no longer tests.
    """
    if x.is_cuda and capability(x.device.index) < (8, 0):
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    return block_size in SIZES and x.dtype in DTYPES.values() and rows < 2**31


def rotate(x: Tensor, delta: Tensor, tile: Tile | None = None) -> Tensor:
    """`x + x blockdiag(D)`, summed in float32 and rounded once.

    Args:
        x: `(..., r * b)`. Read where it lies if its last axis is contiguous and its leading axes are at most two
            levels of strides (a slice, an expanded or a transposed tensor); copied otherwise.
        delta: `(r, b, b)` or `(g, r, b, b)`, x's dtype, any strides: in 16 bits a transposed D costs nothing.
        tile: instead of the committed one, for tuning.

    Returns:
        x's shape and dtype, contiguous.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return out
    if turns_first(x):
        delta = delta.contiguous()
    key = key_of("rotate", x, delta) if tile is None else None
    if again(key, (x, delta, out)):
        return out
    delta = delta.unsqueeze(0) if delta.dim() == 3 else delta
    groups, blocks, block_size = *delta.shape[:2], int(delta.shape[2])
    tile = tile or tile_of("rotate", block_size, x.dtype)
    rows = x.numel() // x.shape[-1] // groups
    lie = rows_of(x, groups)
    turned = delta.stride(-1) != 1 and delta.stride(-2) == 1
    delta = delta.transpose(-1, -2) if turned else delta
    wide = groups * triton.cdiv(blocks, tile.width // block_size)
    steps = steps_of(rows, wide, tile)
    row_programs = triton.cdiv(rows, tile.rows * steps)
    launch(
        _rotate_kernel,
        row_programs * wide,
        (lie.tensor, delta, out),
        (rows, blocks, row_programs, lie.group_stride, lie.outer_stride, lie.inner, lie.inner_stride, *delta.stride()),
        key if lie.tensor is x else None,
        SIZE=block_size, WIDTH=tile.width, ROWS=tile.rows, STEPS=steps, LEVELS=1 + (lie.inner < rows),
        TURNED=turned, PRECISION=precision(x), UPCAST=upcast(x), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def delta_grad(x: Tensor, grad: Tensor, shape: list[int], tile: Tile | None = None) -> Tensor:
    """`dD`: per block `x_i^T g_i` over all rows, summed in float32.

    Programs add their parts of the rows to one another in whatever order they end, unless
    `torch.use_deterministic_algorithms` asks for the same bits every time: then they write at most `PARTS` partial
    sums, which a second pass adds.

    Args:
        x: the input, `(..., r * b)`.
        grad: of the output, x's shape and dtype.
        shape: D's: `(r, b, b)` or `(g, r, b, b)`.
        tile: instead of the committed one, for tuning.

    Returns:
        `shape`, x's dtype, contiguous.
    """
    groups, (blocks, block_size) = shape[0] if len(shape) == 4 else 1, (shape[-3], int(shape[-2]))
    if not x.numel():
        return x.new_zeros(shape)
    key = key_of(f"delta_grad {tuple(shape)} {ordered()}", x, grad) if tile is None else None
    tile = tile or tile_of("delta_grad", block_size, x.dtype)
    rows = x.numel() // x.shape[-1] // groups
    parts, part = parts_of(rows, tile)
    out = sums(x, parts, shape)
    if again(key, (x, grad, out)):
        return summed(out, x)
    left, right = rows_of(x, groups), rows_of(grad, groups)
    launch(
        _delta_grad_kernel,
        groups * parts * triton.cdiv(blocks, tile.width // block_size),
        (left.tensor, right.tensor, out),
        (rows, blocks, parts, part, groups, *left[1:], *right[1:]),
        key if left.tensor is x and right.tensor is grad else None,
        SIZE=block_size, WIDTH=tile.width, ROWS=tile.rows, LEVELS=1 + (min(left.inner, right.inner) < rows),
        ATOMIC=parts > len(out), PRECISION=precision(x), UPCAST=upcast(x),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return summed(out, x)


def turns_first(x: Tensor) -> bool:
    """Whether a transposed D is laid out anew before: in float32 the kernel takes four times as long to turn it."""
    return x.dtype == torch.float32


def steps_of(rows: int, wide: int, tile: Tile) -> int:
    """Tiles of rows one after another in a program: the table's, or fewer where x is too small to keep a card busy."""
    steps = tile.steps
    while steps > 1 and triton.cdiv(rows, tile.rows * steps) * wide < PROGRAMS:
        steps //= 2
    return steps


def parts_of(rows: int, tile: Tile) -> tuple[int, int]:
    """In how many parts rows are summed, and how long one is."""
    parts = min(PARTS, triton.cdiv(rows, tile.rows * tile.steps))
    part = triton.cdiv(triton.cdiv(rows, parts), tile.rows) * tile.rows
    return triton.cdiv(rows, part), part


def ordered() -> bool:
    """Whether the same bits are asked for every time."""
    return torch.are_deterministic_algorithms_enabled()


def sums(x: Tensor, parts: int, shape: Sequence[int]) -> Tensor:
    """Where parts are summed: one sum where there is one part, or where they are added up by atomics; else one each."""
    if parts == 1:
        return x.new_empty((1, *shape))
    if ordered():
        return x.new_empty((parts, *shape), dtype=torch.float32)
    return x.new_zeros((1, *shape), dtype=torch.float32)


def summed(parts: Tensor, x: Tensor) -> Tensor:
    """Their sum, in x's dtype."""
    return (parts[0] if len(parts) == 1 else parts.sum(0)).to(x.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def offsets(row, inner, outer_stride, inner_stride, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """In elements, int64: tensors may have more than 2^31."""
    if LEVELS == 1:  # no division
        at = row.to(tl.int64) * inner_stride
    else:
        at = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    return at


@triton.jit  # type: ignore[untyped-decorator]
def delta_tile(  # type: ignore[no-untyped-def] # noqa: ANN201
    delta_ptr, column, kept, delta_block, delta_row, delta_column,  # noqa: ANN001
    SIZE: tl.constexpr, TURNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Neighbouring blocks as one block-diagonal matrix, since they may be narrower than what `tl.dot` takes."""
    block, within = column // SIZE, column % SIZE
    diagonal = (block[:, None] == block[None, :]) & kept[:, None] & kept[None, :]
    at = block.to(tl.int64)[:, None] * delta_block + within[:, None] * delta_row + within[None, :] * delta_column
    delta = tl.load(delta_ptr + at, mask=diagonal, other=0.0)
    if UPCAST:
        delta = delta.to(tl.float32)
    if TURNED:  # here rather than by strides, by which every number would be fetched apart
        delta = tl.trans(delta)
    return delta


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_kernel(  # type: ignore[no-untyped-def] # noqa: ANN202
    x_ptr, delta_ptr, out_ptr, rows, blocks, row_programs,  # noqa: ANN001
    x_group, x_outer, x_inner_size, x_inner, delta_group, delta_block, delta_row, delta_column,  # noqa: ANN001
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, LEVELS: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Each program: `WIDTH // SIZE` neighbouring blocks, whose deltas it keeps, and `STEPS` tiles of `ROWS` rows."""
    tiles = tl.cdiv(blocks, WIDTH // SIZE)
    # Neighbours in time take neighbours in a row, so that what one fetches of a memory page the next one uses.
    tile = tl.program_id(0) % tiles
    chunk = (tl.program_id(0) // tiles) % row_programs
    group = (tl.program_id(0) // tiles // row_programs).to(tl.int64)
    column = tile * WIDTH + tl.arange(0, WIDTH)
    kept = column < blocks * SIZE

    delta = delta_tile(
        delta_ptr + group * delta_group, column, kept, delta_block, delta_row, delta_column, SIZE, TURNED, UPCAST
    )
    for step in range(STEPS):
        row = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & kept[None, :]
        at = offsets(row, x_inner_size, x_outer, x_inner, LEVELS)
        x = tl.load(x_ptr + group * x_group + at[:, None] + column[None, :], mask=mask, other=0.0)
        own = x.to(tl.float32)
        if UPCAST:
            x = own
        turned = tl.dot(x, delta, acc=own, input_precision=PRECISION)
        out_at = (group * rows + row.to(tl.int64)) * (blocks * SIZE)
        tl.store(out_ptr + out_at[:, None] + column[None, :], turned.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _delta_grad_kernel(  # type: ignore[no-untyped-def] # noqa: ANN202
    x_ptr, grad_ptr, out_ptr, rows, blocks, parts, part, groups,  # noqa: ANN001
    x_group, x_outer, x_inner_size, x_inner, grad_group, grad_outer, grad_inner_size, grad_inner,  # noqa: ANN001
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr, ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Each program: `WIDTH // SIZE` neighbouring blocks, and one of `parts` parts of the rows, `part` long."""
    tiles = tl.cdiv(blocks, WIDTH // SIZE)
    tile = tl.program_id(0) % tiles
    chunk = (tl.program_id(0) // tiles) % parts
    group = (tl.program_id(0) // tiles // parts).to(tl.int64)
    column = tile * WIDTH + tl.arange(0, WIDTH)
    kept = column < blocks * SIZE

    total = tl.zeros((WIDTH, WIDTH), dtype=tl.float32)
    for start in range(chunk * part, tl.minimum(chunk * part + part, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & kept[None, :]
        at = offsets(row, x_inner_size, x_outer, x_inner, LEVELS)
        x = tl.load(x_ptr + group * x_group + at[:, None] + column[None, :], mask=mask, other=0.0)
        at = offsets(row, grad_inner_size, grad_outer, grad_inner, LEVELS)
        grad = tl.load(grad_ptr + group * grad_group + at[:, None] + column[None, :], mask=mask, other=0.0)
        if UPCAST:
            x, grad = x.to(tl.float32), grad.to(tl.float32)
        total = tl.dot(tl.trans(x), grad, acc=total, input_precision=PRECISION)

    slot = group if ATOMIC else chunk * groups + group
    add_blocks(out_ptr + slot * blocks * (SIZE * SIZE), total, column, kept, SIZE, SIZE, ATOMIC)


@triton.jit  # type: ignore[untyped-decorator]
def add_blocks(out_ptr, total, column, kept, row_size, SIZE: tl.constexpr, ATOMIC: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """The blocks on a product's diagonal, to where they belong: `delta_tile` the other way. Rows `row_size` apart."""
    block, within = column // SIZE, column % SIZE
    diagonal = (block[:, None] == block[None, :]) & kept[:, None] & kept[None, :]
    at = block.to(tl.int64)[:, None] * (SIZE * row_size) + within[:, None] * row_size + within[None, :]
    if ATOMIC:
        tl.atomic_add(out_ptr + at, total, mask=diagonal, sem="relaxed")
    else:
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=diagonal)


def rows_of(x: Tensor, groups: int) -> Rows:
    """The rows as they lie, or a copy if its strides are more than the kernels follow."""
    lead = list(zip(x.shape[:-1], x.stride()[:-1], strict=True)) or [(1, 0)]
    size, stride = lead[0]
    lead[0] = (size // groups, stride)
    levels: list[tuple[int, int]] = []
    for size_of, stride_of in lead:
        if size_of == 1:
            continue
        if levels and levels[-1][1] == size_of * stride_of:
            levels[-1] = (levels[-1][0] * size_of, stride_of)  # one level with the axis before
        else:
            levels.append((size_of, stride_of))
    if x.stride(-1) != 1 or len(levels) > 2:
        return rows_of(x.contiguous(), groups)
    outer, inner = [(1, 0), (1, 0), *levels][-2:]
    return Rows(x, size // groups * stride, outer[1], inner[0], inner[1])
