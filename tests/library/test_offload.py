"""Loading, weighing, swapping and fusing in pipelines whose weights lie elsewhere between forwards.

On a machine without an accelerator from the processor to itself. Sequential offloading keeps weights on the meta device
and group offloading to disk leaves garbage in them, here as there; the others' hooks are real, their devices are not.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from oft_diffusion import (
    OFTConfig,
    disable_oft_adapters,
    enable_oft_adapters,
    fuse_oft,
    inject_oft,
    list_oft_adapters,
    load_oft_weights,
    oft_adapters_per_image,
    save_oft_weights,
    set_oft_adapters,
    unfuse_oft,
    unload_oft_weights,
)
from oft_diffusion.errors import AdapterError, TargetError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.hooks import bank_of
from tests.library.support import BOTH, assert_one_sentence, copy_pipe, distance, draw, excite

CPU = torch.device("cpu")
MOVED = 1e-3
Offload = Callable[[Any, Path], None]


def whole_models(pipe: Any, _: Path) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential(pipe: Any, _: Path) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")
    for module in (m for part in pipe.components.values() if isinstance(part, nn.Module) for m in part.modules()):
        hook: Any = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):  # diffusers says "cpu:0", which accelerate takes for elsewhere
            if getattr(each, "execution_device", None) is not None:
                each.execution_device = CPU


def blocks(pipe: Any, _: Path) -> None:
    pipe.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1)


def leaves(pipe: Any, _: Path) -> None:
    pipe.enable_group_offload(CPU, CPU, "leaf_level")


def blocks_on_disk(pipe: Any, folder: Path) -> None:
    _to_disk(pipe, folder, offload_type="block_level", num_blocks_per_group=1)


def leaves_on_disk(pipe: Any, folder: Path) -> None:
    _to_disk(pipe, folder, offload_type="leaf_level")


def _to_disk(pipe: Any, folder: Path, **options: Any) -> None:
    for part in (*BOTH, "vae"):  # a folder each: files are called after modules, of which components have the same
        apply_group_offloading(getattr(pipe, part), CPU, CPU, offload_to_disk_path=str(folder / part), **options)


IN_MEMORY = [whole_models, sequential, blocks, leaves]
ON_DISK = [blocks_on_disk, leaves_on_disk]


def steps(mug: Path, plain: Path, series: Path) -> dict[str, Callable[[Any], object]]:
    """What a user does to a pipeline with an adapter, in this order, each with another picture than the one before."""
    return {
        "strength": lambda pipe: set_oft_adapters(pipe, "mug", 0.4),
        "hot swap": lambda pipe: load_oft_weights(pipe, plain, adapter_name="mug", hotswap=True),
        "by component": lambda pipe: set_oft_adapters(pipe, "mug", {"unet": 0.9, "text_encoder": -0.5}),
        "disable": disable_oft_adapters,
        "a second": lambda pipe: load_oft_weights(pipe, series, adapter_name="series", strength=0.5),
        "enable": enable_oft_adapters,
        "in another order": lambda pipe: set_oft_adapters(pipe, ["series", "mug"], [0.7, 0.4], "linear"),
    }


@pytest.fixture(scope="module")
def expected(base_pipe: Any, mug: Path, plain: Path, series: Path) -> dict[str, Tensor]:
    """The picture after each step, without offloading."""
    pipe = copy_pipe(base_pipe)
    pictures = {"base": draw(pipe)}
    load_oft_weights(pipe, mug, adapter_name="mug")
    pictures["load"] = draw(pipe)
    for name, step in steps(mug, plain, series).items():
        step(pipe)
        pictures[name] = draw(pipe)
    shown = list(pictures.values())
    assert all(distance(a, b) > MOVED for a, b in pairwise(shown))
    return pictures


@pytest.mark.thinned(5)
@pytest.mark.filterwarnings("error:.*was trained on another base")
@pytest.mark.parametrize("first", ["load", "offload"])
@pytest.mark.parametrize("offload", [*IN_MEMORY, *ON_DISK])
def test_adapters_act_as_without_offloading(
    pipe: Any, mug: Path, plain: Path, series: Path, expected: Any, tmp_path: Path, offload: Offload, first: str
) -> None:
    if first == "offload":
        offload(pipe, tmp_path)
    load_oft_weights(pipe, mug, adapter_name="mug")
    if first == "load":
        offload(pipe, tmp_path)
    assert torch.equal(draw(pipe), expected["load"])
    for name, step in steps(mug, plain, series).items():
        step(pipe)
        assert torch.equal(draw(pipe), expected[name]), name
    unload_oft_weights(pipe)
    assert torch.equal(draw(pipe), expected["base"])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("offload", IN_MEMORY)
def test_choices_before_the_first_picture(
    pipe: Any, base_pipe: Any, mug: Path, plain: Path, tmp_path: Path, offload: Offload
) -> None:
    """No forward has told the adapters yet where they will be wanted."""
    offload(pipe, tmp_path)
    other = copy_pipe(base_pipe)
    for each in (pipe, other):
        load_oft_weights(each, mug, adapter_name="mug", strength=0.3)
        set_oft_adapters(each, "mug", 0.6)
        load_oft_weights(each, plain, adapter_name="mug", hotswap=True)
        fuse_oft(each)
    assert torch.equal(draw(pipe), draw(other))


def weights(pipe: Any) -> dict[str, Tensor]:
    """Everything that offloading has taken away, taken back."""
    pipe.remove_all_hooks()
    return {f"{part}.{name}": t.clone() for part in BOTH for name, t in getattr(pipe, part).state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.thinned(5)
@pytest.mark.parametrize("fused", ["before", "after"])
@pytest.mark.parametrize("keep_base", ["cpu", False])
@pytest.mark.parametrize("offload", IN_MEMORY)
def test_fusing_and_unfusing(
    pipe: Any, base_pipe: Any, mug: Path, tmp_path: Path, offload: Offload, keep_base: Any, fused: str
) -> None:
    base, other = weights(copy_pipe(base_pipe)), copy_pipe(base_pipe)
    load_oft_weights(other, mug, adapter_name="mug")
    live = draw(other)
    fuse_oft(other)
    merged = draw(other)
    load_oft_weights(pipe, mug, adapter_name="mug")
    if fused == "before":
        fuse_oft(pipe, keep_base=keep_base)
    offload(pipe, tmp_path)
    if fused == "after":
        assert torch.equal(draw(pipe), live)
        fuse_oft(pipe, keep_base=keep_base)
    assert torch.equal(draw(pipe), merged)
    if keep_base:
        unfuse_oft(pipe)
        assert torch.equal(draw(pipe), live)
        assert same(weights(pipe), base)
    else:
        unload_oft_weights(pipe)
        assert torch.equal(draw(pipe), merged)
        assert same(weights(pipe), weights(other))


def test_taking_offloading_back_keeps_what_was_fused(pipe: Any, base_pipe: Any, mug: Path, tmp_path: Path) -> None:
    sequential(pipe, tmp_path)
    load_oft_weights(pipe, mug, adapter_name="mug")
    live = draw(pipe)
    fuse_oft(pipe)
    assert distance(draw(pipe), live) < 1e-5
    assert not same(weights(pipe), weights(copy_pipe(base_pipe)))
    assert distance(draw(pipe), live) < 1e-5
    unfuse_oft(pipe)
    assert torch.equal(draw(pipe), live)


@pytest.mark.parametrize("offload", ON_DISK)
def test_what_is_on_disk_is_neither_fused_nor_unfused(pipe: Any, mug: Path, tmp_path: Path, offload: Offload) -> None:
    load_oft_weights(pipe, mug, adapter_name="mug")
    live = draw(pipe)
    twin = copy_pipe(pipe)
    fuse_oft(twin)
    merged = draw(twin)
    for each, change in ((pipe, fuse_oft), (twin, unfuse_oft)):
        offload(each, tmp_path / change.__name__)
        before = list_oft_adapters(each)
        with pytest.raises(TargetError) as error:
            change(each)
        assert_one_sentence(error, "offloaded to disk", "offload to memory")
        assert list_oft_adapters(each) == before
    assert torch.equal(draw(pipe), live)
    assert torch.equal(draw(twin), merged)


def test_one_component_on_disk_leaves_all_unfused(pipe: Any, mug: Path, tmp_path: Path) -> None:
    load_oft_weights(pipe, mug, adapter_name="mug")
    live = draw(pipe)
    disk_offload(pipe.unet, str(tmp_path), execution_device=CPU, offload_buffers=True)
    before = pipe.text_encoder.encoder.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(TargetError) as error:
        fuse_oft(pipe)
    assert_one_sentence(error, "no floating weight matrix in memory", "keep the adapter live")
    assert torch.equal(pipe.text_encoder.encoder.layers[0].self_attn.q_proj.weight, before)
    assert torch.equal(draw(pipe), live)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("offload", [*IN_MEMORY, leaves_on_disk])
def test_an_adapter_per_image(
    pipe: Any, base_pipe: Any, mug: Path, style: Path, tmp_path: Path, offload: Offload
) -> None:
    other = copy_pipe(base_pipe)
    offload(pipe, tmp_path)
    pictures = []
    for each in (pipe, other):
        load_oft_weights(each, mug, adapter_name="mug")
        load_oft_weights(each, style, adapter_name="style")
        with oft_adapters_per_image(each, ["style", None, "mug"], [0.5, 1.0, 1.0]):
            generator = torch.Generator().manual_seed(0)
            prompts = ["a mug", "a red mug", "a dog"]
            made = each(prompts, num_inference_steps=2, output_type="pt", generator=generator).images
        pictures.append(made)
    assert torch.equal(*pictures)


def test_a_swap_that_is_refused_changes_nothing(pipe: Any, mug: Path, style: Path, tmp_path: Path) -> None:
    load_oft_weights(pipe, style, adapter_name="subject", strength=0.8)
    sequential(pipe, tmp_path)
    live = draw(pipe)
    with pytest.raises(AdapterError, match="'other'"):
        load_oft_weights(pipe, mug, adapter_name="other", hotswap=True)
    fuse_oft(pipe)
    with pytest.raises(AdapterError, match="is merged"):
        load_oft_weights(pipe, style, adapter_name="subject", hotswap=True)
    unfuse_oft(pipe)
    assert torch.equal(draw(pipe), live)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("offload", IN_MEMORY)
def test_saving_and_what_is_left_after_unloading(pipe: Any, mug: Path, tmp_path: Path, offload: Offload) -> None:
    trainable = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    offload(pipe, tmp_path)
    load_oft_weights(pipe, mug, adapter_name="mug")
    draw(pipe)
    saved = load_adapter_file(save_oft_weights(pipe, tmp_path / "saved", "mug"))
    assert saved.metadata.sha256 == load_adapter_file(mug).metadata.sha256
    unload_oft_weights(pipe)
    draw(pipe)
    pipe.remove_all_hooks()
    assert bank_of(pipe.unet) is None
    assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == trainable


@pytest.mark.thinned(3)
@pytest.mark.filterwarnings("error:.*was trained on another base")
@pytest.mark.parametrize("offload", [*IN_MEMORY, *ON_DISK])
def test_what_is_made_and_saved_offloaded_loads(pipe: Any, base_pipe: Any, tmp_path: Path, offload: Offload) -> None:
    """A file tells of its base what can be seen of it, and nothing of the garbage that lies there instead."""
    for part in BOTH:
        excite(inject_oft(getattr(pipe, part), OFTConfig(block_size=8), "a"), "a")
    offload(pipe, tmp_path / "weights")
    live = draw(pipe)
    path = save_oft_weights(pipe, tmp_path / "saved", "a")
    other = copy_pipe(base_pipe)
    load_oft_weights(other, path)
    assert torch.equal(draw(other), live)
