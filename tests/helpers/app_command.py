"""The app as a process of its own, started as a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
APP = (sys.executable, "-m", "oft_diffusion", "app")


def free_port() -> int:
    """One at which nothing listens now."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def answers(url: str) -> bool:
    """Whether there is a page."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def started(
    command: Sequence[str], port: int, *, environment: Mapping[str, str] | None = None, patience: float = 240
) -> Iterator[str]:
    """A command that serves the app at a port, until the end of the block: the address.

    Args:
        command: with its arguments.
        port: at which it was told to listen.
        environment: beside this process's own.
        patience: seconds until there must be a page.

    Raises:
        RuntimeError: it ended, or there is no page; with what it said.
    """
    url = f"http://127.0.0.1:{port}/"
    merged = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False", **(environment or {})}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([*command], env=merged, stdout=said, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + patience
            while not answers(url):
                if process.poll() is not None or time.monotonic() > end:
                    said.seek(0)
                    raise RuntimeError(f"no page at {url}:\n{said.read()}")
                time.sleep(0.1)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
