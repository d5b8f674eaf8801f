"""What `convert` and `merge` refuse: in a sentence, with status 1, and with every file as it was."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from oft_diffusion import OFTConfig, convert, inject_oft, load_oft_weights, save_oft_weights
from oft_diffusion.files import load_adapter_file
from tests.helpers.single_files import write_single_file
from tests.helpers.tiny_families import tiny_family, write_tiny_family
from tests.library.support import copy_pipe, distance, draw, excite, folder_bytes
from tests.library.test_convert import run
from tests.peers import algebra, onetrainer

ALL = ("oft", "peft", "onetrainer", "sd-scripts", "comfyui-oftv2", "diff", "lora", "glora", "folder", "checkpoint")


def adapted(pipe: Any, folder: Path, *parts: str, norm: float = 0.5, **settings: Any) -> Path:
    """An adapter file of these components."""
    for seed, part in enumerate(parts):
        config = OFTConfig(block_size=4, parametrisation="cayley_neumann", neumann_order=4, **settings)
        excite(inject_oft(getattr(pipe, part), config, "a"), "a", seed=seed, norm=norm)
    return save_oft_weights(pipe, folder, "a")


def refused(capsys: Any, *arguments: object) -> str:
    status, text = run(capsys, *arguments)
    assert status == 1, text
    [error] = [line for line in text.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(r"error: .+ Expected: .+ Fix: .+", error)
    assert "Traceback" not in text
    return error


@pytest.fixture
def checkpoint(model_folder: Path, tmp_path: Path) -> Path:
    return write_single_file(StableDiffusionPipeline.from_pretrained(model_folder), tmp_path / "base.safetensors")


# -- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["plain", "overwrite"])
@pytest.mark.parametrize(
    ("what", "to"), [*((what, to) for what in ("adapter", "link", "model") for to in ALL), ("checkpoint", "checkpoint")]
)
def test_nothing_that_is_read_is_written_over(
    mug: Path, model_folder: Path, checkpoint: Path, tmp_path: Path, capsys: Any, what: str, to: str, overwrite: Any
) -> None:
    source, link = tmp_path / "mine.safetensors", tmp_path / "link.safetensors"
    shutil.copy(mug, source)
    link.symlink_to(source)
    model: list[object] = ["--model", model_folder]
    if what == "model":
        model = ["--model", checkpoint, "--config-dir", model_folder]
    target = {"adapter": source, "link": link, "model": checkpoint, "checkpoint": checkpoint}[what]
    told = ["--checkpoint", checkpoint] if to == "checkpoint" else []
    before = folder_bytes(tmp_path)
    text = refused(capsys, "convert", source, target, "--to", to, *model, *told, *overwrite)
    if not (overwrite and to in ("peft", "folder")):  # these two have no such option
        assert target.name in text
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("to", ["oft", "onetrainer", "diff", "checkpoint"])
def test_weights_of_the_model_s_folder_stay(
    mug: Path, model_folder: Path, checkpoint: Path, tmp_path: Path, capsys: Any, to: str
) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    target = next((model / "unet").glob("*.safetensors"))
    told = ["--checkpoint", checkpoint] if to == "checkpoint" else []
    before = folder_bytes(model)
    assert "or of it" in refused(capsys, "convert", mug, target, "--to", to, "--model", model, *told, "--overwrite")
    assert folder_bytes(model) == before


def test_the_shipped_model_stays(
    mug: Path, model_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")  # in its place, in case this fails
    monkeypatch.setattr(convert, "pocket_path", lambda: model)
    target, before = next((model / "unet").glob("*.safetensors")), folder_bytes(model)
    text = refused(capsys, "convert", mug, target, "--to", "oft", "--model", "pocket", "--overwrite")
    assert "or of it" in text
    assert folder_bytes(model) == before


@pytest.mark.parametrize("to", [to for to in ALL if to != "checkpoint"])
def test_what_is_there_stays_unless_asked(
    mug: Path, series: Path, model_folder: Path, tmp_path: Path, capsys: Any, to: str
) -> None:
    is_folder = to in ("peft", "folder")
    target = tmp_path / ("out" if is_folder else "out.safetensors")
    other = target / "other.txt" if is_folder else target
    other.parent.mkdir(exist_ok=True)
    other.write_text("somebody's")
    source = series if to in ("peft", "onetrainer", "sd-scripts", "comfyui-oftv2") else mug
    model = ["--model", model_folder]
    assert "is there already" in refused(capsys, "convert", source, target, "--to", to, *model)
    assert folder_bytes(tmp_path) == {str(other.relative_to(tmp_path)): b"somebody's"}
    status, text = run(capsys, "convert", source, target, "--to", to, *model, "--overwrite")
    assert status == (1 if is_folder else 0), text
    assert (other.read_bytes() == b"somebody's") == is_folder


def test_a_folder_of_ours_is_a_target_that_is_there(mug: Path, plain: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(capsys, "convert", mug, tmp_path / "mine", "--to", "oft")[0] == 0
    before = folder_bytes(tmp_path)
    refused(capsys, "convert", plain, tmp_path / "mine", "--to", "oft")
    refused(capsys, "convert", tmp_path / "mine", tmp_path / "mine", "--to", "oft", "--overwrite")
    refused(capsys, "merge", tmp_path / "mine", plain, "--out", tmp_path / "mine", "--overwrite")
    refused(capsys, "merge", mug, plain, "--out", tmp_path / "mine")
    assert folder_bytes(tmp_path) == before
    assert run(capsys, "merge", mug, plain, "--out", tmp_path / "mine", "--overwrite")[0] == 0
    assert folder_bytes(tmp_path) != before


@pytest.mark.parametrize("to", ["onetrainer", "sd-scripts", "comfyui-oftv2", "diff", "lora", "glora"])
def test_files_are_called_what_they_are(series: Path, model_folder: Path, tmp_path: Path, capsys: Any, to: str) -> None:
    text = refused(capsys, "convert", series, tmp_path / "x.txt", "--to", to, "--model", model_folder)
    assert "x.safetensors" in text
    assert not list(tmp_path.iterdir())


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["oft", "peft", "onetrainer", "sd-scripts", "comfyui-oftv2", "diff", "folder"])
def test_another_architecture(mug: Path, tmp_path: Path, capsys: Any, to: str) -> None:
    flux = write_tiny_family("FluxPipeline", tmp_path)
    text = refused(capsys, "convert", mug, tmp_path / "x.safetensors", "--to", to, "--model", flux)
    assert "mug.safetensors" in text
    assert "UNet2DConditionModel" in text or "StableDiffusionPipeline" in text  # what it is for
    assert "Flux" in text  # what this is
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("to", ["oft", "peft", "onetrainer", "sd-scripts"])
def test_another_model_of_that_architecture(model_folder: Path, tmp_path: Path, capsys: Any, to: str) -> None:
    """The same classes, layers of the same names; only their widths tell."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(model_folder)
    parts = dict(pipe.components)
    settings = {**parts["unet"].config, "cross_attention_dim": 48}
    parts["unet"] = type(parts["unet"]).from_config(settings)
    other = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    source = adapted(other, tmp_path / "theirs", "unet")
    text = refused(capsys, "convert", source, tmp_path / "x.safetensors", "--to", to, "--model", model_folder)
    assert "has 48 rows, which has 32 inputs" in text
    assert not (tmp_path / "x.safetensors").exists()


