"""A base that cannot be trained is refused by a look at its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from oft_diffusion.errors import ConfigError
from oft_diffusion.training.find import find_base, is_hub_id


@pytest.fixture
def model(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_found(model: Path) -> None:
    base = find_base(str(model))
    assert (base.vae_factor, base.prediction_type, base.variant, base.single_file) == (2, "epsilon", None, False)
    assert base.pipeline == "StableDiffusionPipeline"
    base.check_resolution(16)
    with pytest.raises(ConfigError, match=r"resolution = 17 is no multiple of 2.*use 16 or 18"):
        base.check_resolution(17)
    base.check_timesteps(999, 1000)
    base.check_timesteps(0, None)
    for lowest, end in ((1000, None), (0, 1001)):
        with pytest.raises(ConfigError, match=r"timesteps from .* are asked for, but .* has 1000"):
            base.check_timesteps(lowest, end)


def test_fingerprint_knows_copies(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    edit(copy / "unet" / "config.json", _diffusers_version="9.9", _name_or_path="elsewhere")
    assert find_base(str(model)).fingerprint() == find_base(str(copy)).fingerprint()


@pytest.mark.thinned(2)
@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_fingerprint_knows_a_change_of_any_tensor(model: Path, component: str) -> None:
    before = find_base(str(model)).fingerprint()
    [weights] = (model / component).glob("*.safetensors")
    tensors = load_file(weights)
    seen = {before}
    for name in tensors:
        save_file({**tensors, name: tensors[name] + 0.1}, weights, {"format": "pt"})
        seen.add(find_base(str(model)).fingerprint())
    assert len(seen) == 1 + len(tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: edit(m / "scheduler" / "scheduler_config.json", prediction_type="v_prediction"),
        lambda m: edit(m / "text_encoder" / "config.json", hidden_act="gelu"),
        lambda m: edit(m / "vae" / "config.json", scaling_factor=0.5),
        lambda m: [p.write_bytes(p.read_bytes() + b" ") for p in (m / "tokenizer").glob("*.json")],
    ],
    ids=["scheduler", "text encoder", "vae", "tokenizer"],
)
def test_fingerprint_knows_the_configs(change: Callable[[Path], object], model: Path) -> None:
    before = find_base(str(model)).fingerprint()
    change(model)
    assert find_base(str(model)).fingerprint() != before


def test_fp16_only_folder(model: Path) -> None:
    for file in [*model.glob("*/diffusion_pytorch_model.safetensors"), *model.glob("*/model.safetensors")]:
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert find_base(str(model)).variant == "fp16"
    (model / "unet" / "diffusion_pytorch_model.fp16.safetensors").rename(
        model / "unet" / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(ConfigError, match="only fp16 weights for some"):
        find_base(str(model))


def empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def one_file_inside(model: Path) -> None:
    empty(model)
    (model / "v1-5.safetensors").touch()


def truncate(model: Path) -> None:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pickle_weights(model: Path) -> None:
    (model / "vae" / "diffusion_pytorch_model.safetensors").rename(model / "vae" / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (shutil.rmtree, "there is no model"),
        (empty, "has no model_index.json; it is empty"),
        (one_file_inside, "v1-5.safetensors, with config_dir"),
        (lambda m: edit(m / "model_index.json", _class_name="LTXPipeline"), "is a LTXPipeline"),
        (lambda m: (m / "unet" / "config.json").unlink(), "lacks unet/config.json"),
        (lambda m: (m / "vae" / "config.json").write_text("{"), "vae/config.json cannot be read"),
        (lambda m: (m / "vae" / "config.json").write_text("{}"), "vae/config.json has no list block_out_channels"),
        (lambda m: (m / "unet" / "config.json").write_text("[]"), "unet/config.json has no list block_out_channels"),
        (lambda m: edit(m / "vae" / "config.json", block_out_channels=[]), "has no list block_out_channels"),
        (lambda m: [p.unlink() for p in (m / "tokenizer").iterdir()], "lacks the files of tokenizer"),
        (truncate, "are truncated or corrupt"),
        (pickle_weights, "diffusion_pytorch_model.bin is a pickle"),
        (lambda m: (m / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "holds no .safetensors weights"),
        (lambda m: edit(m / "unet" / "config.json", in_channels=9), "takes 9 channels, but its VAE makes 4"),
        (lambda m: edit(m / "scheduler" / "scheduler_config.json", prediction_type="flow"), "prediction_type 'flow'"),
    ],
)
def test_unusable_folders(break_it: Callable[[Path], object], sentence: str, model: Path) -> None:
    break_it(model)
    with pytest.raises(ConfigError) as caught:
        find_base(str(model))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("name", "config_dir", "sentence"),
    [
        ("sd.ckpt", None, "is a pickled checkpoint"),
        ("sd.txt", None, "is no model file"),
        ("sd.safetensors", None, "needs configs, which diffusers would fetch from the hub"),
        ("sd.safetensors", "nowhere", "has no model_index.json"),
    ],
)
def test_unusable_files(name: str, config_dir: str | None, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError) as caught:
        find_base(str(tmp_path / name), config_dir)
    assert sentence in str(caught.value)


def test_corrupt_single_file(tmp_path: Path, tiny_sd: Path) -> None:
    (tmp_path / "sd.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match="truncated or corrupt"):
        find_base(str(tmp_path / "sd.safetensors"), str(tiny_sd))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owner/name", True), ("stable-diffusion-v1-5/stable-diffusion-v1-5", True), ("model", False), ("a/b/c", False),
     ("./model", False), ("owner/sd.safetensors", False), ("/abs/model", False), ("tests/nothing", False)],
)  # fmt: skip
def test_hub_ids(name: str, expected: bool) -> None:
    assert is_hub_id(name) == expected
