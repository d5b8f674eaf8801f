"""The speed benchmark: equal targets for all methods, turns that hit all alike, reasons in place of guesses."""

from __future__ import annotations

import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import (
    build_forms,
    full_counts,
    fused_linear,
    methods,
    quantized_layers,
    quantized_merge,
    quantized_tables,
    quantized_times,
    quantized_training,
    records,
    rotate_bandwidth,
    rotate_forms,
    speed,
    stages,
)
from benchmarks.candidates import Candidate
from benchmarks.counting import peak_allocated, saved_bytes
from benchmarks.methods import (
    BASE,
    BOFT,
    DENSE,
    DORA,
    EQUAL_LORA,
    FULL,
    LORA,
    LYCORIS,
    METHODS,
    NATIVE,
    OURS,
    PEFT_OFT,
    TRITON,
    WEIGHT_CENTRIC,
    Adapted,
    Method,
    UnsupportedError,
    disturb,
    equal_rank,
)  # fmt: skip
from benchmarks.speed_brief import brief
from benchmarks.speed_pooled import pooled
from benchmarks.speed_setups import BUILDS, KINDS, SETUPS, STACK, Setup
from benchmarks.speed_tables import pictures, table
from benchmarks.turns import CardStoppedError, take_turns, told
from benchmarks.weight_centric import rotate_weight
from benchmarks.works import WORKS, Sizes, Work
from oft_diffusion.kernels import block_rotate, processor
from oft_diffusion.quantization import scheme
from oft_diffusion.rotation import cayley_delta, unpack
from oft_diffusion.targets import find_targets
from tests.helpers.tiny_denoisers import unet

TINY = Sizes(tokens=8, width=64, layers=2)
NO_MERGING = {LYCORIS, WEIGHT_CENTRIC, DENSE}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_commit", lambda: "abc")
    monkeypatch.setitem(WORKS, "tiny", lambda sizes, **_: Work(*unet(), note="tiny"))


def names_of(model: nn.Module) -> list[str]:
    return [target.name for target in find_targets(model, "attention")]


# -- methods


