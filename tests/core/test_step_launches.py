"""What a whole training step asks of a card: kernels of ours, by name, and operations of torch's beside them.

Without a card (`card_path`). Everything is counted and told from the model's structure, so that one launch more fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counting import NOT_WORK
from benchmarks.methods import kernels_switched
from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.bank import OFTBank
from oft_diffusion.kernels import tiles
from oft_diffusion.rotation import packed_size, rotation_delta
from tests.core.card_path import needs_triton, pretend
from tests.core.reference import relative, unet_inputs
from tests.library.support import excite, tiny_unet

pytestmark = needs_triton
SIZE = 8
# Of a transformer block: inputs that several layers share (of q, k, v; of k, v of the text), and those of one (out, q,
# out); and layers.
SHARED, ALONE, LAYERS = 2, 3, 8


def adapted(dtype: torch.dtype = torch.float32) -> tuple[Any, OFTBank, int]:
    """A UNet, its bank, and how many transformer blocks it has."""
    unet = tiny_unet().train().requires_grad_(False)
    for module in unet.modules():  # not `to` of diffusers, which warns
        module._apply(lambda tensor: tensor.to(dtype), recurse=False)
    bank = inject_oft(unet, OFTConfig(SIZE))
    excite(bank)
    blocks = sum(isinstance(module, BasicTransformerBlock) for module in unet.modules())
    assert blocks == 4
    assert len(bank.hooks) == LAYERS * blocks
    return unet, bank, blocks


def gradient(unet: Any, bank: OFTBank) -> Tensor:
    """Of one step."""
    [parameter] = bank.parameters()
    bank.zero_grad()
    unet(**unet_inputs(unet)).sample.square().mean().backward()
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_launches_one_kernel_for_each_input_each_way(
    monkeypatch: pytest.MonkeyPatch, checkpointed: bool
) -> None:
    """Forward one, recomputed one more, dx one and dD one; for what needs no dx none. D takes no kernel of ours."""
    unet, bank, blocks = adapted()
    with kernels_switched(on=False):
        expected = gradient(unet, bank)
    if checkpointed:
        unet.enable_gradient_checkpointing()
    launched = pretend(monkeypatch, runs=True)
    # Nobody asks for the text's gradient, nor for that of what lies before the first of all adapted layers.
    dx = {"shared_kernel": SHARED * blocks - blocks - 1, "rotate_kernel": ALONE * blocks}
    forward = Counter(shared_kernel=SHARED * blocks, rotate_kernel=ALONE * blocks)
    backward = Counter(dx) + Counter(delta_grads_kernel=SHARED * blocks, delta_grad_kernel=ALONE * blocks)
    if checkpointed:
        backward += forward
    for _ in range(2):
        launched.clear()
        assert relative(gradient(unet, bank), expected) < 1e-4, "not the kernels' own work"
        assert Counter(launched) == forward + backward
        assert len(launched) == ((4 if checkpointed else 3) * (SHARED + ALONE) - 1) * blocks - 1


def test_drawing_launches_one_kernel_for_each_input(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, bank, blocks = adapted()
    bank.freeze("default")
    launched = pretend(monkeypatch, runs=False)
    with torch.no_grad():
        unet(**unet_inputs(unet))
    assert Counter(launched) == Counter(shared_kernel=SHARED * blocks, rotate_kernel=ALONE * blocks)


class Operations(TorchDispatchMode):
    """Torch's operations that a card would be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        if name in ("aten::clone", "aten::_to_copy") or name not in NOT_WORK | {"aten::new_empty"}:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], object]) -> Counter[str]:
    with Operations() as seen:
        call()
    return seen.counts


def building() -> tuple[Counter[str], Counter[str]]:
    """Of D and of its gradient."""
    packed = (0.02 * torch.randn(3, packed_size(SIZE))).requires_grad_()
    made: list[Tensor] = []
    forward = operations(lambda: made.append(rotation_delta(packed, OFTConfig(SIZE))))
    return forward, operations(lambda: torch.autograd.grad(made[0], packed, made[0].detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beside_the_kernels_a_step_asks_for_little(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """More than the base's step, gradients going back to the inputs in both. Of however many layers D is one batch."""
    pretend(monkeypatch, runs=False)
    built = building()
    assert sum(built[0].values()) <= 10
    assert sum(built[1].values()) <= 9
    unet, bank, blocks = adapted(dtype)
    inputs = unet_inputs(unet, dtype=dtype, tokens=9)
    inputs["sample"] = torch.randn(2, 4, 36, 36, dtype=dtype)
    tile = tiles.tile_of("delta_grad", SIZE, dtype)
    assert 2 * 9 <= tile.rows * tile.steps < 2 * 18 * 18, "only dD of image tokens are to be summed in parts"
    losses: list[Tensor] = []

    def step() -> tuple[Counter[str], Counter[str]]:
        for name in ("sample", "encoder_hidden_states"):
            inputs[name] = inputs[name].detach().requires_grad_()
        forward = operations(lambda: losses.append(unet(**inputs).sample.square().mean()))
        return forward, operations(lambda: losses.pop().backward())

    ours = step()
    bank.set_adapters([])
    base = step()
    wide, of_image = dtype == torch.float32, SHARED + ALONE - 1
    forward = built[0] + Counter({"aten::_to_copy": 0 if wide else 1})  # D, to 16 bits, at once
    backward = built[1] + Counter({"aten::cat": 1})  # the parts of its gradient
    backward += Counter({"aten::new_zeros": of_image * blocks})  # to which parts of dD are added
    if wide:
        backward["aten::clone"] += LAYERS * blocks  # a D is turned before, not in the kernel
    else:
        backward["aten::_to_copy"] += of_image * blocks + 1  # those sums, and D's gradient back to 32 bits
    backward["aten::add"] -= (LAYERS - SHARED - ALONE) * blocks  # a shared input has one gradient, not one for each
    for found, without, wanted in zip(ours, base, (forward, backward), strict=True):
        assert {n: found[n] - without[n] for n in found | without if found[n] != without[n]} == {
            n: count for n, count in wanted.items() if count
        }
