"""Ctrl-C and SIGTERM as a polite request."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def on_interrupt(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` at the first SIGINT or SIGTERM in this block; a second one acts as if we were not here.

    Outside the main thread this does nothing, since Python delivers signals there only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        callback()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
