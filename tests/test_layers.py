"""Which layer may import which. `LAYERS` is the rule; docs/architecture.md draws it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "oft_diffusion"
ROOTS = (PACKAGE, "train_scripts", "app")


class Layer(NamedTuple):
    """One row: what the files of a layer may import besides the standard library and their own layer."""

    layers: str  # other layers, by name
    packages: str  # other distributions, by their import names
    name: str = ""  # the layer's, where several files make one; else the path's


_HUGGING_FACE = "diffusers transformers accelerate huggingface_hub safetensors"
_CORE = f"torch numpy PIL tqdm {_HUGGING_FACE}"

_QUANTIZERS = "bitsandbytes torchao optimum gguf diffusers"
_MATHS = "errors config autocast kernels rotation quantized architectures text_encoders targets"
_ADAPTER = f"{_MATHS} plan deltas bank inject merge"
_LIBRARY = (
    f"{_ADAPTER} prediction proof disk metadata files formats arithmetic images pipeline quantization load skeleton "
    "generate report"
)
_EVERYTHING = f"{_LIBRARY} training pocket evaluation cli"

# Longest matching path wins. In the order of the tree: a row names only rows above it.
LAYERS: dict[str, Layer] = {
    "oft_diffusion/errors.py": Layer("", ""),
    "oft_diffusion/config.py": Layer("errors", ""),
    "oft_diffusion/autocast.py": Layer("", "torch"),
    "oft_diffusion/kernels/": Layer("autocast", "torch triton"),
    "oft_diffusion/rotation.py": Layer("errors config kernels", "torch"),
    "oft_diffusion/quantized.py": Layer("errors", f"torch {_QUANTIZERS}"),
    "oft_diffusion/architectures.py": Layer("", ""),
    "oft_diffusion/text_encoders.py": Layer("architectures", ""),
    "oft_diffusion/prediction.py": Layer("", ""),
    "oft_diffusion/targets.py": Layer("errors architectures text_encoders", "torch"),
    "oft_diffusion/plan.py": Layer(_MATHS, "torch"),
    "oft_diffusion/deltas.py": Layer(f"{_MATHS} plan", "torch"),
    "oft_diffusion/offload.py": Layer("", "torch", name="bank"),
    "oft_diffusion/prepared.py": Layer(f"{_MATHS} plan deltas", "torch", name="bank"),
    "oft_diffusion/sharing.py": Layer(f"{_MATHS} plan deltas", "torch", name="bank"),
    "oft_diffusion/frozen.py": Layer("quantized", "torch", name="bank"),
    "oft_diffusion/streaming.py": Layer("errors quantized", "torch", name="bank"),
    "oft_diffusion/compiling.py": Layer("", "torch", name="bank"),
    "oft_diffusion/hooks.py": Layer(f"{_MATHS} plan deltas", "torch", name="bank"),
    "oft_diffusion/audit.py": Layer(f"{_MATHS} plan deltas", "torch", name="bank"),
    "oft_diffusion/store.py": Layer(f"{_MATHS} plan deltas", "torch", name="bank"),
    "oft_diffusion/choice.py": Layer(f"{_MATHS} plan deltas", "torch", name="bank"),
    "oft_diffusion/mixing.py": Layer(f"{_MATHS} plan deltas", "torch", name="bank"),
    "oft_diffusion/bank.py": Layer(f"{_MATHS} plan deltas", "torch"),
    "oft_diffusion/inject.py": Layer(f"{_MATHS} plan deltas bank", "torch"),
    "oft_diffusion/base_copy.py": Layer("errors quantized", "torch safetensors", name="merge"),
    "oft_diffusion/merge.py": Layer(f"{_MATHS} plan deltas bank inject", "torch safetensors"),
    "oft_diffusion/proof.py": Layer(_ADAPTER, "torch"),
    "oft_diffusion/disk.py": Layer("errors", "torch safetensors"),
    "oft_diffusion/metadata.py": Layer("errors config disk", ""),
    "oft_diffusion/files.py": Layer(f"{_ADAPTER} proof disk metadata", "torch safetensors"),
    "oft_diffusion/formats/": Layer(f"{_ADAPTER} proof disk metadata files", "torch safetensors"),
    "oft_diffusion/geodesics.py": Layer("errors config rotation", "torch", name="arithmetic"),
    "oft_diffusion/matching.py": Layer(f"{_ADAPTER} disk metadata files", "torch", name="arithmetic"),
    "oft_diffusion/arithmetic.py": Layer(f"{_ADAPTER} disk metadata files", "torch"),
    "oft_diffusion/images.py": Layer("errors disk", "numpy PIL"),
    "oft_diffusion/pipeline/": Layer(
        f"{_ADAPTER} prediction proof disk metadata files formats images", f"torch PIL {_HUGGING_FACE}"
    ),
    "oft_diffusion/quantization.py": Layer("errors", f"torch transformers {_QUANTIZERS}"),
    "oft_diffusion/gguf_file.py": Layer("errors quantization", "torch diffusers gguf", name="quantization"),
    "oft_diffusion/load.py": Layer("errors autocast text_encoders quantization", "torch diffusers huggingface_hub"),
    "oft_diffusion/skeleton.py": Layer("errors", "torch diffusers transformers huggingface_hub"),
    "oft_diffusion/generate.py": Layer(
        f"{_ADAPTER} metadata files formats images pipeline load", "torch PIL diffusers"
    ),
    "oft_diffusion/report.py": Layer("errors disk images", "PIL"),
    "oft_diffusion/pocket/": Layer("errors", "torch numpy PIL diffusers transformers safetensors"),
    "oft_diffusion/evaluation/": Layer(f"{_LIBRARY} pocket", f"{_CORE} skimage matplotlib"),
    "oft_diffusion/training/": Layer(f"{_LIBRARY} pocket evaluation", f"{_CORE} tomli"),
    "oft_diffusion/evaluation/command.py": Layer(f"{_LIBRARY} pocket evaluation training", _CORE, name="cli"),
    "oft_diffusion/convert.py": Layer(f"{_LIBRARY} pocket", _CORE, name="cli"),
    "oft_diffusion/info.py": Layer(_LIBRARY, _CORE, name="cli"),
    "oft_diffusion/cli.py": Layer(f"{_LIBRARY} training pocket evaluation", _CORE),
    # The facade, and the door: nothing in the package imports them.
    "oft_diffusion/quiet.py": Layer("", ""),
    "oft_diffusion/__init__.py": Layer(f"quiet {_LIBRARY}", ""),
    "oft_diffusion/__main__.py": Layer("cli", ""),
    # Outside the package: anything public, and no import leads back.
    "train_scripts/": Layer(f"{_EVERYTHING} __init__", f"{_CORE} skimage matplotlib"),
    **{  # what works without a browser
        f"app/{name}.py": Layer(f"{_EVERYTHING} __init__", _CORE)
        for name in (
            "session",
            "training",
            "machine",
            "shelf",
            "drawing",
            "comparing",
            "covers",
            "photos",
            "runs",
            "kept",
            "room",
            "packing",
            "presets",
            "previews",
            "prompts",
            "words",
            "workshop",
        )
    },
    "app/workspace.py": Layer(f"{_EVERYTHING} __init__", f"{_CORE} filelock"),
    "app/model.py": Layer(f"{_EVERYTHING} __init__", f"{_CORE} psutil"),
    "app/gate.py": Layer(f"{_EVERYTHING} __init__", f"{_CORE} gradio starlette"),
    "app/": Layer(f"{_EVERYTHING} __init__", f"{_CORE} gradio"),
}


def layer_name(path: str) -> str:
    """`oft_diffusion/kernels/` -> `kernels`, `oft_diffusion/bank.py` -> `bank`; outside the package the root's name."""
    if (row := row_of(path)) is not None and LAYERS[row].name:
        return LAYERS[row].name
    parts = Path(path).with_suffix("").parts
    return parts[1] if parts[0] == PACKAGE else parts[0]