def test_single_files_tell_their_layers_by_a_config_dir(
    series: Path, model_folder: Path, checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    to = ("--to", "onetrainer", "--model")
    text = refused(capsys, "convert", series, tmp_path / "x.safetensors", *to, checkpoint)
    assert "--config-dir" in text
    told = (checkpoint, "--config-dir", model_folder)
    assert run(capsys, "convert", series, tmp_path / "x.safetensors", *to, *told)[0] == 0
    assert run(capsys, "convert", series, tmp_path / "y.safetensors", *to, model_folder)[0] == 0
    x, y = (load_file(tmp_path / f"{name}.safetensors") for name in "xy")
    assert x.keys() == y.keys()
    assert all(torch.equal(x[key], y[key]) for key in x)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "option", "words"),
    [
        ("oft", ["--dtype", "float16"], "--dtype means nothing"),
        ("folder", ["--dtype", "float16"], "--dtype means nothing"),
        ("peft", ["--naming", "flat"], "--naming means nothing"),
        ("folder", ["--overwrite"], "--overwrite means nothing"),
        ("diff", ["--rank", "2"], "--rank means nothing"),
        ("oft", ["--checkpoint", "x.safetensors"], "--checkpoint means nothing"),
        ("onetrainer", ["--mode", "linear"], "--mode means nothing with a strength of 1"),
        ("onetrainer", ["--config-dir", "."], "--config-dir means nothing"),
        ("diff", ["--config-dir", "."], "--config-dir means nothing"),
        *((to, ["--component", "unet"], "--component means nothing") for to in ("oft", "onetrainer", "diff")),
        *((to, ["--component", "bogus"], "--component means nothing") for to in ("oft", "onetrainer", "diff")),
        *((to, ["--legacy-scaled"], "--legacy-scaled means nothing") for to in ("oft", "onetrainer", "diff")),
        *((to, ["--only", "vae"], "does not adapt vae") for to in ("oft", "onetrainer", "diff")),
        ("sd-scripts", ["--naming", "comfy"], "sd-scripts has no comfy names"),
        ("diff", ["--naming", "diffusers"], "naming='diffusers' is unusable"),
    ],
)
def test_options_that_would_do_nothing(
    mug: Path, model_folder: Path, tmp_path: Path, capsys: Any, to: str, option: list[str], words: str
) -> None:
    text = refused(capsys, "convert", mug, tmp_path / "x.safetensors", "--to", to, "--model", model_folder, *option)
    assert words in text
    assert not list(tmp_path.iterdir())


