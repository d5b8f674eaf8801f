"""The operator against a dense rotation, its gradients against finite differences, and torch's own operator checks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oft_diffusion.kernels import block_rotate
from oft_diffusion.rotation import cayley_delta, unpack
from tests.core.reference import SEEDS, random_packed, relative
from tests.core.rotate_cases import every_way as every_way  # around every test

LEADING = st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 4), (0,)])
BLOCKS, SIZES = st.integers(1, 5), st.sampled_from([2, 3, 8, 16])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def case(leading: tuple[int, ...], blocks: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, blocks * size, generator=draw, dtype=torch.float64)
    return x, cayley_delta(unpack(random_packed(blocks, size, seed)))


@given(leading=LEADING, blocks=BLOCKS, size=SIZES, seed=SEEDS, dtype=st.sampled_from(list(TOLERANCE)))
def test_it_is_x_times_the_dense_rotation(
    leading: tuple[int, ...], blocks: int, size: int, seed: int, dtype: torch.dtype
) -> None:
    x, delta = case(leading, blocks, size, seed)
    dense = torch.eye(blocks * size, dtype=torch.float64) + torch.block_diag(*delta)
    out = block_rotate(x.to(dtype), delta.to(dtype))
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert out.is_contiguous()
    if x.numel():
        assert relative(out, x @ dense) < TOLERANCE[dtype]
        # of the matrix, not of x: an odd block leaves its axis alone, and x may lie along it
        assert relative(dense, torch.eye(blocks * size)) > 0.1, "the case does not rotate"


@pytest.mark.parametrize("rows", [40, 1500, 9000])
@pytest.mark.parametrize("grad", [False, True])
def test_in_bfloat16_the_sum_is_rounded_once(rows: int, grad: bool) -> None:
    """Half a unit in the last place, where a product that is rounded by itself would add half of its own.

    Of what is nearly nothing the unit is less than what float32, in which it is summed, can tell.
    """
    x, delta = (t.bfloat16() for t in case((rows,), 3, 32, 0))
    blocks = x.double().view(rows, 3, 32)
    exact = (blocks + torch.einsum("nrb,rbc->nrc", blocks, delta.double())).view(x.shape)
    found = block_rotate(x.clone().requires_grad_(grad), delta).detach().double()
    unit = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7).clamp_min(2.0**-17)
    assert float(((found - exact).abs() / unit).max()) < 0.52
    twice = x.double() + (exact - x.double()).bfloat16().double()
    assert float(((twice.bfloat16().double() - exact).abs() / unit).max()) > 0.6


@given(blocks=BLOCKS, size=SIZES, seed=SEEDS)
def test_strides_do_not_matter(blocks: int, size: int, seed: int) -> None:
    x, delta = case((6, 4), blocks, size, seed)
    expected = block_rotate(x, delta)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.stack([x, x], dim=-1)[..., 0]
    expanded = x[:1].expand(3, -1, -1)
    for other in (transposed, sliced):
        assert not other.is_contiguous()
        assert torch.equal(block_rotate(other, delta), expected)
    assert torch.equal(block_rotate(expanded, delta)[2], expected[0])
    backward = delta.transpose(1, 2)
    torch.testing.assert_close(block_rotate(expected, backward), x, rtol=0, atol=1e-12)


@given(blocks=st.integers(1, 3), size=st.sampled_from([2, 3, 4]), seed=SEEDS)
def test_gradients_against_finite_differences(blocks: int, size: int, seed: int) -> None:
    x, delta = case((3, 2), blocks, size, seed)
    assert torch.autograd.gradcheck(block_rotate, (x.requires_grad_(), delta.requires_grad_()))


@given(blocks=BLOCKS, size=SIZES, seed=SEEDS)
def test_gradients_against_a_dense_rotation(blocks: int, size: int, seed: int) -> None:
    x, delta = case((4, 3), blocks, size, seed)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    ours = [x.clone().requires_grad_(), delta.clone().requires_grad_()]
    (block_rotate(*ours) * weight).sum().backward()
    dense = [x.clone().requires_grad_(), delta.clone().requires_grad_()]
    ((dense[0] + dense[0] @ torch.block_diag(*dense[1])) * weight).sum().backward()
    for a, b in zip(ours, dense, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10)
        assert a.grad.abs().max() > 0


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)])
def test_torch_agrees_that_it_is_an_operator(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, delta = case(shape[:-1], 3, 8, 0)
    arguments = (x.to(dtype).requires_grad_(), delta.to(dtype).requires_grad_())
    torch.library.opcheck(torch.ops.oft_diffusion.block_rotate, arguments)
    torch.library.opcheck(
        torch.ops.oft_diffusion.block_rotate_delta_grad, (x.detach().to(dtype), x.detach().to(dtype), [3, 8, 8])
    )


def test_backward_saves_the_input_once_and_no_rotated_copy() -> None:
    x, delta = case((64,), 3, 8, 0)
    x, delta = x.requires_grad_(), delta.requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = block_rotate(x, delta)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), delta.data_ptr()}
    assert relative(out, x) > 0.1


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    x, delta = case((4,), 2, 4, 0)
    block_rotate(x.requires_grad_(), delta).sum().backward()
    assert x.grad is not None
    assert delta.grad is None


@pytest.mark.parametrize(
    ("x", "delta", "message"),
    [
        (torch.zeros(2, 7), torch.zeros(2, 4, 4), "do not fit"),
        (torch.zeros(2, 8), torch.zeros(2, 4, 3), "do not fit"),
        (torch.zeros(2, 8), torch.zeros(4, 4), "do not fit"),
        (torch.zeros(2, 8).half(), torch.zeros(2, 4, 4), "cast delta"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(x: torch.Tensor, delta: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        block_rotate(x, delta)
