"""The rotations in C: against their definition in float64, and left alone where something watches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from oft_diffusion import OFTConfig, rotation
from oft_diffusion.kernels import block_rotate, block_rotate_shared, processor, processor_graph
from oft_diffusion.kernels.block_rotate import by_processor
from oft_diffusion.training.memory import LiveStorages
from tests.core import rotate_cases as cases
from tests.core.reference import random_packed, relative

BLOCKS = 3
needs_kernels = pytest.mark.skipif(processor.library() is None, reason="no compiler, or no Linux")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def each(size: int, count: int, blocks: int = BLOCKS) -> list[Tensor]:
    one = cases.deltas(size, torch.float32, "cpu", groups=1, blocks=blocks)[0]
    return [one * (1 + i) for i in range(count)]


def derivatives(x: Tensor, deltas: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The definition, in float64."""
    dx = sum(cases.rotated(g, d[None].transpose(-1, -2)) for g, d in zip(grads, deltas, strict=True))
    assert isinstance(dx, Tensor)
    return dx, [cases.delta_gradient(x, g, 1, deltas[0].shape[-1])[0] for g in grads]


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("size", processor.SIZES)
@pytest.mark.parametrize("rows", [1, 13, 77, 1100])
def test_every_size_count_and_tail(size: int, count: int, rows: int) -> None:
    x, deltas = cases.draw(rows, BLOCKS * size, seed=2, device="cpu"), each(size, count)
    grads = [cases.draw(*x.shape, seed=3 + i, device="cpu") for i in range(count)]
    made = processor.rotate(x, processor.plan_for(deltas))
    dx, ddeltas = processor.gradients(x, deltas, grads)
    assert dx is not None
    assert ddeltas is not None
    expected, expected_deltas = derivatives(x, deltas, grads)
    for out, delta in zip(made, deltas, strict=True):
        assert (out.shape, out.is_contiguous()) == (x.shape, True)
        assert cases.error(out, cases.rotated(x, delta[None])) < 5e-7
        assert cases.error(out, x) > 0.3
    assert cases.error(dx, expected) < 5e-7
    for found, wanted in zip(ddeltas, expected_deltas, strict=True):
        assert cases.error(found, wanted) < 1e-6


@needs_kernels
def test_what_near_the_identity_would_be_rounded_away_is_kept() -> None:
    """The product is summed before x is added: a rotation by 1e-6 moves x by that, to more than a digit."""
    x, delta = cases.draw(40, 96, seed=0, device="cpu"), each(32, 1)[0] * 1e-6
    moved = processor.rotate(x, processor.plan_for([delta]))[0].double() - x.double()
    exact = cases.rotated(x, delta[None]) - x.double()
    assert float((moved - exact).abs().max()) <= 0.5 * torch.finfo(torch.float32).eps * float(x.abs().max())


@needs_kernels
@pytest.mark.parametrize("size", [8, 32])
def test_strides(size: int) -> None:
    x = cases.draw(4, 6, BLOCKS * size, seed=5, device="cpu")
    deltas, grad = each(size, 2), cases.draw(4, 6, BLOCKS * size, seed=6, device="cpu")
    expected, (dx, ddeltas) = (
        processor.rotate(x, processor.plan_for(deltas)),
        processor.gradients(x, deltas, [grad, grad]),
    )
    assert dx is not None
    assert ddeltas is not None
    for (name, one), other in zip(cases.lying(x).items(), reversed(cases.lying(grad).values()), strict=True):
        for found, wanted in zip(processor.rotate(one, processor.plan_for(deltas)), expected, strict=True):
            assert torch.equal(found, wanted), name
            assert found.is_contiguous(), name
        other_dx, others = processor.gradients(one, deltas, [other, grad])
        assert other_dx is not None
        assert torch.equal(other_dx, dx), name
        assert other_dx.is_contiguous(), name
        assert all(torch.equal(a, b) for a, b in zip(others or [], ddeltas, strict=True)), name
    expanded = x[:1].expand(4, -1, -1)
    assert torch.equal(processor.rotate(expanded, processor.plan_for(deltas))[0][3], expected[0][0])
    turned = [delta.transpose(1, 2).contiguous().transpose(1, 2) for delta in deltas]
    assert torch.equal(processor.rotate(x, processor.plan_for(turned))[1], expected[1])
    single = x[0, 0]
    assert torch.equal(processor.rotate(single, processor.plan_for(deltas))[0], expected[0][0, 0])


