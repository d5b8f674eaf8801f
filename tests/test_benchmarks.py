"""The benchmarks' scripts: data is appended and never lost, tables say what the data says, one tiny run end to end."""

from __future__ import annotations

import csv
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from benchmarks import (
    app_page,
    card_memory,
    estimates,
    pocket_base,
    pocket_look,
    pocket_recipe,
    pocket_subjects,
    records,
    swapping,
)
from oft_diffusion import __version__
from oft_diffusion.evaluation import Row
from oft_diffusion.evaluation.figures import SETS
from oft_diffusion.pocket.world import ATTRIBUTES
from tests.helpers.tiny_sd import RESOLUTION, draw_pictures, write_tiny_sd


def test_rows_are_appended_with_hardware_and_versions(tmp_path: Path) -> None:
    file = tmp_path / "new" / "data.csv"
    assert records.load(file) == []
    records.append(file, [{"name": "a, b", "value": 1}])
    records.append(file, [{"name": "c", "value": 2}])
    rows = records.load(file)
    assert [(row["name"], row["value"]) for row in rows] == [("a, b", "1"), ("c", "2")]
    assert all(row["torch"] and row["hardware"] and row["threads"] and row["date"] for row in rows)
    with pytest.raises(ValueError, match="has the columns"):
        records.append(file, [{"other": 1}])
    assert records.load(file) == rows


def test_a_checkout_that_is_not_installed_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_others(name: str) -> str:
        if name == "oft-diffusion":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(records, "version", of_others)
    assert records.environment("cpu")["oft-diffusion"] == __version__
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{__version__}"\n' in project


def test_a_changed_tree_is_told_by_how_it_differs_from_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    code, row = tmp_path / "code.py", tmp_path / "benchmarks" / "data" / "rows.csv"
    row.parent.mkdir(parents=True)
    monkeypatch.setattr(records, "DATA", row.parent)
    assert records._commit() == ""
    for file in (code, row):
        file.write_bytes(b"one\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    marks = []
    for file, content in ((row, b"2"), (code, b"2"), (code, b"\xff"), (row, b"3"), (code, b"\x00"), (code, b"one\n")):
        file.write_bytes(content)
        marks.append(records._commit())
    clean, two, three, same, binary, back = marks
    assert clean == back == git("rev-parse", "--short", "HEAD")
    assert all(re.fullmatch(clean + r"\+[0-9a-f]{8}", mark) for mark in (two, three, binary))
    assert three == same
    assert len({two, three, binary}) == 3


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pocket_subjects, "RUNS", tmp_path / "runs.csv")
    monkeypatch.setattr(pocket_subjects, "PICTURES_FILE", tmp_path / "pictures.csv")
    monkeypatch.setattr(pocket_subjects, "SETUPS", tmp_path / "setups.json")
    monkeypatch.setattr(pocket_recipe, "FILE", tmp_path / "recipe.csv")
    return tmp_path


def test_the_subjects_table_is_made_of_finished_runs_of_the_newest_setup_alone(files: Path) -> None:
    with (files / "pictures.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(pocket_subjects._COLUMNS)
        for setup, group, hits in (("old", "bow_cat/0", 0), ("new", "bow_cat/0", 3), ("new", "captain_mug/0", 1)):
            for name in SETS:
                for i in range(4):
                    for adapted in (0, 1):
                        hit = int(adapted and i < hits and name == "subject")
                        kept = int(name != "other" or i > 0 or not adapted)
                        read = ["cat"] * len(ATTRIBUTES)
                        writer.writerow(
                            (setup, group, name, "a spotted cat", i, adapted, hit, 0, kept, 0.3, 0.2, *read)
                        )
    run = {"training": "50", "wall": "60", "megabytes": "0.6"}
    records.append(files / "runs.csv", [{"setup": setup, "group": "bow_cat/0", **run} for setup in ("old", "new")])
    text = pocket_subjects.table().splitlines()
    assert text[0] == "| | **all 1 runs** | bow_cat |"
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text[2 : text.index("")]}
    assert cells["| subject hit"][0].startswith("75.0 / 0.0 (")
    shown = {"subject hit": "75.0 / 0.0 |", "prompt fidelity": "100.0 / 100.0 |", "preservation": "-25.0 |"}
    assert {name: cells[f"| {name}"][1] for name in shown} == shown
    pooled, attributes, words = "\n".join(text).split("\n\n")[1:]
    assert "4 pairs" in pooled
    assert "spotted pattern: 1 lost, 0 won of 4" in pooled
    assert "50 s of training, 60 s" in pooled
    assert attributes.splitlines()[0].startswith("| right, per cent | object | accent | face | hat | badge | colour |")
    lines = ("bow_cat", "**striped and spotted ones**", "**all**")
    assert attributes.splitlines()[2:] == [f"| {name} | 100 |{' 0 |' * 7}" for name in lines]
    assert words.splitlines()[2:] == [
        "| as long, begins alike | 4 | 0.0 / 0.0 (0.0 to 49.0) | +0.0 |",
        "| as long, both | 8 | 0.0 / 0.0 (0.0 to 32.4) | +0.0 |",
        "| as long, unrelated | 4 | 0.0 / 0.0 (0.0 to 49.0) | +0.0 |",
    ]


