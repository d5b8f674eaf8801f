"""How strengths are taken, and which adapters act, through saving, converting, fusing and disabling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from oft_diffusion import (
    OFTConfig,
    disable_oft_adapters,
    enable_oft_adapters,
    fuse_oft,
    list_oft_adapters,
    load_oft_weights,
    save_oft_weights,
    set_oft_adapters,
    unfuse_oft,
)
from oft_diffusion.cli import main
from oft_diffusion.errors import AdapterError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.merge import put_back
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.pipeline import fusing
from tests.library.support import assert_loading_refused, assert_one_sentence, copy_pipe, distance, draw
from tests.peers import peft_oft


@pytest.fixture
def theirs(pipe: Any, tmp_path: Path) -> Path:
    """A folder of PEFT's, with generators for which a fraction of a turn and a blend are far apart."""
    names = [n for n, _ in pipe.unet.named_modules() if n.endswith(("to_q", "to_v"))]
    shapes = {name: tuple(pipe.unet.get_submodule(name).weight.shape) for name in names}
    return peft_oft.write_peft(tmp_path / "peft", shapes, block_size=8, norm=0.9)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("strength", [0.5, -0.7, 1.0])
@pytest.mark.parametrize("how", ["saved", "saved with other metadata", "converted"])
def test_another_tools_strength_stays_its_own_in_a_file_of_ours(
    pipe: Any, base_pipe: Any, theirs: Path, model_folder: Path, tmp_path: Path, how: str, strength: float
) -> None:
    load_oft_weights(pipe, theirs, adapter_name="a", component="unet", strength=strength)
    wanted, ours = draw(pipe), tmp_path / "ours.safetensors"
    if how == "converted":
        options = ["--component", "unet", "--model", str(model_folder)]
        assert main(["convert", str(theirs), str(ours), "--to", "oft", *options]) == 0
    else:
        save_oft_weights(pipe, ours, "a", AdapterMetadata(components={}, trigger="x") if "other" in how else None)
    assert load_adapter_file(ours).metadata.mode == "linear"
    again = copy_pipe(base_pipe)
    load_oft_weights(again, ours, adapter_name="a", strength=strength)
    assert distance(draw(again), wanted) < 1e-5
    set_oft_adapters(again, "a", strength)
    assert distance(draw(again), wanted) < 1e-5


def test_converting_by_way_of_ours_bakes_in_the_same(
    theirs: Path, model_folder: Path, tmp_path: Path, pipe: Any, base_pipe: Any
) -> None:
    model = ["--model", str(model_folder)]
    ours = tmp_path / "ours.safetensors"
    assert main(["convert", str(theirs), str(ours), "--to", "oft", "--component", "unet", *model]) == 0
    lora = ["--to", "lora", "--naming", "diffusers", "--strength", "0.5", "--dtype", "float32", *model]
    for source, name, told in ((theirs, "direct", ["--component", "unet"]), (ours, "by_way", [])):
        assert main(["convert", str(source), str(tmp_path / f"{name}.safetensors"), *lora, *told]) == 0
    pipe.load_lora_weights(tmp_path / "direct.safetensors")
    by_way = copy_pipe(base_pipe)
    by_way.load_lora_weights(tmp_path / "by_way.safetensors")
    assert distance(draw(by_way), draw(pipe)) < 1e-5
    assert distance(draw(pipe), draw(base_pipe)) > 1e-3


def test_a_strength_for_each_component_from_the_start(pipe: Any, base_pipe: Any, mug: Path) -> None:
    load_oft_weights(pipe, mug, adapter_name="mug", strength={"unet": 0.3, "text_encoder": 0.0})
    later = copy_pipe(base_pipe)
    load_oft_weights(later, mug, adapter_name="mug")
    set_oft_adapters(later, "mug", {"unet": 0.3, "text_encoder": 0.0})
    assert torch.equal(draw(pipe), draw(later))
    assert list_oft_adapters(pipe)[0].strengths == {"unet": 0.3, "text_encoder": 0.0}
    fresh = copy_pipe(base_pipe)
    assert_loading_refused(fresh, mug, "'vae'", "unet", kind=AdapterError, strength={"vae": 0.3})


def test_what_was_disabled_and_fused_comes_back_as_it_was(pipe: Any, mug: Path, style: Path) -> None:
    load_oft_weights(pipe, mug, adapter_name="a")
    load_oft_weights(pipe, style, adapter_name="b", strength=0.6)
    both = draw(pipe)
    disable_oft_adapters(pipe, "b")
    one = draw(pipe)
    fuse_oft(pipe, "b")
    set_oft_adapters(pipe, ["a"])
    unfuse_oft(pipe)
    told = {a.name: (a.strengths.get("unet"), a.enabled) for a in list_oft_adapters(pipe)}
    assert told == {"a": (1.0, True), "b": (0.6, False)}
    assert torch.equal(draw(pipe), one)
    enable_oft_adapters(pipe)
    assert distance(draw(pipe), both) < 1e-5


def test_tied_layers_are_not_swapped_for_others(pipe: Any, make: Any) -> None:
    tied = make("tied", parts=("unet",), config=OFTConfig(8, share_qkv=True))
    apart = make("apart", parts=("unet",), config=OFTConfig(8))
    load_oft_weights(pipe, tied, adapter_name="subject")
    words = (apart.name, "'subject'", "share one rotation", "share_qkv")
    assert_loading_refused(pipe, apart, *words, adapter_name="subject", hotswap=True)


def test_an_interrupted_unfuse_is_finished(pipe: Any, base_pipe: Any, mug: Path, monkeypatch: Any) -> None:
    load_oft_weights(pipe, mug)
    live, calls = draw(pipe), []
    fuse_oft(pipe)

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        put_back(*arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(fusing, "put_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unfuse_oft(pipe)
    assert not any(a.fused for a in list_oft_adapters(pipe))
    assert torch.equal(draw(pipe), live)
    with pytest.raises(AdapterError) as error:
        unfuse_oft(pipe)
    assert_one_sentence(error, "nothing is fused")