@needs_kernels
@pytest.mark.parametrize("strides", [(9999, 100, 1), (0, 100, 1), (7, 100, 1), (100, 9999, 1), (100, 0, 1), (96, 5, 1)])
def test_axes_of_one_may_have_any_stride(strides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a column slice of one picture's text has. What is read where it lies is not copied."""
    shape = (1, 5, 96) if strides[1] == 100 else (5, 1, 96)
    x, deltas = cases.draw(700, seed=1, device="cpu").as_strided(shape, strides), each(32, 2)
    dense = x.contiguous().clone(memory_format=torch.contiguous_format).view(5, 96)
    wanted = processor.rotate(dense, processor.plan_for(deltas))
    wanted_dx, _ = processor.gradients(dense, deltas, wanted)
    copies = []
    monkeypatch.setattr(Tensor, "contiguous", lambda tensor, *_: copies.append(tensor))
    made = processor.rotate(x, processor.plan_for(deltas))
    assert not any(copied is x for copied in copies)
    monkeypatch.undo()
    dx, _ = processor.gradients(x, deltas, made)
    assert dx is not None
    assert wanted_dx is not None
    for found, other in zip((*made, dx), (*wanted, wanted_dx), strict=True):
        assert found.is_contiguous()
        assert torch.equal(found.view(5, 96), other)


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 48), (4, 0, 48)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x, deltas = torch.empty(shape, requires_grad=True), [d.requires_grad_() for d in each(16, 2)]
    made = processor_graph.rotated(x, processor.plan_for(deltas))
    assert [out.shape for out in made] == [shape, shape]
    dx, *ddeltas = torch.autograd.grad(made, [x, *deltas], made)
    assert dx.shape == shape
    assert all(torch.equal(found, torch.zeros_like(found)) for found in ddeltas)


@needs_kernels
def test_the_number_of_threads_changes_no_bit(one_thread: None) -> None:
    x, deltas = cases.draw(1100, 96, seed=0, device="cpu"), each(32, 3)
    packed = random_packed(50, 32, 0).float()

    def all_of_it() -> list[Tensor]:
        dx, ddeltas = processor.gradients(x, deltas, processor.rotate(x, processor.plan_for(deltas)))
        delta = processor.cayley_delta(packed, 32)
        assert dx is not None
        assert ddeltas is not None
        assert delta is not None
        flat = processor.Flat()
        flat.hold(packed, None)
        plan = processor.plan_in(flat, [0, 20, 40], 3, 32, of_generators=True)
        found, in_place = torch.zeros_like(packed), processor.rotate(x, plan)
        other_dx = processor.rotate_back(x, plan, flat.address, in_place, plan.offsets, found.data_ptr(), of_x=True)
        assert other_dx is not None
        return [dx, *ddeltas, delta, processor.cayley_grad(delta, delta), *in_place, other_dx, found]

    alone = all_of_it()
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, all_of_it(), strict=True))


@needs_kernels
def test_it_is_what_eager_code_takes_and_only_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (first, second) = cases.draw(5, 96, seed=0, device="cpu"), each(32, 2)
    taken: list[int] = []
    real = processor.rotate
    monkeypatch.setattr(processor, "rotate", lambda x, plan: taken.append(len(plan.deltas)) or real(x, plan))  # type: ignore[func-returns-value]
    block_rotate(x, first)
    block_rotate_shared(x, [first, second])
    torch.ops.oft_diffusion.block_rotate(x, first)
    assert taken == [1, 2, 1]
    block_rotate(x.double(), first.double())
    block_rotate(x.bfloat16(), first.bfloat16())
    block_rotate(x[:, :72], each(24, 1)[0])  # no size of the C's
    block_rotate(torch.empty(5, 96, device="meta"), first.to("meta"))
    fake = FakeTensorMode()
    assert by_processor(fake.from_tensor(x), [fake.from_tensor(first)]) is None
    assert taken == [1, 2, 1]


