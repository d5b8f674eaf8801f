"""Files for other tools: what those make of them, by their own code or formulas, is what we draw."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from oft_diffusion import OFTConfig, fuse_oft, inject_oft, load_oft_weights, save_oft_weights
from oft_diffusion.errors import AdapterFileError
from oft_diffusion.files import AdapterFile, load_adapter_file
from oft_diffusion.formats import read, write_peft, write_single_file
from oft_diffusion.formats.writing import part_of
from tests.helpers.single_files import unet_name
from tests.helpers.tiny_families import tiny_family
from tests.helpers.tiny_sd import write_tiny_sd
from tests.library.support import assert_one_sentence, copy_pipe, excite
from tests.peers import algebra
from tests.peers.comfy_node import merged_weight_comfy_node
from tests.peers.onetrainer import merged_weight_onetrainer
from tests.peers.sd_scripts import merged_weight_sd_scripts

FIVE_TERMS: dict[str, Any] = {"parametrisation": "cayley_neumann", "neumann_order": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(write_tiny_sd(tmp_path_factory.mktemp("tiny")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapter(base: Any, folder: Path, *, norm: float = 0.5, **settings: Any) -> AdapterFile:
    """An adapter of UNet and text encoder in a file."""
    pipe = copy_pipe(base) if isinstance(base, StableDiffusionPipeline) else copy.deepcopy(base)
    for seed, part in enumerate(("unet", "text_encoder") if hasattr(pipe, "unet") else ("transformer",)):
        own = settings if part != "text_encoder" else settings | {"targets": "attention+mlp"}
        excite(inject_oft(getattr(pipe, part), OFTConfig(**{"block_size": 8, **own}), "a"), "a", seed=seed, norm=norm)
    return load_adapter_file(save_oft_weights(pipe, folder / "ours", "a"))


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}


def rotated(base: Any, file: AdapterFile) -> dict[tuple[str, str], Tensor]:
    """Every adapted weight with the adapter in it, in float64."""
    pipe = copy_pipe(base)
    for part in file.components:
        getattr(pipe, part).double()
    load_oft_weights(pipe, file.path)
    fuse_oft(pipe)
    return {
        (part, name): module.weight.detach()
        for part in file.components
        for name, module in getattr(pipe, part).named_modules()
        if getattr(module, "weight", None) is not None
    }


def key_of(base: Any, part: str, layer: str, naming: str) -> str:
    """A layer's key as the tools spell it for Stable Diffusion 1."""
    name = layer if part == "unet" else f"text_model.{layer.removeprefix('text_model.')}"
    if naming == "diffusers":
        return f"{part}.{name}"
    if naming != "comfy":
        return f"lora_{'unet' if part == 'unet' else 'te'}_{name.replace('.', '_')}"
    if part == "unet":
        return f"diffusion_model.{unet_name(f'{name}.weight', base.unet).removesuffix('.weight')}"
    return f"text_encoders.clip_l.transformer.{name}"


