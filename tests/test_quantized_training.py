"""Training upon quantized bases, compared: the methods begin alike, train adapters alone, and are told from the CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import quantized_run, quantized_times
from benchmarks.methods import LORA, OURS, PEFT_OFT
from benchmarks.pocket_subjects import FINAL
from benchmarks.quantized_learner import Learner, learn
from benchmarks.quantized_merge import trained_pairs
from benchmarks.quantized_run import COLUMNS, NONE, Bench, Task
from benchmarks.quantized_tables import best, table
from benchmarks.quantized_training import METHODS, Queue, _parser
from benchmarks.records import append, load
from oft_diffusion.load import load_pipeline
from oft_diffusion.pocket import pocket_path

TASK = Task("final", "nf4", OURS, FINAL[0], 0, 9e-3, 3e-4)
SMALL: dict[str, Any] = {
    "steps": 2, "warmup_steps": 0, "decay_steps": 0, "sampling_steps": 1, "num_class_images": 1, "prior_twins": 0,
    "min_crop": 1.0, "flip": False, "batch_size": 1, "class_batch_size": 1, "mixed_precision": "no",
}  # fmt: skip


def _of_the_base(learner: Learner) -> dict[str, Tensor]:
    own = {id(parameter) for parameter in learner.trained}
    named = [item for name in learner.adapted for item in learner.family.module(name).named_parameters()]
    return {name: p.detach().clone() for name, p in named if id(p) not in own}


@pytest.mark.slow
def test_methods_begin_alike_and_train_adapters_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = []

    def watched(learner: Learner, *rest: Any) -> Any:
        batch = learner.batches.at(0)

        @torch.no_grad()
        def answer() -> Tensor:
            return learner.model(batch.latents, batch.levels, batch.prompts, batch.encoded)

        with learner.without_adapters():
            answer()  # at a layer's first call bitsandbytes may pack its weight otherwise
            plain = answer()
        assert torch.allclose(answer(), plain, atol=1e-4)
        before, adapters = _of_the_base(learner), [p.detach().clone() for p in learner.trained]
        found = learn(learner, *rest)
        after = _of_the_base(learner)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
        assert any(not torch.equal(p, old) for p, old in zip(learner.trained, adapters, strict=True))
        with learner.without_adapters():
            assert torch.equal(answer(), plain)
        apart.append(float((answer() - plain).abs().max()))
        return found

    monkeypatch.setattr(quantized_run, "learn", watched)
    bench = Bench(SMALL, 1, tmp_path, "cpu", busy=True, validation=1)
    rows = [bench.run(replace(TASK, method=method)) for method in METHODS]
    first = [float(row["first_loss"]) for row in rows]
    assert first == pytest.approx([first[0]] * len(rows), rel=1e-4)
    assert min(apart) > 1e-3
    assert all(math.isfinite(float(row[name])) for row in rows for name in (*quantized_run.LOSSES, "seconds"))
    assert all(row["hit"] in ("0", "1") and row["busy"] == "yes" and not row["failed"] for row in rows)
    append(tmp_path / "data.csv", [{"setup": "it", **row} for row in rows])
    append(tmp_path / "data.csv", [{"setup": "it", **bench.failed(replace(TASK, method=LORA, seed=1), "no")}])
    text = table(load(tmp_path / "data.csv"))
    assert all(f"| `nf4` | {method} | 1 | 0." in text or f"| `nf4` | {method} | 1 | 1." in text for method in METHODS)
    assert f"- failed: final, nf4, {LORA}, {FINAL[0]}, 1, 0.009, 0.0003: no" in text


@pytest.mark.slow
def test_steps_side_by_side(tmp_path: Path) -> None:
    bench = Bench(SMALL, 1, tmp_path, "cpu", busy=False, validation=1)
    rows = quantized_times.measure(bench, "int8", 3)
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert int(row["peak_bytes"]) > 3 * 4 * int(row["parameters"])  # gradients and two moments, and activations
    append(tmp_path / "times.csv", rows)
    lora = rows[1] | {"seconds": "1 2 4", "peak_bytes": str(2**20)}
    ours = rows[0] | {"seconds": "1 1 1", "peak_bytes": str(2**19)}
    append(tmp_path / "times.csv", [ours, lora])
    text = quantized_times.table(load(tmp_path / "times.csv"))
    assert "| 1000.0 (1000.0 to 1000.0) | 0.50 (0.38 to 0.75) | 0.5 | 0.50 |" in text
    assert "| 2000.0 (1500.0 to 3000.0) | 1.00 (1.00 to 1.00) | 1.0 | 1.00 |" in text


@pytest.mark.slow
def test_a_run_upon_the_base_leaves_its_weights(tmp_path: Path) -> None:
    bench = Bench(SMALL, 1, tmp_path, "cpu", busy=False, validation=1)
    for method in (OURS, LORA):
        bench.run(replace(TASK, quantization=NONE, method=method))
    [pair] = trained_pairs(tmp_path / "weights")
    pipe = load_pipeline(pocket_path())
    assert pair["ours"].keys() == pair["LoRA"].keys()
    for layer in pair["ours"]:
        part, _, path = layer.partition(".")
        base = getattr(pipe, part).get_submodule(path).weight
        ours, lora = (pair[method][layer] for method in ("ours", "LoRA"))
        assert min((ours - base).norm(), (lora - base).norm()) > 1e-5 * base.norm()
        torch.testing.assert_close(ours.norm(dim=1), base.norm(dim=1), rtol=1e-4, atol=1e-5)


def _row(**cells: object) -> dict[str, str]:
    usual = {
        "setup": "new", "purpose": "final", "quantization": "none", "method": OURS, "subject": "a", "seed": "0",
        "learning_rate": "0.01", "epsilon": "1e-08", "adapter": "b = 32", "parameters": "10", "steps": "450",
        "pictures": "48", "first_loss": "1", "loss": "0.5", "instance_loss": "0.1", "validation_loss": "0.6",
        "validation_instance_loss": "0.2", "hit": "0.5", "fidelity": "0.9", "hit_and_fidelity": "0.4",
        "preservation": "0", "seconds": "0.1", "peak_bytes": str(2**20), "busy": "no", "validation_batches": "64",
    }  # fmt: skip
    return dict.fromkeys(COLUMNS, "") | usual | {name: str(value) for name, value in cells.items()}


def _saved(path: Path, rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    append(path, rows)
    return load(path)


def test_the_table_sets_quantized_beside_plain(tmp_path: Path) -> None:
    rows = [_row(setup="old", loss=9)]
    rows += [_row(seed=seed, loss=loss, hit=0.25) for seed, loss in ((0, 0.5), (1, 0.7))]
    rows += [
        _row(seed=seed, loss=loss, hit=0.75, quantization="nf4", busy="yes", seconds=77)
        for seed, loss in ((0, 0.6), (1, 0.9))
    ]
    compared = table(_saved(tmp_path / "data.csv", rows))
    assert "| `none` | ours | 2 | 0.6000 (0.5000 to 0.7000) |" in compared
    assert "| `nf4` | ours | 2 | 0.7500 (0.6000 to 0.9000); +0.1500 |" in compared
    assert "75.0 (75.0 to 75.0); +50.0" in compared
    assert "9.0000" not in compared


def test_rates_are_read_from_the_search(tmp_path: Path) -> None:
    options = _parser().parse_args(["--file", str(tmp_path / "data.csv"), "--out", str(tmp_path), "--device", "cpu"])
    queue = Queue(options, "cpu")
    with pytest.raises(SystemExit, match="--search"):
        queue.tasks()
    found = {"setup": queue.setup, "purpose": "search"}
    rows = [
        _row(**found, method=LORA, learning_rate=0.001, hit_and_fidelity=0.9, validation_loss=0.5),
        _row(**found, method=LORA, learning_rate=0.002, hit_and_fidelity=0.9, validation_loss=0.4),
        _row(**found, method=LORA, learning_rate=0.004, hit_and_fidelity=0.9, validation_loss="nan"),
        _row(**found, method=LORA, learning_rate=0.008, hit_and_fidelity=0.1, validation_loss=0.1),
        _row(**found, method=PEFT_OFT, learning_rate=0.009, epsilon=3e-4),
    ]
    rows = _saved(tmp_path / "data.csv", rows)
    assert best(rows, LORA) == (0.002, 1e-8)
    tasks = queue.tasks()
    assert len(tasks) == 3 * 3 * 3 * 2
    assert {(t.method, t.rate, t.epsilon) for t in tasks} == {
        (OURS, 9e-3, 3e-4), (LORA, 0.002, 1e-8), (PEFT_OFT, 0.009, 3e-4),
    }  # fmt: skip
    assert "| PEFT LoRA | 0.002 | 1e-08 | 1 | 90.0 | 50.0 | 90.0 | 0.0 | 0.5000 | 0.4000 | chosen |" in table(rows)
    assert not queue._is_done(tasks[0])
    _saved(tmp_path / "data.csv", [_row(setup=queue.setup, **tasks[1].columns(), validation_batches=32)])
    _saved(tmp_path / "data.csv", [_row(setup=queue.setup, **tasks[0].columns())])
    assert [queue._is_done(task) for task in tasks[:2]] == [True, False]


def test_a_search_has_a_subject_of_its_own(tmp_path: Path) -> None:
    options = _parser().parse_args(["--search", "--file", str(tmp_path / "data.csv"), "--out", str(tmp_path)])
    tasks = Queue(options, "cpu").tasks()
    assert not {task.subject for task in tasks} & set(FINAL)
    assert {task.quantization for task in tasks} == {"none"}
    tried = [(task.rate, task.epsilon) for task in tasks if task.method == LORA]
    assert tried == [(rate, e) for e in (3e-4, 1e-8) for rate in (5e-4, 1e-3, 2e-3, 4e-3)]
    assert [task.rate for task in tasks if task.method == PEFT_OFT] == pytest.approx([4.5e-3, 9e-3, 18e-3])
