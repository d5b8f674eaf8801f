"""Ctrl-C and SIGTERM as a polite request."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Launchers pass on a Ctrl-C that the terminal sends to their workers anyway: signals this close together are one.
SECONDS_TOGETHER = 1.0


@contextmanager
def on_interrupt(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` at the first SIGINT or SIGTERM in this block; a second one acts as if we were not here.

    A signal that is ignored, as a shell has it for a job in the background, stays so. Outside the main thread this does
    nothing, since Python delivers signals there only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    previous = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    first: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            callback()
        elif time.monotonic() - first[0] >= SECONDS_TOGETHER:
            restore()
            signal.raise_signal(number)

    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
