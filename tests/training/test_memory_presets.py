"""Settings by memory: they fill in what nobody said, and what they promise is counted on bases of full size."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from benchmarks.full_size import FULL_SIZE, write_stub
from benchmarks.step_memory import FAMILIES, step_gigabytes, vae_gigabytes
from oft_diffusion.errors import ConfigError
from oft_diffusion.training import TrainConfig, memory_presets, train
from oft_diffusion.training.checks import settings_problems
from oft_diffusion.training.command import main
from oft_diffusion.training.config import REQUIRED
from oft_diffusion.training.count import Counts, count
from oft_diffusion.training.find import find_base
from oft_diffusion.training.memory_presets import MEMORIES, ROWS, filled, row_for, row_of

Config = Callable[..., TrainConfig]
KNOBS = {f.name for f in fields(TrainConfig)} - set(REQUIRED)


# -- filling in --------------------------------------------------------------------------------------------------------


def test_presets_set_knobs_that_exist_and_agree() -> None:
    for row in ROWS:
        assert list(row.settings) == list(MEMORIES)
        for settings in row.settings.values():
            assert settings.keys() <= KNOBS
            given = {"model": "m", "instance_dir": "i", "trigger": "sks", "class_word": "dog", "output_dir": "o"}
            assert settings_problems(TrainConfig.from_dict(given | dict(settings))) == []


def test_only_what_nobody_said_is_filled_in(config: Config, tmp_path: Path) -> None:
    found = config(memory="8 GB")
    assert (found.mixed_precision, found.gradient_checkpointing, found.cache_text_embeddings) == ("bf16", True, True)
    own = config(memory="8 GB", mixed_precision="no", gradient_checkpointing=False)
    assert (own.mixed_precision, own.gradient_checkpointing, own.cache_text_embeddings) == ("no", False, True)
    assert config() == config(memory=None)
    with_text_encoder = config(memory="8 GB", text_encoder=True)
    assert not with_text_encoder.cache_text_embeddings
    assert settings_problems(with_text_encoder) == []
    path = tmp_path / "c.toml"
    path.write_text('memory = "8 GB"\ngradient_checkpointing = false\n' + "".join(
        f"{name} = {json.dumps(getattr(found, name))}\n" for name in REQUIRED
    ))  # fmt: skip
    read = TrainConfig.from_toml(path, {"mixed_precision": "fp16"})
    assert (read.mixed_precision, read.gradient_checkpointing, read.cache_text_embeddings) == ("fp16", False, True)
    path.write_text(read.to_toml())  # which holds what memory stood for
    assert TrainConfig.from_toml(path) == read


def test_what_excludes_a_setting_keeps_it_out(tmp_path: Path) -> None:
    model = {"model": str(index(tmp_path, "SDXL", "StableDiffusionXLPipeline"))}
    assert filled(model | {"memory": "8 GB"})["quantization"] == "nf4"
    assert "quantization" not in filled(model | {"memory": "8 GB", "denoiser_file": "x.gguf"})
    for knob in ({"cache_latents": False}, {"cache_text_embeddings": False}, {"text_encoder": True}):
        assert "drop_encoders" not in filled(model | {"memory": "8 GB"} | knob)


def test_the_option_is_for_shipped_names_too(
    config: Config, tmp_path: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(config(model="shipped", steps=1).to_toml().replace("gradient_checkpointing = false\n", ""))
    arguments = ["--config", str(path), "--memory", "8 GB"]
    assert main(arguments, shipped={"shipped": lambda: tiny_sd}) == 0
    assert TrainConfig.from_toml(Path(config().output_dir) / "config.toml").gradient_checkpointing
    assert main(["--config", str(path), "--memory", "9 GB"], shipped={"shipped": lambda: tiny_sd}) == 1
    assert "memory = '9 GB' is none that is known" in capsys.readouterr().err


def index(folder: Path, name: str, pipeline: str, layers: int | None = None) -> Path:
    """A model's folder, as far as it tells what the model is."""
    model = folder / name
    (model / "transformer").mkdir(parents=True)
    (model / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    if layers is not None:
        (model / "transformer" / "config.json").write_text(json.dumps({"num_layers": layers}))
    return model


def test_a_base_is_told_by_its_configs(tmp_path: Path) -> None:
    for name, model, layers in (
        ("Flux.1", "FluxPipeline", 19),
        ("Stable Diffusion 3.5 Large", "StableDiffusion3Pipeline", 38),
        ("Stable Diffusion 3 or 3.5 Medium", "StableDiffusion3Pipeline", 24),
    ):
        found = index(tmp_path, name, model, layers)
        assert row_for(found).about == name
        assert filled({"model": str(found), "memory": "8 GB"}).get("layer_offload", 0.0) == (layers != 24)
    assert row_for(index(tmp_path, "other", "SanaPipeline", 60)).about.startswith("other")
    with pytest.raises(ConfigError, match="does not tell which it is"):
        filled({"model": str(tmp_path), "memory": "8 GB"})


def test_of_a_single_file_nothing_is_quantized(tmp_path: Path) -> None:
    def asked(name: str, memory: str) -> dict[str, Any]:
        configs = tmp_path / name
        if not configs.exists():
            kinds = {"xl": "StableDiffusionXLPipeline", "flux": "FluxPipeline", "other": "SanaPipeline"}
            index(tmp_path, name, kinds[name], 19)
        return filled({"model": "x.safetensors", "config_dir": str(configs), "memory": memory})

    assert asked("xl", "8 GB")["layer_offload"] == asked("flux", "12 GB")["layer_offload"] == 1.0
    assert "layer_offload" not in asked("xl", "12 GB")
    with pytest.raises(ConfigError, match=r"memory = '8 GB' is too little.*single file.*save_pretrained.*\"12 GB\""):
        asked("flux", "8 GB")
    for memory in MEMORIES:
        with pytest.raises(ConfigError, match=r"single file.*save_pretrained it and pass that folder, or leave memory"):
            asked("other", memory)
    for row in ROWS:
        for settings in row.possible(single_file=True).values():
            assert not any("quantization" in knob for knob in settings)


def test_a_run_that_goes_on_has_its_settings_already(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"memory = '8 GB' is given with resume.*config.toml of the run has"):
        config(memory="8 GB", resume="latest")


@pytest.mark.parametrize("memory", [["8 GB"], 8, "8", "8 GiB", "", {}])
def test_memory_is_one_of_a_few_words(memory: object, config: Config) -> None:
    with pytest.raises(ConfigError, match=r"memory = .* is none that is known. Expected: 8 GB, 12 GB, 16 GB, 24 GB"):
        config(memory=memory)


def test_memory_is_understood_however_it_is_spaced(config: Config) -> None:
    assert config(memory="8GB") == config(memory=" 8 gb") == config(memory="8 GB") != config()
    with pytest.raises(ConfigError, match=r"'memroy' .did you mean 'memory'"):
        config(memroy="8 GB")


def test_what_the_base_cannot_be_told_by_is_one_sentence(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config_dir = 3 is not usable"):
        train(config(memory="8 GB", config_dir=3))
    model = index(tmp_path, "null", "StableDiffusion3Pipeline")
    (model / "transformer" / "config.json").write_text('{"num_layers": null}')
    with pytest.raises(ConfigError, match=r"does not tell which it is .*num_layers = null"):
        filled({"model": str(model), "memory": "24 GB"})


def test_of_a_hub_model_the_configs_alone_are_fetched_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = index(tmp_path, "large", "StableDiffusion3Pipeline", 38), list[str]()

    def snapshot(hub_id: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert allow_patterns == ["model_index.json", "transformer/config.json"]
        if local_files_only and not asked:
            raise LocalEntryNotFoundError("not in the cache")
        if not local_files_only:
            asked.append(hub_id)
        return str(folder)

    monkeypatch.setattr(memory_presets, "snapshot_download", snapshot)
    for _ in range(2):
        assert row_for(Path("someone/large")).about == "Stable Diffusion 3.5 Large"
    assert asked == ["someone/large"]


@pytest.mark.parametrize("there", [[], ["model_index.json"]])
def test_half_a_model_in_the_hubs_cache_is_made_whole(
    there: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = index(tmp_path, "large", "StableDiffusion3Pipeline", 38)
    (whole / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline", "transformer": ["", ""]}')
    half = tmp_path / "half"
    half.mkdir()
    for name in there:
        (half / name).write_bytes((whole / name).read_bytes())

    def snapshot(_: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert allow_patterns
        return str(half if local_files_only else whole)

    monkeypatch.setattr(memory_presets, "snapshot_download", snapshot)
    assert row_for(Path("someone/large")).about == "Stable Diffusion 3.5 Large"


# -- counting ----------------------------------------------------------------------------------------------------------

# GB that come and go: estimates, none measured on a card (benchmarks/card_memory.py would). In a step, checkpointed and
# not: twice what benchmarks/step_memory.py counts, since on a card autocast keeps some in float32; of Flux.1, of which
# that is 2.6 and 24, 1.25 and 1.7 times that. While a picture is encoded, and while a few are drawn, of which decoding
# one in float32 takes most: what is counted there, and what the denoiser takes for them.
STEP = {"SD 1.5": (1.0, 3.4), "SDXL": (2.5, 23.0), "SD 3.5 Medium": (1.5, 16.0), "SD 3.5 Large": (3.0, 30.0),
        "Flux.1": (3.2, 40.0)}  # fmt: skip
ENCODE = {512: 0.7, 1024: 2.8}
DRAW = {512: 1.5, 1024: 4.0}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("name", ["SD 1.5", "SD 3.5 Large"])
def test_what_steps_are_allowed_is_twice_what_is_counted(name: str, checkpointed: bool) -> None:
    counted = step_gigabytes(name, FAMILIES[name], checkpointed=checkpointed)
    assert STEP[name][not checkpointed] == pytest.approx(2 * counted, rel=0.05)


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL"])
def test_what_pictures_are_allowed_is_more_than_is_counted(name: str) -> None:
    encoding, decoding = vae_gigabytes(name)
    resolution = FULL_SIZE[name].resolution
    assert encoding < ENCODE[resolution] < 1.1 * encoding
    assert 1.2 * decoding < DRAW[resolution] < 2 * decoding


def peak(name: str, settings: TrainConfig, counts: Counts) -> float:
    """GB at most on a card."""
    part = {key: size / 1e9 for key, size in counts.parts.items()}
    encoders = sum(size for key, size in part.items() if key.startswith("text_encoder"))
    alone = sum(part.values()) - encoders - counts.streamed / 1e9  # denoiser and VAE
    loading = max(alone - part["vae"], counts.arriving / 1e9)
    resolution = FULL_SIZE[name].resolution
    steps = alone - part["vae"] + (counts.adapter_bytes + counts.training_bytes) / 1e9
    steps += STEP[name][not settings.gradient_checkpointing]
    latents = alone + (0 if settings.drop_encoders else encoders) + ENCODE[resolution]
    prompts = alone + encoders + 0.2
    return max(loading, steps, latents, prompts, alone + DRAW[resolution])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", FULL_SIZE)
def test_presets_fit_the_memory_that_they_are_for(name: str, tmp_path: Path) -> None:
    model = write_stub(name, tmp_path)
    base = find_base(str(model))
    row = row_for(model)
    assert row.about in (r.about for r in ROWS[:-1])

    def need(settings: dict[str, Any]) -> float:
        given = {"model": str(model), "instance_dir": "i", "trigger": "sks", "class_word": "dog", "output_dir": "o"}
        chosen = TrainConfig.from_dict(given | settings)
        return peak(name, chosen, count(chosen, base))

    for single_file in (False, True):
        needed = {memory: need(dict(settings)) for memory, settings in row.possible(single_file).items()}
        assert all(needed[memory] < MEMORIES[memory] / 1e9 for memory in needed), needed
        least = need(dict(row_of("").settings["8 GB"] if not single_file else memory_presets._STREAMED))
        refused = [memory for memory in MEMORIES if memory not in needed]
        assert all(least > MEMORIES[memory] / 1e9 for memory in refused), least