def test_names_that_no_format_has(mug: Path, model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    for naming in ("bogus", "peft", "lycoris"):
        with pytest.raises(SystemExit) as stop:
            run(capsys, "convert", mug, tmp_path / "x", "--to", "onetrainer", "--model", model_folder,
                "--naming", naming)  # fmt: skip
        assert stop.value.code == 2
        assert "invalid choice" in capsys.readouterr().err


# -- what would be lost -----------------------------------------------------------------------------------------------


def test_no_expert_of_two_is_lost(tmp_path: Path, capsys: Any) -> None:
    model = write_tiny_family("WanPipeline", tmp_path)
    source = adapted(tiny_family("WanPipeline", tmp_path), tmp_path / "ours", "transformer", "transformer_2")
    layers = {part: len(state) for part, state in load_adapter_file(source).components.items()}
    target = tmp_path / "x.safetensors"
    for to in ("comfyui-oftv2", "diff", "lora", "glora"):
        text = refused(capsys, "convert", source, target, "--to", to, "--model", model)
        assert "a layer of transformer and of transformer_2" in text
        assert not target.exists()
    for to in ("onetrainer", "sd-scripts"):
        text = refused(capsys, "convert", source, target, "--to", to, "--model", model)
        assert f"{to} loads no OFT of a WanTransformer3DModel" in text
    for only, count in layers.items():
        told = ("--to", "comfyui-oftv2", "--model", model, "--only", only, "--overwrite")
        assert run(capsys, "convert", source, target, *told)[0] == 0
        assert len(load_file(target)) == count


def test_a_refusal_at_the_second_component_leaves_nothing(
    base_pipe: Any, model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    source = adapted(copy_pipe(base_pipe), tmp_path / "ours", "text_encoder", "unet", targets=".*(to_q|q_proj|conv1)")
    before = folder_bytes(tmp_path)
    text = refused(capsys, "convert", source, tmp_path / "peft", "--to", "peft", "--model", model_folder)
    assert "larger than 1x1" in text
    assert folder_bytes(tmp_path) == before


def test_a_write_that_breaks_off_leaves_no_folder(
    series: Path, model_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[int] = []

    def full(handle: int) -> None:
        files.append(handle)
        if len(files) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    text = refused(capsys, "convert", series, tmp_path / "out" / "peft", "--to", "peft", "--model", model_folder)
    assert "No space left" in text
    assert folder_bytes(tmp_path) == {}


@pytest.mark.parametrize("to", ["peft", "onetrainer"])
def test_numbers_too_large_for_their_dtype(
    base_pipe: Any, model_folder: Path, tmp_path: Path, capsys: Any, to: str
) -> None:
    source = adapted(copy_pipe(base_pipe), tmp_path / "ours", "unet", norm=2e5, targets=".*to_q")
    target = tmp_path / "x.safetensors"
    told = ("--to", to, "--model", model_folder, "--dtype")
    assert "torch.float16 cannot hold" in refused(capsys, "convert", source, target, *told, "float16")
    assert not target.exists()
    assert run(capsys, "convert", source, target, *told, "bfloat16")[0] == 0


# -- folders of PEFT's ------------------------------------------------------------------------------------------------


def test_a_folder_of_several_components_is_read_back(
    pipe: Any, base_pipe: Any, series: Path, model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    load_oft_weights(pipe, series)
    wanted = draw(pipe)
    model = ("--model", model_folder)
    assert run(capsys, "convert", series, tmp_path / "peft", "--to", "peft", *model)[0] == 0
    status, text = run(capsys, "convert", tmp_path / "peft", tmp_path / "again", "--to", "oft", *model)
    assert status == 0, text
    before, after = load_adapter_file(series), load_adapter_file(tmp_path / "again")
    assert f"{sum(map(len, before.components.values()))} layers" in text
    assert after.components.keys() == before.components.keys()
    ours = copy_pipe(base_pipe)
    load_oft_weights(ours, tmp_path / "again")
    assert distance(draw(ours), wanted) < 1e-6
    status, text = run(capsys, "convert", tmp_path / "peft", tmp_path / "x.safetensors", "--to", "diff", *model)
    assert status == 0, text


# -- strengths and series of other tools ------------------------------------------------------------------------------


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"


def theirs(pipe: Any, path: Path, **options: Any) -> tuple[Path, algebra.Written, nn.Linear]:
    layer = pipe.unet.get_submodule(LAYER)
    key = f"lora_unet_{LAYER.replace('.', '_')}"
    written = onetrainer.write_onetrainer({key: tuple(layer.weight.shape)}, block_size=16, norm=0.8, **options)
    return algebra.save(written, path), written, layer


def difference(path: Path) -> torch.Tensor:
    [stored] = load_file(path).values()
    return stored.double()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("to", ["diff", "lora", "glora", "folder", "checkpoint", "oft", "onetrainer"])
def test_old_scaled_oft_is_told_to_every_format(
    base_pipe: Any, model_folder: Path, checkpoint: Path, tmp_path: Path, capsys: Any, to: str
) -> None:
    source, written, layer = theirs(base_pipe, tmp_path / "old.safetensors", scaled=True, legacy_scale=True)
    key = next(iter(written.tensors)).partition(".")[0]
    told = [*(["--checkpoint", checkpoint] if to == "checkpoint" else []), "--model", model_folder]
    told += ["--dtype", "float32"] if to in ("diff", "lora", "glora") else []
    found = {}
    for flag in ("", "--legacy-scaled"):
        out = tmp_path / f"x{flag}" if to == "folder" else tmp_path / f"x{flag}.safetensors"
        status, text = run(capsys, "convert", source, out, "--to", to, *told, *filter(None, [flag]))
        assert status == 0, text
        found[flag] = weight_from(out, to, base_pipe, model_folder)
    wanted = {
        flag: onetrainer.merged_weight_onetrainer(
            layer.weight.detach(), algebra.of_layer(written.tensors, key), written.metadata, legacy_scale=bool(flag)
        )
        for flag in found
    }
    assert float((wanted[""] - wanted["--legacy-scaled"]).abs().max()) > 1e-3
    for flag, weight in found.items():
        assert float((weight - wanted[flag]).abs().max()) < 1e-5


def weight_from(path: Path, to: str, base_pipe: Any, model_folder: Path) -> torch.Tensor:
    """The layer's weight in what was written, by the formulas of those that read it."""
    from tests.peers.comfy_core import comfy_weight

    before = base_pipe.unet.get_submodule(LAYER).weight.detach()
    if to in ("folder", "checkpoint"):
        pipe = (
            StableDiffusionPipeline.from_pretrained(path)
            if to == "folder"
            else StableDiffusionPipeline.from_single_file(str(path), config=str(model_folder), local_files_only=True)
        )
        weight: torch.Tensor = pipe.unet.get_submodule(LAYER).weight.detach().double()
        return weight
    if to == "oft":
        pipe = copy_pipe(base_pipe)
        load_oft_weights(pipe, path)
        return pipe.unet.get_submodule(LAYER)(torch.eye(before.shape[1])).detach().T.double() - _bias(base_pipe)
    tensors = load_file(path)
    [key] = {name.partition(".")[0] for name in tensors}
    if to == "onetrainer":
        return onetrainer.merged_weight_onetrainer(before, algebra.of_layer(tensors, key), {})
    return comfy_weight(before, algebra.of_layer(tensors, key))


def _bias(pipe: Any) -> torch.Tensor:
    bias: torch.Tensor = pipe.unet.get_submodule(LAYER).bias.detach().double()
    return bias[:, None]


def test_a_strength_is_the_tool_s_own_unless_asked(
    base_pipe: Any, model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    source, written, layer = theirs(base_pipe, tmp_path / "theirs.safetensors")
    key = next(iter(written.tensors)).partition(".")[0]
    model = ("--model", model_folder)
    told = ("--to", "diff", *model, "--dtype", "float32", "--strength", 0.5)
    weight = layer.weight.detach()
    for number, extra in enumerate(((), ("--mode", "linear"), ("--mode", "rotation"))):
        assert run(capsys, "convert", source, tmp_path / f"{number}.safetensors", *told, *extra)[0] == 0
    linear = onetrainer.merged_weight_onetrainer(weight, algebra.of_layer(written.tensors, key), {}, 0.5) - weight
    default, asked, rotation = (difference(tmp_path / f"{number}.safetensors") for number in range(3))
    assert float((default - linear).abs().max()) < 1e-5
    assert torch.equal(default, asked)
    assert float((rotation - linear).abs().max()) > 1e-2

    # A file of rotations cannot hold a blend.
    for to in ("oft", "onetrainer", "peft"):
        text = refused(capsys, "convert", source, tmp_path / "x.safetensors", "--to", to, *model, "--strength", 0.5)
        assert "--mode rotation" in text
    half = ("--strength", 0.5, "--mode", "rotation")
    status, text = run(capsys, "convert", source, tmp_path / "half", "--to", "oft", *model, *half)
    assert status == 0
    assert "is a truncated series: its nearest rotations were taken" in text
    out = tmp_path / "half.safetensors"
    assert run(capsys, "convert", tmp_path / "half", out, "--to", "diff", *model, "--dtype", "float32")[0] == 0
    # The series of five terms is (I - Q^4) C(Q), so that the nearest rotation is C(Q).
    packed = written.tensors[f"{key}.oft_R.weight"]
    values, vectors = torch.linalg.eig(algebra.cayley(algebra.skew(packed.double())))
    root = (vectors @ torch.diag_embed(values.sqrt()) @ vectors.mH).real
    wanted = algebra.times(weight, root.mT) - weight
    assert float((difference(out) - wanted).abs().max()) < 1e-5
