"""`TrainConfig`: one list of knobs in three spellings, and everything wrong with it at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oft_diffusion.errors import ConfigError
from oft_diffusion.training import TrainConfig
from oft_diffusion.training.checks import settings_problems
from oft_diffusion.training.command import dashed
from oft_diffusion.training.config import REQUIRED

CONFIGS = Path(__file__).parents[2] / "train_scripts" / "configs"
REST = {"model": "m", "instance_dir": "i", "trigger": "sks", "class_word": "dog", "output_dir": "o"}
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1)


def errors(**knobs: object) -> str:
    return "\n".join(str(p.error) for p in settings_problems(TrainConfig.from_dict(REST | knobs)))


def from_options(options: list[str]) -> TrainConfig:
    parser = argparse.ArgumentParser()
    TrainConfig.add_arguments(parser)
    return TrainConfig.from_namespace(parser.parse_args(options))


@given(
    model=TEXT, prompts=st.lists(TEXT, max_size=3), rate=st.floats(1e-9, 10), seed=st.integers(0, 2**40),
    flag=st.booleans(), block=st.one_of(st.just("auto"), st.integers(2, 128)), gamma=st.none() | st.floats(0.1, 20),
)  # fmt: skip
def test_toml_round_trip(tmp_path_factory, model, prompts, rate, seed, flag, block, gamma) -> None:
    config = TrainConfig.from_dict(
        REST | {"model": model, "validation_prompts": prompts, "learning_rate": rate, "seed": seed, "flip": flag,
                "block_size": block, "min_snr_gamma": gamma}
    )  # fmt: skip
    path = tmp_path_factory.mktemp("toml") / "c.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert TrainConfig.from_toml(path) == config
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_every_knob_is_documented_and_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        from_options(["--help"])
    shown = capsys.readouterr().out
    for f in fields(TrainConfig):
        assert f"--{f.name.replace('_', '-')}" in shown
        assert len(f.metadata["about"]) > 10
    assert {f.name for f in fields(TrainConfig) if f.name in REQUIRED} == set(REQUIRED)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(TrainConfig.from_dict(REST | {"steps": 7, "min_snr_gamma": 5.0}).to_toml())
    config = from_options(
        ["--config", str(path), "--learning-rate", "3e-4", "--no-cache-latents", "--targets", "a", "b",
         "--min-snr-gamma", "none", "--block-size", "auto", "--validation-prompts", "x", "y"]
    )  # fmt: skip
    assert (config.steps, config.learning_rate, config.cache_latents) == (7, 3e-4, False)
    assert (config.targets, config.min_snr_gamma, config.block_size) == (("a", "b"), None, "auto")
    assert config.validation_prompts == ("x", "y")
    assert from_options(["--config", str(path), "--targets", "mlp"]).targets == "mlp"


def test_underscored_options_mean_the_same() -> None:
    assert dashed(["--learning_rate", "a_b", "--output_dir=x_y"]) == ["--learning-rate", "a_b", "--output-dir=x_y"]


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('learning_rat = 1\nmodle = "x"')
    with pytest.raises(ConfigError, match=r"'learning_rat' \(did you mean 'learning_rate'\?\), 'modle' \(.*'model'"):
        TrainConfig.from_toml(path)


def test_missing_file_broken_toml_and_missing_knobs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no settings file"):
        TrainConfig.from_toml(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("model = ")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        TrainConfig.from_toml(tmp_path / "broken.toml")
    with pytest.raises(ConfigError, match=r"lacks instance_dir, trigger, class_word, output_dir.*--instance-dir"):
        from_options(["--model", "x"])


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"resolution": "big"}, "resolution = 'big' is not usable. Expected: an integer at least 16"),
        ({"resolution": 8}, "resolution = 8 is out of range"),
        ({"seed": 2**64 - 1}, "seed = 18446744073709551615 is out of range"),
        ({"steps": True}, "steps = True is not usable"),
        ({"learning_rate": 0}, "learning_rate = 0.0 is out of range"),
        ({"learning_rate": float("nan")}, "learning_rate = nan is not usable"),
        ({"lr_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"mixed_precision": "fp8"}, "'no' or 'fp16' or 'bf16'"),
        ({"block_size": 1}, "block_size=1 is not usable"),
        ({"trigger": " "}, "trigger is empty"),
        ({"trigger": "dog"}, "the trigger 'dog' is part of the class word"),
        ({"instance_prompt": "a photo of a dog"}, "does not hold the trigger"),
        (
            {"class_prompts": ("a dog", "a {trigger} dog"), "prior_preservation": True},
            "class_prompts[1] = 'a sks dog' holds the trigger",
        ),
        ({"class_prompts": (), "prior_preservation": True}, "no class_prompts"),
        ({"prior_twins": 2, "prior_preservation": True}, "would teach that the pictures do not show the subject"),
        ({"validation_prompts": ("a dog", "")}, "a list of texts"),
        ({"validation_prompts": ["a {colour} dog"]}, "braces that mean nothing"),
        ({"validation_prompts": "a dog"}, "a list of texts"),
        ({"text_encoder": True, "cache_text_embeddings": True}, "cached embeddings would not follow"),
        ({"text_encoder_learning_rate": 1e-5}, "text_encoder is off, so it would do nothing"),
        ({"class_dir": "x"}, "prior_preservation is off, so it would do nothing"),
        ({"resume": "latest", "overwrite": True}, "resume and overwrite are both set"),
        ({"warmup_steps": 500}, "takes up all of steps = 500"),
        ({"warmup_steps": 300, "decay_steps": 201}, "more than steps = 500"),
        ({"decay_steps": 10, "lr_schedule": "linear"}, "lr_schedule = 'linear', which falls all the way"),
        ({"min_crop": 0.0}, "min_crop = 0.0 is out of range"),
        ({"min_timestep": 500, "max_timestep": 500}, "min_timestep = 500 is not below max_timestep = 500"),
        ({"coft_eps": -1.0}, "coft_eps=-1.0 bounds nothing"),
    ],
)
def test_one_sentence_per_mistake(knobs: dict[str, object], sentence: str) -> None:
    found = errors(**knobs)
    assert sentence in found
    assert found.count("Fix:") == 1


def test_all_mistakes_at_once() -> None:
    found = errors(resolution="x", steps=0, lr_schedule="up", block_size=1, warmup_steps=-1)
    assert found.count("Fix:") == 5


def test_the_default_settings_have_no_problem() -> None:
    assert errors() == ""


def test_equal_settings_compare_equal_however_they_are_spelled() -> None:
    a = TrainConfig.from_dict(REST | {"learning_rate": 1, "validation_prompts": ["x"], "model": Path("m")})
    b = replace(a, learning_rate=1.0, validation_prompts=("x",), model="m")
    assert a == b


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_configs_have_no_problem(path: Path) -> None:
    assert not settings_problems(TrainConfig.from_toml(path))


def test_every_seed_that_is_accepted_works() -> None:
    [seed] = [f.metadata["maximum"] for f in fields(TrainConfig) if f.name == "seed"]
    assert errors(seed=seed) == ""
    torch.manual_seed(seed)
    torch.Generator().manual_seed(seed + 63)  # the last column of the widest grid


def test_fill(config: Callable[..., TrainConfig]) -> None:
    assert config().fill("a {trigger} {class_word}, {{x}}") == "a sks mug, {x}"
