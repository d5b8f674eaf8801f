"""The guide and settings.md say what is so: every setting with its default, options that exist, code that runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from oft_diffusion.training import TrainConfig
from oft_diffusion.training.command import main
from oft_diffusion.training.memory_presets import MEMORIES, ROWS

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SETTINGS = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def shown(default: Any) -> str:
    if default is MISSING:
        return ""
    if default is None:
        return "none"
    return f"`{json.dumps(default)}`"


def test_every_setting_is_in_the_table_as_it_is() -> None:
    rows = {
        name: (star, default) for name, star, default in re.findall(r"^\| `(\w+)`( \*)? \| (.*?) ?\|", SETTINGS, re.M)
    }
    assert rows.keys() == {f.name for f in fields(TrainConfig)}
    for f in fields(TrainConfig):
        assert rows[f.name] == (" *" if f.metadata.get("free") else "", shown(f.default).strip()), f.name


def test_settings_by_memory_are_those_of_the_table() -> None:
    def told(settings: Mapping[str, Any]) -> str:
        level = "frugal" if "drop_encoders" in settings else "checkpointed"
        level = level if "gradient_checkpointing" in settings else "cached"
        bits = [("quantization", ""), ("text_encoder_quantization", "encoders ")]
        found = [level, *(f"{words}{settings[knob]}" for knob, words in bits if knob in settings)]
        return ", ".join([*found, *(["streamed"] if "layer_offload" in settings else [])])

    for row in ROWS:
        cells = [told(row.settings[memory]) for memory in MEMORIES]
        assert f"| {row.about} | {' | '.join(cells)} |\n" in SETTINGS


def test_options_exist_and_files_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    options = capsys.readouterr().out
    known = ("--adapter", "--guidance", "--multi_gpu", "--num_processes", "--no-")  # of `generate` and of accelerate
    for option in set(re.findall(r"--[a-z][a-z_-]+", GUIDE + SETTINGS)) - set(known):
        assert option in options, option
    for file in set(re.findall(r"train_scripts/[\w./]*\w", GUIDE)):
        assert (ROOT / file).exists(), file
    for name in re.findall(r"\]\(([^)#]+)", GUIDE + SETTINGS):
        assert name.startswith("https://arxiv.org/") or (ROOT / "docs" / name).is_file(), name
    assert GUIDE.count("\n") <= 200


def test_the_python_block_runs(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "mug.toml").write_text(config(steps=1).to_toml())
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    exec(compile(code, "docs/training.md", "exec"), {"__name__": "guide"})  # noqa: S102 - our own guide
    assert str(config().output_dir) in capsys.readouterr().out


def test_what_a_run_writes_is_what_the_guide_lists(config: Callable[..., TrainConfig], run: Any) -> None:
    _, result = run(config(validation_prompts=["a dog"], prior_preservation=True, num_class_images=1, steps=1))
    listed = GUIDE[GUIDE.index("## What the run writes") : GUIDE.index("## Stopping")]
    for path in result.adapter.parent.iterdir():
        assert re.sub(r"\d{6}", "NNNNNN", path.name) in listed, path.name
    for path in result.checkpoint.iterdir():
        assert path.name in listed, path.name
