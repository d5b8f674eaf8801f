"""A candidate: D = 2 (I - Q)^-1 Q in one Triton kernel, a block of Q to a program. `benchmarks.build_forms` times it.

python -m benchmarks.solve_kernel 90    # compile it, without a card

Gauss-Jordan elimination without pivots: those of I - Q, whose symmetric part is the identity, are 1 at least.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from oft_diffusion.kernels.launch import launch
from oft_diffusion.rotation import cayley_delta_grad


@triton.jit  # type: ignore[untyped-decorator]
def _solve(q_pointer, delta_pointer, SIZE: tl.constexpr):
    """Eliminate in registers."""
    i = tl.arange(0, SIZE)
    lie = tl.program_id(0).to(tl.int64) * SIZE * SIZE + i[:, None] * SIZE + i[None, :]
    q = tl.load(q_pointer + lie)
    left = (i[:, None] == i[None, :]).to(tl.float32) - q
    right = 2.0 * q
    for k in range(SIZE):
        here = i == k
        pivot = tl.sum(tl.where(here[:, None] & here[None, :], left, 0.0))
        row = tl.sum(tl.where(here[:, None], left, 0.0), 0) / pivot
        answer = tl.sum(tl.where(here[:, None], right, 0.0), 0) / pivot
        factor = tl.where(here, 0.0, tl.sum(tl.where(here[None, :], left, 0.0), 1))
        left = tl.where(here[:, None], row[None, :], left - factor[:, None] * row[None, :])
        right = tl.where(here[:, None], answer[None, :], right - factor[:, None] * answer[None, :])
    tl.store(delta_pointer + lie, right)


def solved(q: Tensor) -> Tensor:
    """D of skew-symmetric blocks `(r, b, b)`, float32, b a power of two of at least 16."""
    q = q.contiguous()
    delta = torch.empty_like(q)
    launch(_solve, len(q), [q, delta], [], None, SIZE=q.shape[-1], num_warps=_warps(q.shape[-1]))
    return delta


def _warps(size: int) -> int:
    """So that a thread holds 64 numbers of the two matrices."""
    return max(1, size**2 // 1024)


class _Solved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        delta = solved(q)
        ctx.save_for_backward(delta)
        return delta

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (delta,) = ctx.saved_tensors
        return cayley_delta_grad(delta, grad)


def solved_delta(q: Tensor) -> Tensor:
    """`solved` with `cayley_delta`'s backward."""
    delta: Tensor = _Solved.apply(q)
    return delta


def main() -> None:
    """Compile every size for a compute capability, and say what it takes of the card."""
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    for size in (16, 32, 64, 128):
        types = {"q_pointer": "*fp32", "delta_pointer": "*fp32", "SIZE": "constexpr"}
        source = ASTSource(fn=_solve, signature=types, constexprs={(2,): size})
        made = triton.compile(source, target=target, options={"num_warps": _warps(size)})
        spilled = "st.local" in made.asm["ptx"]
        print(f"b = {size}: {made.metadata.shared} bytes shared, {_warps(size)} warps, spills {spilled}")


if __name__ == "__main__":
    main()
