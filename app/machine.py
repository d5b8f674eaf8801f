"""One piece of heavy work at a time: who waits, who works, what it has come to, and how it is cancelled."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from PIL import Image

from oft_diffusion.errors import OFTError

from .words import UNFORESEEN, explained, is_foreseen

State = Literal["waiting", "working", "done", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")
_LOG = logging.getLogger(__name__)
_KEPT = 50  # ended jobs that can still be asked for, with the pictures that they found


class Cancelled(Exception):  # noqa: N818 - what was asked for is no error
    """Raised inside work whose job was cancelled."""


class Busy(OFTError):  # noqa: N818
    """Too much is waiting already."""


@dataclass(frozen=True)
class Progress:
    """What a job has come to.

    Attributes:
        state: waiting for its turn, working, or how it ended.
        before: jobs that will be done before it, in that order.
        text: what is going on, in words.
        done, total: of what is counted (steps); 0 of 0 where nothing is.
        seconds_left: an estimate; None where there is none.
        preview: an unfinished picture.
        found: what there is so far, in order (pictures, records of steps); it only grows.
        error: why it failed, in words.
    """

    state: State = "waiting"
    before: tuple[Job, ...] = ()
    text: str = ""
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    preview: Image.Image | None = None
    found: tuple[Any, ...] = ()
    error: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ENDED


@dataclass
class Job:
    """Work that was asked for. `tell` and `check` are for the work itself; `watch` is for whoever looks on."""

    owner: str
    kind: str
    about: str = ""  # id of what is worked on, where there is one
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    started: float | None = None

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._progress = Progress()
        self._version = 0
        self._cancelled = threading.Event()
        self.on_cancel: Callable[[], object] = lambda: None

    @property
    def progress(self) -> Progress:
        """As it is now."""
        return self._progress

    def tell(self, *found: Any, **changes: Any) -> None:
        """Note progress: things found, and other attributes of `Progress`."""
        with self._changed:
            if found:
                changes["found"] = (*self._progress.found, *found)
            self._progress = replace(self._progress, **changes)
            self._version += 1
            self._changed.notify_all()

    def check(self) -> None:
        """Go on, unless the job was cancelled.

        Raises:
            Cancelled: it was.
        """
        if self._cancelled.is_set():
            raise Cancelled

    def cancel(self) -> None:
        """Ask the work to end at its next check; whoever looks on is told at once."""
        self._cancelled.set()
        self.on_cancel()
        if not self.progress.ended:
            self.tell(text="stopping", seconds_left=None)

    def watch(self, timeout: float | None = None) -> Iterator[Progress]:
        """The state now, and each time it has changed, until the job has ended. Many may watch, at any time.

        Args:
            timeout: seconds after which the same state comes again.
        """
        seen = -1
        while True:
            with self._changed:
                if seen == self._version:
                    self._changed.wait(timeout)
                seen, now = self._version, self._progress
            yield now
            if now.ended:
                return


class Machine:
    """Does one job at a time. Of those that wait, the next is of whoever has been served longest ago.

    Somebody new counts as served when they came, or a crowd of new names would always be first.
    """

    def __init__(self, most_waiting: int = 64, most_of_one: int = 8) -> None:
        self.most_waiting, self.most_of_one = most_waiting, most_of_one
        self._lock = threading.Condition()
        self._waiting: list[Job] = []
        self._working: Job | None = None
        self._served: dict[str, float] = {}  # owner to when
        self._jobs: dict[str, Job] = {}
        self._threads: list[threading.Thread] = []

    def check(self, owner: str) -> None:
        """Whether more of this owner's work may be queued.

        Raises:
            Busy: too much is waiting, or too much of this owner.
        """
        with self._lock:
            own = sum(waiting.owner == owner for waiting in self._waiting)
            if len(self._waiting) >= self.most_waiting or own >= self.most_of_one:
                raise Busy(
                    f"{own} of your jobs are waiting already" if own >= self.most_of_one
                    else f"{len(self._waiting)} jobs are waiting already",
                    expected=f"at most {self.most_of_one} of one person, and {self.most_waiting} in all",
                    fix="wait for some to be done, or cancel one",
                )  # fmt: skip

    def start(self, owner: str, kind: str, work: Callable[[Job], object], about: str = "") -> Job:
        """Queue work.

        Args:
            owner: who asks; nobody else can see or cancel the job.
            kind: what sort of work, to find it again.
            work: called in a thread of its own, when it is its turn. An exception ends the job as failed, with the
                exception explained; `Cancelled` as cancelled.
            about: id of what is worked on, where there is one.

        Raises:
            Busy: too much is waiting, or too much of this owner.
        """
        job = Job(owner, kind, about)
        with self._lock:
            self.check(owner)
            self._forget()
            self._served.setdefault(owner, time.monotonic())
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._tell_places()
            thread = threading.Thread(target=self._run, args=(job, work), name=f"{kind}-{job.id}", daemon=True)
            self._threads = [*(t for t in self._threads if t.is_alive()), thread]
            thread.start()
        return job

    def find(self, owner: str, job_id: str) -> Job | None:
        """A job of this owner."""
        job = self._jobs.get(job_id)
        return job if job is not None and job.owner == owner else None

    def newest(self, owner: str, kind: str) -> Job | None:
        """This owner's last job of a kind, also an ended one."""
        own = [job for job in list(self._jobs.values()) if (job.owner, job.kind) == (owner, kind)]
        return own[-1] if own else None

    def under_way(self, owner: str, kind: str) -> Job | None:
        """This owner's last job of a kind, where it waits or works."""
        job = self.newest(owner, kind)
        return None if job is None or job.progress.ended else job

    def watch_newest(self, owner: str, kind: str, timeout: float = 5.0) -> Iterator[Progress]:
        """As `Job.watch`, of this owner's last job of a kind; where another one is begun meanwhile, of that one."""
        job, newest = None, self.newest(owner, kind)
        while newest is not None and newest is not job:
            job = newest
            for now in job.watch(timeout):
                newest = self.newest(owner, kind)
                if newest is not job:
                    break
                yield now

    def going(self, kind: str) -> list[Job]:
        """Jobs of a kind, of everybody, that wait or work."""
        return [job for job in list(self._jobs.values()) if job.kind == kind and not job.progress.ended]

    def forget_ended(self, owner: str, kind: str) -> None:
        """Let go of this owner's ended jobs of a kind, and of what they found."""
        with self._lock:
            self._keep(lambda job: (job.owner, job.kind) != (owner, kind) or not job.progress.ended)

    def cancel(self, owner: str, job_id: str) -> bool:
        """Cancel a job of this owner's; whether there was one to cancel."""
        job = self.find(owner, job_id)
        if job is None or job.progress.ended:
            return False
        job.cancel()
        with self._lock:
            self._lock.notify_all()
        return True

    def cancel_all(self, owner: str, kind: str) -> None:
        """Cancel this owner's jobs of a kind, those that wait first: none of them begins meanwhile."""
        own = [job for job in list(self._jobs.values()) if (job.owner, job.kind) == (owner, kind)]
        for job in reversed(own):
            self.cancel(owner, job.id)

    def stop(self, patience: float = 60.0) -> None:
        """Cancel everything, as the server ends, and wait for work to end at its next check.

        Args:
            patience: seconds. A process that ends in the middle of torch's work crashes.
        """
        for job in list(self._jobs.values()):
            job.cancel()
        with self._lock:
            self._lock.notify_all()
        until = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self, job: Job, work: Callable[[Job], object]) -> None:
        try:
            self._wait_for_turn(job)
        except Cancelled:
            job.tell(state="cancelled", before=())
            return
        try:
            job.started = time.monotonic()
            job.tell(state="working", before=())
            job.check()
            work(job)
            state: dict[str, Any] = {"state": "done"}
        except Cancelled:
            state = {"state": "cancelled"}
        except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on
            if foreseen := is_foreseen(error):
                _LOG.info("a job failed: %s: %s", job.kind, error)
            else:
                _LOG.exception("a job failed: %s", job.kind)
            state = {"state": "failed", "error": explained(error) if foreseen else UNFORESEEN}
        with self._lock:
            self._working = None
            self._served[job.owner] = time.monotonic()
            self._tell_places()
            self._lock.notify_all()
        job.tell(preview=None, seconds_left=None, **state)

    def _wait_for_turn(self, job: Job) -> None:
        with self._lock:
            try:
                while self._working is not None or self._order()[0] is not job:
                    job.check()
                    self._lock.wait()
                job.check()
                self._working = job
            finally:
                self._waiting.remove(job)
                self._tell_places()
                self._lock.notify_all()

    def _order(self) -> list[Job]:
        """Who comes next: by owner, longest unserved first, and each owner's jobs in the order asked, in turn."""
        queues: dict[str, list[Job]] = {}
        for job in self._waiting:
            queues.setdefault(job.owner, []).append(job)
        served = self._working.owner if self._working is not None else None  # whose turn it is comes last
        owners = sorted(queues, key=lambda owner: (owner == served, self._served[owner]))
        most = max(map(len, queues.values()), default=0)
        return [queues[owner][i] for i in range(most) for owner in owners if i < len(queues[owner])]

    def _tell_places(self) -> None:
        before = () if self._working is None else (self._working,)
        for job in self._order():
            job.tell(before=before)
            before = (*before, job)

    def _forget(self) -> None:
        """Of ended jobs, only the newest of an owner's kind can be asked for, and of all the last `_KEPT`."""
        newest = {(job.owner, job.kind): job.id for job in self._jobs.values()}
        self._keep(lambda job: not job.progress.ended or newest[job.owner, job.kind] == job.id)
        ended = [job.id for job in self._jobs.values() if job.progress.ended]
        old = set(ended[: max(0, len(ended) - _KEPT)])
        self._keep(lambda job: job.id not in old)

    def _keep(self, wanted: Callable[[Job], bool]) -> None:
        """Only these, and of those who were served only their owners."""
        self._jobs = {job.id: job for job in self._jobs.values() if wanted(job)}
        known = {job.owner for job in self._jobs.values()}
        self._served = {owner: when for owner, when in self._served.items() if owner in known}
