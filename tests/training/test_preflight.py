"""Bad input: one sentence each, all of them at once, before any model is loaded or anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from oft_diffusion.errors import AdapterFileError, ConfigError, DataError, OFTError, TrainingError
from oft_diffusion.pocket import pocket_path
from oft_diffusion.training import TrainConfig, preflight, train
from oft_diffusion.training.families.kinds import StableDiffusion
from oft_diffusion.training.find import find_base
from tests.helpers.single_files import write_single_file
from tests.helpers.tiny_sd import draw_pictures, tiny_pipeline
from tests.training.conftest import Run

Config = Callable[..., TrainConfig]
CONFIGS = Path(__file__).parents[2] / "train_scripts" / "configs"


@pytest.fixture(autouse=True)
def no_model_is_loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object) -> None:
        raise AssertionError("a model is loaded")

    if "run" not in request.fixturenames:
        monkeypatch.setattr(StableDiffusion, "load", load)


def refused(config: TrainConfig) -> OFTError:
    with pytest.raises(OFTError) as caught:
        train(config, progress=False)
    assert caught.value.expected
    assert caught.value.fix
    return caught.value


def test_what_the_issue_names(config: Config, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    draw_pictures(tmp_path / "one", count=1)
    torn = draw_pictures(tmp_path / "torn")
    (torn / "picture_1.png").write_bytes(b"no picture")
    mistakes: list[tuple[dict[str, object], type[OFTError], str]] = [
        ({"instance_dir": str(tmp_path / "empty")}, DataError, "holds no images"),
        ({"instance_dir": str(tmp_path / "one")}, DataError, "holds one image only"),
        ({"instance_dir": str(torn)}, DataError, "1 of 3 images in"),
        ({"resolution": 400}, DataError, "3 of 3 images"),
        ({"model": str(tmp_path / "empty")}, ConfigError, "has no model_index.json; it is empty"),
        ({"model": str(tmp_path / "gone")}, ConfigError, "there is no model"),
        ({"trigger": "dog"}, ConfigError, "is a common word"),
        ({"resolution": 17}, ConfigError, "is no multiple of 2"),
    ]
    if not torch.cuda.is_available():
        mistakes.append(({"mixed_precision": "fp16"}, ConfigError, "needs a GPU"))
    for knobs, kind, sentence in mistakes:
        error = refused(config(**knobs))
        assert isinstance(error, kind)
        assert sentence in error.problem
    assert not (tmp_path / "run").exists()


def test_all_at_once(config: Config, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    error = refused(
        config(
            instance_dir=str(tmp_path / "empty"), trigger="table", learning_rate=-1.0, resolution=17, resume="latest"
        )
    )
    message = str(error)
    assert message.count("Fix:") == 6  # five, and the one of the whole
    for sentence in ("learning_rate = -1.0", "holds no images", "a common word", "no multiple of 2", "no checkpoint"):
        assert sentence in message


def test_checks_do_not_trip_over_broken_knobs(config: Config) -> None:
    message = str(
        refused(config(resolution="large", block_size="many", trigger=3, steps=None, output_dir=7, model=None))
    )
    assert message.count("Fix:") == 7


def test_full_disk(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    error = refused(config())
    assert isinstance(error, TrainingError)
    assert "has 5 MB free" in error.problem
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000_000))
    preflight(config())
    error = refused(config(prior_preservation=True, num_class_images=200_000))
    assert "200000 class images" in error.expected


def test_output_that_cannot_be_written(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # tests may run as root, who may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert "cannot be written" in refused(config(output_dir=str(tmp_path / "locked" / "run"))).problem


def test_output_that_is_a_file(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(config(output_dir=str(tmp_path / "file"))).problem


def test_hub_id_without_a_network(config: Config) -> None:
    error = refused(config(model="owner/no-such-model"))
    assert "the model owner/no-such-model cannot be fetched from the hub" in error.problem


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"block_size": 24}, "block_size=24 does not divide the in_features of 32 of 32 targets"),
        ({"targets": ["nothing"]}, "match no layer of UNet2DConditionModel"),
        ({"targets": ["("]}, "is no regular expression"),
        ({"targets": [".*attn2.*to_k"], "block_size": 32, "text_encoder": True}, ""),
        ({"text_encoder": True, "block_size": 64}, "block_size=64 does not divide"),
    ],
)
def test_targets_and_block_sizes(knobs: dict[str, object], sentence: str, config: Config) -> None:
    if sentence:
        assert sentence in refused(config(**knobs)).problem
    else:
        preflight(config(**knobs))


def test_configs_of_which_no_model_can_be_built(config: Config, tiny_sd: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_sd, tmp_path / "model"))
    file = model / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"down_block_types": ["NoBlock2D"]}))
    assert "no model can be built from" in refused(config(model=str(model))).problem


def test_prompts_that_are_cut_are_noted(config: Config, tmp_path: Path) -> None:
    long = " ".join(["red"] * 90)
    notes = preflight(config(validation_prompts=["a dog", long], instance_prompt=f"a sks mug {long}")).notes
    assert notes == [f"longer than the text encoder reads, and cut: {p!r}" for p in (f"a sks mug {long}", long)]


@pytest.mark.parametrize(
    ("knobs", "note"),
    [
        ({"neumann_order": 4}, "without parametrisation = 'cayley_neumann' this does nothing: neumann_order = 4"),
        ({"prior_weight": 0.5, "num_class_images": 7},
         "without prior_preservation = true this does nothing: prior_weight = 0.5, num_class_images = 7"),
        ({"validation_every": 7},
         "without validation_prompts this does nothing: validation_every = 7"),
        ({"config_dir": "configs"},
         "without a single-file model this does nothing: config_dir = 'configs'"),
    ],
)  # fmt: skip
def test_settings_that_do_nothing_are_noted(knobs: dict[str, object], note: str, config: Config) -> None:
    assert note in preflight(config(**knobs)).notes


def test_settings_that_do_something_are_not_noted(config: Config) -> None:
    knobs = {"parametrisation": "cayley_neumann", "neumann_order": 4, "prior_preservation": True, "prior_weight": 0.5,
             "num_class_images": 7, "validation_prompts": ["a dog"], "validation_every": 7}  # fmt: skip
    assert not [note for note in preflight(config(**knobs)).notes if "does nothing" in note]
    assert not preflight(config()).notes


def test_notes_are_no_errors(config: Config, tmp_path: Path) -> None:
    plan = preflight(config(instance_dir=str(draw_pictures(tmp_path / "two", count=2)), resolution=32))
    assert len(plan.notes) == 2


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_configs_pass_with_folders_that_exist(path: Path, tiny_sd: Path, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "photos", side=512)
    own = {"model": str(tiny_sd), "instance_dir": str(pictures), "output_dir": str(tmp_path / "run")}
    plan = preflight(TrainConfig.from_toml(path, {**own, "evaluation_count": 0}))
    assert len(plan.pictures) == 3


def test_the_shipped_bases_name_is_explained(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(TrainConfig.from_toml(CONFIGS / "pocket.toml", {"output_dir": str(tmp_path / "run")}))
    assert error.problem == "model = 'pocket' is a name that the command line alone knows"
    assert error.fix == "use model = str(oft_diffusion.pocket.pocket_path())"
    assert preflight(config(model=str(pocket_path()), resolution=16)).base.pipeline == "StableDiffusionPipeline"
    (tmp_path / "pocket").symlink_to(config().model)  # a folder of that name is a folder like any other
    monkeypatch.chdir(tmp_path)
    preflight(config(model="pocket"))


def test_adapters_to_continue_from(config: Config, run: Run, tmp_path: Path) -> None:
    _, first = run(config())
    adapter = str(first.adapter)
    out = str(tmp_path / "next")
    assert isinstance(
        refused(config(output_dir=out, init_adapter=str(tmp_path / "none.safetensors"))), AdapterFileError
    )
    error = refused(config(output_dir=out, init_adapter=adapter, block_size=8, scaled=True))
    assert "unet's block_size is 16 there, 8 here; unet's scaled is False there, True here" in error.problem
    error = refused(config(output_dir=out, init_adapter=adapter, text_encoder=True))
    assert "adapts unet" in error.problem
    assert error.fix == "set text_encoder = false"
    preflight(config(output_dir=out, init_adapter=adapter, block_size="auto"))
    first.adapter.write_bytes(first.adapter.read_bytes()[:-50])
    assert isinstance(refused(config(output_dir=out, init_adapter=adapter)), AdapterFileError)


def test_another_tools_adapter_is_no_start(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "foreign.safetensors"
    save_file({"unet.mid_block.to_q.oft_R.weight": torch.zeros(2, 120)}, file)
    error = refused(config(init_adapter=str(file)))
    assert "was written by another tool" in error.problem
    assert error.fix == "load it with the tool that wrote it"


def test_single_file_checkpoint_trains(config: Config, run: Run, tiny_sd: Path, tmp_path: Path) -> None:
    file = write_single_file(tiny_pipeline(tmp_path), tmp_path / "tiny.safetensors")
    assert "needs configs" in refused(config(model=str(file))).problem
    assert "pickled" in refused(config(model=str(tmp_path / "sd.ckpt"), config_dir=str(tiny_sd))).problem
    bases = [find_base(str(file), str(tiny_sd)), find_base(str(tiny_sd))]
    one, other = (StableDiffusion.load(base, torch.float32) for base in bases)
    for component in ("unet", "text_encoder", "vae"):
        found = other.module(component).state_dict()
        own = one.module(component).state_dict()
        assert own.keys() == found.keys()
        assert all(own[name].equal(found[name]) for name in found)
    _, from_file = run(config(model=str(file), config_dir=str(tiny_sd)))
    _, from_folder = run(config(overwrite=True))
    # Equal weights at addresses of another alignment: the processor may add up in another order.
    assert from_file.losses == pytest.approx(from_folder.losses, rel=1e-6)