@pytest.mark.thinned(5)
@pytest.mark.parametrize("naming", ["flat", "kohya", "diffusers", "comfy"])
@pytest.mark.parametrize("targets", ["attention", "all-linear+conv"])
def test_tools_of_one_file_come_to_our_weights(base: Any, tmp_path: Path, naming: str, targets: str) -> None:
    file = adapter(base, tmp_path, targets=targets, **FIVE_TERMS)
    wanted = rotated(base, file)
    written = write_single_file(tmp_path / "theirs.safetensors", file, parts_of(base), naming)
    assert written.notes == ()
    tensors = load_file(written.path)
    keys = [key.removesuffix(".oft_R.weight") for key in tensors]
    assert len(keys) == sum(len(state) for state in file.components.values())
    with safe_open(written.path, framework="pt") as opened:
        header = opened.metadata()
    meant = {key: layer for layer in wanted for key in [key_of(base, *layer, naming)]}
    for key in keys:
        part, layer = meant[key]
        weight = getattr(base, part).get_submodule(layer).weight.detach()
        for formula in (merged_weight_onetrainer, merged_weight_sd_scripts, merged_weight_comfy_node):
            got = formula(weight, algebra.of_layer(tensors, key), header)
            torch.testing.assert_close(got, wanted[part, layer], rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize("naming", ["flat", "kohya", "diffusers", "comfy"])
def test_what_is_written_is_read_again(base: Any, tmp_path: Path, naming: str) -> None:
    file = adapter(base, tmp_path, **FIVE_TERMS)
    written = write_single_file(tmp_path / "theirs.safetensors", file, parts_of(base), naming)
    again = read(written.path, parts_of(base)).file
    assert again.components.keys() == file.components.keys()
    for part, state in file.components.items():
        canonical = {key.removeprefix("text_model."): tensor for key, tensor in again.components[part].items()}
        assert canonical.keys() == {key.removeprefix("text_model.") for key in state}
        assert all(torch.equal(canonical[key.removeprefix("text_model.")], tensor) for key, tensor in state.items())


@pytest.mark.parametrize(
    ("family", "version"),
    [
        ("StableDiffusionPipeline", {"ss_base_model_version": "sd_v1", "ss_v2": "False"}),
        ("StableDiffusionPipeline 2.x", {"ss_base_model_version": "sd_v2", "ss_v2": "True"}),
        ("StableDiffusionXLPipeline", {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}),
        ("FluxPipeline", {}),
    ],
)
def test_the_header_says_which_base(family: str, version: dict[str, str], tmp_path: Path) -> None:
    pipe = tiny_family(family, tmp_path)
    pipe.register_to_config(_name_or_path="tiny")
    if family.endswith("2.x"):
        pipe.text_encoder.config.hidden_act = "gelu"  # OpenCLIP's, by which SD 2 is known
    file = adapter(pipe, tmp_path, **FIVE_TERMS)
    with safe_open(write_single_file(tmp_path / "x.safetensors", file, parts_of(pipe)).path, framework="pt") as opened:
        header = opened.metadata()
    assert {key: text for key, text in header.items() if key in ("ss_base_model_version", "ss_v2")} == version
    assert header["ss_network_module"] == "networks.oft_v2"


@pytest.mark.thinned(2)
@pytest.mark.parametrize("to", ["oft", "peft", "onetrainer", "sd-scripts", "comfyui-oftv2"])
def test_another_base_is_turned_as_well(base: Any, tmp_path: Path, to: str) -> None:
    """Files of rotations fit any base: its own weights are turned, `W R^T`."""
    file, another = adapter(base, tmp_path, **FIVE_TERMS), copy_pipe(base)
    torch.manual_seed(5)
    with torch.no_grad():
        for part in file.components:
            for parameter in getattr(another, part).parameters():
                parameter.normal_(std=0.2)
    before = copy_pipe(another)
    if to == "peft":
        path = write_peft(tmp_path / "theirs", file, parts_of(base)).path
        for part in file.components:
            model = peft.PeftModel.from_pretrained(getattr(another, part), path / part)
            setattr(another, part, model.merge_and_unload())
    else:
        theirs = tmp_path / "theirs.safetensors"
        path = file.path if to == "oft" else write_single_file(theirs, file, parts_of(base), tool=to).path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which says that it is another base
            load_oft_weights(another, path)
        fuse_oft(another)
    for part, state in file.components.items():
        for key, packed in state.items():
            layer = key.removesuffix(".oft_R.weight")
            weight, got = (getattr(p, part).get_submodule(layer).weight.detach() for p in (before, another))
            wanted = algebra.times(weight, algebra.neumann(algebra.skew(packed)).mT)
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5, msg=key)
            assert float((wanted - weight).abs().max()) > 1e-3


def test_another_series_is_told_by_how_much_it_differs(base: Any, tmp_path: Path) -> None:
    file = adapter(base, tmp_path)
    written = write_single_file(tmp_path / "theirs.safetensors", file, parts_of(base))
    assert len(written.notes) == 2
    (note,) = (note for note in written.notes if note.startswith("unet"))
    told = float(note.partition("by up to ")[2].split()[0])
    theirs = load_file(written.path)
    worst = 0.0
    for key, packed in theirs.items():
        if key.startswith("lora_unet_"):
            blocks = algebra.neumann(algebra.skew(packed)) - algebra.cayley(algebra.skew(packed))
            worst = max(worst, float(blocks.abs().max()))
    assert told == pytest.approx(worst, rel=0.05)
    assert told > 1e-3


