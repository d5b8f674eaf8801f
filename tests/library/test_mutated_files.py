"""A thousand damaged files: refused in one sentence, or loaded as what they now say; quickly, and without a trace."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from oft_diffusion import fuse_oft, list_oft_adapters, load_oft_weights, unfuse_oft, unload_oft_weights
from oft_diffusion.errors import OFTError
from oft_diffusion.inject import oft_state_dict
from tests.helpers.mutations import CONFIG_KINDS, FILE_KINDS, SAME_MEANING, mutate
from tests.library.mutant_subjects import Files, Layer, Subject, Wanted, subjects
from tests.library.support import Maker, assert_one_sentence, copy_pipe, draw, memory
from tests.peers import algebra

MUTANTS, CONFIGS = 1000, 100  # all in all; of these, damaged configurations beside tensors
SAMPLE, CHUNK = 2, 60  # of the chunks that they come in, how many are quick
SECONDS, MEGABYTES = 1.0, 200.0
_CPU_LIMIT = 600  # of a worker: a hang ends there
_SANE = 2.0  # norm of Q up to which float32 weights can be held to float64 formulas

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")


class Case(NamedTuple):
    subject: Subject
    kind: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.subject.name}: {self.kind}({self.seed})"


class Outcome(NamedTuple):
    """What came of a case: whether it was loaded, or the refusal; the cost of trying; and what was wrong with that."""

    name: str
    loaded: bool
    message: str
    seconds: float
    megabytes: float
    fault: str


def all_cases(found: Sequence[Subject]) -> list[Case]:
    """Every kind meets every subject, the first hundred or so as many of both as can be; then again with new seeds."""
    groups = [
        (MUTANTS - CONFIGS, list(FILE_KINDS), [s for s in found if s.damaged.endswith(".safetensors")]),
        (CONFIGS, list(CONFIG_KINDS), [s for s in found if not s.damaged.endswith(".safetensors")]),
    ]
    cases = []
    for count, kinds, chosen in groups:
        turns = [divmod(i, len(kinds)) for i in range(count)]
        cases.append([Case(chosen[(kind + turn) % len(chosen)], kinds[kind], turn) for turn, kind in turns])
    share = MUTANTS // CONFIGS  # configurations evenly among the others
    return [case for i in range(MUTANTS) for case in [cases[i % share == 0].pop(0)]]


@pytest.fixture(scope="session")
def found(base_pipe: Any, make: Maker) -> list[Subject]:
    return subjects(base_pipe, make("damaged", seed=4, trigger="sks", class_word="mug"))


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "chunk", [pytest.param(i, marks=[] if i < SAMPLE else pytest.mark.slow) for i in range(-(-MUTANTS // CHUNK))]
)
def test_a_damaged_file_is_refused_or_says_what_it_says(
    base_pipe: Any, found: list[Subject], untouched: Tensor, tmp_path: Path, record_property: Any, chunk: int
) -> None:
    cases = all_cases(found)[chunk * CHUNK : (chunk + 1) * CHUNK]
    outcomes = _in_a_worker(base_pipe, found, cases, untouched, tmp_path)
    assert len(outcomes) == len(cases), f"the worker died of {cases[len(outcomes)].name}"
    slowest, largest = max(outcomes, key=lambda o: o.seconds), max(outcomes, key=lambda o: o.megabytes)
    loaded = sum(outcome.loaded for outcome in outcomes)
    record_property(
        "figure",
        f"damaged files, part {chunk}: {len(outcomes)}, of which {loaded} loaded; at most {slowest.seconds:.2f} s "
        f"({slowest.name}) and {largest.megabytes:.0f} MB ({largest.name})",
    )
    faults = [f"{o.name}: {o.fault}" for o in outcomes if o.fault]
    faults += [f"{o.name}: {o.seconds:.2f} s of CPU" for o in outcomes if o.seconds > SECONDS]
    faults += [f"{o.name}: {o.megabytes:.0f} MB" for o in outcomes if o.megabytes > MEGABYTES]
    assert not faults, "\n".join(faults)


def test_the_cases_cover_every_kind_and_tool(found: list[Subject]) -> None:
    cases = all_cases(found)
    assert len({case.name for case in cases}) == len(cases) == MUTANTS
    quick = cases[: SAMPLE * CHUNK]
    assert {case.kind for case in quick} == FILE_KINDS.keys() | CONFIG_KINDS.keys()
    assert {case.subject.name for case in quick} == {subject.name for subject in found}
    tools = Counter(case.subject.name for case in cases)
    assert min(tools.values()) >= CONFIGS // 2


def test_damage_is_the_same_again_and_is_damage(found: list[Subject]) -> None:
    changed = []
    for subject, kind, seed in all_cases(found)[: SAMPLE * CHUNK]:
        sound = subject.files[subject.damaged]
        damaged = mutate(kind, sound, seed)
        assert damaged == mutate(kind, sound, seed)
        changed.append(damaged != sound)
    assert sum(changed) > 0.95 * len(changed)  # zeros that are overwritten by zeros are as they were


# -- the worker --------------------------------------------------------------------------------------------------------


def _in_a_worker(
    pipe: Any, found: Sequence[Subject], cases: Sequence[Case], untouched: Tensor, folder: Path
) -> list[Outcome]:
    """One process for all, so that starting it costs once and whatever kills it is told."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    worker = fork.Process(target=_work, args=(pipe, found, cases, untouched, folder, theirs), daemon=True)
    worker.start()
    theirs.close()
    outcomes: list[Outcome] = []
    try:
        while len(outcomes) < len(cases):
            outcomes.append(ours.recv())
    except EOFError:
        pass
    worker.join()
    return outcomes


