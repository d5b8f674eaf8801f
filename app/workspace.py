"""Where the app keeps things: one folder, in which everything goes by an id that the server made.

`adapters/<id>/`, `runs/<id>/`, `people/<digest of a token>/pictures/<id>.png`, and `uploads/` beside;
`class_images/<digest of how they were made>/` are for all runs. Ids and tokens
are checked before they become part of a path; nothing else that a browser sends ever does.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from oft_diffusion.disk import is_writable, write_atomically
from oft_diffusion.errors import ConfigError, DataError

_ID = re.compile(r"[0-9a-f]{16}")
_TOKEN = re.compile(r"[0-9a-f]{32}")
_KEEP_UPLOADS = _KEEP_COPIES = 24 * 3600  # seconds
_KEEP_CLASS_IMAGES = 30 * 24 * 3600  # seconds since a run began that used them
_CLEAN_EVERY = 3600  # seconds
_KEEP_NEW = 3600  # seconds in which nothing goes for want of room: somebody may be about to use it


_born = 0  # when the last id was, in ticks of 65 microseconds
_BIRTH = threading.Lock()


def new_id() -> str:
    """An id that sorts by its time of birth. No two are born in one tick, or chance alone would keep them apart."""
    global _born
    with _BIRTH:
        _born = max(_born + 1, time.time_ns() >> 16)
        return f"{_born:012x}{secrets.token_hex(2)}"


def new_token() -> str:
    """What one browser is known by: 128 random bits."""
    return secrets.token_hex(16)


def is_token(text: object) -> bool:
    """Whether it is one of `new_token`'s form."""
    return isinstance(text, str) and _TOKEN.fullmatch(text) is not None


class Workspace:
    """The folder."""

    def __init__(self, root: Path) -> None:
        """Make the folder.

        Raises:
            ConfigError: it cannot be written.
        """
        self.root = root.absolute()
        if not is_writable(self.root):
            raise ConfigError(
                f"the workspace {root} cannot be written", expected="a folder of yours", fix="choose another one"
            )
        for folder in (self.adapters, self.runs, self.people, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def people(self) -> Path:
        return self.root / "people"

    @property
    def temporary(self) -> Path:
        """For gradio's own copies."""
        return self.root / "temporary"

    def class_images(self, record: Mapping[str, Any]) -> Path:
        """The folder of class images that were made in one way, for all runs that want such."""
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]
        return self.root / "class_images" / digest

    def fresh(self) -> Path:
        """A new temporary folder."""
        folder = self.temporary / new_id()
        folder.mkdir()
        return folder

    def adapter(self, adapter_id: str) -> Path:
        """The folder of an adapter."""
        return self.adapters / _checked(adapter_id)

    def run(self, run_id: str) -> Path:
        """The folder of a training run."""
        return self.runs / _checked(run_id)

    def person(self, token: str) -> str:
        """What a person is called on disk. Not the token itself: paths are seen by more eyes than a browser's storage.

        Raises:
            DataError: this is no token.
        """
        if not is_token(token):
            raise DataError("this browser has no token", expected="one that the page made", fix="reload the page")
        return hashlib.sha256(token.encode()).hexdigest()[:32]

    def pictures(self, token: str) -> Path:
        """One person's pictures."""
        return self._of(self.person(token), "pictures")

    def picture(self, token: str, picture: str) -> Path:
        """One of a person's pictures."""
        return self.pictures(token) / f"{_checked(picture)}.png"

    def grids(self, person: str) -> Path:
        """Pictures of one person's trainings that the page shows, with `person` as `Workspace.person` has it."""
        return self._of(person, "grids")

    def uploads(self, token: str) -> Path:
        """What one person has uploaded."""
        return self._of(self.person(token), "uploads")

    def token_of(self, user: str) -> str:
        """The token of a user who has a password: the same in each browser, and to be guessed from no name."""
        path = self.root / "secret"
        if not path.is_file():
            write_atomically(path, secrets.token_bytes(32))
            path.chmod(0o600)
        return hmac.new(path.read_bytes(), user.encode(), "sha256").hexdigest()[:32]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else serves this folder meanwhile: two servers would remove each other's files.

        Raises:
            ConfigError: another server does.
        """
        lock = FileLock(self.root / "lock")
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise ConfigError(
                f"another server works in {self.root}", expected="a workspace of its own for each",
                fix="end that one, or choose another --workspace",
            ) from error  # fmt: skip
        try:
            yield
        finally:
            lock.release()

    def clean(self, copies: float = 0.0) -> None:
        """Remove uploads and grids that are a day old, class images unused for a month, and what is temporary.

        Args:
            copies: how old that has to be, in seconds. By when it came here: a copy is as old as what it is of.
        """
        now = time.time()
        for kind in ("uploads", "grids"):
            for left in self.people.glob(f"*/{kind}/*"):
                if left.stat().st_mtime < now - _KEEP_UPLOADS:
                    _remove(left)
        for left in self.root.glob("class_images/*"):
            if left.stat().st_mtime < now - _KEEP_CLASS_IMAGES:
                _remove(left)
        for left in self.temporary.iterdir():
            if left.stat().st_ctime <= now - copies:
                _remove(left)

    def trim(self, most: int) -> int:
        """Remove of what is temporary the oldest, until the rest has so many bytes; how many it has.

        What is not an hour old stays, and what holds nothing yet: it waits for a job.
        """
        known = sorted((newest, size, path) for path in self.temporary.iterdir() for newest, size in [_age(path)])
        left, now = sum(size for _, size, _ in known), time.time()
        for newest, size, path in known:
            if left > most and size and newest < now - _KEEP_NEW:
                _remove(path)
                left -= size
        return left

    def keep_clean(self, until: threading.Event) -> None:
        """Clean each hour, leaving what is temporary for a day."""
        while not until.wait(_CLEAN_EVERY):
            self.clean(_KEEP_COPIES)

    def remove(self, folder: Path) -> None:
        """Remove a folder, which is gone at once, and whole: what cannot be deleted waits for `clean`."""
        gone = self.temporary / new_id()
        folder.rename(gone)
        _remove(gone)

    def _of(self, person: str, kind: str) -> Path:
        folder = self.people / person / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _checked(text: str) -> str:
    if not isinstance(text, str) or _ID.fullmatch(text) is None:
        raise DataError("there is no such thing", expected="an id that this server made", fix="reload the page")
    return text


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return _age(path)[1]


def _age(path: Path) -> tuple[float, int]:
    """When it was changed last, or something in it; and its bytes."""
    inside = (Path(folder, name) for folder, *names in os.walk(path) for name in chain(*names))
    newest, size = 0.0, 0
    for part in (path, *inside):
        with suppress(OSError):  # where it went meanwhile
            told = part.lstat()
            newest = max(newest, told.st_ctime)
            size += 0 if stat.S_ISDIR(told.st_mode) else told.st_size
    return newest, size


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
