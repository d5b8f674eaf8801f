"""CUDA graphs: recorded once, they follow strengths and hot swaps, which write in place. Building D never waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oft_diffusion import OFTConfig, load_oft_state_dict, oft_state_dict
from oft_diffusion.rotation import packed_size, rotation_delta
from tests.core.reference import relative, unet_inputs
from tests.core.test_compile import adapted
from tests.library.support import excite

pytestmark = pytest.mark.gpu


def on_card(unet: Any) -> dict[str, Any]:
    """The same tensors in every call, as graphs want them."""
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in unet_inputs(unet).items()}


def test_a_recorded_graph_follows_strengths_and_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # whose mantissas are too short for what is compared
    unet, bank, _ = adapted(frozen=True)
    unet.cuda()
    inputs = on_card(unet)

    def eager() -> Tensor:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            answer: Tensor = unet(**inputs).sample
            return answer.clone()

    def graphed() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            answer: Tensor = compiled(**inputs).sample
            return answer.clone()

    compiled = torch.compile(unet, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):  # traced, recorded, replayed
        first = graphed()
    assert relative(first, eager()) < 1e-3
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for strength in (0.5, 0.0, 1.0):
        bank.set_adapters("default", strength)
        assert relative(graphed(), eager()) < 1e-3
    other = {key: 0.5 * tensor for key, tensor in oft_state_dict(unet).items()}
    load_oft_state_dict(unet, other)
    assert relative(graphed(), eager()) < 1e-3
    assert relative(graphed(), first) > 1e-3, "the swap is seen"
    excite(bank, seed=7)
    bank.refresh()
    assert relative(graphed(), eager()) < 1e-3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("parametrisation", ["cayley", "cayley_neumann"])
def test_building_d_and_its_gradient_never_waits_and_can_be_recorded(parametrisation: Any) -> None:
    config = OFTConfig(block_size=32, parametrisation=parametrisation)
    packed = (0.02 * torch.randn(40, packed_size(32), device="cuda")).requires_grad_()

    def build() -> tuple[Tensor, Tensor]:
        delta = rotation_delta(packed, config)
        [gradient] = torch.autograd.grad(delta, packed, delta.detach())
        return delta.detach(), gradient

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):  # where libraries make their workspaces, which would wait
        for _ in range(3):
            build()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        build()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = build()
    with torch.no_grad():
        packed.mul_(3.0)
    graph.replay()
    torch.testing.assert_close(recorded, build())
