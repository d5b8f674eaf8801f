"""The command line: what it prints and returns; and two processes that learn what one would."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from oft_diffusion.files import load_adapter_file
from oft_diffusion.training import TrainConfig
from oft_diffusion.training.command import main
from tests.training.conftest import Run

Config = Callable[..., TrainConfig]
ROOT = Path(__file__).parents[2]

# `oft-diffusion train`, and each process notes what it has learned.
WORKER = """
import os, sys, torch
from pathlib import Path
from oft_diffusion.training import TrainingRun
from oft_diffusion.training.command import main

finish = TrainingRun._finish
def note(run):
    finish(run)
    learned = {name: bank.state_dict() for name, bank in run.parts.banks.items()}
    Path(run.output_dir, f"learned-{os.environ['RANK']}.txt").write_text(
        repr([(name, key, tensor.tolist()) for name, state in learned.items() for key, tensor in state.items()])
    )
TrainingRun._finish = note
sys.exit(main())
"""


def test_trains_and_says_where(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(model="shipped", validation_prompts=["a dog"])
    (tmp_path / "c.toml").write_text(settings.to_toml())
    tiny = Path(config().model)
    assert main(["--config", str(tmp_path / "c.toml"), "--num_class_images=7"], shipped={"shipped": lambda: tiny}) == 0
    shown = capsys.readouterr().out
    assert str(Path(settings.output_dir) / "oft_adapter.safetensors") in shown
    assert "step-000003.png" in shown


def test_errors_are_a_sentence_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "x"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: the command line lacks instance_dir")
    assert "Traceback" not in shown


def test_the_script_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = ROOT / "train_scripts" / "train_dreambooth.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    shown = capsys.readouterr().out
    assert "--instance-dir" in shown
    assert shown.startswith("usage: python ")
    assert script.read_text().count("\n") < 200


@pytest.mark.slow  # three fresh interpreters
def test_two_processes_learn_what_one_does(config: Config, run: Run, tmp_path: Path) -> None:
    settings = config(steps=4, text_encoder=True, validation_prompts=["a dog"], checkpoint_every=2,
                      prior_preservation=True, num_class_images=3)  # fmt: skip
    (tmp_path / "c.toml").write_text(settings.to_toml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip

    def two(*options: str) -> None:
        command = [
            sys.executable,
            "-c",
            WORKER,
        ]
        processes = [
            subprocess.Popen([*command, "--config", str(tmp_path / "c.toml"), *options], cwd=ROOT,
                             env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for rank in range(2)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=240)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    two("--steps", "2")
    two("--resume", "latest")
    _, alone = run(
        config(
            steps=4, text_encoder=True, batch_size=2, output_dir=str(tmp_path / "alone"), prior_preservation=True,
            num_class_images=3, class_dir=str(settings.class_folder),
        )
    )  # fmt: skip
    learned = [(tmp_path / "run" / f"learned-{rank}.txt").read_text() for rank in range(2)]
    assert learned[0] == learned[1]
    assert len(learned[0]) > 1000
    losses = [row["loss"] for row in json.loads((tmp_path / "run" / "losses.json").read_text())]
    assert losses == pytest.approx(alone.losses, rel=1e-5)
    ours, theirs = (load_adapter_file(p).components for p in (tmp_path / "run", alone.adapter))
    for component, state in theirs.items():
        for name, tensor in state.items():
            assert ours[component][name].allclose(tensor, atol=2e-4), name
