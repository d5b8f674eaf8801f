"""The maths of OFT: from packed generators to block rotations. Pure functions of tensors.

Conventions (docs/maths.md): a *generator* is the packed strict upper triangle, row-major, of a skew-symmetric block
`Q`; the *rotation* is `R = (I + Q)(I - Q)^-1`; row vectors are rotated as `x R`; what is computed and stored is the
*delta* `D = R - I`, which keeps near the identity what `R` itself would round away.

Shapes: packed `(r, b(b-1)/2)`, `Q`, `R` and `D` `(r, b, b)`, for r blocks of size b. Floating dtypes of at least
32 bits: `torch.linalg` has no half-precision solvers, and a rotation rounded to bfloat16 is not one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import AdapterError
from oft_diffusion.kernels import processor


def packed_size(block_size: int) -> int:
    """Entries of one block's generator: b(b-1)/2."""
    return block_size * (block_size - 1) // 2


def block_size_of(packed: int) -> int | None:
    """The block size whose generator has this many entries, or None when there is none."""
    block_size = (1 + math.isqrt(1 + 8 * packed)) // 2
    return block_size if block_size >= 2 and packed_size(block_size) == packed else None


def unpack(packed: Tensor) -> Tensor:
    """Packed generators `(r, b(b-1)/2)` to skew-symmetric `Q (r, b, b)`: upper = packed, lower = -packed."""
    q: Tensor = _Unpack.apply(packed, _block_size(packed))
    return q


def _block_size(packed: Tensor) -> int:
    block_size = block_size_of(packed.shape[-1])
    if block_size is None:
        raise AdapterError(
            f"a generator of {packed.shape[-1]} entries belongs to no block size",
            expected="b(b-1)/2 entries, for example 496 for b = 32",
            fix="check that the tensor is a packed OFT generator",
        )
    return block_size


class _Unpack(torch.autograd.Function):
    """The triangles, with a backward that reads the two it wants: autograd's own turns all of Q's gradient around."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, block_size: int) -> Tensor:
        ctx.block_size = block_size
        upper = packed.new_zeros(packed.shape[0], block_size * block_size)
        upper = upper.index_copy_(1, _upper_index(block_size, packed.device), packed)
        upper = upper.view(-1, block_size, block_size)
        return upper - upper.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flat = grad.reshape(len(grad), -1)
        upper = flat.index_select(1, _upper_index(ctx.block_size, grad.device))
        return upper - flat.index_select(1, _lower_index(ctx.block_size, grad.device)), None


def pack(q: Tensor) -> Tensor:
    """The strict upper triangles of `Q (r, b, b)`, as `unpack` takes them."""
    return q.reshape(len(q), -1).index_select(1, _upper_index(q.shape[-1], q.device))


def _upper_index(block_size: int, device: torch.device) -> Tensor:
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=device)
    return torch.add(columns, rows, alpha=block_size)


def _lower_index(block_size: int, device: torch.device) -> Tensor:
    """Where the upper triangle's entries stand mirrored, in its order."""
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=device)
    return torch.add(rows, columns, alpha=block_size)


def cayley_delta(q: Tensor) -> Tensor:
    """`D = R - I = 2 (I - Q)^-1 Q` for the exact Cayley rotation (arXiv 2506.19847, eq. 2).

    `I - Q` is always invertible, since the eigenvalues of a skew-symmetric Q are imaginary. Orthogonal with det 1 at
    any norm of Q, up to rounding.
    """
    delta: Tensor = _CayleyDelta.apply(q)
    return delta


class _CayleyDelta(torch.autograd.Function):
    """The solve with a backward of two products, which keeps nothing but D: autograd's own solves again, and keeps LU.

    With A = I - Q, R = A^-1 (I + Q) and A^-1 = (R + I) / 2, a change of Q changes R by `A^-1 dQ (R + I)`. So the
    gradient of Q is `(R + I)^T G (R + I)^T / 2`, and R + I = D + 2 I.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        # Where a look at Q costs nothing. A compiler would make a constant of what it sees.
        delta = _by_doubling(q) if q.is_cpu and not torch.compiler.is_compiling() else None
        if delta is None:
            delta = _by_solving(q)
        ctx.save_for_backward(delta)
        return delta

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (delta,) = ctx.saved_tensors
        return cayley_delta_grad(delta, grad)


def cayley_delta_grad(delta: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `cayley_delta`'s Q, of D and D's own gradient, all `(..., b, b)`: `_CayleyDelta`."""
    turned = delta.transpose(-2, -1)
    half = torch.baddbmm(grad, turned, grad, beta=2.0)
    return torch.baddbmm(half, half, turned, alpha=0.5)


