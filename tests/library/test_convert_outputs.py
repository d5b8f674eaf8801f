"""`convert` of adapters that rotate and scale outputs: what holds them, at any strength, and what refuses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("to", ["peft", "onetrainer", "comfyui-oftv2", "sd-scripts", "glora"])
def test_formats_of_inputs_refuse_them(theirs: Path, model_folder: Path, tmp_path: Path, capsys: Any, to: str) -> None:
    out = tmp_path / ("x" if to == "peft" else "x.safetensors")
    status, text = convert(capsys, theirs, out, "--to", to, "--model", model_folder)
    assert status == 1
    _, _, reason = text.partition("error: ")
    assert "rotates outputs" in reason or (to == "glora" and "rotated inputs" in reason)
    assert not out.exists()
