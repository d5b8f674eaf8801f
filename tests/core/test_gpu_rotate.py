"""The Triton kernels on a CUDA card: the interpreter's cases, and the op as models call it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from oft_diffusion.kernels import block_rotate, block_rotate_shared
from oft_diffusion.kernels.block_rotate import triton_kernels
from tests.core import rotate_cases as cases

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def ops() -> Iterator[Any]:
    os.environ.pop("OFT_DIFFUSION_KERNELS", None)
    triton_kernels.cache_clear()
    kernels = triton_kernels()
    if kernels is None:
        pytest.skip("no Triton, or no C compiler")
    from oft_diffusion.kernels import launch

    assert not launch.INTERPRETED
    yield kernels
    triton_kernels.cache_clear()


@pytest.mark.parametrize(("size", "name"), cases.EVERY)
def test_every_size_and_dtype_is_the_definition(ops: Any, size: int, name: str) -> None:
    cases.check_every_kernel(ops, size, name, "cuda")
    cases.check_committed_tiles(ops, size, name, "cuda")


@pytest.mark.parametrize(("size", "name"), cases.EVERY)
def test_layers_of_one_input(ops: Any, size: int, name: str) -> None:
    from oft_diffusion.kernels import triton_shared

    for count in triton_shared.COUNTS:
        cases.check_shared(triton_shared, size, name, "cuda", count)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_shared_op_its_gradients_and_the_compiler(count: int) -> None:
    x = cases.draw(2, 77, 96, seed=0, device="cuda").requires_grad_()
    deltas = [d.requires_grad_() for d in cases.deltas(32, torch.float32, "cuda", groups=count).unbind()]
    grads = [cases.draw(*x.shape, seed=1 + i, device="cuda") for i in range(count)]
    torch.library.opcheck(torch.ops.oft_diffusion.block_rotate_shared, (x, deltas))
    single = [block_rotate(x, delta) for delta in deltas]
    expected = torch.autograd.grad(single, (x, *deltas), grads)
    for rotate in (block_rotate_shared, torch.compile(block_rotate_shared, fullgraph=True)):
        together = rotate(x, deltas)
        for one, other in zip(together, single, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(torch.autograd.grad(together, (x, *deltas), grads), expected, strict=True):
            assert cases.error(one, other.double().cpu()) < 1e-5


@pytest.mark.parametrize("size", [8, 32])
def test_strides_do_not_matter(ops: Any, size: int) -> None:
    cases.check_strides(ops, size, "cuda")
    cases.check_empty(ops, "cuda")


def test_offsets_beyond_32_bits(ops: Any) -> None:
    cases.check_far_apart(ops, "cuda")


@pytest.mark.parametrize(("size", "name"), cases.EVERY)
def test_every_way_of_adding_up(ops: Any, size: int, name: str) -> None:
    cases.check_determinism(ops, size, name, "cuda", rows=5000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 24])
def test_the_op_its_gradients_and_the_compiler(dtype: torch.dtype, size: int) -> None:
    x = cases.draw(2, 77, 3 * size, seed=0, device="cuda", dtype=dtype).requires_grad_()
    delta = cases.deltas(size, dtype, "cuda", groups=1)[0].requires_grad_()
    grad = cases.draw(*x.shape, seed=1, device="cuda", dtype=dtype)
    torch.library.opcheck(torch.ops.oft_diffusion.block_rotate, (x, delta))
    for rotate in (block_rotate, torch.compile(block_rotate, fullgraph=True)):
        out = rotate(x, delta)
        dx, ddelta = torch.autograd.grad(out, (x, delta), grad)
        name = str(dtype).removeprefix("torch.")
        transposed = delta.detach()[None].transpose(-1, -2)
        assert cases.error(out.detach(), cases.rotated(x.detach(), delta.detach()[None])) < cases.TOLERANCE[name]
        assert cases.error(dx, cases.rotated(grad, transposed)) < cases.TOLERANCE[name]
        expected = cases.delta_gradient(x.detach(), grad, 1, size)[0]
        assert cases.error(ddelta, expected) < cases.TOLERANCE[name]


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_was_launched_once_is_launched_again_without_triton(
    ops: Any, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    from oft_diffusion.kernels import launch, triton_rotate, triton_shared

    def made(x: Tensor, grad: Tensor, delta: Tensor) -> list[Tensor]:
        with cases.deterministic() if deterministic else nullcontext():
            return [
                ops.rotate(x, delta), ops.rotate(grad, delta.transpose(1, 2)),
                ops.delta_grad(x, grad, list(delta.shape)), *triton_shared.rotate(x, [delta, delta * 2]),
                triton_shared.input_grad(x, [delta, delta * 2], [grad, x]),
                *triton_shared.delta_grads(x, [grad, x], *delta.shape[:2]),
            ]  # fmt: skip

    def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        x, grad = (cases.draw(3000, 96, seed=seed + i, device="cuda") for i in range(2))
        return x, grad, cases.deltas(32, torch.float32, "cuda", groups=1)[0]

    made(*drawn(0))
    known = dict(launch._known)
    expected = made(*drawn(5))
    assert launch._known == known
    for module in (triton_rotate, triton_shared):
        monkeypatch.setattr(module, "launch", None)  # raises
    for one, other in zip(made(*drawn(5)), expected, strict=True):
        assert cases.error(one, other.double().cpu()) < 1e-6
    x, _, delta = drawn(5)
    odd = torch.empty(3000 * 96 + 1, device="cuda")[1:].view(3000, 96)  # at no multiple of 16
    odd.copy_(x)
    with pytest.raises(TypeError):
        ops.rotate(odd, delta)
    monkeypatch.undo()
    assert cases.error(ops.rotate(odd, delta), cases.rotated(x, delta[None])) < 1e-6
    launch._known.clear()
    assert cases.error(ops.rotate(x, delta), cases.rotated(x, delta[None])) < 1e-6


def test_a_graph_can_be_captured(ops: Any) -> None:
    x = cases.draw(64, 96, seed=0, device="cuda")
    delta = cases.deltas(32, torch.float32, "cuda", groups=1)
    block_rotate(x, delta)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_rotate(x, delta)
    x.neg_()
    graph.replay()
    assert cases.error(out, cases.rotated(x, delta)) < 1e-6


def test_autocast_leaves_the_op_alone(ops: Any) -> None:
    x, delta = cases.draw(64, 96, seed=0, device="cuda"), cases.deltas(32, torch.float32, "cuda", groups=1)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(block_rotate(x, delta), ops.rotate(x, delta))
