"""What is made of the speed benchmark's rows: tables, aims beside what was reached, all runs and the newest, plots."""

from __future__ import annotations

from pathlib import Path

from benchmarks import rotate_bandwidth
from benchmarks.methods import BASE, BOFT, LORA, NATIVE, OURS, PEFT_OFT, TRITON, WEIGHT_CENTRIC
from benchmarks.speed_aims import aims
from benchmarks.speed_brief import brief
from benchmarks.speed_groups import groups, runs
from benchmarks.speed_pooled import pooled
from benchmarks.speed_setups import SETUPS, STACK
from benchmarks.speed_tables import pictures, plots, scaling, series, table, unmeasured

ROW = {
    "date": "2030-01-01", "hardware": "A card", "threads": "2", "torch": "3", "diffusers": "1", "transformers": "1",
    "oft-diffusion": "1", "commit": "abc", "peft": "1", "lycoris": "1", "cuda": "13", "device": "cuda",
    "work": "SDXL", "cut": "",
    "base_parameters": "1", "base_bytes": "2", "dtype": "bfloat16", "quantization": "none", "block_size": "32",
    "compiled": "no",
    "checkpointing": "no", "text": "no", "small": "no", "batch": "1", "tokens": "", "width": "", "layers": "",
    "kind": "train", "settings": "", "trained": "", "adapter_bytes": "", "peak_bytes": "", "operations": "",
    "saved_bytes": "", "kernels": "", "kernel_seconds": "", "load": "0.1", "reason": "", "run": "one",
}  # fmt: skip


def row(method: str, *seconds: float, **figures: object) -> dict[str, str]:
    times = {"rounds": str(len(seconds)), "seconds": " ".join(map(str, seconds))}
    return ROW | {"method": method} | times | {name: str(value) for name, value in figures.items()}


ROWS = [
    row(OURS, 9.0, 9.0, run="an older one", commit="of another tree"),
    row(BASE, 1.0, 2.0, 1.0, operations=100, peak_bytes=5_000_000),
    row(OURS, 1.2, 2.2, 1.2, operations=120, peak_bytes=6_000_000, trained=1234),
    row(LORA, 1.5, 2.5, 1.5, operations=200, peak_bytes=7_000_000),
    row(BOFT, reason="no | such thing"),
]


def test_tables_pair_rounds_and_leave_out_what_is_empty() -> None:
    text = table(ROWS)
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| | "))
    assert head == (
        "| | trained | ms | of LoRA | of the base | overhead, ms | operations | peak above weights, MB | why not |"
    )
    [own] = [line for line in lines if line.startswith("| ours |")]
    assert own == (
        "| ours | 1,234 | 1200.0 (1200.0 to 1700.0) | 0.80 (0.80 to 0.84) | 1.20 (1.15 to 1.20) | "
        "200.0 (200.0 to 200.0) | 120 | 6.0 |  |"
    )
    assert "| PEFT BOFT |  |  |  |  |  |  |  | no / such thing |" in lines
    assert "A card, 2 threads, CUDA 13" in text
    assert "commit abc of 2030-01-01, 3 rounds; load 0.1 before it." in text


def test_aims_stand_beside_what_was_reached() -> None:
    lines = table(ROWS).splitlines()
    cells = [line.split(" | ") for line in lines[2 : lines.index("")]]
    told = {first[2:]: [*more, last.removesuffix(" |")] for first, *more, last in cells}
    where = "SDXL, a training step (bfloat16, batch 1, b = 32, eager), A card"
    run = "abc of 2030-01-01, 3 rounds"
    assert told["adapter operations, of PEFT LoRA's"] == ["0.35", "0.200", where, run, "yes"]
    assert told["training step, of PEFT LoRA's"] == ["1.00", "0.800 (0.800 to 0.840)", where, run, "yes"]
    assert told["overhead, of PEFT LoRA's"] == ["0.50", "0.400", where, run, "yes"]
    assert all(last == "not measured" for words, (*_, last) in told.items() if "weight-centric" in words)
    slow = [row(OURS, 1.6, 2.6, 1.6) if r["method"] == OURS else r for r in ROWS]
    assert any(line.startswith("| training step") and line.endswith("| no |") for line in table(slow).splitlines())
    near = [row(OURS, 1.47, 2.55, 1.49) if r["method"] == OURS else r for r in ROWS]
    [line] = [line for line in table(near).splitlines() if line.startswith("| training step, of PEFT LoRA's |")]
    assert line.endswith("| yes, within the spread |")
    assert table([]) == "No figures have been taken yet."