@needs_kernels
def test_what_looks_at_operations_sees_them() -> None:
    """Traced as a constant, a rotation would be of one input for ever."""
    x, (delta,) = cases.draw(5, 96, seed=0, device="cpu"), each(32, 1)
    expected = block_rotate(2 * x, delta)
    for traced in (
        torch.jit.trace(block_rotate, (x, delta), check_trace=False),
        make_fx(block_rotate)(x, delta),
        make_fx(block_rotate, tracing_mode="fake")(x, delta),
    ):
        torch.testing.assert_close(traced(2 * x, delta), expected)
    torch.testing.assert_close(torch.func.vmap(block_rotate, (0, None))(torch.stack([x, 2 * x]), delta)[1], expected)
    half, turn = x[None].bfloat16(), delta.bfloat16()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            mapped = torch.func.vmap(block_rotate, (0, None))(half, turn)
            torch.testing.assert_close(mapped[0], block_rotate(half[0], turn), rtol=2**-7, atol=2**-7)
    with LiveStorages("cpu") as memory:  # which asks for no more than what C is given
        assert by_processor(x, [delta]) is not None
        made = block_rotate(x, delta)
    assert memory.most == made.untyped_storage().nbytes()
    with FlopCounterMode(display=False) as counter:
        block_rotate(x, delta)
    assert counter.get_total_flops() == 2 * x.numel() * 32


@needs_kernels
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_and_their_derivatives(count: int) -> None:
    """By autograd, an output that nobody used among them; once more derived, by torch's own operations."""
    x = cases.draw(7, 48, seed=0, device="cpu").requires_grad_()
    deltas = [delta.requires_grad_() for delta in each(16, count)]
    weights = [cases.draw(7, 48, seed=5 + i, device="cpu") for i in range(count)]

    def loss(x: Tensor, deltas: list[Tensor], turn: bool) -> Tensor:
        made = (
            processor_graph.rotated(x, processor.plan_for(deltas))
            if turn
            else [cases_rotated(x, delta) for delta in deltas]
        )
        return torch.stack([(out * w).square().sum() for out, w in zip(made, weights, strict=True)]).sum()

    def cases_rotated(x: Tensor, delta: Tensor) -> Tensor:
        return x + x @ torch.block_diag(*delta)

    wide = [x.detach().double().requires_grad_(), *(delta.detach().double().requires_grad_() for delta in deltas)]
    first = torch.autograd.grad(loss(x, deltas, True), [x, *deltas], create_graph=True)
    wanted = torch.autograd.grad(loss(wide[0], wide[1:], False), wide, create_graph=True)
    for found, expected in zip(first, wanted, strict=True):
        assert relative(found.double(), expected) < 1e-6
    second = torch.autograd.grad(first[0].square().sum(), [x, *deltas])
    for found, expected in zip(second, torch.autograd.grad(wanted[0].square().sum(), wide), strict=True):
        assert relative(found.double(), expected) < 1e-5
    made = processor_graph.rotated(x, processor.plan_for(deltas))
    [dx] = torch.autograd.grad(made[-1].sum(), x)
    assert relative(dx.double(), torch.autograd.grad(cases_rotated(wide[0], wide[-1]).sum(), wide[0])[0]) < 1e-6


@needs_kernels
@pytest.mark.parametrize("size", processor.SIZES)
@pytest.mark.parametrize("norm", [1e-4, 1e-3, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.6, 3.0, 10.0])
def test_building_d_and_its_gradient(size: int, norm: float) -> None:
    packed, condition = random_packed(9, size, 1, norm).float(), max(1.0, norm)  # of I - Q
    made = processor.cayley_delta(packed, size)
    wide = packed.double().requires_grad_()
    exact = rotation.cayley_delta(rotation.unpack(wide))
    assert relative(made.double(), exact.detach()) < 5e-8 * math.sqrt(size) * condition  # b sums of numbers near 1
    grad = torch.randn(made.shape, generator=torch.Generator().manual_seed(0))
    [wanted] = torch.autograd.grad(exact, wide, grad.double())
    assert relative(processor.cayley_grad(made, grad).double(), wanted) < 1e-6 * condition


