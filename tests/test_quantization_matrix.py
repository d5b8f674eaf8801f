"""The matrix in docs/quantization.md. Apart from what it looks at, whose log is written while those tests run."""

from __future__ import annotations

import re
from pathlib import Path

from oft_diffusion.quantization import SCHEMES
from tests.quantization.backends import GGUF, ON_A_PROCESSOR, STEPS

ROOT = Path(__file__).parent.parent


def test_the_matrix_in_the_docs_is_what_ran() -> None:
    """Each tick is a test of `test_backends.py` that the committed log says passed, a "no" one of `test_refused.py`."""
    text = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    row = r"^\| `([a-z0-9-]+)` \| [^|]+ \| [^|]+ \|((?: [^|]*\|){" + str(len(STEPS)) + "})$"
    rows = re.findall(row, text.partition('Each "yes"')[0], re.MULTILINE)
    ticks = {name: [cell.strip() for cell in cells.split("|")[:-1]] for name, cells in rows}
    assert set(ticks) == {*SCHEMES, GGUF}
    here = {*ON_A_PROCESSOR, GGUF}
    assert {name for name, cells in ticks.items() if cells == ["yes"] * len(STEPS)} == here
    log = (ROOT / "docs" / "logs" / "test-quantization.log").read_text(encoding="utf-8")
    passed = set(re.findall(r"PASSED tests/quantization/test_backends\.py::(\w+\[[^]]+\])", log))
    for name in here:
        assert {f"test_{step}[{name}]" for step in ("train", "save", "merge_and_unmerge")} <= passed
        assert {f"test_load[{name}-{onto}]" for onto in ("the same", "another", "the base itself")} <= passed
    assert not re.search(r"\b(FAILED|ERROR)\b", log)
    others = {name: cells for name, cells in ticks.items() if name not in here}
    assert all(cells[0] == ("not run" if SCHEMES[name].trains else "no") for name, cells in others.items())
    assert all(cells[1:] == ["not run"] * (len(STEPS) - 1) for cells in others.values())
