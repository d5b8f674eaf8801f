"""The demo scripts, end to end, with next to no steps; once, on demand, with all of them."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from oft_diffusion.errors import TrainingError
from oft_diffusion.files import FILE_NAME, load_adapter_file
from oft_diffusion.pocket import SUBJECTS
from oft_diffusion.training.loop import TrainingRun
from train_scripts import demo, demo_photographs, render_subjects

QUICK = {
    "steps": 2, "warmup_steps": 0, "decay_steps": 0, "sampling_steps": 2, "validation_prompts": [],
    "num_class_images": 1, "prior_twins": 1, "evaluation_count": 1, "min_crop": 1.0,
}  # fmt: skip


@pytest.mark.slow
def test_demo_twice_leaves_an_adapter_a_grid_and_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    for steps, measured in ((3, 0), (2, 1)):
        own = {"steps": steps, "evaluation_count": measured, "overwrite": True}
        assert demo.run_demo("party_car", out, **QUICK | own) == 0
    file = load_adapter_file(out)
    assert file.metadata.training["steps"] == 2
    assert file.metadata.class_word == SUBJECTS["party_car"].object
    with Image.open(out / "before_after.png") as grid:
        assert grid.width > 8 * demo.CELL
        assert grid.height > 5 * demo.CELL
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2  # the instance images and the demo's grid
    assert "<span>steps</span>" in page
    assert all(name in page for name in ("subject hit", "preservation", "leakage, other trigger"))
    assert (out / "evaluation.json").stat().st_size > 1000
    assert not re.search(r'(src|href)="http', page)
    # the command that it leaves the reader with works as it stands
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("more ")][-1:]
    command = [*shlex.split(line)[1:], "--steps", "1", "--out", str(tmp_path / "pictures")]
    subprocess.run(command, check=True, capture_output=True)
    assert list((tmp_path / "pictures").glob("*.png"))


@pytest.mark.slow
def test_the_demo_as_it_comes_teaches_its_subject(tmp_path: Path) -> None:
    assert demo.run_demo("party_car", tmp_path / "demo") == 0
    rows = json.loads((tmp_path / "demo" / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    hits = {
        adapted: [r["hit"] for r in rows if r["set"] == "subject" and r["adapted"] is adapted]
        for adapted in (True, False)
    }
    assert len(hits[True]) == len(hits[False]) == 4
    assert any(hits[True])
    assert not any(hits[False])


def test_demo_deletes_nothing_but_what_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"somebody's")
    given: list[bool] = []
    with pytest.raises(TrainingError, match="holds an earlier run"):
        demo.run_demo("party_car", tmp_path, **QUICK)
    assert (tmp_path / FILE_NAME).read_bytes() == b"somebody's"

    def note(name: str, out: Path, *, overwrite: bool) -> int:
        given.append(overwrite)
        return 0

    monkeypatch.setattr(demo, "run_demo", note)
    for arguments in ([], ["--out", "runs/dog"], ["--out", "runs/dog", "--overwrite"]):
        monkeypatch.setattr("sys.argv", ["demo.py", *arguments])
        demo.main()
    assert given == [True, False, True]


def test_demo_that_is_interrupted_claims_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = TrainingRun.__iter__

    def with_ctrl_c(run: TrainingRun):
        for step in steps(run):
            signal.raise_signal(signal.SIGINT)
            yield step

    monkeypatch.setattr(TrainingRun, "__iter__", with_ctrl_c)
    assert demo.run_demo("party_car", tmp_path / "demo", **{**QUICK, "steps": 9}) == 130
    assert not (tmp_path / "demo" / "report.html").exists()


def test_photographs_reach_a_grid_as_jpeg_views(tmp_path: Path) -> None:
    assert demo_photographs.run(tmp_path, ["cat", "rocket"], **QUICK | {"evaluation_count": 0}) == 0
    views = sorted((tmp_path / "cat" / "views").glob("*.jpg"))
    assert len(views) == demo_photographs.VIEWS
    with Image.open(views[0]) as view:
        assert view.format == "JPEG"
    with Image.open(tmp_path / "photographs.png") as grid:
        assert grid.width > 8 * 128


def test_subjects_can_be_drawn_again(tmp_path: Path) -> None:
    render_subjects.main(["--out", str(tmp_path)])
    assert len(list(tmp_path.glob("*/*.png"))) == render_subjects.PICTURES * len(SUBJECTS)