def test_what_has_no_figure_is_told() -> None:
    missing = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in unmeasured(ROWS).splitlines()[2:]}
    [where, methods] = missing["SDXL (train, bfloat16, batch 1, b = 32)"]
    assert where == "a card"
    assert WEIGHT_CENTRIC in methods
    assert not {BASE, OURS, LORA, BOFT} & set(methods.removesuffix(" |").split("; "))  # BOFT has a reason
    assert missing["SD 1.5 (train, float32, batch 1, small, b = 32)"] == ["a processor", "all |"]
    assert len(unmeasured([]).splitlines()) == 2 + sum(map(len, SETUPS.values()))


def test_aims_without_a_figure_on_a_card_have_an_empty_cell() -> None:
    """By mode, with the models that lack it; a quantized base does not answer for its model."""
    measured = [r | {"method": TRITON} if r["method"] == OURS else r for r in ROWS]
    nf4 = [r | {"work": "Flux.1", "quantization": "nf4", "run": "two"} for r in measured]
    compiled = [r | {"work": "SD 1.5", "compiled": "yes", "run": "three"} for r in measured]
    lines = aims(groups([*measured, *nf4, *compiled]), []).splitlines()
    of_lora = [line for line in lines if line.startswith("| training step, of PEFT LoRA's, by Triton |")]
    assert [line for line in of_lora if line.endswith("| not measured |")] == [
        f"| training step, of PEFT LoRA's, by Triton | 1.00 |  | {where}, a card |  | not measured |"
        for where in ("SD 1.5, SD 3.5 Medium, Flux.1 (eager)", "SDXL, SD 3.5 Medium, Flux.1 (compiled)")
    ]
    assert len(of_lora) == 5
    assert not any("plain" in line or "in C" in line for line in lines if line.endswith("| not measured |"))


def copied(shape: str, share: float, **change: str) -> dict[str, str]:
    usual = {"way": "dx", "dtype": "bfloat16", "block_size": "32", "hardware": "A card"}
    told = {"date": "2030-01-01", "commit": "abc"}
    return usual | told | {"shape": shape, "of_copy": str(share)} | change


def test_the_kernel_alone_is_told_by_dtype_block_size_and_way() -> None:
    rows = [
        copied("SDXL, a", 0.1),
        copied("SDXL, a", 0.5),
        copied("SDXL, b", 0.9),
        copied("Flux.1, c", 0.8, commit="d"),
    ]
    first, *lacking = [line for line in aims([], rows).splitlines() if "rotation kernel" in line]
    assert first == (
        "| rotation kernel, dx, of a copy's bandwidth (at least) | 80 % | 50 to 90 % | SDXL and Flux.1, 3 inputs "
        "(bfloat16, b = 32), A card | abc of 2030-01-01, d of 2030-01-01 | by 2 of 3 inputs |"
    )
    assert [line.split(" | ")[3] for line in lacking] == [
        "b = 8, 16, 64, 128 (bfloat16), a card", "b = 8, 16, 32, 64, 128 (float16, float32), a card",
    ]  # fmt: skip
    assert all(line.endswith(" |  | not measured |") for line in lacking)


def test_all_runs_stand_beside_the_newest() -> None:
    def run(name: str, own: float, **change: str) -> list[dict[str, str]]:
        about = {"work": "SD 1.5", "device": "cpu", "hardware": "A processor", "run": name, "commit": name} | change
        times = {NATIVE: own, LORA: 1.0, PEFT_OFT: 2.0}
        return [row(method, *(3 * (seconds,))) | about for method, seconds in times.items()]

    older_than_c = [r for r in run("zero", 9.0) if r["method"] != NATIVE]
    rows = [*older_than_c, *run("one", 0.8), *run("two", 0.9), *run("three", 0.7), *run("four", 5.0, work="SDXL")]
    [_, _, line] = pooled(rows).splitlines()
    assert line == (
        "| bfloat16, batch 1, b = 32, eager | A processor | 0.700 (0.700 to 0.700) | 0.800 (0.700 to 0.900) | "
        "0.350 (0.350 to 0.350) | 0.400 (0.350 to 0.450) | 0.800 (one of 2030-01-01, 3 rounds); "
        "0.900 (two of 2030-01-01, 3 rounds); 0.700 (three of 2030-01-01, 3 rounds) |"
    )


