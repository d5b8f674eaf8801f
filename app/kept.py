"""What a person keeps on the server's disk: how much of it there may be, what it is, and how it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from oft_diffusion.errors import ConfigError, DataError

from .machine import Machine
from .room import check_room
from .runs import Earlier
from .workspace import Workspace, size_of

MOST_BYTES = 10_000_000_000  # of one person's pictures, uploads and runs
_OLD = 7 * 24 * 3600  # seconds
ALL, OLD = "all pictures", "pictures older than a week"


@dataclass(frozen=True)
class Usage:
    """What one person's things take.

    Attributes:
        pictures: how many were drawn and compared.
        picture_bytes: of these.
        upload_bytes: of what was uploaded for training, and of pictures that trainings drew.
        runs: each with its bytes, newest first.
    """

    pictures: int
    picture_bytes: int
    upload_bytes: int
    runs: tuple[tuple[Earlier, int], ...]

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.picture_bytes + self.upload_bytes + sum(size for _, size in self.runs)


class Kept:
    """Counts and deletes what people keep.

    Args:
        workspace: where.
        machine: whose jobs may be at work on it.
        earlier: gives all runs.
    """

    def __init__(self, workspace: Workspace, machine: Machine, earlier: Callable[[], Sequence[Earlier]]) -> None:
        self.workspace, self.machine, self.earlier = workspace, machine, earlier

    def usage(self, person: str) -> Usage:
        """What this person's things take."""
        pictures, owner = self.workspace.pictures(person), self.workspace.person(person)
        runs = [run for run in self.earlier() if run.owner == owner]
        return Usage(
            sum(1 for _ in pictures.iterdir()), size_of(pictures),
            size_of(self.workspace.uploads(person)) + size_of(self.workspace.grids(owner)),
            tuple((run, size_of(self.workspace.run(run.id))) for run in runs),
        )  # fmt: skip

    def check_room(self, person: str) -> None:
        """Refuse to make more for somebody who keeps too much, or where there is no room for anybody.

        Raises:
            DataError: what they keep is above `MOST_BYTES`, or the disk is nearly full.
        """
        check_room(self.workspace)
        if (used := self.usage(person).bytes) > MOST_BYTES:
            raise DataError(
                f"you keep {used / 1e9:.1f} GB here", expected=f"at most {MOST_BYTES / 1e9:.0f} GB",
                fix="delete pictures or training runs: under Adapters, What you keep here",
            )  # fmt: skip

    def delete(self, person: str, what: str) -> str:
        """Delete for good; what was, in a sentence.

        Args:
            person: whose.
            what: `ALL` or `OLD` pictures, or a run's id.

        Raises:
            ConfigError: this person has no such run, or it is under way.
        """
        if what in (ALL, OLD):
            return self._delete_pictures(person, time.time() - (_OLD if what == OLD else 0))
        owner = self.workspace.person(person)
        run = next((run for run in self.earlier() if (run.id, run.owner) == (what, owner)), None)
        if run is None:
            raise ConfigError("there is no such run", expected="one of yours", fix="choose one")
        if any(job.about == run.id for job in self.machine.going("train")):
            raise ConfigError(f"the run {run.name} is under way", expected="one that has ended", fix="stop it first")
        self.workspace.remove(self.workspace.run(run.id))
        return f"Deleted the run {run.name}"

    def picture(self, person: str, picture: str) -> Path:
        """Where one of this person's pictures is.

        Raises:
            OFTError: there is none of that id.
        """
        path = self.workspace.picture(person, picture)
        if not path.is_file():
            raise DataError("this picture is gone", expected="one of yours", fix="choose another one")
        return path

    def delete_picture(self, person: str, picture: str) -> None:
        """Delete one picture for good.

        Raises:
            OFTError: this person has none of that id.
        """
        self.picture(person, picture).unlink(missing_ok=True)
        self._forget_jobs(person)

    def _delete_pictures(self, person: str, before: float) -> str:
        found = [path for path in self.workspace.pictures(person).iterdir() if path.stat().st_mtime <= before]
        for path in found:
            path.unlink(missing_ok=True)
        self._forget_jobs(person)
        return f"Deleted {len(found)} picture{'' if len(found) == 1 else 's'}"

    def _forget_jobs(self, person: str) -> None:
        """Those whose pictures a page that is loaded anew would look for."""
        for kind in ("draw", "compare"):
            self.machine.forget_ended(person, kind)
