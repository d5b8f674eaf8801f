"""What every test shares: no network, one thread, and how hard the property tests try."""

from __future__ import annotations

import collections
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import signal
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels then run in its interpreter; read when triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.helpers.browser import NAMES

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a background job; the tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)

_quiet = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
hypothesis.settings.register_profile(
    "quick", max_examples=8, derandomize=True, database=None, deadline=None, suppress_health_check=_quiet
)
hypothesis.settings.register_profile(
    "full", max_examples=100, deadline=None, suppress_health_check=_quiet, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# marker: (can this machine run it?, what it lacks)
_NEEDS = {
    "gpu": (torch.cuda.is_available(), "no CUDA device"),
    "browser": (
        importlib.util.find_spec("playwright") is not None and any(map(shutil.which, NAMES)),
        "no playwright or no Chromium",  # in CI, which installs both, their tests fail instead
    ),
}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    variants: collections.Counter[str] = collections.Counter()
    for item in items:
        thinned = item.get_closest_marker("thinned")
        if thinned is not None and "slow" not in item.keywords:
            function = item.nodeid.partition("[")[0]
            if variants[function] % thinned.args[0]:
                item.add_marker(pytest.mark.slow)
            variants[function] += 1
        for marker, (can_run, lack) in _NEEDS.items():
            if marker in item.keywords and not can_run and not (marker == "browser" and os.environ.get("CI")):
                item.add_marker(pytest.mark.skip(reason=lack))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Figures that tests recorded, `record_property("figure", ...)`: below xdist nothing that they print is seen."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    called = [report for report in reports if getattr(report, "when", None) == "call"]
    figures = [value for report in called for name, value in report.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.line(str(figure))


def pytest_report_header() -> list[str]:
    shown = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "peft", "numpy", "hypothesis")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in shown)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return [
        f"date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"versions: Python {platform.python_version()}, {versions}",
        f"hardware: {platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, {gpu}",
    ]
