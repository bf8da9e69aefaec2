"""What comes again and again: counted, told of now and then, bounded, and never at the cost of what comes once."""

import errno
import os
import resource
from collections.abc import Iterator

import pytest

from snapd import engine
from snapd.daemon import refusals, repeats, start
from snapd.daemon.refusals import Refusals
from snapd.daemon.repeats import EVERY_S, Repeats
from snapd.engine import Model, Notice, NoticeKind
from snapd.errors import NotPermitted, ProtocolError
from snapd.store.format import HEADER_BYTES


def make_store() -> engine.Store:
    """Return an empty store."""
    engine.start(packers=1)
    return engine.Store(os.memfd_create("store"), bytes(16), HEADER_BYTES)


@pytest.fixture
def model() -> Iterator[Model]:
    """Yield a session without a target; no notice waits."""
    store = make_store()
    one = Model(store)
    list(engine.notices())
    yield one
    one.session.close()
    store.release()


def of_kind(kind: NoticeKind) -> list[Notice]:
    """Take all notices and return those of a kind."""
    return [notice for notice in engine.notices() if notice.kind is kind]


def test_trouble_is_counted_and_the_end_of_a_session_is_never_lost(model: Model) -> None:
    for _ in range(3):
        for cause in range(1, 10_001):
            model.trouble(cause)
        for _ in range(10_000):
            model.trouble(errno.EMFILE)
    model.vanish()
    taken = list(engine.notices())
    assert [notice.session for notice in taken if notice.kind is NoticeKind.GONE] == [model.session.key]
    troubles = [notice for notice in taken if notice.kind is NoticeKind.TROUBLE]
    assert len(troubles) < 1000
    assert sum(notice.count for notice in troubles) == 60_000
    assert not list(engine.notices())


def test_notice_of_a_session_that_was_closed_before_it_was_taken_is_dropped() -> None:
    store = make_store()
    models = [Model(store) for _ in range(3)]
    keys = [model.session.key for model in models]
    list(engine.notices())
    for model in models:
        model.vanish()
    models[1].session.close()
    assert [notice.session for notice in of_kind(NoticeKind.GONE)] == [keys[0], keys[2]]
    models[2].session.close()
    models[0].session.close()
    store.release()


def test_lines_are_told_now_and_then_and_count_what_was_not_told() -> None:
    now = 100.0
    counts = Repeats(lambda: now)
    assert [counts.count("a"), counts.count("a", 5), counts.count("b"), counts.count("a")] == [1, 0, 1, 0]
    now += EVERY_S
    assert [counts.count("a"), counts.count("a"), counts.count("b")] == [7, 0, 1]
    assert repeats.suffix(1) == ""
    assert repeats.suffix(7) == " (7 times)"


def test_counts_are_bounded() -> None:
    counts = Repeats()
    for key in range(3 * repeats.MAX_KEYS):
        assert counts.count(key) == 1
    assert len(counts._known) == repeats.MAX_KEYS


def test_reason_is_remembered_for_the_process_that_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Refusals()
    assert known.reason(os.getpid()) is None
    assert known.add(os.getpid(), ProtocolError("x"))
    assert not known.add(os.getpid(), ProtocolError("x"))
    assert known.add(os.getpid(), ProtocolError("y"))
    assert known.add(os.getpid(), NotPermitted(1, 2))
    assert isinstance(known.reason(os.getpid()), NotPermitted)
    monkeypatch.setattr("snapd.daemon.procfs.start_ticks", lambda pid: pid + 1)
    assert known.reason(os.getpid()) is None, "another process has its number by now"
    for pid in range(3 * refusals.MAX_REFUSALS):
        known.add(pid, ProtocolError("x"))
    assert len(known._known) == refusals.MAX_REFUSALS
    known.forget(pid)
    assert known.reason(pid) is None


@pytest.mark.parametrize("may_raise", [True, False])
def test_root_without_the_right_to_raise_the_hard_limit_takes_what_there_is(
    monkeypatch: pytest.MonkeyPatch, *, may_raise: bool
) -> None:
    asked: list[tuple[int, int]] = []

    def setrlimit(_: int, limits: tuple[int, int]) -> None:
        if limits[1] > 4096 and not may_raise:
            raise ValueError("not allowed to raise maximum limit")
        asked.append(limits)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    start._raise_limits()
    assert asked == [(start.OPEN_FILES, start.OPEN_FILES) if may_raise else (4096, 4096)]
