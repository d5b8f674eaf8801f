"""A line between a browser and the app that can be cut, as a laptop's is that sleeps."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Line:
    """Hands on what comes in at a port of its own to another port of this machine.

    Attributes:
        url: of the app, through the line.
    """

    def __init__(self, port: int) -> None:
        self.to = ("127.0.0.1", port)
        self._here = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._dead = False
        self.url = f"http://127.0.0.1:{self._here.getsockname()[1]}/"
        threading.Thread(target=self._take, daemon=True).start()

    def cut(self) -> None:
        """Break all connections, and each new one at once."""
        self._dead = True
        while self._open:
            _end(self._open.pop())

    def mend(self) -> None:
        """Let connections through again."""
        self._dead = False

    def close(self) -> None:
        """Break all connections for good."""
        self.cut()
        _end(self._here)

    def _take(self) -> None:
        with suppress(OSError):
            while True:
                browser, _ = self._here.accept()
                if self._dead:
                    _end(browser)
                    continue
                server = socket.create_connection(self.to)
                self._open += [browser, server]
                for source, target in ((browser, server), (server, browser)):
                    threading.Thread(target=_hand_on, args=(source, target), daemon=True).start()


def _hand_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    _end(target)


def _end(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def lined(url: str) -> Iterator[Line]:
    """A line to the app at an address, until the end of the block."""
    line = Line(int(url.rstrip("/").rpartition(":")[2]))
    try:
        yield line
    finally:
        line.close()