def rotated(generators: Callable[[nn.Sequential], list[Tensor]]) -> tuple[Tensor, ...]:
    """Output of two layers under a random adapter, and gradients of input and generators."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32)).requires_grad_(False)
    x = torch.randn(5, 64, requires_grad=True)
    trained = generators(model)
    rows = 0.1 * torch.randn(7, 120)  # 64 and 48 inputs: 4 and 3 blocks of 16, of one parameter or two
    with torch.no_grad():
        for parameter, own in zip(trained, rows.split([len(p) for p in trained]), strict=True):
            parameter.copy_(own)
    out = model(x)
    out.square().sum().backward()
    grads = [p.grad for p in trained if p.grad is not None]
    assert len(grads) == len(trained)
    assert x.grad is not None
    return out.detach(), x.grad, torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("dense", [False, True])
def test_the_weight_centric_reference_computes_what_ours_does(dense: bool) -> None:
    def reference(model: nn.Sequential) -> list[Tensor]:
        return [rotate_weight(layer, 16, dense=dense) for layer in model]

    def own(model: nn.Sequential) -> list[Tensor]:
        return list(methods.ours(model, ["0", "1"], 16).trained)

    for mine, theirs in zip(rotated(own), rotated(reference), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_all_methods_adapt_the_same_layers() -> None:
    model, _ = unet()
    names = names_of(model)
    layers: list[Any] = [model.get_submodule(name) for name in names]
    ins, outs = sum(layer.in_features for layer in layers), sum(layer.out_features for layer in layers)
    rank = equal_rank(model, names, 32)
    wanted = {
        BASE: 0, OURS: ins * 31 / 2, NATIVE: ins * 31 / 2, PEFT_OFT: ins * 31 / 2, WEIGHT_CENTRIC: ins * 31 / 2,
        DENSE: ins * 31 / 2,
        LORA: 16 * (ins + outs), EQUAL_LORA: rank * (ins + outs), DORA: 16 * (ins + outs) + outs,
        BOFT: 16 * ins + outs, FULL: sum(p.numel() for p in model.parameters()),
        LYCORIS: sum(min(32, layer.out_features // 32) * layer.out_features for layer in layers),
    }  # fmt: skip
    assert abs(wanted[EQUAL_LORA] - wanted[OURS]) <= (ins + outs) / 2
    assert wanted.keys() | {TRITON} == METHODS.keys()
    for method, count in wanted.items():
        model, inputs = unet()
        torch.manual_seed(1)
        model.requires_grad_(False)
        before = model(**inputs).sample
        adapted = METHODS[method].adapt(model, names, 32)
        assert sum(p.numel() for p in adapted.trained) == count, method
        if method not in (BASE, FULL):
            disturb(adapted.trained)
            assert not torch.equal(model(**inputs).sample, before), method
            model(**inputs).sample.square().mean().backward()
            assert all(p.grad is not None for p in adapted.trained), method


def test_a_method_that_adapts_other_layers_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="1 of 2 target layers"):
        methods._expect(2, 1)


def test_copies_share_weights_and_merging_changes_only_their_own() -> None:
    setup = Setup("tiny", "inference")
    work = speed.make_work(setup, "cpu")
    before = {name: p.clone() for name, p in work.named_parameters()}
    result = work()
    candidates = {m: Candidate(work, work.targets(), m, setup) for m in (BASE, OURS, LORA, PEFT_OFT, WEIGHT_CENTRIC)}
    unadapted = ("denoiser.conv_in.weight",)
    for candidate in candidates.values():
        shared = dict(candidate.work.named_parameters())
        assert all(shared[name].data_ptr() == work.get_parameter(name).data_ptr() for name in unadapted)
    for method, candidate in candidates.items():
        live = candidate.work()
        assert torch.equal(live, result) == (method == BASE)
        candidate.between(2)
        assert candidate.can("merge") == (method in (OURS, LORA, PEFT_OFT))
        torch.testing.assert_close(candidate.work(), live, rtol=1e-3, atol=1e-4)
        candidate.between(3)
        torch.testing.assert_close(candidate.work(), live, rtol=1e-3, atol=1e-4)
    assert torch.equal(work(), result)
    assert all(torch.equal(p, before[name]) for name, p in work.named_parameters())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_methods_upon_a_quantized_base(quantization: Any) -> None:
    setup = Setup("tiny", quantization=quantization)
    work = speed.make_work(setup, "cpu")
    before = {name: p.clone() for name, p in work.named_parameters()}
    for method in (BASE, OURS, LORA, PEFT_OFT):
        candidate = Candidate(work, work.targets(), method, setup)
        candidate.gradients()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in candidate.trained), method
        candidate.train()
        own = {type(module).__module__ for module in candidate.work.modules()}
        assert any("bitsandbytes" in name for name in own), method
        assert method != LORA or "peft.tuners.lora.bnb" in own, "PEFT takes it for floats"
    assert all(torch.equal(p, before[name]) for name, p in work.named_parameters())


# -- works


@pytest.mark.parametrize(
    ("name", "millions", "targets"),
    [
        ("SD 1.5", 859.5, [128, 48]), ("SDXL", 2567.5, [560, 44, 128]), ("SD 3.5 Medium", 2243.2, [242, 48, 128]),
        ("Flux.1", 11901.4, [266, 48]),
    ],
)  # fmt: skip
def test_works_are_of_the_real_sizes(name: str, millions: float, targets: list[int]) -> None:
    with torch.device("meta"):
        work = WORKS[name](Sizes(), text=True)
        assert sum(p.numel() for p in work.denoiser.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
        assert [len(names) for names in work.targets()] == targets
        assert work.note == ""


@pytest.mark.parametrize("name", [name for name in WORKS if name not in ("tiny", STACK)])
def test_works_run_in_bfloat16_with_their_text_encoders(name: str) -> None:
    work = speed.make_work(Setup(name, dtype="bfloat16", text=True, small=True), "meta")
    work.let_gradients_through()
    result = work()
    assert result.dtype == torch.bfloat16
    assert result.requires_grad
    assert work.note


def test_setups_name_works_and_methods_that_are_there() -> None:
    for device, setups in SETUPS.items():
        assert len({str(setup) for setup in setups}) == len(setups)
        for setup in setups:
            assert setup.work in WORKS
            assert set(setup.methods) <= (set(BUILDS) if setup.kind == "build" else METHODS.keys())
            assert setup.small == (device == "cpu" and setup.kind != "build" and setup.work != STACK)


# -- the harness


def test_each_round_has_every_method_once_and_after_others_than_before() -> None:
    seen: list[str] = []
    stage = {name: {"train": lambda name=name: seen.append(name)} for name in "abc"}
    times, reasons = take_turns(stage, 30)
    rounds = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert all(sorted(one) == [*"abc"] for one in rounds)
    assert len(set(rounds)) == 6
    before = Counter(pairwise(seen))  # who met what whom left behind
    assert min(before[pair] for pair in permutations("abc", 2)) >= 5
    assert {name: len(taken["train"]) for name, taken in times.items()} == {"a": 30, "b": 30, "c": 30}
    assert reasons == {}


def test_a_method_that_breaks_off_has_no_figure_and_the_others_go_on() -> None:
    def fail() -> None:
        raise ValueError("no /some/place/of/this/machine.so here\nand more")

    times, reasons = take_turns({"a": {"train": fail}, "b": {"train": lambda: None}}, 3)
    assert list(times) == ["b"]
    assert reasons == {"a": "ValueError: no ... here"}
    with pytest.raises(CardStoppedError, match="stopped in 'a': CUDA error: an illegal"):
        told("a", RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_every_method_is_measured_or_has_a_reason(tmp_path: Path) -> None:
    out = tmp_path / "speed.csv"
    stack = [Setup(STACK, sizes=TINY), Setup(STACK, "inference", sizes=TINY)]
    build = Setup("SD 1.5", "build", BUILDS, small=True, block_size=8)
    speed.run([*stack, build], "cpu", out, minutes=3, rounds=3)
    rows = records.load(out)
    assert len(rows) == sum(len(setup.cells()) for setup in (*stack, build))
    assert all(row["hardware"] and row["torch"] and row["peft"] and row["lycoris"] and row["load"] for row in rows)
    assert all(bool(row["seconds"]) != bool(row["reason"]) for row in rows)
    assert all(len(row["seconds"].split()) == int(row["rounds"]) == 3 for row in rows if row["seconds"])
    missing = {(row["method"], row["kind"]) for row in rows if row["reason"]}
    unmerged = {(m, kind) for m in (BASE, FULL, *NO_MERGING) for kind in ("merge", "unmerge")}
    unfused = {(m, "fused") for m in (FULL, *NO_MERGING)} | {(m, "swap") for m in (BASE, FULL, WEIGHT_CENTRIC, DENSE)}
    triton = {(TRITON, kind) for kind in ("train", *KINDS["inference"])}
    assert missing == unmerged | unfused | triton
    trained = {row["method"]: row for row in rows if row["kind"] == "train" and row["seconds"]}
    own, lora, base = trained[OURS], trained[LORA], trained[BASE]
    assert int(base["operations"]) < int(own["operations"])
    assert int(lora["peak_bytes"]) > int(base["peak_bytes"]) > 0
    assert int(own["adapter_bytes"]) == 4 * int(own["trained"]) == 4 * 128 * 31 / 2
    assert (own["kernels"], own["cuda"]) == ("", "")


def test_what_was_measured_by_the_same_commit_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, setup = tmp_path / "speed.csv", Setup(STACK, methods=(BASE, OURS), sizes=TINY)
    speed.run([setup], "cpu", out, minutes=1, rounds=3)
    own = [{k: v for k, v in row.items() if k not in records.environment("cpu")} for row in records.load(out)]
    assert len(own) == 2
    monkeypatch.setattr(speed, "measure", lambda *_: records.append(out, own))
    counts = []
    for commit, again in (("abc", False), ("abc", True), ("d", False), ("d", False), ("d+1", False), ("d+1", False)):
        monkeypatch.setattr(records, "_commit", lambda commit=commit: commit)
        speed.run([setup], "cpu", out, minutes=1, again=again)
        counts.append(len(records.load(out)))
    assert counts == [2, 4, 6, 6, 8, 8]
    monkeypatch.setattr(records, "_commit", lambda: "abc")
    assert speed.is_done(setup, "cpu", records.load(out))
    assert not speed.is_done(Setup(STACK, methods=(BASE, OURS, LORA), sizes=TINY), "cpu", records.load(out))
    assert not speed.is_done(Setup(STACK, methods=(BASE, OURS)), "cpu", records.load(out))
    assert not speed.is_done(setup, "cpu", [row | {"hardware": "another"} for row in records.load(out)])
    assert not speed.is_done(setup, "cpu", [row | {"commit": "abc+"} for row in records.load(out)])


def test_nothing_is_written_where_time_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = Setup(STACK, methods=(BASE, OURS), sizes=TINY)
    speed.run([setup], "cpu", tmp_path / "speed.csv", minutes=0)
    assert "run it again" in capsys.readouterr().out
    with pytest.raises(speed.OutOfTimeError):
        speed.measure(setup, "cpu", tmp_path / "speed.csv", time.monotonic() - 1)
    assert not (tmp_path / "speed.csv").exists()


def test_a_setup_without_a_base_gives_its_reason_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = speed.make_work

    def broken(setup: Setup, device: str) -> Work:
        if setup.block_size == 16:
            raise RuntimeError("no room")
        return make(setup, device)

    monkeypatch.setattr(speed, "make_work", broken)
    setups = [Setup(STACK, methods=(BASE, OURS), sizes=TINY, block_size=size) for size in (16, 32)]
    speed.run(setups, "cpu", tmp_path / "speed.csv", minutes=1, rounds=3)
    found = [(row["block_size"], row["method"], row["reason"], bool(row["seconds"])) for row in
             records.load(tmp_path / "speed.csv")]  # fmt: skip
    assert found == [
        ("16", BASE, "RuntimeError: no room", False), ("16", OURS, "RuntimeError: no room", False),
        ("32", BASE, "", True), ("32", OURS, "", True),
    ]  # fmt: skip


def test_a_method_that_cannot_be_built_or_warmed_up_gives_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unbuilt(model: nn.Module, names: Any, size: int) -> Adapted:
        raise UnsupportedError("it knows no such layer")

    def unrun(model: Any, names: Any, size: int) -> Adapted:
        model[0].register_forward_hook(lambda *_: 1 / 0)
        return Adapted([nn.Parameter(torch.zeros(1))])

    monkeypatch.setitem(METHODS, "unbuilt", Method(unbuilt))
    monkeypatch.setitem(METHODS, "unrun", Method(unrun))
    speed.run(
        [Setup(STACK, methods=("unbuilt", OURS, "unrun"), sizes=TINY)], "cpu", tmp_path / "s.csv", minutes=1, rounds=3
    )
    rows = {row["method"]: row for row in records.load(tmp_path / "s.csv")}
    assert rows["unbuilt"]["reason"] == "it knows no such layer"
    assert rows["unrun"]["reason"].startswith("ZeroDivisionError")
    assert rows["unbuilt"]["median"] == rows["unrun"]["median"] == ""
    assert float(rows[OURS]["median"]) > 0


@pytest.mark.parametrize("method", [BASE, OURS, LORA])
def test_checkpointing_keeps_less_for_backward(method: str) -> None:
    saved = []
    for checkpointing in (False, True):
        setup = Setup("tiny", checkpointing=checkpointing, dtype="bfloat16")
        work = speed.make_work(setup, "cpu")
        candidate = Candidate(work, work.targets(), method, setup)
        candidate.train()
        saved.append(saved_bytes(candidate.loss, [*candidate.work.parameters(), *candidate.trained]))
    assert 0 < saved[1] < saved[0]


def test_the_most_that_is_allocated_at_once_is_counted() -> None:
    def call() -> None:
        for _ in range(3):
            torch.ones(1_000_000)

    assert 4_000_000 <= peak_allocated(call) < 4_100_000


def test_a_card_that_stops_leaves_a_reason_and_the_next_setup_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise CardStoppedError("the card stopped in 'base': CUDA error: a reason")

    class ReplacedError(Exception):
        """By the new process."""

    def replace_process(_: str, arguments: list[str]) -> None:
        raise ReplacedError(*arguments)

    only = [word for setup in SETUPS["cpu"][:2] for word in ("--only", str(setup))]
    command = ["speed", *only, "--out", str(tmp_path / "speed.csv")]
    measured: list[str] = []
    monkeypatch.setattr(speed, "measure", stop)
    monkeypatch.setattr(os, "execv", replace_process)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ReplacedError) as replaced:
        speed.main()
    monkeypatch.setattr(speed, "measure", lambda setup, *_: measured.append(str(setup)))
    monkeypatch.setattr(sys, "argv", list(replaced.value.args[2:]))
    speed.main()
    assert measured == [str(SETUPS["cpu"][1])]
    rows = records.load(tmp_path / "speed.csv")
    assert {(row["method"], row["kind"]) for row in rows} == set(SETUPS["cpu"][0].cells())
    assert {row["reason"] for row in rows} == {"the card stopped in 'base': CUDA error: a reason"}


# -- pages and single benchmarks


DOCS = Path(__file__).parent.parent / "docs"


def test_pages_show_the_pictures_that_are_drawn_from_the_data() -> None:
    folder = DOCS / "images" / "benchmarks"
    shown = re.findall(r"\(images/benchmarks/(\S+\.png)\)", (DOCS / "benchmarks.md").read_text(encoding="utf-8"))
    assert set(shown) <= pictures(records.load(speed.FILE)).keys()
    assert sorted(shown) == sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_the_page_of_tables_is_what_is_printed() -> None:
    text = (DOCS / "benchmark_tables.md").read_text(encoding="utf-8")
    assert text[text.index("| aim |") :] == table(records.load(speed.FILE)) + "\n"


@pytest.mark.parametrize(
    ("page", "made"),
    [
        ("benchmarks.md", lambda: brief(records.load(speed.FILE))),
        ("benchmarks.md", lambda: pooled(records.load(speed.FILE))),
        ("benchmarks.md", lambda: full_counts.table(records.load(full_counts.FILE))),
        ("benchmarks.md", stages.table),
        ("benchmarks.md", build_forms.table),
        ("benchmarks.md", rotate_forms.table),
        ("benchmarks.md", rotate_bandwidth.table),
        ("benchmarks.md", fused_linear.table),
        ("quantization.md", quantized_merge.table),
        ("quantization.md", lambda: quantized_times.table(records.load(quantized_times.FILE))),
        ("quantization.md", quantized_layers.table),
        ("quantization.md", lambda: quantized_tables.table(records.load(quantized_training.FILE))),
    ],
)
def test_the_pages_show_what_the_data_says(page: str, made: Any) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert [line for line in made().splitlines() if line not in text] == []


def test_forms_are_what_they_are_called() -> None:
    """Those that rotate give what `block_rotate` does; of those that build D, the exact ones the exact rotation."""
    x, packed = torch.randn(5, 32), build_forms.generators(0.1, "cpu")[:4]
    exact = cayley_delta(unpack(packed))
    delta = exact.float()[:, :8, :8].contiguous()
    for name, form in rotate_forms.forms().items():
        if name != "compiled":
            torch.testing.assert_close(form(x, delta), block_rotate(x, delta))
    for name, build in build_forms.FORMS.items():
        if name not in (build_forms.IN_C, build_forms.IN_TRITON):
            assert (build(packed) - exact).abs().max() < (1e-5 if "m = 5" in name else 1e-7), name
    if processor.library() is not None:
        assert (build_forms.in_c(packed.float()) - exact).abs().max() < 1e-6


def test_where_there_is_no_c_its_cells_are_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows and tables; rows that are older than C are of plain PyTorch, whatever they were called."""
    monkeypatch.setattr(build_forms, "BLOCKS", 4)
    monkeypatch.setattr(build_forms, "FILE", tmp_path / "build.csv")
    with methods.kernels_switched(on=False):
        build_forms.measure("cpu", 3)
    rows = [r for r in records.load(tmp_path / "build.csv") if r["form"] == build_forms.IN_C]
    assert len(rows) == 5
    assert not any(r["median"] or r["error"] for r in rows)
    assert f"| {build_forms.IN_C} |  |  |  |  |  |" in build_forms.table().splitlines()
    stage = {name: {"rotate": lambda: None} for name in (rotate_forms.PLAIN, rotate_forms.IN_C)}
    [plain, native] = rotate_forms._in_turns(stage, 3, in_c=False)
    assert plain["seconds"]
    assert native == {
        "form": rotate_forms.IN_C, "kind": "rotate", "rounds": "0", "median": "", "low": "", "high": "", "seconds": "",
        "reason": "C needs Linux, a C compiler and float32",
    }  # fmt: skip
    [plain, native] = rotate_forms._in_turns(stage, 3, in_c=True)
    assert native["seconds"]