@pytest.mark.slow
def test_a_run_that_was_cut_off_while_it_was_written_is_measured_again(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def run(self: object, name: str, seed: int, *_: object) -> pocket_subjects.Trained:
        measured.append(f"{name}/{seed}")
        if len(measured) == 2:
            raise KeyboardInterrupt
        rows = [
            Row(f"{name}/{seed}", set_name, "a cat", i, adapted, {}, adapted, 0, True, 0.3)
            for set_name in SETS for i in range(2) for adapted in (True, False)
        ]  # fmt: skip
        return pocket_subjects.Trained(rows, 0.2, 50.0, 60.0, 0.6)

    monkeypatch.setattr(pocket_subjects, "FINAL", ("bow_cat", "captain_mug"))
    monkeypatch.setattr(pocket_subjects, "SEEDS", (0,))
    monkeypatch.setattr(pocket_subjects.Bench, "run", run)
    with pytest.raises(KeyboardInterrupt):
        pocket_subjects.measure(files, "cpu", pocket_subjects.FINAL)
    pocket_subjects.measure(files, "cpu", pocket_subjects.FINAL)
    assert measured == ["bow_cat/0", "captain_mug/0", "captain_mug/0"]
    text = pocket_subjects.table()
    assert "| | **all 2 runs** | bow_cat | captain_mug |" in text
    assert "| subject hit | 100.0 / 0.0 (" in text
    setup = records.load(files / "runs.csv")[-1]["setup"]
    noted = json.loads((files / "setups.json").read_text())[setup]
    assert (noted["steps"], noted["captions"], noted["pictures"]) == (450, True, pocket_subjects.PICTURES)


def test_times_of_a_run_can_be_taken_later(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "class-images").mkdir()  # which a run makes itself, and which takes time
    adapter = files / "oft_adapter.safetensors"
    adapter.write_bytes(bytes(800_000))

    def trained(config: object) -> tuple[Path, float, float]:
        assert not (files / "class-images").exists()
        return adapter, 70.0, 80.0

    monkeypatch.setattr(pocket_subjects, "trained", trained)
    pocket_subjects.clock(files, "cpu", ["bow_cat"])
    [row] = records.load(files / "runs.csv")
    assert (row["group"], row["training"], row["wall"], row["megabytes"]) == ("bow_cat/0", "70.0", "80.0", "0.800")


def test_a_set_that_is_new_is_drawn_with_the_adapters_there_are(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def rows(name: str, only: Sequence[str]) -> list[Row]:
        both = (True, False)
        return [Row(f"{name}/0", s, "a cat", 0, adapted, {}, adapted, 0, True, 0.3) for s in only for adapted in both]

    def run(self: object, name: str, *_: object) -> pocket_subjects.Trained:
        (files / name / "0").mkdir(parents=True)
        (files / name / "0" / "oft_adapter.safetensors").touch()
        return pocket_subjects.Trained(rows(name, SETS[:-1]), 0.2, 50.0, 60.0, 0.6)

    def draw(self: object, name: str, _seed: int, _config: object, _path: Path, _n: int, only: list[str]) -> object:
        asked.append((name, *only))
        return rows(name, only), 0.2

    monkeypatch.setattr(pocket_subjects, "FINAL", ("bow_cat",))
    monkeypatch.setattr(pocket_subjects, "SEEDS", (0,))
    monkeypatch.setattr(pocket_subjects.Bench, "run", run)
    monkeypatch.setattr(pocket_subjects.Bench, "draw", draw)
    for _ in range(3):
        pocket_subjects.measure(files, "cpu", pocket_subjects.FINAL)
    assert asked == [("bow_cat", SETS[-1])]
    assert {row["set"] for row in records.load(files / "pictures.csv")} == set(SETS)
    assert len(records.load(files / "runs.csv")) == 1


@pytest.mark.slow
def test_a_tiny_search_is_resumed_and_ranked(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"steps": 1, "warmup_steps": 0, "decay_steps": 0, "sampling_steps": 1, "num_class_images": 1}
    monkeypatch.setattr(pocket_recipe, "CANDIDATES", {"one": quick, "two, no captions": quick | {"captions": "none"}})
    pocket_recipe.measure(files / "runs", [("one", "dozy_house", 0)], 1)
    first = records.load(files / "recipe.csv")
    second = [("one", "dozy_house", 0), ("one", "dozy_house", 1), ("two, no captions", "dozy_house", 0)]
    pocket_recipe.measure(files / "runs", second, 1, busy=True)
    assert records.load(files / "recipe.csv")[:1] == first
    rows = records.load(files / "recipe.csv")
    assert [(row["candidate"], row["seed"]) for row in rows] == [("one", "0"), ("one", "1"), ("two, no captions", "0")]
    assert [row["training"] == "nan" for row in rows] == [False, True, True]
    text = pocket_recipe.table()
    assert len(text.splitlines()) == 7  # the second table is empty
    assert "| one | 0.0 \u00b1 0.0 |" in text
    assert "| dozy_house 2 |" in text
    assert not list((files / "runs" / "dozy_house" / "none").rglob("0*.txt"))


def test_a_candidate_is_compared_with_what_it_varies() -> None:
    wanted = {
        "the chosen one": "the chosen one", "crops of 0.9": "the chosen one", "ten letters": "the chosen one",
        "ten letters, 4 twins": "ten letters", "ten letters, ten twins": "ten letters",
        "ten letters, ten twins, 510 steps": "ten letters, ten twins",
    }  # fmt: skip
    assert {name: pocket_recipe.varied(name) for name in wanted} == wanted
    assert wanted.keys() <= pocket_recipe.CANDIDATES.keys()


def test_half_the_captions_can_leave_out_what_the_subject_is_to_keep(tmp_path: Path) -> None:
    photos = pocket_subjects._recaptioned("candy_tree", "half", tmp_path / "half")
    told = [file.read_text(encoding="utf-8").strip() for file in sorted(photos.glob("*.txt"))]
    assert told[:3] == ["a tree in the snow", "a pink striped tree in a room", "a tree in a meadow"]
    assert len(list(photos.glob("*.png"))) == 5


def test_eyes_and_judge_are_compared_where_eyes_can_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = "number,group,accent,face,hat,badge\n"
    judged = ("gold,smile,beanie,ring", "gold,smile,beanie,ring", "gold,smile,crown,ring", "gold,smile,none,ring")
    seen = ("gold,smile,beanie,ring", "gold,smile,bow,ring", "gold,smile,,ring", "lime,smile,none,ring")
    for name, rows in (("BY_JUDGE", judged), ("BY_EYE", seen)):
        file = tmp_path / f"{name}.csv"
        file.write_text(head + "".join(f"{i + 1},winter_fish/0,{row}\n" for i, row in enumerate(rows)))
        monkeypatch.setattr(pocket_look, name, file)
    lines = pocket_look.table().splitlines()
    assert [line.split(" (")[0] for line in lines[2:7]] == [
        "| accent | 4 | 0 | 75", "| face | 4 | 0 | 100", "| hat | 4 | 1 | 67", "| badge | 4 | 0 | 100",
        "| hit or not | 4 | 1 | 67",
    ]  # fmt: skip
    assert lines[-1] == "Of those 3 pictures 67 % are hits by the judge, 33 % by eye."


def test_the_score_punishes_only_what_is_beyond_the_goal() -> None:
    assert pocket_recipe.score(0.8, 1.2, -0.02, 0.05) == pytest.approx(0.9)
    assert pocket_recipe.score(0.8, 1.0, -0.12, 0.05) == pytest.approx(0.8)
    assert pocket_recipe.score(0.8, 1.0, 0.1, 0.25) == pytest.approx(0.7)


@pytest.mark.slow
def test_an_estimate_and_its_run_are_told_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def together(way: str, settings: Mapping[str, object], _: int) -> dict[str, float]:
        return estimates.WAYS[way](estimates.config(settings, Path(tempfile.mkdtemp(dir=tmp_path))))

    quick = {
        "steps": 2, "warmup_steps": 0, "decay_steps": 0, "sampling_steps": 1, "num_class_images": 1, "batch_size": 1,
        "evaluation_count": 0, "validation_prompts": [], "min_crop": 1.0, "prior_twins": 0,
    }  # fmt: skip
    monkeypatch.setattr(estimates, "FILE", tmp_path / "estimates.csv")
    monkeypatch.setattr(estimates, "apart", together)
    for _ in range(2):
        estimates.measure(quick, 1)
    rows = records.load(tmp_path / "estimates.csv")
    assert [row["measure"] for row in rows] == 2 * ["a step", "the run", "memory", "adapter file"]
    assert {row["steps"] for row in rows} == {"2"}
    assert all(float(row["predicted"]) > 0 for row in rows)
    assert all(float(row["true"]) > 0 for row in rows if row["measure"] != "memory")  # it grows once alone
    said, was = (float(rows[-1][way]) for way in ("predicted", "true"))
    assert 0.5 * was < said < was  # of the file, its header is the rest
    lines = estimates.table().splitlines()
    assert len(lines) == 8
    assert lines[5] == f"| adapter file | {said:.4g} MB | {was:.4g} MB | {said / was:.0%} |"


def test_the_base_table_shows_the_base_that_ships_and_one_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pocket_base, "FILE", tmp_path / "base.csv")
    monkeypatch.setattr(pocket_base, "base_digest", lambda: "new")
    for base, value in (("old", 0.5), ("new", 1.0)):
        rows = pocket_base.rows_of("drawn", {"hat": [value] * 20})
        records.append(tmp_path / "base.csv", [{"base": base, **row} for row in rows])
    [line] = [line for line in pocket_base.table().splitlines() if "hat" in line]
    assert line.startswith("| drawn | hat | 1.0000 | 0.8")
    assert line.endswith("to 1.0000 (95 %) | 20 |")
    records.append(tmp_path / "base.csv", [{"base": "again", **pocket_base.rows_of("drawn", {"hat": [0.0, 0.5]})[0]}])
    [line] = [line for line in pocket_base.table().splitlines() if "hat" in line]
    assert line.endswith("to 1.0000 (95 %) | 20 | 0.2500 |")
    records.append(tmp_path / "base.csv", [{"base": "new", **pocket_base.rows_of("drawn", {"hat": [1.0] * 30})[0]}])
    [line] = [line for line in pocket_base.table().splitlines() if "hat" in line]
    assert line.endswith("to 1.0000 (95 %) | 30 | 0.2500 |")


def test_diversity_is_about_one_for_even_draws_and_zero_for_one_hat() -> None:
    rng, hats = random.Random(1), ATTRIBUTES["hat"]
    even = [pocket_base.diversity([{"hat": rng.choice(hats)} for _ in range(20)], "hat") for _ in range(20)]
    assert sum(even) / 20 == pytest.approx(1, abs=0.05)
    assert pocket_base.diversity([{"hat": "bow"}] * 20, "hat") == 0


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("page", "made"),
    [
        pytest.param("evaluation.md", pocket_subjects.table, marks=pytest.mark.slow),  # thousands of resamples
        ("evaluation.md", pocket_recipe.table),
        ("evaluation.md", pocket_look.table),
        ("pocket.md", pocket_base.table),
        ("using.md", swapping.table),
        ("app.md", app_page.table),
        ("app.md", estimates.table),
    ],
    ids=["subjects", "recipe", "eyes", "base", "swapping", "page", "estimates"],
)
def test_pages_show_what_the_data_says(page: str, made: Callable[[], str]) -> None:
    text = (Path(__file__).parent.parent / "docs" / page).read_text(encoding="utf-8")
    missing = [line for line in made().splitlines() if line not in text]
    assert missing == []


