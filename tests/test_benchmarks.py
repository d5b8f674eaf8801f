"""The benchmarks' scripts: data is appended and never lost, tables say what the data says, one tiny run end to end."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import pocket_base, pocket_recipe, pocket_subjects, records
from oft_diffusion.evaluation.figures import SETS
from oft_diffusion.pocket.world import ATTRIBUTES


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


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pocket_subjects, "RUNS", tmp_path / "runs.csv")
    monkeypatch.setattr(pocket_subjects, "PICTURES_FILE", tmp_path / "pictures.csv")
    monkeypatch.setattr(pocket_recipe, "FILE", tmp_path / "recipe.csv")
    return tmp_path


def test_the_subjects_table_is_made_of_finished_runs_alone(files: Path) -> None:
    with (files / "pictures.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(pocket_subjects._COLUMNS)
        for group, hits in (("bow_cat/0", 3), ("merry_boat/0", 1), ("merry_boat/1", 4)):
            for name in SETS:
                for i in range(4):
                    for adapted in (0, 1):
                        hit = int(adapted and i < hits and name == "subject")
                        writer.writerow((group, name, "a cat", i, adapted, hit, 1, 0.3, 0.2))
    run = {"seconds": "50", "megabytes": "0.6"}
    records.append(
        files / "runs.csv", [{"group": "bow_cat/0", **run}, {"group": "merry_boat/0", **run, "seconds": "70"}]
    )
    cat, boat, everything = pocket_subjects.table().splitlines()[2:]
    assert cat.startswith("| bow_cat | 75.0 | 0.0 | 100.0 | 100.0 | 0.0 | 0.0 | 0.0 | 50 |")
    assert boat.startswith("| merry_boat | 25.0 |"), "the run that was cut off does not count"
    assert everything.startswith("| all, 2 runs | 50.0 (")
    assert "n = 8" in everything
    assert everything.endswith("| 70 | 0.60 |")


def test_a_tiny_search_is_resumed_and_ranked(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"steps": 1, "sampling_steps": 1}
    monkeypatch.setattr(pocket_recipe, "CANDIDATES", {"one": quick, "two, no captions": quick | {"captions": False}})
    monkeypatch.setattr(pocket_recipe, "SUBJECTS", ("party_car",))
    monkeypatch.setattr(pocket_recipe, "PICTURES", 1)
    pocket_recipe.measure(files / "runs", ["one"])
    first = records.load(files / "recipe.csv")
    pocket_recipe.measure(files / "runs", [])
    assert records.load(files / "recipe.csv")[:1] == first
    assert [row["candidate"] for row in records.load(files / "recipe.csv")] == ["one", "two, no captions"]
    assert len(pocket_recipe.table().splitlines()) == 4
    assert not list((files / "runs" / "two,-no-captions").rglob("0*.txt"))


def test_the_score_punishes_only_what_is_beyond_the_goal() -> None:
    assert pocket_recipe.score(0.8, 1.2, -0.02, 0.05) == pytest.approx(0.9)
    assert pocket_recipe.score(0.8, 1.0, -0.12, 0.05) == pytest.approx(0.8)
    assert pocket_recipe.score(0.8, 1.0, 0.1, 0.25) == pytest.approx(0.7)


def test_the_base_table_shows_the_newest_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pocket_base, "FILE", tmp_path / "base.csv")
    for value in (0.5, 1.0):
        records.append(tmp_path / "base.csv", pocket_base.rows_of("drawn", {"hat": [value]}))
    assert pocket_base.table().splitlines()[2:] == ["| drawn | hat | 1.0000 | 1.0000 to 1.0000 | 1 |"]


def test_diversity_is_one_for_an_even_draw_and_zero_for_one_hat() -> None:
    values = ATTRIBUTES["hat"]
    other = {name: choices[0] for name, choices in ATTRIBUTES.items()}
    even = pocket_base.diversity([{**other, "hat": value} for value in values])
    assert even["hat"] == [pytest.approx(1)]
    assert even["face"] == [0]
