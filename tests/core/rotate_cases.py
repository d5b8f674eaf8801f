"""What the Triton kernels must do, on whichever device: the interpreter's tests and the GPU's share these cases."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from oft_diffusion.kernels import processor
from oft_diffusion.kernels.tiles import DTYPES, Tile, tile_of

# Against float64. The interpreter cuts bfloat16 off where a card rounds: by up to 2^-7 of a value.
TOLERANCE = {"float32": 1e-6, "bfloat16": 6e-3, "float16": 6e-4}
# The usual size first: it is there in every sample of these.
EVERY = [(size, name) for size in (32, 64, 16, 8, 128) for name in DTYPES]
GROUPS, BLOCKS = 2, 3  # an odd number of blocks: the last tile of a pair of narrow blocks is half empty


@pytest.fixture(params=["in C", "small", "large"], autouse=True)
def every_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of a file that imports this: in C where that fits; by torch, small rotations left to its backward, or
    our own for all.
    """
    # By its path: the package has a function of the same name.
    dispatch = importlib.import_module("oft_diffusion.kernels.block_rotate")
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "in C":
            patch.setattr(processor, "library", lambda: None)
        if request.param == "large":
            patch.setattr(dispatch, "_SMALL", 0)
        yield


def draw(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def deltas(size: int, dtype: torch.dtype, device: str, groups: int = GROUPS, blocks: int = BLOCKS) -> Tensor:
    """As large as a rotation's: rows of D are about as long as rows of I."""
    return (draw(groups, blocks, size, size, seed=1, device="cpu") / size**0.5).to(device, dtype)


def dense(delta: Tensor) -> Tensor:
    """`(g, r, b, b)` as `(g, r b, r b)`, float64."""
    return torch.stack([torch.block_diag(*group) for group in delta.double().cpu()])


def rotated(x: Tensor, delta: Tensor) -> Tensor:
    """The definition, in float64: not the package's own pure-torch form."""
    own = x.double().cpu()
    parts = own.reshape(delta.shape[0], -1, own.shape[-1])
    return (parts + parts @ dense(delta)).reshape(own.shape)


def delta_gradient(x: Tensor, grad: Tensor, groups: int, size: int) -> Tensor:
    """The definition, in float64: `(g, r, b, b)`."""
    left, right = (t.double().cpu().reshape(groups, -1, t.shape[-1] // size, size) for t in (x, grad))
    return torch.einsum("gnri,gnrj->grij", left, right)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).norm() / expected.norm())


def lying(x: Tensor) -> dict[str, Tensor]:
    """x, `(n, t, c)` with even n, as tensors of the same values that lie otherwise in memory."""
    n, t, c = x.shape
    room = torch.full((n, t + 2, c + 16), torch.nan, dtype=x.dtype, device=x.device)
    room[:, 1:-1, 8:-8] = x
    return {
        "contiguous": x,
        "slice": room[:, 1:-1, 8:-8],  # two levels of rows
        "columns": torch.cat([x, x + 1], dim=-1)[..., :c],  # one level, a longer stride
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": x.transpose(1, 2).contiguous().transpose(1, 2),  # copied
        "four axes": x.reshape(n // 2, 2, t, c).permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3).reshape(n, t, c),
    }


def tiled(kernel: Any, size: int, dtype: torch.dtype, **changes: int) -> Tile:
    return tile_of(kernel, size, dtype)._replace(**changes)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_every_kernel(ops: Any, size: int, name: str, device: str) -> None:
    """Forward, dx and dD of ragged rows in two groups, against the definition."""
    dtype = DTYPES[name]
    # 2 x 2 x 35 rows: 70 in a group, no multiple of any tile; small tiles, so that several are needed.
    x = draw(2 * GROUPS, 35, BLOCKS * size, seed=2, device=device, dtype=dtype)
    grad = draw(*x.shape, seed=3, device=device, dtype=dtype)
    delta = deltas(size, dtype, device)
    small = tiled("rotate", size, dtype, rows=16, steps=2)
    out = ops.rotate(x, delta, small)
    assert (out.shape, out.dtype, out.is_contiguous()) == (x.shape, dtype, True)
    assert error(out, rotated(x, delta)) < TOLERANCE[name]
    assert error(out, x.double().cpu()) > 0.3
    dx = ops.rotate(grad, delta.transpose(-1, -2), small)
    assert error(dx, rotated(grad, delta.transpose(-1, -2))) < TOLERANCE[name]
    assert error(dx, rotated(grad, delta)) > 0.3
    small = tiled("delta_grad", size, dtype, rows=16, steps=2)
    found = ops.delta_grad(x, grad, list(delta.shape), small)
    assert (found.shape, found.dtype, found.is_contiguous()) == (delta.shape, dtype, True)
    assert error(found, delta_gradient(x, grad, GROUPS, size)) < TOLERANCE[name]


def check_committed_tiles(ops: Any, size: int, name: str, device: str) -> None:
    dtype = DTYPES[name]
    x = draw(70, 2 * size, seed=4, device=device, dtype=dtype)
    delta = deltas(size, dtype, device, groups=1, blocks=2)
    assert error(ops.rotate(x, delta[0]), rotated(x, delta)) < TOLERANCE[name]
    found = ops.delta_grad(x, x, [2, size, size])
    assert error(found[None], delta_gradient(x, x, 1, size)) < TOLERANCE[name]


def check_strides(ops: Any, size: int, device: str) -> None:
    x = draw(2 * GROUPS, 5, BLOCKS * size, seed=5, device=device)
    grad = draw(*x.shape, seed=6, device=device)
    delta = deltas(size, torch.float32, device)
    expected, gradient = rotated(x, delta), delta_gradient(x, grad, GROUPS, size)
    for (name, one), other in zip(lying(x).items(), reversed(lying(grad).values()), strict=True):
        assert torch.equal(one, x), name
        assert error(ops.rotate(one, delta), expected) < 1e-6, name
        assert error(ops.delta_grad(one, other, list(delta.shape)), gradient) < 1e-6, name
    expanded = x[:1].expand(4, -1, -1)
    assert error(ops.rotate(expanded, delta), rotated(expanded, delta)) < 1e-6
    single = x[0, 0]
    assert error(ops.rotate(single, delta[0]), rotated(single[None], delta[:1])[0]) < 1e-6
    sums = torch.ones((), device=device).expand(x.shape)  # what `sum().backward()` hands back
    assert error(ops.delta_grad(x, sums, list(delta.shape)), delta_gradient(x, sums, GROUPS, size)) < 1e-6


def check_empty(ops: Any, device: str) -> None:
    for shape in ((0, 48), (4, 0, 48)):
        x = torch.empty(shape, device=device)
        assert ops.rotate(x, torch.ones(6, 8, 8, device=device)).shape == shape
        gradient = ops.delta_grad(x, x, [6, 8, 8])
        assert torch.equal(gradient, torch.zeros(6, 8, 8, device=device))


def check_far_apart(ops: Any, device: str) -> None:
    """Rows 2^30 elements apart: the offset of the third does not fit in 32 bits."""
    room = torch.empty(2**31 + 16, dtype=torch.float16, device=device)  # pages that nobody writes cost nothing on a CPU
    x = room.as_strided((3, 16), (2**30, 1))
    x.copy_(draw(3, 16, seed=7, device=device))
    delta = deltas(8, torch.float16, device, groups=1, blocks=2)
    assert error(ops.rotate(x, delta), rotated(x, delta)) < TOLERANCE["float16"]
    assert error(ops.delta_grad(x, x, [1, 2, 8, 8]), delta_gradient(x, x, 1, 8)) < TOLERANCE["float16"]


def check_determinism(ops: Any, size: int, name: str, device: str, rows: int = 150) -> Callable[[], Tensor]:
    """Both ways of adding up are right, the deterministic one bit by bit the same each time."""
    dtype = DTYPES[name]
    x, grad = (draw(rows, BLOCKS * size, seed=seed, device=device, dtype=dtype) for seed in (8, 9))
    tile = tiled("delta_grad", size, dtype, rows=16, steps=1)

    def gradient() -> Tensor:
        return ops.delta_grad(x, grad, [BLOCKS, size, size], tile)

    free = gradient()
    with deterministic():
        first, second = gradient(), gradient()
    assert torch.equal(first, second)
    expected = delta_gradient(x, grad, 1, size)[0]
    assert error(first, expected) < TOLERANCE[name]
    assert error(free, expected) < TOLERANCE[name]
    return gradient


def check_shared(shared: Any, size: int, name: str, device: str, count: int) -> None:
    """Layers of one input: forward, dx and every dD, against the definition."""
    dtype = DTYPES[name]
    x = draw(5, 14, BLOCKS * size, seed=2, device=device, dtype=dtype)
    each = [deltas(size, dtype, device, groups=1)[0] * (1 + i) for i in range(count)]
    grads = [draw(*x.shape, seed=3 + i, device=device, dtype=dtype) for i in range(count)]
    small = tiled("rotate", size, dtype, rows=16, steps=2)
    sliced = lying(x.reshape(2, 35, -1))["slice"].reshape(2, 35, -1)  # where it lies, rows in two levels
    for own in (x, sliced):
        made = shared.rotate(own, each, small)
        assert len(made) == count
        for out, delta in zip(made, each, strict=True):
            assert (out.shape, out.dtype, out.is_contiguous()) == (own.shape, dtype, True)
            assert error(out, rotated(own, delta[None])) < TOLERANCE[name]
    dx = shared.input_grad(x, each, grads, small)
    expected = sum(rotated(g, d[None].transpose(-1, -2)) for g, d in zip(grads, each, strict=True))
    assert isinstance(expected, Tensor)
    assert (dx.shape, dx.dtype) == (x.shape, dtype)
    assert error(dx, expected) < TOLERANCE[name]
    small = tiled("delta_grad", size, dtype, rows=16, steps=2)
    wanted = torch.cat([delta_gradient(x, g, 1, size)[0] for g in grads], dim=2)

    def delta_grads(*tile: Tile) -> Tensor:
        return torch.cat(shared.delta_grads(x, grads, BLOCKS, size, *tile), dim=2)

    for found in (delta_grads(small), delta_grads()):
        assert (found.shape, found.dtype) == (wanted.shape, dtype)
        assert error(found, wanted) < TOLERANCE[name]
    with deterministic():
        first, second = (delta_grads(small) for _ in range(2))
    assert torch.equal(first, second)
    assert error(first, wanted) < TOLERANCE[name]
