"""Resuming: N + N steps are 2N steps, to the bit; anything else is refused by name."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from oft_diffusion.errors import TrainingError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.training import TrainConfig, train
from oft_diffusion.training.checkpoint import list_checkpoints, load_checkpoint, require_space, restore_rng, rng_states
from oft_diffusion.training.command import main
from tests.helpers.tiny_sd import draw_pictures, write_tiny_sd
from tests.training.conftest import Run

Config = Callable[..., TrainConfig]


def same_adapter(a: Path, b: Path) -> bool:
    one, two = load_adapter_file(a).components, load_adapter_file(b).components
    return one.keys() == two.keys() and all(one[c][n].equal(two[c][n]) for c in one for n in one[c])


SETTINGS = [
    {},
    {"text_encoder": True, "batch_size": 2, "flip": True},
    {"scaled": True, "accumulation": 2, "cache_latents": False, "share_qkv": True},
    {"coft_eps": 0.01, "weight_decay": 0.1, "gradient_checkpointing": True},
]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "text", "scaled", "coft"])
def test_n_and_n_steps_are_2n_steps(settings: dict[str, object], config: Config, run: Run, tmp_path: Path) -> None:
    straight, halves = str(tmp_path / "straight"), str(tmp_path / "halves")
    _, whole = run(config(steps=6, output_dir=straight, **settings))
    run(config(steps=3, output_dir=halves, **settings))
    torch.manual_seed(99)
    steps, resumed = run(config(steps=6, output_dir=halves, resume="latest", **settings))
    assert [s.step for s in steps] == [4, 5, 6]
    assert resumed.losses == whole.losses
    assert same_adapter(resumed.adapter, whole.adapter)
    ours, theirs = (load_checkpoint(Path(str(r.checkpoint))) for r in (resumed, whole))
    assert all(ours.tensors[name].equal(theirs.tensors[name]) for name in theirs.tensors if not name.startswith("rng/"))
    assert ours.state["adam_steps"] == theirs.state["adam_steps"]


def test_with_a_schedule_that_depends_on_the_length(config: Config, run: Run, tmp_path: Path) -> None:
    schedule = {"steps": 6, "lr_schedule": "cosine", "warmup_steps": 2}
    _, whole = run(config(output_dir=str(tmp_path / "straight"), **schedule))
    with train(config(output_dir=str(tmp_path / "halves"), **schedule), progress=False) as first:
        for step in first:
            if step.step == 3:
                first.stop()
    assert first.result.steps == 3
    steps, resumed = run(config(output_dir=str(tmp_path / "halves"), resume="latest", **schedule))
    assert resumed.losses == whole.losses
    assert same_adapter(resumed.adapter, whole.adapter)
    assert steps[-1].learning_rate < 1e-3


@pytest.mark.slow
def test_global_randomness_goes_on_too(config: Config, run: Run, tmp_path: Path) -> None:
    # Only dropout in a base draws from the global generators: give it some.
    model = write_tiny_sd(tmp_path)
    file = model / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dropout": 0.3}))
    same = {"model": str(model), "validation_prompts": ["a {trigger} {class_word}"], "validation_every": 2}
    _, whole = run(config(steps=4, output_dir=str(tmp_path / "straight"), **same))
    run(config(steps=2, output_dir=str(tmp_path / "halves"), **same))
    torch.manual_seed(99)
    random.seed(99)
    _, resumed = run(config(steps=4, output_dir=str(tmp_path / "halves"), resume="latest", **same))
    assert resumed.losses == whole.losses
    assert same_adapter(resumed.adapter, whole.adapter)
    assert [p.read_bytes() for p in resumed.pictures] == [p.read_bytes() for p in whole.pictures]
    _, without = run(config(steps=1, output_dir=str(tmp_path / "without")))
    assert without.losses[0] != whole.losses[0]


def test_going_back_does_not_delete_what_comes_later(config: Config, run: Run) -> None:
    settings = {"checkpoint_every": 1, "keep_checkpoints": 3}
    _, result = run(config(**settings))
    folder = result.adapter.parent
    with pytest.raises(TrainingError, match="holds checkpoints later than checkpoint-000001: checkpoint-000002, "):
        train(config(resume=str(folder / "checkpoint-000001"), **settings))
    assert len(list_checkpoints(folder)) == 3


def test_ctrl_c_saves_and_its_command_resumes(config: Config, run: Run, tmp_path: Path) -> None:
    settings = config(steps=5, output_dir=str(tmp_path / "cut short"))
    _, whole = run(config(steps=5, output_dir=str(tmp_path / "straight")))
    notes: list[str] = []
    handler = signal.getsignal(signal.SIGINT)
    with train(settings, progress=False, on_note=notes.append) as cut:
        for step in cut:
            if step.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler
    assert cut.result.interrupted
    assert cut.result.steps == 2
    [command] = [line.strip() for note in notes for line in note.splitlines() if "--resume" in line]
    program, verb, *arguments = shlex.split(command)
    assert (program, verb) == ("oft-diffusion", "train")
    assert main(arguments) == 0
    assert same_adapter(tmp_path / "cut short" / "oft_adapter.safetensors", whole.adapter)
    assert not list_checkpoints(tmp_path / "cut short")[:-2]


def test_older_checkpoints_are_deleted(config: Config, run: Run) -> None:
    _, result = run(config(steps=5, checkpoint_every=1, keep_checkpoints=2))
    assert [p.name for p in list_checkpoints(result.adapter.parent)] == ["checkpoint-000004", "checkpoint-000005"]
    assert load_adapter_file(Path(str(result.checkpoint))).metadata is not None


def test_checkpoints_hold_no_pickle(config: Config, run: Run) -> None:
    _, result = run(
        config(text_encoder=True, validation_prompts=["a dog"], prior_preservation=True, num_class_images=1)
    )
    files = [p for p in result.adapter.parent.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".toml", ".png", ".html"}
    others = [p for p in files if p.suffix != ".safetensors"]  # whose first byte is a length, and may be any
    assert not [p.name for p in others if p.read_bytes()[:1] == b"\x80"]
    assert not [p.name for p in files if zipfile.is_zipfile(p)]
    for path in set(files) - set(others):
        with safe_open(path, framework="pt") as opened:
            assert opened.keys()
    assert sorted(p.name for p in Path(str(result.checkpoint)).iterdir()) == [
        "oft_adapter.safetensors", "state.json", "training.safetensors",
    ]  # fmt: skip


def test_a_longer_run_can_go_on_elsewhere(config: Config, run: Run, tmp_path: Path) -> None:
    _, first = run(config(output_dir=str(tmp_path / "a")))
    steps, _ = run(
        config(output_dir=str(tmp_path / "b"), steps=5, resume=str(first.checkpoint), gradient_checkpointing=True)
    )
    assert [s.step for s in steps] == [4, 5]


def test_a_finished_run_resumes_to_its_result(config: Config, run: Run) -> None:
    _, first = run(config())
    steps, again = run(config(resume="latest"))
    assert steps == []
    assert again.losses == first.losses


def test_a_resumed_run_needs_its_first_adapter_no_more(config: Config, run: Run, tmp_path: Path) -> None:
    _, first = run(config(output_dir=str(tmp_path / "first"), steps=1))
    start = {"init_adapter": str(first.adapter)}
    run(config(**start))
    first.adapter.unlink()
    steps, _ = run(config(steps=4, resume="latest", **start))
    assert [s.step for s in steps] == [4]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"learning_rate": 2e-3, "seed": 1}, r"learning_rate was 0.001, now 0.002; .*seed was 0, now 1"),
        ({"block_size": 8}, "block_size was 16, now 8"),
        ({"steps": 2}, r"at step 3, past steps = 2"),
        ({"lr_schedule": "cosine", "steps": 9}, "lr_schedule was 'constant', now 'cosine'; steps was 3, now 9"),
        ({"decay_steps": 1, "steps": 9}, "decay_steps was 0, now 1; steps was 3, now 9"),
    ],
)
def test_changed_settings_are_refused_by_name(
    knobs: dict[str, object], sentence: str, config: Config, run: Run
) -> None:
    run(config())
    with pytest.raises(TrainingError, match=sentence):
        train(config(**({"steps": 6, "resume": "latest"} | knobs)))


def test_changed_pictures_and_base_are_refused(config: Config, run: Run, tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "p")
    run(config(instance_dir=str(folder)))
    (folder / "picture_1.txt").write_text("a sks mug on a table")
    other = write_tiny_sd(tmp_path / "other", seed=5)
    settings = config(instance_dir=str(folder), model=str(other), steps=6, resume="latest")
    with pytest.raises(TrainingError, match="these changed: base model, instance images or captions"):
        run(settings)


def test_unusable_checkpoints(config: Config, run: Run, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no checkpoint"):
        train(config(resume="latest"))
    with pytest.raises(TrainingError, match="is no checkpoint"):
        train(config(resume=str(tmp_path)))
    _, result = run(config())
    checkpoint = Path(str(result.checkpoint))
    file = checkpoint / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(TrainingError, match=r"training.safetensors is damaged"):
        run(config(steps=5, resume="latest"))
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"version": 99}))
    with pytest.raises(TrainingError, match="a checkpoint of version 99"):
        train(config(steps=5, resume="latest"))
    (checkpoint / "state.json").write_text("{")
    with pytest.raises(TrainingError, match=r"state.json is damaged"):
        train(config(steps=5, resume="latest"))


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("schedule", None, r"state.json is damaged \('schedule' is missing\)"),
        ("adam_steps", None, r"state.json is damaged \('adam_steps' is missing\)"),
        ("history", None, r"state.json is damaged \('history' is missing\)"),
        ("step", "x", r"state.json is damaged \(step is 'x'\)"),
        ("config", [], r"state.json is damaged \(config is \[\]\)"),
        ("identity", [], r"state.json is damaged \(identity is \[\]\)"),
        ("schedule", {}, "step 3 is damaged"),
        ("adam_steps", {"unet": "x"}, "step 3 is damaged"),
        ("history", [{}], "step 3 is damaged"),
    ],
)
def test_what_is_missing_in_a_state_is_told(key: str, value: Any, sentence: str, config: Config, run: Run) -> None:
    _, result = run(config())
    file = result.checkpoint / "state.json"
    state = json.loads(file.read_text())
    del state[key]
    file.write_text(json.dumps(state if value is None else state | {key: value}))
    with pytest.raises(TrainingError, match=sentence):
        run(config(steps=5, resume="latest"))


def test_missing_rng_states_are_told(config: Config, run: Run) -> None:
    _, result = run(config())
    file = result.checkpoint / "training.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.startswith("rng/")}, file)
    with pytest.raises(TrainingError, match="step 3 is damaged"):
        run(config(steps=5, resume="latest"))


def test_a_run_killed_while_writing_leaves_no_checkpoint(config: Config, run: Run, tmp_path: Path) -> None:
    partial = tmp_path / "run" / "checkpoint-000007.partial"
    partial.mkdir(parents=True)
    (partial / "state.json").write_text("{}")
    _, result = run(config())
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["checkpoint-000003"]
    assert not partial.exists()
    assert result.steps == 3


def test_rng_states_as_bytes() -> None:
    random.seed(5)
    random.gauss(0, 1)  # leaves a second gauss in the state
    torch.manual_seed(7)
    states = rng_states()
    assert all(state.dtype == torch.uint8 for state in states.values())
    expected = (random.gauss(0, 1), random.random(), torch.rand(2))
    random.seed(0)
    torch.manual_seed(0)
    restore_rng(states)
    again = (random.gauss(0, 1), random.random(), torch.rand(2))
    assert expected[:2] == again[:2]
    assert expected[2].equal(again[2])


def test_space_is_checked_on_the_disk_of_a_folder_to_be(tmp_path: Path) -> None:
    require_space(tmp_path / "a" / "b", 1000, "a test")
    with pytest.raises(TrainingError, match=r"MB free. Expected: at least 1\d+ MB, for a test"):
        require_space(tmp_path / "a" / "b", 10**18, "a test")