@needs_kernels
@pytest.mark.parametrize("rows", [1, 13, 300])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", processor.SIZES)
@pytest.mark.parametrize("norm", [1e-3, 0.3, 3.0])
def test_deltas_built_where_they_are_used(norm: float, size: int, count: int, rows: int) -> None:
    """To the bit as by deltas that lie in memory; gradients are the generators'."""
    packed, flat = random_packed(count * BLOCKS + 1, size, 1, norm).float(), processor.Flat()
    condition = max(1.0, norm)  # of I - Q, which is turned in the backward
    flat.hold(packed, None)
    starts = [1 + BLOCKS * i for i in reversed(range(count))]  # neither from the beginning nor in order
    plan = processor.plan_in(flat, starts, BLOCKS, size, of_generators=True)
    deltas = [processor.cayley_delta(packed[start : start + BLOCKS], size) for start in starts]
    x = cases.draw(rows, BLOCKS * size, seed=2, device="cpu")
    grads = [cases.draw(*x.shape, seed=3 + i, device="cpu") for i in range(count)]
    for made, wanted in zip(processor.rotate(x, plan), processor.rotate(x, processor.plan_for(deltas)), strict=True):
        assert torch.equal(made, wanted)
    found = torch.full_like(packed, torch.nan)
    dx = processor.rotate_back(x, plan, flat.address, grads, plan.offsets, found.data_ptr(), of_x=True)
    expected, of_deltas = processor.gradients(x, deltas, grads)
    assert dx is not None
    assert expected is not None
    assert of_deltas is not None
    assert relative(dx, expected) < 1e-6 * condition
    for start, delta, of_delta in zip(starts, deltas, of_deltas, strict=True):
        assert relative(found[start : start + BLOCKS], processor.cayley_grad(delta, of_delta)) < 2e-6 * condition
    assert found[0].isnan().all()
    alone = processor.rotate_back(x, plan, flat.address, grads, None, of_x=True)
    assert alone is not None
    assert torch.equal(dx, alone)
    again = torch.empty_like(found)
    assert processor.rotate_back(x, plan, flat.address, grads, plan.offsets, again.data_ptr(), of_x=False) is None
    assert torch.equal(again[1:], found[1:])


@needs_kernels
@pytest.mark.parametrize("of", [3.0, float("nan"), float("inf")])
def test_a_block_of_any_norm_is_built_and_one_that_is_not_finite_spoils_no_other(of: float) -> None:
    packed = random_packed(4, 16, 1).float()
    packed[2] *= of / float(torch.linalg.matrix_norm(rotation.unpack(packed[2:3]), 2))
    made = rotation.rotation_delta(packed, OFTConfig(16))
    others = torch.tensor([0, 1, 3] + [2] * (of < 10))
    wanted = rotation._by_solving(rotation.unpack(packed[others].double()))
    torch.testing.assert_close(made[others].double(), wanted, rtol=0, atol=1e-6)
    assert rotation.orthogonality_error(made[others]) < 2e-6
    assert of < 10 or not torch.isfinite(made[2]).any()


@needs_kernels
def test_gradients_of_several_vectors_at_once_and_forward_mode() -> None:
    """What hands in batches, or asks for tangents, gets torch's own operations."""
    x, (delta,) = cases.draw(3, 16, seed=0, device="cpu").requires_grad_(), each(16, 1, blocks=1)
    dense = torch.eye(16) + delta[0]
    jacobian = torch.autograd.functional.jacobian(lambda x: block_rotate(x, delta), x, vectorize=True)
    for row in range(3):
        torch.testing.assert_close(jacobian[row, :, row, :], dense.T)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        tangent = forward_ad.unpack_dual(block_rotate(dual, delta)).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, torch.ones_like(x) @ dense)


@needs_kernels
def test_the_ops_refuse_gradients_that_are_too_short() -> None:
    """C would read whatever lies behind them."""
    ops, x, deltas = torch.ops.oft_diffusion, cases.draw(6, 48, seed=0, device="cpu"), each(16, 2)
    for wrong in (x[:3], x.bfloat16()):
        with pytest.raises(RuntimeError):
            ops.block_rotate_delta_grad(x, wrong, [3, 16, 16])
    with pytest.raises(RuntimeError):
        ops.block_rotate_shared_grads(x, deltas, [x, x[:3]], True, True)
    with pytest.raises(RuntimeError):
        ops.block_rotate_delta_grad(x, x, [4, 16, 16])


@needs_kernels
def test_more_layers_than_c_takes_at_once() -> None:
    x, deltas = cases.draw(4, 16, seed=0, device="cpu"), each(8, 20, blocks=2)
    for out, delta in zip(block_rotate_shared(x, deltas), deltas, strict=True):
        assert cases.error(out, cases.rotated(x, delta[None])) < 1e-6