def test_fused_weights_want_one_rotation(tmp_path: Path) -> None:
    pipe = tiny_family("FluxPipeline", tmp_path / "flux")
    apart = adapter(pipe, tmp_path / "apart", **FIVE_TERMS)
    with pytest.raises(AdapterFileError) as error:
        write_single_file(tmp_path / "x.safetensors", apart, parts_of(pipe), "kohya")
    assert_one_sentence(error, "double_blocks", "to_q", "share_qkv")
    assert not (tmp_path / "x.safetensors").exists()
    # In single blocks the MLP is part of the weight, too, and share_qkv does not tie it.
    double = [r"transformer_blocks\.\d+\.attn\.(to_|add_)[qkv](_proj)?"]
    shared = adapter(pipe, tmp_path / "shared", share_qkv=True, targets=double, **FIVE_TERMS)
    written = write_single_file(tmp_path / "x.safetensors", shared, parts_of(pipe), "kohya")
    again = read(written.path, parts_of(pipe)).file.components["transformer"]
    assert again.keys() == shared.components["transformer"].keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in shared.components["transformer"].items())


# -- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        FIVE_TERMS,
        {"parametrisation": "cayley_neumann", "neumann_order": 5},
        {"parametrisation": "cayley_neumann", "neumann_order": 3},
        {"block_size": 16},
        {"targets": [".*to_q", ".*proj_in", ".*conv_shortcut"]},
    ],
    ids=str,
)
def test_peft_itself_loads_it_and_answers_as_we_do(base: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    file = adapter(base, tmp_path, **settings)
    pipe = copy_pipe(base)
    load_oft_weights(pipe, file.path)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 5, 32)
    tokens = torch.randint(0, 100, (2, 7))
    for part, call in (("unet", (x, t, text)), ("text_encoder", (tokens,))):
        written = write_peft(tmp_path / part, part_of(file, part), parts_of(base))
        assert written.notes == ()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT warns about adjusted sizes and missing keys
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(getattr(base, part)), written.path)
        with torch.no_grad():
            plain, got, wanted = (m(*call)[0] for m in (getattr(base, part), theirs, getattr(pipe, part)))
        assert float((wanted - plain).abs().max()) > 1e-2
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_pefts_sizes_of_its_own_choice_are_found(base: Any, tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=100, target_modules=["to_q", "ff.net.2"])
    model = peft.get_peft_model(copy.deepcopy(base.unet), config)
    for name, parameter in model.named_parameters():
        if "oft_R" in name:
            nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(tmp_path / "theirs"))
    imported = read(tmp_path / "theirs" / "adapter_model.safetensors", parts_of(base)).file
    assert imported.metadata.components["unet"].block_size == "mixed"
    write_peft(tmp_path / "again", imported, parts_of(base))
    again, before = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("again", "theirs"))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[key], before[key]) for key in before)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.unet), tmp_path / "again")
    x = (torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 5, 32))
    torch.testing.assert_close(loaded(*x)[0], model(*x)[0], rtol=0, atol=1e-6)


def test_what_peft_cannot_hold_is_refused(base: Any, tmp_path: Path) -> None:
    conv = adapter(base, tmp_path / "conv", targets="all-linear+conv")
    with pytest.raises(AdapterFileError) as error:
        write_peft(tmp_path / "peft", part_of(conv, "unet"), parts_of(base))
    assert_one_sentence(error, "larger than 1x1")
    assert not (tmp_path / "peft").exists()


def test_settings_are_those_that_peft_writes(base: Any, tmp_path: Path) -> None:
    write_peft(tmp_path / "peft", part_of(adapter(base, tmp_path), "unet"), parts_of(base))
    model = peft.get_peft_model(copy.deepcopy(base.unet), peft.OFTConfig(target_modules=["to_q"]))
    model.save_pretrained(str(tmp_path / "t"))
    ours, theirs = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("peft", "t"))
    assert set(ours) <= set(theirs)
    assert isinstance(peft.PeftConfig.from_pretrained(str(tmp_path / "peft")), peft.OFTConfig)