def _work(
    base: Any, found: Sequence[Subject], cases: Sequence[Case], untouched: Tensor, folder: Path, results: Any
) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_LIMIT, _CPU_LIMIT))
    warnings.simplefilter("ignore")
    pipe = copy_pipe(base)
    for subject in found:  # sound, and so that what is loaded once counts for nobody
        outcome = _attempt(pipe, base, subject, subject.files, folder, untouched)
        assert outcome.loaded, outcome
        assert not outcome.fault, outcome
    gc.freeze()  # or each collection would look at all of torch and diffusers
    for case in cases:
        subject = case.subject
        damaged = subject.finish(mutate(case.kind, subject.files[subject.damaged], case.seed))
        files = {**subject.files, subject.damaged: damaged}
        outcome = _attempt(pipe, base, subject, files, folder, untouched)
        fault = outcome.fault
        if damaged == subject.files[subject.damaged]:
            fault = fault or ("" if outcome.loaded else "refused, though nothing was changed")
        elif outcome.loaded and subject.read is None:
            fault = "loaded, though it was changed"
        elif not outcome.loaded and case.kind in SAME_MEANING and subject.name not in ("ours", "ours sealed"):
            fault = f"refused, though its meaning is the same: {outcome.message}"
        results.send(outcome._replace(name=case.name, fault=fault))
        if fault:  # whatever is wrong now is not the next one's
            pipe = copy_pipe(base)
    results.close()


def _attempt(pipe: Any, base: Any, subject: Subject, files: Files, folder: Path, untouched: Tensor) -> Outcome:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    loaded, message, fault = False, "", ""
    gc.collect()
    before, started = _reset_peak(), time.process_time()
    try:
        load_oft_weights(pipe, folder / subject.source, adapter_name="damaged")
        loaded = True
    except OFTError as error:
        refusal = error
    except BaseException:  # noqa: BLE001 - whatever else comes out is a defect
        fault = traceback.format_exc()
    seconds, megabytes = time.process_time() - started, _peak() - before
    try:
        if loaded:
            try:
                if subject.read is not None:
                    _check(pipe, base, subject.read(files))
            finally:
                unload_oft_weights(pipe)
        elif not fault:
            message = str(refusal)
            assert_one_sentence(_info(refusal))
        assert list_oft_adapters(pipe) == []
        assert torch.equal(draw(pipe), untouched), "the pipeline draws otherwise"
    except Exception:  # noqa: BLE001
        fault = fault or traceback.format_exc()
    return Outcome(subject.name, loaded, message, seconds, megabytes, fault)


def _info(error: OFTError) -> pytest.ExceptionInfo[OFTError]:
    return pytest.ExceptionInfo.from_exception(error)


def _check(pipe: Any, base: Any, wanted: dict[Layer, Wanted]) -> None:
    """The adapter's generators are those, to the bit where they are stored so, and its weights the formula's."""
    (adapter,) = list_oft_adapters(pipe)
    states = {part: oft_state_dict(getattr(pipe, part), "damaged") for part in adapter.components}
    layers = {(part, key.removesuffix(".oft_R.weight")) for part, s in states.items() for key in s if "oft_R" in key}
    assert layers == wanted.keys()
    norms = {}
    for (part, name), layer in wanted.items():
        state = states[part]
        if layer.packed is not None:
            packed = layer.packed.double()
            norms[part, name] = float(torch.linalg.matrix_norm(algebra.skew(packed), 2).max())
            torch.testing.assert_close(
                state[f"{name}.oft_R.weight"].double(), packed, rtol=2e-7, atol=1e-8 * min(1.0, norms[part, name])
            )
        if (scale := state.get(f"{name}.oft_scale.weight")) is not None:  # one, beside layers that are scaled
            assert torch.equal(scale.flatten(), torch.ones(scale.numel()) if layer.scale is None else layer.scale)
        else:
            assert layer.scale is None
    fuse_oft(pipe)
    try:
        for (part, name), layer in wanted.items():
            if norms.get((part, name), 0.0) > _SANE:
                continue
            formula, weight = layer.weight(), getattr(base, part).get_submodule(name).weight
            got = getattr(pipe, part).get_submodule(name).weight.detach().double()
            atol = layer.tolerance * float(max(weight.abs().max(), formula.abs().max(), 1.0))
            torch.testing.assert_close(got, formula, rtol=0, atol=atol)
    finally:
        unfuse_oft(pipe)


def _reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def _peak() -> float:
    return memory("VmHWM")