def row_of(path: str) -> str | None:
    rows = [row for row in LAYERS if path == row or (row.endswith("/") and path.startswith(row))]
    return max(rows, key=len, default=None)


def imported_modules(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands; `from a import b` gives `a.b`."""
    package = Path(path).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *filter(None, [node.module])))
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def resolve(root: Path, dotted: str) -> tuple[str, str]:
    """("layer", name), ("package", import name) or ("stdlib", name) of what a dotted name leads to."""
    first, *rest = dotted.split(".")
    if first == PACKAGE:
        module = root / PACKAGE / (rest[0] if rest else "")
        is_module = bool(rest) and (module.is_dir() or module.with_suffix(".py").is_file())
        return "layer", layer_name(f"{PACKAGE}/{rest[0]}.py") if is_module else "__init__"
    if first in ROOTS or first in ("tests", "benchmarks"):
        return "layer", first
    return ("stdlib" if first in sys.stdlib_module_names else "package"), first


def is_private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def violations(root: Path) -> list[str]:
    """One sentence for each import below `root` that `LAYERS` does not allow, and for each file without a row."""
    found = []
    for file in sorted(f for top in ROOTS for f in (root / top).rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if (row := row_of(path)) is None:
            found.append(f"{path}: no row in LAYERS (tests/test_layers.py): say there what it may import")
            continue
        here, allowed = layer_name(path), LAYERS[row]
        for line, dotted in imported_modules(ast.parse(file.read_text(encoding="utf-8")), path):
            kind, name = resolve(root, dotted)
            inside = path.startswith(f"{PACKAGE}/")
            if kind == "layer" and name != here and name not in allowed.layers.split():
                found.append(f"{path}:{line}: {here} may not import {name} ({dotted})")
            elif kind == "package" and name not in allowed.packages.split():
                found.append(f"{path}:{line}: {here} may not import the package {name} ({dotted})")
            elif kind == "layer" and name != here and not inside and is_private(dotted):
                found.append(f"{path}:{line}: {here} may import public names only ({dotted})")
    return found


def test_the_repository_keeps_the_rules() -> None:
    problems = violations(ROOT)
    assert not problems, "\n" + "\n".join(problems)


def test_a_row_names_only_rows_above_it() -> None:
    above: set[str] = set()
    for row, allowed in LAYERS.items():
        if row.startswith(f"{PACKAGE}/"):
            assert set(allowed.layers.split()) <= above, row
            above.add(layer_name(row))


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("oft_diffusion/rotation.py", "from oft_diffusion.bank import OFTBank", "rotation may not import bank"),
        ("oft_diffusion/rotation.py", "from oft_diffusion import bank", "rotation may not import bank"),
        ("oft_diffusion/rotation.py", "from .bank import OFTBank", "rotation may not import bank"),
        ("oft_diffusion/kernels/block_rotate.py", "from ..bank import OFTBank", "kernels may not import bank"),
        ("oft_diffusion/kernels/block_rotate.py", "from .. import bank", "kernels may not import bank"),
        ("oft_diffusion/bank.py", "def f():\n    import diffusers", "bank may not import the package diffusers"),
        ("oft_diffusion/bank.py", "import importlib\nimportlib.import_module('diffusers')", "package diffusers"),
        ("oft_diffusion/config.py", "import torch.nn", "config may not import the package torch"),
        ("oft_diffusion/bank.py", "from oft_diffusion import OFTBank", "bank may not import __init__"),
        ("oft_diffusion/cli.py", "import app.main", "cli may not import app"),
        ("oft_diffusion/pipeline/using.py", "from train_scripts import demo", "pipeline may not import train_scripts"),
        ("oft_diffusion/training/loop.py", "import gradio", "training may not import the package gradio"),
        ("oft_diffusion/evaluation/looks.py", "from oft_diffusion.training import data", "may not import training"),
        ("app/session.py", "import gradio", "app may not import the package gradio"),
        ("app/main.py", "from oft_diffusion.bank import _secret", "public names only"),
        ("oft_diffusion/novelty.py", "", "no row in LAYERS"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path: Path, path: str, source: str, expected: str) -> None:
    for module in ("bank", "training/data"):
        (tmp_path / PACKAGE / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / PACKAGE / f"{module}.py").touch()
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    assert violations(tmp_path) == []
    file.write_text(source)
    [problem] = violations(tmp_path)
    assert expected in problem
    assert problem.startswith(path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("oft_diffusion/bank.py", "import math\nimport torch.nn as nn\nfrom oft_diffusion.rotation import delta"),
        ("oft_diffusion/kernels/__init__.py", "from oft_diffusion.kernels.block_rotate import block_rotate"),
        ("oft_diffusion/__main__.py", "from oft_diffusion.cli import main"),
        ("app/main.py", "import gradio\nfrom app.session import Session\nfrom oft_diffusion import OFTConfig"),
    ],
)
def test_what_the_table_allows_passes(tmp_path: Path, path: str, source: str) -> None:
    for module in ("rotation", "cli", "kernels/block_rotate"):
        (tmp_path / PACKAGE / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / PACKAGE / f"{module}.py").touch()
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    assert violations(tmp_path) == []
