"""The maths against its definitions: exact Cayley, the truncated series, powers, packing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oft_diffusion import rotation
from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import AdapterError
from oft_diffusion.rotation import (
    block_size_of,
    cayley_delta,
    cayley_neumann_delta,
    compose_deltas,
    effective_generator,
    generator_divisor,
    orthogonality_error,
    pack,
    packed_size,
    power_delta,
    project_frobenius_,
    rotation_delta,
    spectrum,
    unpack,
)
from tests.core.reference import BLOCK_SIZES, SEEDS, dense_cayley, dense_series, random_packed

DTYPES = st.sampled_from([torch.float32, torch.float64])
NORMS = st.sampled_from([0.01, 0.5, 1.0, 3.0, 100.0])


def eye_like(delta: torch.Tensor) -> torch.Tensor:
    return torch.eye(delta.shape[-1], dtype=delta.dtype)


@given(b=BLOCK_SIZES, blocks=st.integers(1, 4), seed=SEEDS)
def test_packing_is_the_strict_upper_triangle_row_by_row(b: int, blocks: int, seed: int) -> None:
    packed = random_packed(blocks, b, seed)
    q = unpack(packed)
    assert torch.equal(q, -q.transpose(1, 2))
    rows = [q[0, i, j] for i in range(b) for j in range(i + 1, b)]
    assert torch.equal(torch.stack(rows), packed[0])
    assert torch.equal(pack(q), packed)
    assert block_size_of(packed.shape[1]) == b


@given(packed=st.integers(2, 3000))
def test_a_width_that_no_block_size_has_is_none(packed: int) -> None:
    known = {packed_size(b): b for b in range(2, 100)}
    assert block_size_of(packed) == known.get(packed)


def test_unpack_refuses_a_width_that_no_block_size_has() -> None:
    with pytest.raises(AdapterError, match=r"a generator of 5 entries .* Expected: .* Fix: "):
        unpack(torch.zeros(2, 5))


@given(b=BLOCK_SIZES, blocks=st.integers(1, 4), seed=SEEDS, norm=NORMS, dtype=DTYPES)
def test_cayley_is_orthogonal_with_determinant_one_at_any_norm(
    b: int, blocks: int, seed: int, norm: float, dtype: torch.dtype
) -> None:
    packed = random_packed(blocks, b, seed, norm, dtype)
    delta = cayley_delta(unpack(packed))
    assert delta.dtype == dtype
    r = (delta + eye_like(delta)).double()
    assert (r.transpose(1, 2) @ r - eye_like(r)).abs().max() < 1e-5
    assert (torch.linalg.det(r) - 1).abs().max() < 1e-4
    assert float(orthogonality_error(delta)) < 1e-5
    # Rounding of the solve grows with the norm; the error is that of the rotation, whose entries are at most 1.
    assert (r - dense_cayley(packed)).abs().max() < 1e-5 * max(1.0, norm)
    assert delta.abs().max() > 1e-3 * min(norm, 1.0)


@given(b=BLOCK_SIZES, seed=SEEDS, order=st.integers(1, 8), norm=st.sampled_from([0.1, 0.5, 0.9]))
def test_the_series_is_the_rotation_times_one_minus_q_to_the_m(b: int, seed: int, order: int, norm: float) -> None:
    packed = random_packed(3, b, seed, norm)
    q = unpack(packed)
    delta = cayley_neumann_delta(q, order)
    r = delta + eye_like(delta)
    torch.testing.assert_close(r, dense_series(packed, order), rtol=0, atol=1e-12)
    expected = dense_cayley(packed) @ (eye_like(q) - torch.linalg.matrix_power(q, order))
    torch.testing.assert_close(r, expected, rtol=0, atol=1e-12)
    assert delta.abs().max() > 0.1 * norm / b


@given(angle=st.floats(0.05, 0.95), order=st.integers(1, 9))
def test_length_and_angle_of_a_plane_under_even_and_odd_orders(angle: float, order: int) -> None:
    delta = cayley_neumann_delta(unpack(torch.tensor([[angle]], dtype=torch.float64)), order)
    r = delta[0] + torch.eye(2, dtype=torch.float64)
    # Rows of a scaled plane rotation are (length cos, length sin).
    length = float(torch.linalg.vector_norm(r[0]))
    turn = math.atan2(float(r[0, 1]), float(r[0, 0]))
    tail = angle**order
    if order % 2:
        assert length == pytest.approx(math.sqrt(1 + tail**2), abs=1e-12)
        difference = math.remainder(turn - 2 * math.atan(angle), 2 * math.pi)
        assert abs(difference) == pytest.approx(math.atan(tail), abs=1e-9)
    else:
        assert length == pytest.approx(1 - tail if order % 4 == 0 else 1 + tail, abs=1e-12)
        assert turn == pytest.approx(2 * math.atan(angle), abs=1e-9)


@pytest.mark.parametrize(("norm", "order", "shown"), [(0.3, 4, 1.6e-2), (0.5, 4, 0.12), (0.3, 5, 6e-6), (0.5, 5, 1e-3)])
def test_the_orthogonality_errors_that_the_docs_state(norm: float, order: int, shown: float) -> None:
    packed = random_packed(64, 32, seed=3, norm=norm)
    r = dense_series(packed, order)
    error = float(torch.linalg.matrix_norm(r.transpose(1, 2) @ r - eye_like(r), 2).max())
    assert error == pytest.approx(shown, rel=0.08)


@given(b=BLOCK_SIZES, blocks=st.integers(1, 4), dtype=DTYPES, order=st.integers(1, 6))
def test_zero_generators_give_the_identity_bit_by_bit(b: int, blocks: int, dtype: torch.dtype, order: int) -> None:
    q = unpack(torch.zeros(blocks, packed_size(b), dtype=dtype))
    for delta in (cayley_delta(q), cayley_neumann_delta(q, order)):
        assert torch.equal(delta, torch.zeros(blocks, b, b, dtype=dtype))


@given(b=st.sampled_from([2, 3, 5]), seed=SEEDS, order=st.sampled_from([None, 1, 4, 5]))
def test_gradients_against_finite_differences(b: int, seed: int, order: int | None) -> None:
    config = OFTConfig() if order is None else OFTConfig(parametrisation="cayley_neumann", neumann_order=order)
    packed = random_packed(2, b, seed).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: rotation_delta(p, config), packed)


# Powers


@given(
    b=BLOCK_SIZES, seed=SEEDS, norm=st.sampled_from([0.1, 0.5, 3.0]), first=st.floats(-2, 2), second=st.floats(-2, 2)
)
def test_powers_of_a_rotation_form_a_group(b: int, seed: int, norm: float, first: float, second: float) -> None:
    packed = random_packed(3, b, seed, norm)
    parts = spectrum(packed, OFTConfig())
    a, c = power_delta(parts, first), power_delta(parts, second)
    torch.testing.assert_close(compose_deltas(a, c), power_delta(parts, first + second), rtol=0, atol=1e-10)
    assert float(orthogonality_error(a)) < 1e-10
    assert torch.equal(power_delta(parts, 0.0), torch.zeros_like(a))
    r = dense_cayley(packed)
    torch.testing.assert_close(power_delta(parts, 1.0) + eye_like(a), r, rtol=0, atol=1e-10)
    torch.testing.assert_close(power_delta(parts, -1.0) + eye_like(a), r.transpose(1, 2), rtol=0, atol=1e-10)
    half = power_delta(parts, 0.5) + eye_like(a)
    torch.testing.assert_close(half @ half, r, rtol=0, atol=1e-10)


@given(b=BLOCK_SIZES, seed=SEEDS, strength=st.floats(1e-9, 1e-5))
def test_small_strengths_keep_their_digits(b: int, seed: int, strength: float) -> None:
    packed = random_packed(2, b, seed)
    delta = power_delta(spectrum(packed, OFTConfig()), strength)
    # R^s = exp(s log R), and log R = 2 artanh(Q): to first order a multiple of s, whatever the digits of 1 would hide.
    unit = power_delta(spectrum(packed, OFTConfig()), 1e-6) / 1e-6
    assert (delta / strength - unit).norm() / unit.norm() < 1e-4


@given(b=BLOCK_SIZES, seed=SEEDS, order=st.integers(1, 7), strength=st.floats(-1, 2))
def test_powers_of_a_series_are_continuous_at_one(b: int, seed: int, order: int, strength: float) -> None:
    config = OFTConfig(parametrisation="cayley_neumann", neumann_order=order)
    packed = random_packed(3, b, seed)
    parts = spectrum(packed, config)
    torch.testing.assert_close(power_delta(parts, 1.0), rotation_delta(packed, config), rtol=0, atol=1e-10)
    a, c = power_delta(parts, strength), power_delta(parts, 1.0 - strength)
    torch.testing.assert_close(compose_deltas(a, c), rotation_delta(packed, config), rtol=0, atol=1e-9)


def test_a_series_past_norm_one_has_no_powers() -> None:
    config = OFTConfig(parametrisation="cayley_neumann")
    with pytest.raises(AdapterError, match=r"spectral norm of 1\.2.*Expected: .*Fix: .*linear"):
        spectrum(random_packed(2, 8, 0, norm=1.2), config)


# Options


@given(b=BLOCK_SIZES, seed=SEEDS, eps=st.sampled_from([0.01, 0.5, 10.0]))
def test_projection_bounds_the_frobenius_norm_and_leaves_the_rest(b: int, seed: int, eps: float) -> None:
    packed = torch.cat([random_packed(2, b, seed), torch.zeros(1, packed_size(b), dtype=torch.float64)])
    before = torch.linalg.matrix_norm(unpack(packed))
    after = torch.linalg.matrix_norm(unpack(project_frobenius_(packed.clone(), eps)))
    torch.testing.assert_close(after, before.clamp_max(eps), rtol=1e-9, atol=0)


@given(b=BLOCK_SIZES, seed=SEEDS)
def test_scaled_divides_by_twice_the_root_of_b_minus_one(b: int, seed: int) -> None:
    packed = random_packed(2, b, seed)
    assert generator_divisor(packed.shape[1]) == pytest.approx(2 * math.sqrt(b - 1))
    scaled = effective_generator(packed, OFTConfig(scaled=True))
    torch.testing.assert_close(scaled, packed / (2 * math.sqrt(b - 1)))
    assert effective_generator(packed, OFTConfig()) is packed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", [0.0, 1e-4, 0.1, 0.4, 0.7, 1.5, 20.0])
def test_on_a_processor_small_generators_take_products_and_large_ones_a_solve(norm: float, dtype: torch.dtype) -> None:
    q = unpack(torch.randn(6, packed_size(8), dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    q = q * (norm / torch.linalg.matrix_norm(q, 2))[:, None, None]
    found = rotation._by_doubling(q.to(dtype))
    assert (found is not None) == (norm < 0.9)
    expected = torch.linalg.solve(torch.eye(8, dtype=torch.float64) - q, 2 * q)
    delta = cayley_delta(q.to(dtype))
    assert found is None or torch.equal(found, delta)
    assert (delta.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * max(1.0, norm)


def test_many_blocks_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part takes as many powers as it needs; one that needs a solve sends all there."""
    q = unpack(0.02 * random_packed(7, 8, 0))
    q[3] *= 10.0
    expected = torch.linalg.solve(torch.eye(8, dtype=q.dtype) - q, 2 * q)
    monkeypatch.setattr(rotation, "_AT_A_TIME", 3 * 8 * 8)
    found = rotation._by_doubling(q)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    q[6] *= 1000.0
    assert rotation._by_doubling(q) is None
    torch.testing.assert_close(cayley_delta(q), torch.linalg.solve(torch.eye(8, dtype=q.dtype) - q, 2 * q))


def test_what_is_not_finite_stays_so() -> None:
    q = torch.full((2, 8, 8), torch.nan)
    assert rotation._by_doubling(q) is None
    assert not torch.isfinite(cayley_delta(q)).any()
    assert cayley_delta(torch.zeros(0, 8, 8)).shape == (0, 8, 8)
