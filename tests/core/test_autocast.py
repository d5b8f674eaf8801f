"""Below autocast: rotations compute in the dtype that their layers compute in, and what is asked of devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.autocast import compute_dtype, computes_in_bfloat16
from oft_diffusion.kernels import block_rotate, block_rotate_shared
from oft_diffusion.load import usual_dtype
from tests.core.reference import relative
from tests.library.support import excite

CPU = torch.device("cpu")


class Attention(nn.Module):
    """As below autocast on a card: the norm hands float32 to q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k, self.to_v = (nn.Linear(24, 24) for _ in range(3))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x) * self.to_k(x) + self.to_v(x)


def casts(call: Callable[[], object], shape: list[int]) -> int:
    """Of tensors of a shape."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    return sum(event.name == "aten::_to_copy" and event.input_shapes[0] == shape for event in profiler.events())


def test_an_input_is_cast_once_for_q_k_and_v_and_rotated_in_that_dtype() -> None:
    x = torch.randn(5, 24, requires_grad=True)
    model = Attention()

    def step(model: Attention = model) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x * 1.0)  # no leaf, whose cast autocast would keep
        out.float().square().sum().backward()
        return out

    base = casts(step, [5, 24])
    bank = inject_oft(model, OFTConfig(8, targets=("to_.*",)))
    excite(bank)
    exact = model(x)
    given: list[torch.dtype] = []
    model.to_k.register_forward_pre_hook(lambda _, args: given.append(args[0].dtype))
    assert relative(step(), exact) < 0.02
    assert given == [torch.bfloat16]
    assert casts(step, [5, 24]) == base - 4  # one there and one back, instead of three
    assert casts(step, [9, 8, 8]) == 2  # D of all layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_op_itself_computes_in_what_it_is_given(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 24, dtype=dtype, requires_grad=True)
    deltas = [torch.randn(3, 8, 8, dtype=dtype, requires_grad=True) for _ in range(2)]

    def made() -> list[Tensor]:
        out = block_rotate(x, deltas[0]) + sum(block_rotate_shared(x, deltas))
        return [out, *torch.autograd.grad(out.square().sum(), (x, *deltas))]

    expected = made()
    with torch.autocast("cpu", torch.bfloat16):
        found = made()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_what_a_layer_computes_in() -> None:
    assert compute_dtype(CPU, torch.float32) == torch.float32
    assert compute_dtype(CPU, None) is None
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, None):
            assert compute_dtype(CPU, dtype) == torch.bfloat16
        assert compute_dtype(CPU, torch.float64) == torch.float64, "which autocast leaves alone"
        assert compute_dtype(torch.device("meta"), torch.float32) == torch.float32


@pytest.mark.parametrize("able", [True, False])
def test_a_device_draws_in_bfloat16_where_it_computes_in_it(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": able}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: able)
    assert [computes_in_bfloat16(device) for device in ("cpu", "cuda:1", "mps")] == [able, able, False]
    fallback = [torch.float32, torch.float16, torch.float32]
    found = [usual_dtype(device) for device in ("cpu", "cuda:1", "mps")]
    assert found == ([torch.bfloat16, torch.bfloat16, torch.float32] if able else fallback)
