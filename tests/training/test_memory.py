"""How memory is looked at: tensors that are alive at once, and what the system says of this process."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oft_diffusion.training import memory
from oft_diffusion.training.memory import Meter, freed_memory_kept

CPU = torch.device("cpu")


def test_growth_is_what_is_alive_at_once() -> None:
    kept: list[torch.Tensor] = []
    weights = torch.ones(1000, requires_grad=True)

    def allocate(count: int) -> Callable[[], object]:
        return lambda: kept.append(torch.zeros(count))

    meter = Meter(CPU)
    assert meter.growth(allocate(1000)) == 4000
    assert meter.growth(lambda: [torch.zeros(1000) for _ in range(3)]) == 12000
    assert meter.growth(lambda: [torch.zeros(1000).sum() for _ in range(3)]) < 5000
    assert meter.growth(lambda: kept[0].view(10, 100).add_(1)) == 0
    assert meter.growth(lambda: (weights * 2).exp().exp().sum().backward()) >= 3 * 4000  # saved for backward
    with torch.no_grad():
        assert meter.growth(lambda: (weights * 2).exp().exp().sum()) < 3 * 4000


@pytest.mark.parametrize(
    ("resident", "before", "after", "grown"), [(50, 50, 90, 40), (50, 100, 100, 0), (50, 100, 120, 70), (None, 1, 2, 0)]
)
def test_growth_of_the_process(
    resident: int | None, before: int, after: int, grown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"VmRSS": resident, "VmHWM": before, "MemAvailable": 7}
    monkeypatch.setattr(memory, "_entry", lambda _, name: told[name])
    meter = Meter(CPU)
    assert meter.free == 7
    told["VmHWM"] = after
    assert meter.process_growth() == grown


def test_the_system_is_asked(tmp_path: Path) -> None:
    (tmp_path / "told").write_text("VmPeak:\t    1 kB\nVmHWM:\t  12 kB\n")
    assert memory._entry(str(tmp_path / "told"), "VmHWM") == 12 * 1024
    assert memory._entry(str(tmp_path / "told"), "Vm") is None
    assert memory._entry(str(tmp_path / "none"), "VmHWM") is None


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_step_and_given_back_at_the_end() -> None:
    program = """
import resource, torch
from oft_diffusion.training.memory import freed_memory_kept

def step():
    for _ in range(3):
        tensors = [torch.ones(6_000_000) for _ in range(4)]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int([line for line in open("/proc/self/status") if line.startswith("VmRSS")][0].split()[1])

step()
outside, before = faults(), resident()
with freed_memory_kept():
    step()
    print(outside, faults(), end=" ")
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    outside, inside, left = map(int, done.stdout.split())
    assert inside * 10 < outside
    assert left < 50_000  # kB, of 96 MB


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    with freed_memory_kept():
        assert torch.ones(3).sum() == 3