class _PackedCayleyDelta(torch.autograd.Function):
    """`cayley_delta(unpack(packed))` and its gradient, block by block in a processor's cache (`processor.c`)."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, block_size: int) -> Tensor:
        delta = processor.cayley_delta(packed, block_size)
        ctx.save_for_backward(delta)
        return delta

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (delta,) = ctx.saved_tensors
        if processor.derived_by_torch(delta, delta.shape[-1], (grad,)):
            skew = cayley_delta_grad(delta, grad)
            return pack(skew - skew.transpose(1, 2)), None
        return processor.cayley_grad(delta, grad), None


def _by_solving(q: Tensor) -> Tensor:
    system = (-q).contiguous()
    system.view(len(q), -1)[:, :: q.shape[-1] + 1].fill_(1.0)  # I - Q: Q has zeros there
    # solve_ex, not solve: no host synchronisation to look at an info flag that cannot be set.
    # Row by row in memory, as everything after it wants it.
    return torch.linalg.solve_ex(system, 2 * q)[0].contiguous()


def _by_doubling(q: Tensor) -> Tensor | None:
    """`2 (Q + Q^2 + ... + Q^m)`, m doubled until what is left out is below rounding: the exact rotation, by products.

    On a processor it takes less time than a solve, and is nearer to the truth (docs/maths.md). None where Q is not
    finite, or so large that a solve is faster.
    """
    delta = torch.empty_like(q, memory_format=torch.contiguous_format)
    blocks = max(1, min(len(q), _AT_A_TIME // q.shape[-1] ** 2))
    scratch = q.new_empty(4, blocks, *q.shape[1:])  # kept through the loop: fresh memory costs more than a product
    parts = zip(q.split(blocks), delta.split(blocks), strict=True) if len(q) else ()
    return delta if all(_double_into(out, part, scratch[:, : len(part)]) for part, out in parts) else None


def _double_into(out: Tensor, q: Tensor, scratch: Tensor) -> bool:
    """Write the sum of one part of the blocks; whether it was done."""
    power, squared, total, doubled = scratch
    torch.add(q, torch.bmm(q, q, out=power), out=total)
    for doubling in range(1, _DOUBLINGS):
        norm = float(torch.linalg.vector_norm(power, dim=(1, 2)).max())
        enough = norm * norm < torch.finfo(q.dtype).eps / 4  # the rest is R (power^2), and R's norm is 1
        if enough:
            torch.baddbmm(total, power, total, out=out).mul_(2.0)
            return True
        if doubling > 1 and not norm < 0.7:
            return False
        torch.baddbmm(total, power, total, out=doubled)
        torch.bmm(power, power, out=squared)
        power, squared, total, doubled = squared, power, doubled, total
    return False


_AT_A_TIME = 2**21  # numbers
_DOUBLINGS = 7  # m up to 128


def cayley_neumann_delta(q: Tensor, order: int) -> Tensor:
    """`D = 2Q + 2Q^2 + ... + 2Q^(m-1) + Q^m` (arXiv 2506.19847, section 3.3), m = `order`, by Horner's rule.

    It is `R (I - Q^m) - I`: near-orthogonal only while the spectral norm of Q is well below 1.
    """
    delta = q
    for _ in range(order - 1):
        delta = torch.baddbmm(q, q, delta, beta=2.0)
    return delta


def cayley_series_delta(q: Tensor, order: int) -> Tensor:
    """`D = 2Q + 2Q^2 + ... + 2Q^m`, m = `order`: the power series of the Cayley transform, cut off.

    What PEFT below 0.18 computes (its "5 terms" are m = 4), where arXiv 2506.19847 has a last term of weight 1. It is
    `R (I - 2 Q^(m+1) (I + Q)^-1) - I`.
    """
    delta = 2.0 * q
    for _ in range(order - 1):
        delta = torch.baddbmm(q, q, delta, beta=2.0)
    return delta


def rotation_delta(packed: Tensor, config: OFTConfig) -> Tensor:
    """Packed generators `(r, b(b-1)/2)` to deltas `(r, b, b)`, as the adapter's config says. Differentiable.

    `packed` is the effective generator: `config.scaled` is the caller's business (`effective_generator`).
    """
    block_size = _block_size(packed)
    exact = config.parametrisation == "cayley"
    if exact and not torch.compiler.is_compiling() and processor.fits(packed, block_size):
        delta: Tensor = _PackedCayleyDelta.apply(packed, block_size)
        return delta
    q = unpack(packed)
    if exact:
        return cayley_delta(q)
    series = cayley_neumann_delta if config.parametrisation == "cayley_neumann" else cayley_series_delta
    return series(q, config.neumann_order)


def rotate_vectors(x: Tensor, packed: Tensor, config: OFTConfig) -> Tensor:
    """`x R` per block, `(r, b)`, without building any R: one linear solve, or the series by Horner's rule."""
    q, rows = unpack(packed), x.unsqueeze(1)
    if config.parametrisation == "cayley":
        # z (I - Q) = x (I + Q), transposed: (I + Q) z^T = (I - Q) x^T.
        identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        return torch.linalg.solve_ex(identity + q, rows.mT - q @ rows.mT)[0].squeeze(2)
    tail = rows if config.parametrisation == "cayley_neumann" else 2.0 * rows
    for _ in range(config.neumann_order - 1):
        tail = torch.baddbmm(rows, tail, q, beta=2.0)
    return (rows + tail @ q).squeeze(1)


