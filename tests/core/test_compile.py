"""torch.compile: whole graphs, no recompiling, and adapters that come and go after compiling.

Graphs are run as they are (a counting backend); the default backend, which needs a C++ compiler, has a slow test.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.testing import CompileCounterWithBackend

from oft_diffusion import OFTConfig, inject_oft, remove_oft
from oft_diffusion.bank import OFTBank
from tests.core.reference import relative, unet_inputs
from tests.library.support import excite

CONFIG = OFTConfig(block_size=8)
# torch traces a model's own hooks apart from its forward: where rotations are built in every call, that is a graph.
GRAPHS_TRAINING = 2


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small_unet(middle: bool = False) -> UNet2DConditionModel:
    """One transformer block, or two of them: compiling is slow."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn" if middle else None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()


def adapted(frozen: bool = True, middle: bool = False) -> tuple[Any, OFTBank, torch.Tensor]:
    unet = small_unet(middle)
    base = eager(unet)
    bank = inject_oft(unet, CONFIG)
    excite(bank)
    if frozen:
        bank.freeze("default")
    return unet, bank, base


def eager(unet: Any) -> torch.Tensor:
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return unet(**unet_inputs(unet, dtype=unet.dtype)).sample


def run(model: Any, unet: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**unet_inputs(unet, dtype=unet.dtype)).sample


def counting() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("aot_eager")


@pytest.mark.parametrize("frozen", [True, False])
def test_fullgraph_equals_eager_and_a_new_strength_recompiles_nothing(frozen: bool) -> None:
    unet, bank, base = adapted(frozen)
    expected = eager(unet)
    backend = counting()
    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    assert relative(run(compiled, unet), expected) < 1e-5
    assert relative(expected, base) > 1e-2
    graphs = backend.frame_count
    assert graphs == (1 if frozen else GRAPHS_TRAINING)
    if not frozen:
        excite(bank, seed=3)
        assert relative(run(compiled, unet), eager(unet)) < 1e-5
        assert relative(eager(unet), expected) > 1e-2
    else:
        for strength in (0.5, 0.0, 1.0):
            bank.set_adapters("default", strength)
            assert relative(run(compiled, unet), eager(unet)) < 1e-5
        bank.set_adapters("default", 0.0)
        assert relative(run(compiled, unet), base) < 1e-5
    assert backend.frame_count == graphs


@pytest.mark.parametrize("bank_too", [False, True])
def test_constants_of_a_model_that_was_moved_are_no_results_of_a_graph(bank_too: bool) -> None:
    """A CUDA graph's results lie in memory that its next run writes over; and one trace less."""
    unet, bank, base = adapted()
    unet.double()
    backend = counting()
    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    first = run(compiled, unet)
    graphs = backend.frame_count
    assert graphs == 1
    assert relative(first, base) > 1e-2
    if bank_too:
        bank.to("cpu")  # forgets what it built
        bank.load_state_dict({name: 0.5 * value for name, value in bank.state_dict().items()})
        assert relative(run(compiled, unet), first) > 1e-3
        assert relative(run(compiled, unet), eager(unet)) < 1e-12
        graphs = backend.frame_count
    for strength in (1.0, 0.5, 0.0):
        bank.set_adapters("default", strength)
        assert relative(run(compiled, unet), eager(unet)) < 1e-12
    assert backend.frame_count == graphs


def test_compiling_in_place_follows_strengths_and_hot_swaps_without_recompiling() -> None:
    unet, bank, base = adapted()
    backend = counting()
    unet.compile(fullgraph=True, backend=backend)
    before = run(unet, unet)
    graphs = backend.frame_count
    assert relative(before, eager(unet)) < 1e-5
    assert relative(before, base) > 1e-2
    bank.set_adapters("default", 0.5)
    half = run(unet, unet)
    assert relative(half, eager(unet)) < 1e-5
    assert relative(half, before) > 1e-3
    bank.set_adapters("default", 1.0)
    excite(bank, seed=7)
    after = run(unet, unet)
    assert backend.frame_count == graphs
    assert relative(after, before) > 1e-2
    assert relative(after, eager(unet)) < 1e-5


def test_repeated_blocks_are_compiled_once_and_shared_by_all_layers() -> None:
    unet, bank, base = adapted(middle=True)
    expected = eager(unet)
    assert len([m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]) > 1
    backend = counting()
    unet.compile_repeated_blocks(fullgraph=True, backend=backend)
    assert relative(run(unet, unet), expected) < 1e-5
    plain_backend = counting()
    plain = small_unet(middle=True)
    plain.compile_repeated_blocks(fullgraph=True, backend=plain_backend)
    run(plain, plain)
    assert backend.frame_count == plain_backend.frame_count, "adapters cost graphs of their own"
    bank.set_adapters("default", 0.5)
    assert relative(run(unet, unet), eager(unet)) < 1e-5
    assert backend.frame_count == plain_backend.frame_count
    assert relative(eager(unet), base) > 1e-3


@pytest.mark.thinned(2)
@pytest.mark.parametrize("blocks_only", [False, True])
def test_injecting_and_removing_after_compiling_take_effect(blocks_only: bool) -> None:
    unet = small_unet()
    if blocks_only:
        unet.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    else:
        unet.compile(fullgraph=True, backend="aot_eager")
    base = run(unet, unet)
    excite(inject_oft(unet, CONFIG, "a"), "a")
    with_a = run(unet, unet)
    assert relative(with_a, eager(unet)) < 1e-5
    assert relative(with_a, base) > 1e-2
    excite(inject_oft(unet, OFTConfig(block_size=4), "b"), "b", seed=1)
    assert relative(run(unet, unet), eager(unet)) < 1e-5
    assert relative(run(unet, unet), with_a) > 1e-2
    remove_oft(unet, "b")
    assert relative(run(unet, unet), with_a) < 1e-5
    remove_oft(unet)
    assert relative(run(unet, unet), base) < 1e-5


@pytest.mark.slow
def test_a_wrapped_model_is_injected_through_its_wrapper() -> None:
    unet = small_unet()
    compiled: Any = torch.compile(unet, fullgraph=True, backend="aot_eager")
    base = run(compiled, unet)
    bank = inject_oft(compiled, CONFIG)
    excite(bank)
    assert not any(name.startswith("_orig_mod") for name in bank.hooks)
    assert relative(run(compiled, unet), eager(unet)) < 1e-5
    assert relative(run(compiled, unet), base) > 1e-2


def test_training_compiled_gives_the_gradients_of_eager() -> None:
    unet, bank, _ = adapted(frozen=False)
    unet(**unet_inputs(unet)).sample.square().mean().backward()
    expected = bank.generators["default"].grad
    assert expected is not None
    expected = expected.clone()
    bank.zero_grad()
    backend = counting()
    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    for _ in range(2):
        bank.zero_grad()
        compiled(**unet_inputs(unet)).sample.square().mean().backward()
    gradient = bank.generators["default"].grad
    assert gradient is not None
    assert relative(gradient, expected) < 1e-5
    assert expected.abs().max() > 0
    assert backend.frame_count == GRAPHS_TRAINING


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_the_default_backend() -> None:
    unet, bank, base = adapted()
    expected = eager(unet)
    unet.compile(fullgraph=True)
    assert relative(run(unet, unet), expected) < 1e-4
    bank.set_adapters("default", 0.5)
    assert relative(run(unet, unet), eager(unet)) < 1e-4
    assert relative(expected, base) > 1e-2
