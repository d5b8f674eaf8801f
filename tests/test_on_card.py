"""What is measured where a card is lent for minutes: what comes first, what it takes, and which files come back."""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import full_counts, on_card, records, speed, speed_setups
from benchmarks.command import INCOMPLETE
from benchmarks.methods import (
    BASE,
    BOFT,
    DORA,
    EQUAL_LORA,
    FULL,
    LORA,
    LYCORIS,
    METHODS,
    OURS,
    TRITON,
    WEIGHT_CENTRIC,
)  # fmt: skip
from benchmarks.speed_setups import KINDS, SETUPS, Setup

FAMILIES = ("SD 1.5", "SDXL", "SD 3.5 Medium", "Flux.1")
AIMED = [
    *(("train", False, family) for family in FAMILIES),
    *(("inference", False, family) for family in FAMILIES),
    *(("train", True, family) for family in FAMILIES),
    *(("inference", True, family) for family in FAMILIES),
]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Of data, as it is, and of copies."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(records.DATA, data)
    monkeypatch.setattr(on_card, "DATA", data)
    return data, out


def test_only_the_files_that_a_card_changes_are_copied(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = folders
    modules = [one.module for part in on_card.USUAL[1:] for one in on_card.PARTS[part]]
    files = {module: importlib.import_module(module).FILE.name for module in modules}
    copies = []

    def run(command: list[str], seconds: float) -> str:
        copies.append(sorted(file.name for file in out.iterdir()) if out.exists() else [])
        with (data / files[command[2]]).open("a") as file:
            file.write("a row\n")
        return ""

    monkeypatch.setattr(on_card, "_run", run)
    on_card.measure(on_card.USUAL[1:], 1, out)
    assert copies[:3] == [[], ["speed.csv"], ["rotate_bandwidth.csv", "speed.csv"]]
    assert {file.name for file in out.iterdir()} == set(files.values())
    assert len(set(files.values())) <= 8  # no more come back from a machine that is lent
    assert all(file.read_bytes() == (data / file.name).read_bytes() for file in out.iterdir())


def test_rows_are_copied_while_a_card_measures_on(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = folders
    found: list[str] = []

    def run(command: list[str], seconds: float) -> str:
        (data / "speed.csv").write_text("a row")
        end = time.monotonic() + 10
        while not found and time.monotonic() < end:
            time.sleep(0.01)
            found.extend(file.read_text() for file in out.glob("*") if file.read_text())
        return ""

    monkeypatch.setattr(on_card, "COPIED_EVERY", 0.01)
    monkeypatch.setattr(on_card, "_run", run)
    on_card.measure(["models"], 1, out)
    assert found == ["a row"]


def test_measurements_go_on_behind_one_that_fails(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], seconds: float) -> str:
        ran.append([*command[2:], f"{seconds:g} s"])
        return "failed" if "rotate_bandwidth" in command[2] else ""

    monkeypatch.setattr(on_card, "_run", run)
    assert on_card.measure(on_card.USUAL, 17, None) == ["kernels 1, benchmarks.rotate_bandwidth (failed)"]
    assert ran[1] == ["benchmarks.speed", "--device", "cuda", "--aimed", "--minutes", "9.5", "690 s"]
    assert [command[0] for command in ran[2:4]] == ["benchmarks.rotate_bandwidth", "benchmarks.stages"]
    assert len(ran) == sum(len(on_card.PARTS[part]) for part in on_card.USUAL)
    assert all(importlib.util.find_spec(command[0]) for command in ran)
    assert all(Path(word).exists() for word in ran[0] if word.startswith("tests/"))
    assert sum(one.minutes for part in on_card.USUAL for one in on_card.PARTS[part]) == 17
    ran.clear()
    on_card.measure(["rest"], 5, None)
    assert ran == [["benchmarks.speed", "--device", "cuda", "--minutes", "5", "420 s"]], "alone it has all the time"


def test_all_of_it_ends_within_twenty_minutes(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though everything takes as long as it may."""
    now, begun = [0.0], []

    def run(command: list[str], seconds: float) -> str:
        begun.append(now[0])
        now[0] += seconds + 2 * on_card.CLEARING
        return ""

    monkeypatch.setattr(on_card, "_run", run)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("sys.argv", ["on_card"])
    monkeypatch.setattr(on_card, "NEEDED", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match=r"quantized 2, benchmarks.quantized_layers \(no time left\)"):
        on_card.main()
    assert now[0] <= 20 * 60
    assert begun[1] == (1 + 2) * 60 + 20


def test_what_takes_too_long_is_stopped_with_all_that_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that will not hear of it, with one of its own; and one that clears away."""
    monkeypatch.setattr(on_card, "CLEARING", 2.0)
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    clearing = f"import tempfile, time\nwith tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):\n  time.sleep(60)"
    began = time.monotonic()
    for code in (deaf, clearing):
        assert on_card._run([sys.executable, "-c", code], 2.0) == "stopped after 2 s"
    assert time.monotonic() - began < 30
    assert [file.name for file in tmp_path.iterdir()] == ["pid"]
    status = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX"


@pytest.mark.parametrize(("status", "word"), [(0, ""), (1, "failed"), (INCOMPLETE, "not all of it")])
def test_how_a_measurement_ended_is_told(status: int, word: str) -> None:
    assert on_card._run([sys.executable, "-c", f"raise SystemExit({status})"], 60.0) == word


def test_what_is_lacking_is_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that is not there, then the card."""
    command = [sys.executable, "-m", "benchmarks.on_card"]
    ended = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("benchmarks.on_card needs ")
    monkeypatch.setattr("sys.argv", ["on_card"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(on_card, "NEEDED", ("torch",))
    with pytest.raises(SystemExit, match="needs a CUDA card"):
        on_card.main()
    monkeypatch.setattr(on_card, "NEEDED", ("torch", "no_such_package", "peft"))
    with pytest.raises(SystemExit, match="needs these packages, too: no_such_package;"):
        on_card.main()


def test_a_card_begins_with_what_the_aims_ask_for_and_takes_flux_last_each_time() -> None:
    assert [(setup.kind, setup.compiled, setup.work) for setup in SETUPS["cuda"][: len(AIMED)]] == AIMED


def test_the_aims_fit_into_their_share_by_what_an_h200_took() -> None:
    rows = [row for row in records.load(speed.FILE) if row["hardware"] == "NVIDIA H200" and row["seconds"]]
    took = {
        (row["work"], row["kind"], row["method"]): statistics.fmean(map(float, row["seconds"].split())) for row in rows
    }
    counted = {
        (row["work"], row["checkpointing"], row["method"]): float(row["operations"])
        for row in records.load(full_counts.FILE)
        if row["operations"]
    }

    def operations(setup: Setup) -> float:
        names = (OURS if method == TRITON else method for method in setup.methods)
        return sum(counted[setup.work, "yes" if setup.checkpointing else "no", name] for name in names)

    def training(setup: Setup) -> float:
        return sum(took[setup.work, "train", method] for method in setup.methods)

    aimed = speed_setups.AIMED
    an_operation = sum(map(training, aimed[:2])) / sum(map(operations, aimed[:2]))
    live = sum(took["SDXL", "live", method] for method in (BASE, TRITON, LORA))
    others = sum(took.get(("SDXL", kind, m), 0.0) for kind in KINDS["inference"][1:] for m in (BASE, TRITON, LORA))

    def reckoned(setup: Setup) -> float:
        """Two steps and a round to settle, then what is counted: of what is compiled two steps, else four."""
        around = 3 + (2 if setup.compiled else 4)
        if setup.kind == "inference":  # of all as of SDXL; twice merged beside the rounds
            return (setup.rounds + around) * live + (setup.rounds + 2) * others
        measured = setup.work in ("SD 1.5", "SDXL")
        return (setup.rounds + around) * (training(setup) if measured else an_operation * operations(setup))

    making = 5.0 * len(aimed)
    [share] = on_card.PARTS["models"]
    assert 400 < making + sum(map(reckoned, aimed)) < 60 * share.minutes


def test_peers_are_all_methods_upon_one_model() -> None:
    [measurement] = on_card.PARTS["peers"]
    options = measurement.options
    [peers] = [setup for setup in SETUPS["cuda"] if options[options.index("--only") + 1] in str(setup)]
    assert (peers.work, peers.dtype, peers.methods) == ("SD 1.5", "bfloat16", tuple(METHODS))
    assert {DORA, BOFT, LYCORIS, EQUAL_LORA, WEIGHT_CENTRIC, FULL} < set(peers.methods)
