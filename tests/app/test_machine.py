"""One job at a time, fairly, each its owner's own, and cancelled when its owner says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from app.machine import Busy, Job, Machine
from oft_diffusion.errors import ConfigError

SOON = 20.0  # seconds that a test waits at most


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine(most_waiting=6, most_of_one=3)
    yield machine
    machine.stop()


@pytest.fixture
def held(machine: Machine) -> tuple[Job, threading.Event]:
    """A job that works until the event is set."""
    free, begun = threading.Event(), threading.Event()

    def work(job: Job) -> None:
        begun.set()
        while not free.wait(0.01):
            job.check()

    job = machine.start("first", "draw", work)
    assert begun.wait(SOON)
    return job, free


def end(job: Job) -> Any:
    """The state in which a job ends."""
    found: list[Any] = []
    watcher = threading.Thread(target=lambda: found.extend(job.watch(0.1)))
    watcher.start()
    watcher.join(SOON)
    assert not watcher.is_alive(), "the job does not end"
    return found[-1]


def test_work_is_done_one_after_another_and_tells_what_it_finds(machine: Machine) -> None:
    at_once, most = 0, 0

    def work(job: Job) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        for i in range(3):
            job.tell(i, text=f"step {i}", done=i, total=3)
        at_once -= 1

    jobs = [machine.start("ada", "draw", work) for _ in range(3)]
    ended = [end(job) for job in jobs]
    assert [p.state for p in ended] == ["done"] * 3
    assert [p.found for p in ended] == [(0, 1, 2)] * 3
    assert most == 1


@pytest.mark.parametrize(
    ("error", "told", "logged"),
    [
        (ConfigError("no brush", expected="one", fix="buy it"), "No brush. Expected: one. Buy it.", False),
        (MemoryError(), "smaller pictures", False),
        (KeyError("brush"), "Something went wrong that nobody foresaw", True),
    ],
)
def test_what_went_wrong_is_told_in_words_and_the_next_job_goes_on(
    machine: Machine, caplog: pytest.LogCaptureFixture, error: Exception, told: str, logged: bool
) -> None:
    def fail(job: Job) -> None:
        raise error

    ended = end(machine.start("ada", "draw", fail))
    assert ended.state == "failed"
    assert told in ended.error
    assert ("Traceback" in caplog.text and "brush" in caplog.text) is logged
    assert end(machine.start("ada", "draw", lambda job: None)).state == "done"


def test_whoever_has_waited_longest_since_a_turn_is_next(machine: Machine, held: tuple[Job, threading.Event]) -> None:
    order: list[str] = []

    def note(name: str) -> Callable[[Job], None]:
        return lambda job: order.append(name)

    jobs = [machine.start("ada", "draw", note(f"ada {i}")) for i in range(3)]
    jobs.append(machine.start("bo", "draw", note("bo 0")))
    jobs.append(machine.start("first", "draw", note("first 1")))
    assert [len(job.progress.before) for job in jobs] == [1, 4, 5, 2, 3]
    held[1].set()
    for job in jobs:
        end(job)
    assert order == ["ada 0", "bo 0", "first 1", "ada 1", "ada 2"]


def test_too_much_is_refused(machine: Machine, held: tuple[Job, threading.Event]) -> None:
    for _ in range(3):
        machine.start("ada", "draw", lambda job: None)
    with pytest.raises(Busy, match="3 of your jobs"):
        machine.start("ada", "draw", lambda job: None)
    for _ in range(3):
        machine.start("bo", "draw", lambda job: None)
    with pytest.raises(Busy, match="6 jobs are waiting"):
        machine.start("cy", "draw", lambda job: None)


def test_only_its_owner_cancels_a_job(machine: Machine, held: tuple[Job, threading.Event]) -> None:
    job, _ = held
    waiting = machine.start("ada", "draw", lambda job: None)
    assert not machine.cancel("ada", job.id)
    assert not machine.cancel("first", waiting.id)
    assert not machine.cancel("first", "no such job")
    assert machine.find("ada", job.id) is None
    assert not job.progress.ended
    assert machine.cancel("ada", waiting.id)
    assert end(waiting).state == "cancelled"
    assert machine.cancel("first", job.id)
    assert end(job).state == "cancelled"
    assert not machine.cancel("first", job.id)
    assert end(machine.start("bo", "draw", lambda job: None)).state == "done"


def test_cancelling_is_told_before_the_work_has_noticed(machine: Machine) -> None:
    begun, look = threading.Event(), threading.Event()

    def work(job: Job) -> None:
        job.tell(text="a long step", seconds_left=60)
        begun.set()
        look.wait(SOON)
        job.check()

    job = machine.start("ada", "draw", work)
    assert begun.wait(SOON)
    assert machine.cancel("ada", job.id)
    assert (job.progress.state, job.progress.text, job.progress.seconds_left) == ("working", "stopping", None)
    look.set()
    assert end(job).state == "cancelled"


def test_all_of_a_kind_are_cancelled_and_nothing_else(machine: Machine, held: tuple[Job, threading.Event]) -> None:
    begun: list[str] = []
    more = [machine.start("first", "draw", lambda job: begun.append("more")) for _ in range(2)]
    others = [machine.start("first", "train", lambda job: None), machine.start("ada", "draw", lambda job: None)]
    machine.cancel_all("first", "draw")
    assert [end(job).state for job in (held[0], *more)] == ["cancelled"] * 3
    assert [end(job).state for job in others] == ["done"] * 2
    assert begun == []


def test_who_comes_later_sees_where_a_job_is(machine: Machine, held: tuple[Job, threading.Event]) -> None:
    job, free = held
    job.tell("a picture", done=1, total=2)
    found = machine.newest("first", "draw")
    assert found is job
    assert next(iter(found.watch())).found == ("a picture",)
    free.set()
    assert end(job).found == ("a picture",)
    assert machine.newest("first", "train") is None
    assert machine.newest("ada", "draw") is None


def test_whoever_looks_on_sees_what_was_asked_for_last(machine: Machine, held: tuple[Job, threading.Event]) -> None:
    assert list(machine.watch_newest("ada", "draw")) == []
    looked = machine.watch_newest("first", "draw", timeout=0.1)
    assert next(looked).state == "working"
    machine.start("first", "draw", lambda job: job.tell("found"))
    assert next(looked).before == (held[0],)
    held[1].set()
    assert [now.found for now in looked][-1] == ("found",)


def test_new_names_do_not_come_before_those_who_wait(machine: Machine, held: tuple[Job, threading.Event]) -> None:
    order: list[str] = []

    def note(name: str) -> Callable[[Job], None]:
        return lambda job: order.append(name)

    jobs = [machine.start(name, "draw", note(name)) for name in ("ada", "eve 1", "eve 2", "eve 3")]
    held[1].set()
    assert {end(job).state for job in jobs} == {"done"}
    assert order[0] == "ada"


def test_of_ended_jobs_the_newest_of_each_kind_is_kept(machine: Machine) -> None:
    for kind in ("draw", "compare"):
        jobs = [machine.start("ada", kind, lambda job: job.tell(b"a picture")) for _ in range(2)]
        for job in jobs:
            end(job)
        machine.start("bo", "draw", lambda job: None)
        assert machine.find("ada", jobs[0].id) is None
        assert machine.newest("ada", kind) is jobs[1]
    machine.forget_ended("ada", "compare")
    assert machine.newest("ada", "compare") is None
    assert machine.newest("ada", "draw") is not None