def test_stages_are_of_every_adapted_layer() -> None:
    reads = stages.inputs_of(Setup("SD 1.5", small=True), "cpu")
    work = speed.make_work(Setup("SD 1.5", small=True), "cpu")
    assert sum(read.layers for read in reads) == len(work.targets()[0])
    calls = stages.stages(reads[:2], 32)
    assert tuple(calls) == stages.STAGES
    for call in calls.values():
        call()


@pytest.mark.skipif(processor.library() is None, reason="no compiler, or no Linux")
def test_where_deltas_are_built_in_place_stages_are_of_every_layer_too() -> None:
    reads = stages.inputs_of(Setup("SD 1.5", small=True), "cpu")[:4]
    rotate, backward = stages.in_place(reads, 32).values()
    made: Any = rotate()
    assert [y.shape for y in made] == [read.x.shape for read in reads for _ in range(read.layers)]
    found: Any = backward()
    of_generators, *of_inputs = found
    assert [g.shape for g in of_inputs] == [read.x.shape for read in reads]
    assert (of_generators.abs().amax(1) > 0).all(), "every block has its gradient"


def test_what_is_merged_is_of_the_size_that_the_table_says() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=draw)
    turned = quantized_merge.rotated(weight, 0.3, draw)
    assert turned.norm() == pytest.approx(float(weight.norm()), rel=1e-5)
    change = float((turned - weight).norm())
    assert float((quantized_merge.with_lora(weight, change, draw) - weight).norm()) == pytest.approx(change, rel=1e-5)
    layer = nn.Linear(96, 64, bias=False)
    own = quantized_merge.quantized(layer, scheme("nf4"))
    assert quantized_merge.lost(own, own.dequantized()) < 0.02 * float(own.dequantized().norm())
