"""`convert` of what not every format holds, outputs and strengths: those that do draw the same, the others refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from diffusers import StableDiffusionPipeline

from oft_diffusion import load_oft_weights
from oft_diffusion.cli import main
from tests.helpers.single_files import write_single_file
from tests.library.support import copy_pipe, distance, draw
from tests.peers import algebra, lycoris_oft

LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.proj_in",  # 1x1
    "up_blocks.0.resnets.0.conv1",
)


@pytest.fixture(scope="module")
def theirs(base_pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of LyCORIS's, rescaled."""
    keys = {f"lycoris_{name.replace('.', '_')}": base_pipe.unet.get_submodule(name).weight.shape for name in LAYERS}
    written = lycoris_oft.write_lycoris(keys, rescaled=True, constraint=0.05)
    return algebra.save(written, tmp_path_factory.mktemp("lycoris") / "theirs.safetensors")


def convert(capsys: Any, *arguments: object) -> tuple[int, str]:
    status = main(["convert", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def drawn(base_pipe: Any, path: Path, **options: Any) -> Any:
    pipe = copy_pipe(base_pipe)
    load_oft_weights(pipe, path, **options)
    return draw(pipe)


def test_ours_hold_them(base_pipe: Any, theirs: Path, model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    wanted = drawn(base_pipe, theirs)
    assert distance(wanted, draw(base_pipe)) > 1e-2
    assert convert(capsys, theirs, tmp_path / "ours", "--to", "oft", "--model", model_folder)[0] == 0
    assert distance(drawn(base_pipe, tmp_path / "ours"), wanted) < 1e-6


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("to", ["folder", "checkpoint"])
def test_weights_hold_them(
    base_pipe: Any, theirs: Path, model_folder: Path, tmp_path: Path, capsys: Any, to: str, strength: float
) -> None:
    wanted = drawn(base_pipe, theirs, strength=strength)
    out = tmp_path / ("merged" if to == "folder" else "merged.safetensors")
    told: list[object] = ["--model", model_folder, "--strength", strength]
    if to == "checkpoint":
        told += ["--checkpoint", write_single_file(base_pipe, tmp_path / "base.safetensors")]
    status, text = convert(capsys, theirs, out, "--to", to, *told)
    assert status == 0, text
    merged = (
        StableDiffusionPipeline.from_pretrained(out)
        if to == "folder"
        else StableDiffusionPipeline.from_single_file(str(out), config=str(model_folder), local_files_only=True)
    )
    merged.set_progress_bar_config(disable=True)
    assert distance(draw(merged), wanted) < 1e-4


def test_peft_holds_a_strength_of_ours(
    base_pipe: Any, mug: Path, model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    wanted = drawn(base_pipe, mug, strength=0.4)
    assert distance(wanted, drawn(base_pipe, mug)) > 1e-2
    told = ("--to", "peft", "--model", model_folder, "--strength", 0.4)
    assert convert(capsys, mug, tmp_path / "peft", *told)[0] == 0
    theirs = copy_pipe(base_pipe)
    for part in ("unet", "text_encoder"):
        model = peft.PeftModel.from_pretrained(getattr(theirs, part), str(tmp_path / "peft" / part))
        setattr(theirs, part, model.base_model.model)
    assert distance(draw(theirs), wanted) < 1e-4


@pytest.mark.parametrize("to", ["onetrainer", "comfyui-oftv2", "sd-scripts"])
def test_files_of_five_terms_tell_by_how_much_a_strength_of_ours_differs(
    base_pipe: Any, mug: Path, model_folder: Path, tmp_path: Path, capsys: Any, to: str
) -> None:
    wanted = drawn(base_pipe, mug, strength=0.4)
    out = tmp_path / "x.safetensors"
    status, text = convert(capsys, mug, out, "--to", to, "--model", model_folder, "--strength", 0.4)
    assert status == 0, text
    told = [float(line.partition("by up to ")[2].split()[0]) for line in text.splitlines() if "by up to" in line]
    assert len(told) == 2  # of either component
    assert max(told) < 1e-2
    assert 0 < distance(drawn(base_pipe, out), wanted) < 1e-2


@pytest.mark.parametrize("to", ["peft", "onetrainer", "comfyui-oftv2", "sd-scripts", "glora"])
def test_formats_of_inputs_refuse_them(theirs: Path, model_folder: Path, tmp_path: Path, capsys: Any, to: str) -> None:
    out = tmp_path / ("x" if to == "peft" else "x.safetensors")
    status, text = convert(capsys, theirs, out, "--to", to, "--model", model_folder)
    assert status == 1
    _, _, reason = text.partition("error: ")
    assert "rotates outputs" in reason or (to == "glora" and "rotated inputs" in reason)
    assert not out.exists()


@pytest.mark.parametrize("to", ["oft", "peft", "onetrainer", "comfyui-oftv2", "sd-scripts"])
def test_files_of_rotations_refuse_a_blend(mug: Path, model_folder: Path, tmp_path: Path, capsys: Any, to: str) -> None:
    out = tmp_path / ("x" if to in ("oft", "peft") else "x.safetensors")
    told = ("--to", to, "--model", model_folder, "--strength", 0.4, "--mode", "linear")
    status, text = convert(capsys, mug, out, *told)
    assert status == 1
    assert "--mode rotation" in text
    assert not out.exists()