def scaled_delta(delta: Tensor, scale: Tensor) -> Tensor:
    """The delta of rotating and then scaling each feature, `R diag(scale) - I`; `scale` is `(r, b)`."""
    return delta * scale.unsqueeze(1) + torch.diag_embed(scale - 1.0)


def effective_generator(trained: Tensor, config: OFTConfig) -> Tensor:
    """What a trained parameter stands for: itself, or itself divided by 2 sqrt(b - 1) where `config.scaled`."""
    return trained / generator_divisor(trained.shape[-1]) if config.scaled else trained


def generator_divisor(packed: int) -> float:
    """2 sqrt(b - 1): typical row norm of Q for unit-variance entries, which `OFTConfig.scaled` divides by."""
    block_size = block_size_of(packed)
    assert block_size is not None
    return 2.0 * math.sqrt(block_size - 1)


class Spectrum(NamedTuple):
    """Per block: `iQ = V diag(w) V^H`, and the log-polar form of the rotation's eigenvalues `exp(log_radius + i arg)`.

    Shapes: `vectors (r, b, b)` complex128, `log_radius`, `angle (r, b)` float64.
    """

    vectors: Tensor
    log_radius: Tensor
    angle: Tensor


def spectrum(packed: Tensor, config: OFTConfig) -> Spectrum:
    """Decompose rotations so that any strength is then cheap. Computed in float64, without gradient.

    Raises:
        AdapterError: a truncated series at a spectral norm of 1 or more, where its eigenvalues' angle is not unique.
    """
    # eigh's gradient is not finite where eigenvalues meet, as all do at Q = 0; hence no autograd here.
    with torch.no_grad():
        q = unpack(packed.double())
        w, vectors = torch.linalg.eigh(1j * q)
        if config.parametrisation == "cayley":
            return Spectrum(vectors, torch.zeros_like(w), -2.0 * torch.atan(w))
        eigenvalues = -1j * w
        power = eigenvalues**config.neumann_order
        if config.parametrisation == "cayley_neumann":
            lost = power  # of each eigenvalue, what the series lacks as a share of the exact rotation's
        else:
            lost = 2.0 * power * eigenvalues / (1.0 + eigenvalues)
        if lost.numel() and float(lost.abs().max()) >= 1.0:
            raise AdapterError(
                f"the series adapter's generators reach a spectral norm of {float(w.abs().max()):.3g}",
                expected="a norm below 1, past which the truncated series has no unique fractional power",
                fix='use strength 1, or mode="linear"',
            )
        series_tail = torch.log(1.0 - lost)
        return Spectrum(vectors, series_tail.real, series_tail.imag - 2.0 * torch.atan(w))


def power_delta(parts: Spectrum, strength: float) -> Tensor:
    """`R^s - I`, float64 `(r, b, b)`: every plane's angle times s, and its length to the power s."""
    exponent = strength * torch.complex(parts.log_radius, parts.angle)
    eigenvalues = torch.special.expm1(exponent.real) * torch.exp(1j * exponent.imag)
    # expm1 of an imaginary argument, written so that nothing cancels near strength 0.
    half = exponent.imag / 2
    eigenvalues = eigenvalues + 2j * torch.sin(half) * torch.exp(1j * half)
    return ((parts.vectors * eigenvalues.unsqueeze(-2)) @ parts.vectors.mH).real


def compose_deltas(first: Tensor, second: Tensor) -> Tensor:
    """The delta of applying `first`, then `second`, to row vectors: `R1 R2 - I = D1 + D2 + D1 D2`."""
    return torch.baddbmm(first + second, first, second)


def orthogonality_error(delta: Tensor) -> Tensor:
    """Largest entry of `|R^T R - I|`, a scalar, from `D (r, b, b)`: `D + D^T + D^T D`, in which nothing cancels."""
    transposed = delta.transpose(1, 2)
    return torch.baddbmm(delta + transposed, transposed, delta).abs().max()


def project_frobenius_(packed: Tensor, eps: float) -> Tensor:
    """Bring every block's `‖Q‖_F = sqrt(2) ‖packed row‖` to at most eps, in place (arXiv 2306.07280, section 3.4)."""
    with torch.no_grad():
        norms = math.sqrt(2.0) * torch.linalg.vector_norm(packed, dim=1, keepdim=True)
        return packed.mul_((eps / norms.clamp_min(torch.finfo(packed.dtype).tiny)).clamp_max(1.0))
