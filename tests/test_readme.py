"""The README, and the guide to adapters, are executable: their Python blocks run, and their commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from oft_diffusion import OFTConfig, inject_oft, save_oft_weights
from oft_diffusion.cli import main
from oft_diffusion.pocket import pocket_pipeline
from oft_diffusion.training.families import FAMILIES
from tests.helpers.tiny_families import BUILDERS, kind_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


TEXTS = {"README.md": README} | {
    name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("using.md", "formats.md")
}


def blocks(language: str) -> list[tuple[str, int, str]]:
    """Every block of a language: whose it is, its number, and its lines."""
    return [
        (name, number, block)
        for name, text in TEXTS.items()
        for number, block in enumerate(re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL))
    ]


@pytest.fixture
def demo_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the adapter that `make demo` would have left there."""
    pipe = pocket_pipeline()
    bank = inject_oft(pipe.unet, OFTConfig(), "demo")
    torch.nn.init.normal_(bank.generators["demo"], std=0.05)
    save_oft_weights(pipe, tmp_path / "runs" / "demo", "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "number", "code"), blocks("python"), ids=lambda v: str(v)[:12])
def test_python_blocks_run(name: str, number: int, code: str, demo_folder: Path) -> None:
    exec(compile(code, f"{name} block {number}", "exec"), {"__name__": "readme"})  # noqa: S102 - our own texts
    for saved in re.findall(r'\.save\("(.+?)"\)', code):
        assert (demo_folder / saved).stat().st_size > 1000


def test_there_are_python_blocks() -> None:
    assert len(blocks("python")) >= 4


def test_the_matrix_has_a_row_per_pipeline_that_a_test_trains() -> None:
    rows = re.findall(r"^\| `(\w+)`([^|]*) \|((?: ✓ \|)+)$", README, flags=re.MULTILINE)
    assert [f"{kind}{variant}" for kind, variant, _ in rows] == list(BUILDERS)
    assert {ticks.count("✓") for _, _, ticks in rows} == {5}
    assert {kind_of(name) for name in BUILDERS} == set(FAMILIES)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"README names `make {target}`"


@pytest.mark.parametrize("verb", ["train", "generate", "info", "evaluate", "convert"])
def test_command_lines_use_options_that_exist(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    commands = [c for *_, block in blocks("bash") for c in block.replace("\\\n", " ").splitlines()]
    mine = [shlex.split(c, comments=True) for c in commands if c.startswith(f"oft-diffusion {verb} ")]
    assert mine, f"no text shows `oft-diffusion {verb}`"
    for word in (w for command in mine for w in command if w.startswith("--")):
        assert re.search(rf"{word}\b", shown), f"a text uses {word}, which `oft-diffusion {verb}` does not know"


def test_linked_files_exist() -> None:
    links = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if not t.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), f"README links to {link}"
