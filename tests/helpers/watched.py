"""What this process does to files, to other machines and by other programs, as Python's audit events tell it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Positions of the paths that an event's arguments name, each with that of the folder it is relative to. What `shutil`
# does comes as these, too.
_CHANGES = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.chmod": ((0, 2),),
    "os.truncate": ((0, None),),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile")


@dataclass
class Seen:
    """What was done, as text: nothing, where all is well.

    Attributes:
        inside: folders in which anything may be done.
        canaries: files that nobody may read.
        ports: of this machine, that may be connected to.
    """

    inside: tuple[str, ...]
    canaries: frozenset[str]
    ports: frozenset[int]
    trouble: list[str] = field(default_factory=list)

    def note(self, event: str, args: tuple[Any, ...]) -> None:
        """Take down an event that should not be."""
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = _absolute(args[0])
            if path in self.canaries or ((args[2] or 0) & _WRITES and not self._may_change(path)):
                self.trouble.append(f"open {path}")
        elif event in _CHANGES:
            named = [(args[at], -1 if of is None else args[of]) for at, of in _CHANGES[event]]
            paths = [_absolute(path, folder) for path, folder in named if isinstance(path, (str, bytes))]
            self.trouble += [f"{event} {path}" for path in paths if not self._may_change(path)]
        elif event == "socket.connect" and isinstance(args[1], tuple):
            if args[1][0] not in ("127.0.0.1", "::1") or args[1][1] not in self.ports:
                self.trouble.append(f"{event} {args[1]}")
        elif event in _RUNS:
            self.trouble.append(f"{event} {args[0]}")

    def _may_change(self, path: str) -> bool:
        return f"{path}/".startswith(self.inside)


def _absolute(path: str | bytes, folder: int = -1) -> str:
    base = Path(f"/proc/self/fd/{folder}").readlink() if folder >= 0 else Path.cwd()
    return os.path.normpath(base / os.fsdecode(path))


_watching: list[Seen] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    for seen in _watching:
        seen.note(event, args)


@contextmanager
def watched(inside: Sequence[Path], canaries: Sequence[Path], ports: Sequence[int]) -> Iterator[Seen]:
    """Look on. What compiled code opens by itself, as safetensors does, is not told."""
    folders = (*(f"{path.resolve()}/" for path in inside), "/dev/null/")
    seen = Seen(folders, frozenset(map(str, canaries)), frozenset(ports))
    if not _HOOKED:
        sys.addaudithook(_hook)  # for good: there is no way to take one away
        _HOOKED.append(True)
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


_HOOKED: list[bool] = []
