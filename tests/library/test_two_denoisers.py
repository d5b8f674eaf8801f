"""A pipeline of two denoisers, as Wan 2.2 is: `transformer` takes the noisy steps, `transformer_2` the others."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oft_diffusion import (
    OFTConfig,
    fuse_oft,
    inject_oft,
    list_oft_adapters,
    load_oft_weights,
    oft_state_dict,
    save_oft_weights,
    set_oft_adapters,
    unfuse_oft,
    unload_oft_weights,
)
from oft_diffusion.errors import AdapterError, AdapterFileError
from oft_diffusion.files import load_adapter_file
from tests.helpers.tiny_families import tiny_family
from tests.library.support import assert_one_sentence, assert_unchanged, distance, excite, fingerprint

EXPERTS = ("transformer", "transformer_2")
MOVED = 1e-3


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One for all tests: copy it, never change it."""
    pipe = tiny_family("WanPipeline", tmp_path_factory.mktemp("wan"))
    for part in (*EXPERTS, "text_encoder", "vae"):
        getattr(pipe, part).eval()
    return pipe


def copied(wan: Any) -> Any:
    pipe = type(wan)(**copy.deepcopy(wan.components), boundary_ratio=wan.config.boundary_ratio)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(wan: Any) -> Any:
    return copied(wan)


def film(pipe: Any) -> Tensor:
    """A picture of two steps, one for each expert."""
    frames: Tensor = pipe(
        "a mug", height=16, width=16, num_frames=1, num_inference_steps=2, output_type="pt", max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    return frames


def adapted(wan: Any, folder: Path, parts: Sequence[str] = EXPERTS, seed: int = 1) -> tuple[Any, Path]:
    """A pipeline with an adapter of other generators in each component, and the adapter's file."""
    donor = copied(wan)
    for i, part in enumerate(parts):
        excite(inject_oft(getattr(donor, part), OFTConfig(block_size=8), "mug"), "mug", seed=seed + i)
    return donor, save_oft_weights(donor, folder, "mug")


def test_each_expert_gets_its_own_rotations(wan: Any, pipe: Any, tmp_path: Path) -> None:
    base, before = film(pipe), fingerprint(pipe)
    donor, path = adapted(wan, tmp_path)
    assert set(load_adapter_file(path).components) == set(EXPERTS)
    loaded = load_oft_weights(pipe, path, adapter_name="mug")
    assert loaded.components == EXPERTS
    assert loaded.matched == sum(len(oft_state_dict(getattr(donor, part), "mug")) for part in EXPERTS)
    for part in EXPERTS:
        ours, theirs = (oft_state_dict(getattr(each, part), "mug") for each in (pipe, donor))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert torch.equal(film(pipe), film(donor))
    assert distance(film(pipe), base) > MOVED
    unload_oft_weights(pipe)
    assert torch.equal(film(pipe), base)
    assert_unchanged(pipe, before)


def test_each_expert_has_its_strength(wan: Any, pipe: Any, tmp_path: Path) -> None:
    _, path = adapted(wan, tmp_path / "both")
    load_oft_weights(pipe, path, adapter_name="mug")
    base = film(wan)
    pictures = [base, film(pipe)]
    for strengths in ({"transformer": 0.7, "transformer_2": 0.0}, {"transformer": 0.0, "transformer_2": 0.4}):
        set_oft_adapters(pipe, "mug", strengths)
        (listed,) = list_oft_adapters(pipe)
        assert listed.strengths == strengths
        pictures.append(film(pipe))
        (acting,) = [part for part, strength in strengths.items() if strength]
        alone = copied(wan)
        seed = 1 + EXPERTS.index(acting)
        load_oft_weights(alone, adapted(wan, tmp_path / acting, [acting], seed)[1], strength=strengths[acting])
        assert [a.components for a in list_oft_adapters(alone)] == [(acting,)]
        assert torch.equal(film(alone), pictures[-1])
    assert all(distance(a, b) > MOVED for i, a in enumerate(pictures) for b in pictures[:i])
    set_oft_adapters(pipe, "mug", {"transformer": 0.0, "transformer_2": 0.0})
    assert torch.equal(film(pipe), base)
    set_oft_adapters(pipe, "mug", {"transformer_2": 1.0})  # the other one's is 1 then
    assert torch.equal(film(pipe), pictures[1])


def test_fusing_and_hot_swaps_reach_both(wan: Any, pipe: Any, tmp_path: Path) -> None:
    _, path = adapted(wan, tmp_path / "a")
    other, its_path = adapted(wan, tmp_path / "b", seed=5)
    load_oft_weights(pipe, path, adapter_name="mug")
    live = film(pipe)
    fuse_oft(pipe)
    merged = {part: getattr(pipe, part).blocks[0].attn1.to_q.weight.detach().clone() for part in EXPERTS}
    assert all(distance(w, getattr(wan, part).blocks[0].attn1.to_q.weight) > MOVED for part, w in merged.items())
    assert distance(film(pipe), live) < 1e-5
    unfuse_oft(pipe)
    assert torch.equal(film(pipe), live)
    load_oft_weights(pipe, its_path, adapter_name="mug", hotswap=True)
    assert torch.equal(film(pipe), film(other))
    assert distance(film(pipe), live) > MOVED
    second = adapted(wan, tmp_path / "c", ["transformer_2"], seed=9)[1]
    load_oft_weights(pipe, second, adapter_name="mug", hotswap=True)  # the first becomes the identity
    alone = copied(wan)
    load_oft_weights(alone, second)
    assert torch.equal(film(pipe), film(alone))


def test_offloading_moves_both(wan: Any, pipe: Any, tmp_path: Path) -> None:
    donor, path = adapted(wan, tmp_path)
    pipe.enable_model_cpu_offload(device="cpu")
    load_oft_weights(pipe, path, adapter_name="mug")
    assert torch.equal(film(pipe), film(donor))


def test_one_expert_alone(wan: Any, pipe: Any, tmp_path: Path) -> None:
    """A pipeline that lacks one: a file for both is refused by name, or loaded in part."""
    both, second = adapted(wan, tmp_path / "a")[1], adapted(wan, tmp_path / "b", ["transformer_2"])[1]
    with_both = load_oft_weights(copied(wan), both)
    pipe.register_modules(transformer_2=None)
    pipe.register_to_config(boundary_ratio=None)
    for path in (both, second):
        with pytest.raises(AdapterFileError) as error:
            load_oft_weights(pipe, path)
        assert_one_sentence(error, "no component 'transformer_2'", "this one has", "text_encoder, transformer")
        assert list_oft_adapters(pipe) == []
    with pytest.raises(AdapterFileError, match="no layer that this pipeline has"):
        load_oft_weights(pipe, second, strict=False)
    with pytest.warns(UserWarning, match="layers that this pipeline does not have were left out"):
        loaded = load_oft_weights(pipe, both, strict=False)
    assert loaded.components == ("transformer",)
    assert loaded.matched + len(loaded.unmatched) == with_both.matched
    assert all(name.startswith("transformer_2.") for name in loaded.unmatched)
    with pytest.raises(AdapterError, match="'transformer_2'"):
        set_oft_adapters(pipe, loaded.name, {"transformer_2": 0.5})