def test_the_aims_of_a_processor_in_few_lines() -> None:
    about = {
        "work": "SD 1.5", "device": "cpu", "dtype": "float32", "commit": "new", "hardware": "A processor",
        "cut": "narrower",
    }  # fmt: skip
    times = {BASE: 1.0, OURS: 1.9, NATIVE: 1.8, LORA: 2.0}
    train = [row(method, *(3 * (s,)), operations=int(100 * s)) | about for method, s in times.items()]
    live = [r | {"kind": "live", "compiled": "yes", "run": "two", "cut": ""} for r in train]
    others = [r | {"batch": "4", "run": "three"} for r in train] + [r | {"hardware": "Another"} for r in train]
    assert brief([*others, *train, *live]).splitlines() == [
        "| A processor | at most | in C | in plain PyTorch | commit, rounds |",
        "|---|---|---|---|---|",
        "| adapter operations, of PEFT LoRA's, eager | 0.35 |  | 0.900: no | new of 2030-01-01, 3 rounds |",
        (
            "| training step, of PEFT LoRA's, eager | 0.97 | 0.900 (0.900 to 0.900): yes | "
            "0.950 (0.950 to 0.950): yes | new of 2030-01-01, 3 rounds |"
        ),
        (
            "| live sampling step, of the base's, compiled, uncut | 1.05 | 1.800 (1.800 to 1.800): no | "
            "1.900 (1.900 to 1.900): no | new of 2030-01-01, 3 rounds |"
        ),
    ]
    assert brief([]) == "Not measured yet."


def test_runs_of_the_newest_commit_count_together() -> None:
    """Pair by pair, so that a run of few methods adds rounds to those alone."""
    about = {"device": "cpu", "hardware": "A processor"}
    rows = [
        row(method, *seconds) | about | {"run": run, "commit": commit}
        for run, commit, times in (
            ("one", "old", {BASE: (1.0,) * 3, LORA: (1.0,) * 3, OURS: (9.0,) * 3}),
            ("two", "new", {BASE: (1.0,) * 3, LORA: (2.0,) * 3, OURS: (1.0,) * 3, BOFT: (7.0,) * 3}),
            ("three", "new", {LORA: (4.0,) * 3, OURS: (1.0,) * 3}),
        )
        for method, seconds in times.items()
    ]
    [group] = groups(rows)
    assert group.ratios(OURS, LORA) == [0.5] * 3 + [0.25] * 3
    assert group.overhead(LORA) == [1.0] * 3
    assert group.seconds(BOFT) == [7.0] * 3
    assert group.seconds(LORA) == [2.0] * 3, "milliseconds of two runs are not to be compared"
    assert group.run() == "new of 2030-01-01, 3 + 3 rounds"
    [[*each]] = runs(rows)
    assert [len(run.rows) for run in each] == [3, 4, 2]
    without = [one | {"commit": ""} for one in rows]
    assert groups(without)[0].ratios(OURS, LORA) == [0.25] * 3


def test_a_table_of_several_runs_names_them() -> None:
    row = {"dtype": "float32", "block_size": "32", "way": "dx"}
    rows = [row | {"shape": shape} for shape in ("a", "b", "a")]
    assert rotate_bandwidth._measured_again(rows) == "Of another run, later on that day: a (b = 32)."
    assert rotate_bandwidth._measured_again(rows[:2]) == ""


def test_scaling_is_drawn_along_one_size_alone(tmp_path: Path) -> None:
    usual = {"work": STACK, "tokens": 64, "width": 32, "layers": 2}
    stacks = [
        row(method, *(n * factor for n in (1.0, 1.0, 1.0)), run=f"{i}", **(usual | change))
        for i, change in enumerate(({}, {"tokens": 128}, {"tokens": 32}, {"width": 64}))
        for method, factor in ((BASE, 1.0), (OURS, 2.0 + i))
    ]
    found = groups(stacks)
    [by_tokens], [by_width] = series(found, "tokens"), series(found, "width")
    assert scaling(by_tokens, "tokens") == {OURS: [(32.0, 3000.0), (64.0, 1000.0), (128.0, 2000.0)]}
    assert scaling(by_width, "width") == {OURS: [(32.0, 1000.0), (64.0, 4000.0)]}
    assert series(found, "layers") == []
    written = plots([*ROWS, *stacks], tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in written] == [
        "a_card_2_threads/sdxl_step_bfloat16_batch_1_b_32_eager.png",
        "a_card_2_threads/stack_tokens_bfloat16_batch_1_32_wide_2_layers_b_32_eager.png",
        "a_card_2_threads/stack_width_bfloat16_batch_1_64_tokens_2_layers_b_32_eager.png",
    ]
    assert all(path.stat().st_size > 1000 for path in written)


def test_pictures_of_other_hardware_and_setups_lie_elsewhere() -> None:
    changes: list[dict[str, str]] = [
        {},
        {"hardware": "Another"},
        {"threads": "4"},
        {"batch": "4"},
        {"compiled": "yes"},
        {"text": "yes"},
    ]
    rows = [r | change for change in changes for r in ROWS]
    assert len(pictures(rows)) == len(changes)
