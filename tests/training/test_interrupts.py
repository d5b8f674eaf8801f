"""Ctrl-C: once is a request, which saves and says how to go on; twice stops at once, and says what is lost."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from oft_diffusion.files import load_adapter_file
from oft_diffusion.training import TrainConfig, TrainingRun, interrupts, train
from oft_diffusion.training.checkpoint import list_checkpoints
from oft_diffusion.training.command import main
from tests.training.conftest import Run

Config = Callable[..., TrainConfig]
ROOT = Path(__file__).parents[2]


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so() -> None:
    calls = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.on_interrupt(lambda: calls.append(1)):
            ctrl_c()
            assert calls == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert calls == [1]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_together_are_one_and_a_later_one_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted() -> None:
        with interrupts.on_interrupt(lambda: calls.append(1)):
            ctrl_c()
            os.kill(os.getpid(), signal.SIGTERM)
            assert calls == [1]
            monkeypatch.setattr(interrupts, "SECONDS_TOGETHER", 0.0)
            ctrl_c()
            raise AssertionError("the last one should have stopped this")

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert calls == [1]


def test_ctrl_c_during_the_first_grid_is_resumable(
    config: Config, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"validation_prompts": ["a {trigger} {class_word}"], "validation_every": 2}
    _, whole = run(config(output_dir=str(tmp_path / "straight"), **settings))
    original = TrainingRun.sample

    def sample(self: TrainingRun) -> Path:
        ctrl_c()
        return original(self)

    with monkeypatch.context() as patch, train(config(**settings), progress=False) as cut:
        patch.setattr(TrainingRun, "sample", sample)
        assert list(cut) == []
    assert cut.result.interrupted
    assert cut.result.checkpoint.name == "checkpoint-000000"
    steps, resumed = run(config(resume="latest", **settings))
    assert [s.step for s in steps] == [1, 2, 3]
    assert resumed.losses == whole.losses
    assert [p.read_bytes() for p in resumed.pictures] == [p.read_bytes() for p in whole.pictures]


@pytest.mark.parametrize(
    ("every", "sentence"), [(1, "go on from the last checkpoint:\n"), (0, "there is no checkpoint to go on from")]
)
def test_the_second_one_says_what_is_lost(
    every: int, sentence: str, config: Config, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(interrupts, "SECONDS_TOGETHER", 0.0)
    original = TrainingRun._optimizer_step

    def step(self: TrainingRun) -> object:
        if self.step == 2:
            ctrl_c()
            ctrl_c()
        return original(self)

    monkeypatch.setattr(TrainingRun, "_optimizer_step", step)
    settings = config(steps=5, checkpoint_every=every)
    (tmp_path / "c.toml").write_text(settings.to_toml())
    assert main(["--config", str(tmp_path / "c.toml")]) == 130
    shown = capsys.readouterr().err
    assert "interrupted after step 2, unsaved" in shown
    assert sentence in shown
    assert not (Path(settings.output_dir) / "oft_adapter.safetensors").exists()


def test_before_the_first_step(config: Config, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("oft_diffusion.training.loop.prepare", interrupted)
    (tmp_path / "c.toml").write_text(config().to_toml())
    assert main(["--config", str(tmp_path / "c.toml")]) == 130
    assert "interrupted before the first step" in capsys.readouterr().err


@pytest.mark.slow  # two fresh interpreters
def test_a_real_ctrl_c_and_the_command_it_prints(config: Config, run: Run, tmp_path: Path) -> None:
    settings = config(steps=100_000, checkpoint_every=3)
    (tmp_path / "c.toml").write_text(settings.to_toml())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # An interpreter whose parent ignores SIGINT, as background jobs do, would ignore it too.
    script = subprocess.Popen(
        [sys.executable, "train_scripts/train_dreambooth.py", "--config", str(tmp_path / "c.toml")],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    give_up = time.monotonic() + 200
    while not list_checkpoints(Path(settings.output_dir)) and script.poll() is None and time.monotonic() < give_up:
        time.sleep(0.05)
    script.send_signal(signal.SIGINT)
    shown = script.communicate(timeout=100)[0]
    assert script.returncode == 130, shown
    [command] = [line.strip() for line in shown.splitlines() if "--resume latest" in line]
    python, *words = shlex.split(command)
    assert (python, words[0]) == ("python", "train_scripts/train_dreambooth.py")

    losses = Path(settings.output_dir) / "losses.json"
    done = len(json.loads(losses.read_text()))
    assert list_checkpoints(Path(settings.output_dir))[-1].name == f"checkpoint-{done:06d}"
    subprocess.run([sys.executable, *words, "--steps", str(done + 2)], cwd=ROOT, env=environment, check=True)
    rows = [row["loss"] for row in json.loads(losses.read_text())]
    _, whole = run(config(steps=done + 2, output_dir=str(tmp_path / "straight")))
    assert rows == pytest.approx(whole.losses, rel=1e-6)
    ours, theirs = (load_adapter_file(p).components["unet"] for p in (losses.parent, tmp_path / "straight"))
    assert all(ours[name].allclose(tensor, atol=1e-6) for name, tensor in theirs.items())
