"""The verbs `convert` and `merge`, from the command line to a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from oft_diffusion import fuse_oft, load_oft_weights, set_oft_adapters
from oft_diffusion.cli import main
from oft_diffusion.errors import ConfigError
from oft_diffusion.files import load_adapter_file
from tests.helpers.single_files import write_single_file
from tests.library.support import assert_loading_refused, copy_pipe, distance, draw
from tests.peers import algebra, lycoris_oft
from tests.peers.comfy_core import comfy_weight
from tests.peers.comfy_keys import KeyMap

ROUNDING = 1e-4


def run(capsys: Any, *arguments: object) -> tuple[int, str]:
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def drawn(pipe: Any, path: Path, **options: Any) -> Any:
    load_oft_weights(pipe, path, **options)
    return draw(pipe)


@pytest.mark.parametrize("name", ["onetrainer", "comfyui-oftv2", "sd-scripts"])
def test_there_and_back(
    pipe: Any, base_pipe: Any, series: Path, model_folder: Path, tmp_path: Path, capsys: Any, name: str
) -> None:
    wanted = drawn(pipe, series)
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours"
    status, text = run(capsys, "convert", series, theirs, "--to", name, "--model", model_folder)
    assert (status, text) == (0, f"wrote {theirs}\n")
    assert torch.equal(drawn(copy_pipe(base_pipe), theirs), wanted)
    status, text = run(capsys, "convert", theirs, ours, "--to", "oft", "--model", model_folder)
    assert status == 0
    assert ("OneTrainer" if name == "onetrainer" else "sd-scripts") in text
    assert torch.equal(drawn(copy_pipe(base_pipe), ours), wanted)


def test_peft_folders(pipe: Any, base_pipe: Any, series: Path, model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    wanted = drawn(pipe, series)
    assert run(capsys, "convert", series, tmp_path / "peft", "--to", "peft", "--model", model_folder)[0] == 0
    theirs = copy_pipe(base_pipe)
    for part in ("unet", "text_encoder"):
        model = peft.PeftModel.from_pretrained(getattr(theirs, part), tmp_path / "peft" / part)
        setattr(theirs, part, model.base_model.model)
    assert distance(draw(theirs), wanted) < ROUNDING
    ours = copy_pipe(base_pipe)
    for part in ("unet", "text_encoder"):
        load_oft_weights(ours, tmp_path / "peft" / part, component=part)
    assert distance(draw(ours), wanted) < 1e-6
    at_once = copy_pipe(base_pipe)
    loaded = load_oft_weights(at_once, tmp_path / "peft")
    assert (loaded.name, loaded.format, set(loaded.components)) == ("peft", "PEFT", {"unet", "text_encoder"})
    assert torch.equal(draw(at_once), draw(ours))
    status, text = run(capsys, "info", tmp_path / "peft")
    assert status == 0
    assert [line.split()[0] for line in text.splitlines() if line.startswith(str(tmp_path))] == [
        str(tmp_path / "peft" / part / "adapter_model.safetensors") for part in ("text_encoder", "unet")
    ]


def test_peft_folders_that_do_not_fit(pipe: Any, series: Path, model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "peft"
    assert run(capsys, "convert", series, folder, "--to", "peft", "--model", model_folder)[0] == 0
    assert_loading_refused(pipe, folder, "component='unet'", "leave it out", kind=ConfigError, component="unet")
    (folder / "unet").rename(folder / "transformer")
    assert_loading_refused(pipe, folder, "peft", "transformer")
    (folder / "transformer" / "adapter_model.safetensors").unlink()
    assert_loading_refused(pipe, folder, "adapter_model.safetensors")


def test_one_file_of_several_in_a_folder(mug: Path, plain: Path, tmp_path: Path, capsys: Any) -> None:
    for name, path in (("first", mug), ("second", plain)):
        (tmp_path / "there" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / "deep" / f"{name}.safetensors").write_bytes(path.read_bytes())
    told = ("convert", tmp_path / "there", tmp_path / "out", "--to", "oft", "--subfolder", "deep")
    assert run(capsys, *told)[0] == 1
    assert run(capsys, *told, "--weight-name", "second.safetensors")[0] == 0
    assert load_adapter_file(tmp_path / "out").metadata.sha256 == load_adapter_file(plain).metadata.sha256


def test_a_strength_baked_in(pipe: Any, base_pipe: Any, mug: Path, tmp_path: Path, capsys: Any) -> None:
    wanted = drawn(pipe, mug, strength=0.4)
    assert run(capsys, "convert", mug, tmp_path / "weak", "--to", "oft", "--strength", 0.4)[0] == 0
    assert distance(drawn(copy_pipe(base_pipe), tmp_path / "weak"), wanted) < 1e-5


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_lora_that_diffusers_loads(
    pipe: Any, base_pipe: Any, mug: Path, model_folder: Path, tmp_path: Path, capsys: Any, strength: float
) -> None:
    wanted = drawn(pipe, mug, strength=strength)
    lora = tmp_path / "lora.safetensors"
    options = ("--dtype", "float32", "--naming", "diffusers", "--strength", strength)
    status, text = run(capsys, "convert", mug, lora, "--to", "lora", "--model", model_folder, *options)
    assert status == 0
    assert "0.00% is lost" in text
    theirs = copy_pipe(base_pipe)
    theirs.load_lora_weights(lora)
    assert distance(draw(theirs), wanted) < ROUNDING
    status, text = run(
        capsys, "convert", mug, lora, "--to", "lora", "--model", model_folder, "--rank", 2, "--overwrite"
    )
    assert float(text.partition("weights, ")[2].partition("%")[0]) > 5


@pytest.mark.parametrize("name", ["diff", "lora", "glora"])
def test_carriers_lose_nothing_in_comfyui(
    pipe: Any, base_pipe: Any, mug: Path, model_folder: Path, tmp_path: Path, capsys: Any, name: str
) -> None:
    out = tmp_path / "x.safetensors"
    status, text = run(capsys, "convert", mug, out, "--to", name, "--model", model_folder, "--dtype", "float32")
    assert status == 0
    assert "0.00% is lost" in text
    keys = KeyMap(base_pipe)
    native = keys.native(weights(base_pipe))
    load_oft_weights(pipe, mug)
    fuse_oft(pipe)
    wanted, got = keys.native(weights(pipe)), keys.patched(native, load_file(out), comfy_weight)
    assert got.keys() == wanted.keys()
    assert all(distance(got[weight], wanted[weight]) < 1e-5 for weight in wanted)
    assert sum(distance(native[weight], wanted[weight]) > 1e-3 for weight in wanted) > 10


def weights(pipe: Any) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (part, name): module.weight
        for part in ("unet", "text_encoder")
        for name, module in getattr(pipe, part).named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def test_models_with_the_adapter_inside(pipe: Any, mug: Path, model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoint = write_single_file(StableDiffusionPipeline.from_pretrained(model_folder), tmp_path / "base.safetensors")
    wanted = drawn(pipe, mug)
    assert run(capsys, "convert", mug, tmp_path / "merged", "--to", "folder", "--model", model_folder)[0] == 0
    folder = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    folder.set_progress_bar_config(disable=True)
    assert distance(draw(folder), wanted) < ROUNDING
    out = tmp_path / "merged.safetensors"
    status, _ = run(
        capsys, "convert", mug, out, "--to", "checkpoint", "--model", model_folder, "--checkpoint", checkpoint
    )
    assert status == 0
    single = StableDiffusionPipeline.from_single_file(str(out), config=str(model_folder), local_files_only=True)
    single.set_progress_bar_config(disable=True)
    assert distance(draw(single), wanted) < ROUNDING


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "peft"], ["--model FOLDER"]),
        (["--to", "oft", "--rank", "3"], ["--rank means nothing with --to oft"]),
        (["--to", "checkpoint", "--model", "pocket"], ["--checkpoint FILE"]),
        (["--to", "folder", "--model", "pocket", "--naming", "flat"], ["--naming means nothing"]),
        (["--to", "onetrainer", "--model", "/nowhere/at/all"], ["/nowhere/at/all"]),
    ],
)
def test_options_that_do_not_fit(
    mug: Path, tmp_path: Path, capsys: Any, arguments: list[str], words: list[str]
) -> None:
    status, text = run(capsys, "convert", mug, tmp_path / "out", *arguments)
    assert status == 1
    assert text.startswith("error: ")
    assert "Traceback" not in text
    for word in words:
        assert word in text
    assert not (tmp_path / "out").exists()


def test_another_tools_file_wants_a_model(series: Path, model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    theirs = tmp_path / "theirs.safetensors"
    run(capsys, "convert", series, theirs, "--to", "onetrainer", "--model", model_folder)
    status, text = run(capsys, "convert", theirs, tmp_path / "ours", "--to", "oft")
    assert status == 1
    assert "its layers go by the names of a model" in text


def test_layers_are_counted_not_tensors(model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    written = lycoris_oft.write_lycoris({layer: (32, 32)}, rescaled=True)
    theirs = algebra.save(written, tmp_path / "theirs.safetensors")
    status, text = run(capsys, "convert", theirs, tmp_path / "ours", "--to", "oft", "--model", model_folder)
    assert status == 0
    assert ", 1 layers\n" in text


@pytest.mark.parametrize("how", ["compose", "average", "interpolate", "subtract"])
def test_merging_adapters(
    pipe: Any, base_pipe: Any, mug: Path, plain: Path, tmp_path: Path, capsys: Any, how: str
) -> None:
    status, text = run(capsys, "merge", mug, plain, "--how", how, "--out", tmp_path / "both")
    assert status == 0, text
    got = drawn(copy_pipe(base_pipe), tmp_path / "both")
    load_oft_weights(pipe, mug, adapter_name="mug")
    load_oft_weights(pipe, plain, adapter_name="plain")
    if how == "compose":
        assert distance(draw(pipe), got) < 1e-5
    if how == "subtract":
        set_oft_adapters(pipe, ["mug", "plain"], [1.0, -1.0])
        assert distance(draw(pipe), got) < 1e-5
    assert load_adapter_file(tmp_path / "both").metadata.training["combined"] == how
    assert distance(got, draw(base_pipe)) > 0.001


def test_merging_wants_two(mug: Path, tmp_path: Path, capsys: Any) -> None:
    status, text = run(capsys, "merge", mug, "--how", "interpolate", "--out", tmp_path / "x")
    assert status == 1
    assert "was given 1 adapters" in text


def test_info_tells_whose_a_file_is(series: Path, model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    theirs = tmp_path / "theirs.safetensors"
    run(capsys, "convert", series, theirs, "--to", "onetrainer", "--model", model_folder)
    status, text = run(capsys, "info", theirs)
    assert status == 0
    for word in ("written by OneTrainer", "rotates inputs", "named as lora_", "of size 8", "neumann_order 4"):
        assert word in text