@pytest.mark.slow
def test_presets_by_memory_are_predicted_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(family: str, folder: Path, _: str) -> Path:
        assert family == "SD 1.5"
        draw_pictures(folder / "pictures")
        return write_tiny_sd(folder)

    monkeypatch.setattr(card_memory, "written", tiny)
    file = tmp_path / "card.csv"
    knobs = {"resolution": RESOLUTION, "block_size": 16, "mixed_precision": "no", "validation_count": 1}
    card_memory.measure_all(["SD 1.5"], 5.0, knobs, file)
    card_memory.measure_all(["SD 1.5"], 0.0, knobs, file)  # whose time is up at once
    rows = records.load(file)
    assert [(row["family"], row["memory"], row["problem"]) for row in rows] == [
        ("SD 1.5", "8 GB", ""),
        ("SD 1.5", "12 GB", ""),
    ]
    assert all(float(row["predicted GB"]) >= float(row["predicted steps GB"]) > 0 for row in rows)
    lines = card_memory.table(file).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:4]] == [["| SD 1.5", "8 GB"], ["| SD 1.5", "12 GB"]]
    assert "gradient_checkpointing True" in lines[2]


def test_what_does_not_fit_is_a_row_too(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures")
    knobs = {"resolution": RESOLUTION + 1, "block_size": 16}
    row = card_memory.measure("SD 1.5", write_tiny_sd(tmp_path), "8 GB", knobs)
    assert "no multiple of" in row["problem"]
    assert row["true GB"] == "0"
