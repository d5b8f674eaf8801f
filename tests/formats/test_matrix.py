"""The matrix in docs/formats.md: each cell's test is there, is run, and is about what its cell is about.

That it asserts something, refuses exactly where the cell says so, and has its row's tool and its column's option in its
text or its parameters: what it asserts of them is for readers.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SECTION = re.search(r"\n## Matrix\n(.*?)\n## ", (ROOT / "docs/formats.md").read_text(encoding="utf-8"), re.DOTALL)
assert SECTION is not None
LINES = SECTION[1].splitlines()
TESTS = {  # by its key, the file and the name of a test
    found[1]: (found[2], found[3])
    for line in LINES
    if (found := re.fullmatch(r'\[([a-z0-9-]+)\]: \.\./(tests/\S+\.py) "(.+)"', line))
}


class Cell(NamedTuple):
    table: int
    row: str
    column: str
    text: str

    @property
    def links(self) -> list[tuple[str, str]]:
        """What it says, and the key of a test, of each of its parts."""
        return [(said, key) for said, key in re.findall(r"\[([^][]+)\]\[([^][]+)\]", self.text)]


def _cells() -> list[Cell]:
    found, header, table = [], [], 0
    for before, line in zip(["", *LINES], LINES, strict=False):
        if not line.startswith("|"):
            continue
        entries = [entry.strip() for entry in line.strip("|").split("|")]
        if not before.startswith("|"):
            header, table = entries, table + 1
        elif set(line) != set("|-"):
            assert len(entries) == len(header), line
            found += [Cell(table, entries[0], *pair) for pair in zip(header[1:], entries[1:], strict=True)]
    return found


CELLS = _cells()
# What a test about a row has in its text or its parameters, by the beginning of the row's name; the first that fits.
ROWS = {
    "PEFT": "peft", "diffusers": "diffusers|save_lora", "OneTrainer": "onetrainer", "sd-scripts `oft_v2`": "sd_scripts",
    "ComfyUI-OFTv2": "comfy_node|does_not_tell|nobody", "a musubi": "musubi", "a WAN": "wan", "sd-scripts": "kohya",
    "SimpleTuner": "simpletuner", "LyCORIS": "lycoris", "biases": "peft|lycoris", "BOFT": "boft", "`oft`": "oft|ours",
    "`peft`": "peft", "`onetrainer`": "onetrainer|sd-scripts|comfy_node|experts|write_single_file", "`diff`": "diff",
    "`lora`": "lora", "`glora`": "glora", "`folder`": "folder", "`checkpoint`": "checkpoint|merged_file",
}  # fmt: skip
# The same by column, for those that have such words. `assert_weights` takes all strengths unless it is told one.
COLUMNS = {
    "strength": "strength|assert_weights|multiplier", "bounded": "coft|alpha|constraint|bound", "shared block": "share",
    "scaled": "scale|marker", "other series": "exact|terms|series|variants", "another series": "series|neumann|live",
    "strength baked in": "strength|live", "other bases": "base",
}  # fmt: skip


class _Collected:
    """Notes what pytest finds."""

    def __init__(self) -> None:
        self.items: dict[str, pytest.Function] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.items |= {item.nodeid: item for item in items if isinstance(item, pytest.Function)}


@pytest.fixture(scope="module")
def collected() -> dict[str, list[pytest.Function]]:
    """By file and name, with and without what stands in brackets, the tests that pytest itself finds."""
    plugin = _Collected()
    files = sorted({str(ROOT / file) for file, _ in TESTS.values()})
    options = ["--collect-only", "-qq", f"--rootdir={ROOT}", "-p", "no:cacheprovider"]
    assert pytest.main([*options, *files], plugins=[plugin]) == 0
    found: dict[str, list[pytest.Function]] = {}
    for nodeid, item in plugin.items.items():
        for name in {nodeid, nodeid.partition("[")[0]}:
            found.setdefault(name, []).append(item)
    return found


def test_the_tables_are_whole() -> None:
    assert {cell.table for cell in CELLS} == {1, 2}
    assert len({cell.row for cell in CELLS}) > 25
    assert len([cell for cell in CELLS if cell.links]) > 100
    for cell in CELLS:
        plain = ", ".join(f"[{said}][{key}]" for said, key in cell.links) or "-"
        assert cell.text == plain, f"{cell.row}, {cell.column}: neither links to tests nor -"


def test_every_tool_and_format_has_a_row() -> None:
    from oft_diffusion.convert import FORMATS
    from oft_diffusion.formats.origins import ORIGINS

    written = {name for cell in CELLS if cell.table == 2 for name in re.findall("`(.+?)`", cell.row)}
    assert written == set(FORMATS)
    read = " ".join(cell.row for cell in CELLS if cell.table == 1)
    for origin in ORIGINS:
        assert origin.name.removeprefix("an ") in read


def test_no_key_is_missing_and_none_is_left_over() -> None:
    used = {key for cell in CELLS for _, key in cell.links}
    assert used == TESTS.keys()
    assert len(TESTS) == sum(line.startswith("[") for line in LINES)  # none twice, none misspelt


@pytest.mark.parametrize("key", TESTS)
def test_the_test_of_a_cell_is_there(key: str, collected: dict[str, list[pytest.Function]]) -> None:
    file, name = TESTS[key]
    tests = collected.get(f"{file}::{name}", [])
    assert tests, f"{file} has no test {name}"
    for test in tests:
        assert not {mark.name for mark in test.iter_markers()} & {"skip", "skipif", "xfail"}
    # A cell says "refused" where its test expects a refusal, and no other test does nothing else.
    said = {text for cell in CELLS for text, used in cell.links if used == key}
    refuses = re.search(r"raises\(|refused|status == 1", inspect.getsource(tests[0].function)) is not None
    if any("refused" in text for text in said):
        assert refuses, f"{name} refuses nothing"
    elif "refused" in name or name.startswith("test_a_bound_that_nobody"):
        pytest.fail(f"{name} is a refusal, and the matrix says {said}")


@pytest.mark.parametrize("key", TESTS)
def test_the_test_of_a_cell_is_about_it(key: str, collected: dict[str, list[pytest.Function]]) -> None:
    tests = collected["::".join(TESTS[key])]
    source = inspect.getsource(tests[0].function)
    assert re.search(r"\b(assert|compare_)|raises\(", source), f"{TESTS[key][1]} compares nothing"
    text = " ".join([*(test.nodeid for test in tests), source]).lower()
    for cell in CELLS:
        if any(used == key for _, used in cell.links):
            word = next(word for row, word in ROWS.items() if cell.row.startswith(row))
            assert re.search(word, text), f"{TESTS[key][1]} is not about {cell.row}"
            assert re.search(COLUMNS.get(cell.column, ""), text), f"{TESTS[key][1]} is not about {cell.column}"
