"""What a program does to memory that is out: each discard, move, hole and guard leaves exactly what it leaves natively.

One step at a time on a heap that was dumped before; churn does all of it at once.
"""

import random
from collections.abc import Callable

import pytest

from snapd.errors import SnapdError
from tests.harness import Daemon, Spawner, Target, build
from tests.kernel.driving import MIB, BackToBack, RunningDump, out_bytes
from tests.peers import lacking

pytestmark = pytest.mark.shares_daemon

HEAP_MIB = 48
HEAP_PAGES = HEAP_MIB * 256


@pytest.fixture
def steps(daemon: Daemon, spawn: Spawner) -> Target:
    """Return a target whose heap has just gone out."""
    target = spawn("steps", "--mib", HEAP_MIB)
    daemon.dump(target.pid)
    assert out_bytes(daemon, target.pid) > 0.95 * HEAP_MIB * MIB
    return target


def everything_right(target: Target) -> None:
    """Have every page verified."""
    assert target.ask("look")["lost"] == 0


def test_dumped_heap_reads_as_it_was(steps: Target) -> None:
    assert steps.ask("look") == {"ok": True, "right": HEAP_PAGES, "guards": 0, "lost": 0}


def test_heap_is_the_same_after_dumps_with_restores_between(steps: Target, daemon: Daemon) -> None:
    for _ in range(3):
        restored = daemon.restore(steps.pid)
        assert restored.restored_bytes > 0.9 * HEAP_MIB * MIB
        assert out_bytes(daemon, steps.pid) == 0
        everything_right(steps)
        daemon.dump(steps.pid)
    everything_right(steps)


def test_detached_program_has_everything_back(steps: Target, daemon: Daemon) -> None:
    with daemon.client() as client:
        client.detach(steps.pid)
    assert daemon.session(steps.pid) is None
    everything_right(steps)
    steps.quit()


def test_discarded_page_is_zero_and_stays_so(steps: Target, daemon: Daemon) -> None:
    assert steps.ask("discard", 500, 1)["zeros"] == 500
    daemon.dump(steps.pid)
    assert steps.ask("discard", 500, 2)["zeros"] == 500
    everything_right(steps)


def test_discard_of_pages_that_have_come_back_does_not_bring_their_frames_back(steps: Target, daemon: Daemon) -> None:
    everything_right(steps)
    daemon.dump(steps.pid)  # now all are clean, with frames of before
    steps.ask("look")
    steps.ask("discard", 1000, 1)
    daemon.dump(steps.pid)
    everything_right(steps)


def test_lazily_freed_page_is_old_or_zero(steps: Target, daemon: Daemon) -> None:
    steps.ask("lazy", 500, 1)
    daemon.dump(steps.pid)
    steps.ask("lazy", 500, 2)
    everything_right(steps)


def test_page_that_is_present_survives_a_lazy_free_or_is_zero_after_a_dump(steps: Target, daemon: Daemon) -> None:
    everything_right(steps)
    steps.ask("lazy", 1000, 1)
    daemon.dump(steps.pid)
    everything_right(steps)


def test_heap_follows_its_mremap(steps: Target, daemon: Daemon) -> None:
    for _ in range(3):
        assert steps.ask("move")["right"] == HEAP_PAGES
        daemon.dump(steps.pid)
    everything_right(steps)


def test_old_place_of_a_dontunmap_is_zero_and_the_new_one_has_the_data(steps: Target, daemon: Daemon) -> None:
    for _ in range(2):
        assert steps.ask("keep")["right"] == HEAP_PAGES
        daemon.dump(steps.pid)
    everything_right(steps)


def test_grown_part_is_zero_and_the_rest_as_it_was(steps: Target, daemon: Daemon) -> None:
    assert steps.ask("grow", HEAP_MIB // 2)["right"] == HEAP_PAGES * 3 // 2
    daemon.dump(steps.pid)
    everything_right(steps)
    steps.ask("write", 200, 3)
    daemon.dump(steps.pid)
    everything_right(steps)


def test_part_that_was_shrunk_away_and_grown_again_is_zero(steps: Target, daemon: Daemon) -> None:
    for _ in range(2):
        steps.ask("shrink", HEAP_MIB // 3)
        steps.ask("grow", HEAP_MIB // 3)
        daemon.dump(steps.pid)
    everything_right(steps)


@pytest.mark.parametrize("how", ["hole", "over"])
def test_fresh_mapping_over_dumped_pages_is_zero(steps: Target, daemon: Daemon, how: str) -> None:
    for first in (0, HEAP_PAGES // 2, HEAP_PAGES - 300):
        assert steps.ask(how, first, 300)["right"] == HEAP_PAGES
        daemon.dump(steps.pid)
        everything_right(steps)
    steps.ask("write", 300, 7)
    daemon.dump(steps.pid)
    everything_right(steps)


@pytest.mark.parametrize("how", ["hole", "over"])
def test_heap_that_has_become_several_mappings_comes_back_whole(steps: Target, daemon: Daemon, how: str) -> None:
    """Their entries follow each other, so runs of pages go over the edges."""
    steps.ask(how, 1000, 300)
    steps.ask("write", HEAP_PAGES, 5)
    for _ in range(2):
        daemon.dump(steps.pid)
        assert out_bytes(daemon, steps.pid) > 0.9 * HEAP_MIB * MIB
        daemon.restore(steps.pid)
        assert out_bytes(daemon, steps.pid) == 0
        everything_right(steps)


def test_fresh_mapping_that_nobody_watched_keeps_what_was_written_to_it(steps: Target, daemon: Daemon) -> None:
    steps.ask("hole", 0, HEAP_PAGES)
    steps.ask("write", HEAP_PAGES, 4)
    daemon.dump(steps.pid)
    everything_right(steps)


def test_regrown_program_break_is_zero(daemon: Daemon, spawn: Spawner) -> None:
    target = spawn("steps", "--mib", 4)
    target.ask("brk", 16)
    assert daemon.dump(target.pid).moved_bytes > 19 * MIB
    target.ask("rebrk")
    daemon.dump(target.pid)
    everything_right(target)


def test_guards_go_on_guarding_and_their_neighbours_are_right(steps: Target, daemon: Daemon) -> None:
    if steps.ask("guard", 200, 1).get("unsupported"):
        lacking("the kernel has no MADV_GUARD_INSTALL")
    for seed in (2, 3):
        daemon.dump(steps.pid)
        assert steps.ask("look")["guards"] == 200
        steps.ask("discard", 100, seed)
    daemon.restore(steps.pid)
    assert steps.ask("look")["guards"] == 200
    daemon.dump(steps.pid)
    assert steps.ask("unguard")["guards"] == 0
    daemon.dump(steps.pid)
    everything_right(steps)


def test_restore_and_prefetch_leave_new_guards_alone(steps: Target, daemon: Daemon) -> None:
    if steps.ask("guard", 100, 1).get("unsupported"):
        lacking("the kernel has no MADV_GUARD_INSTALL")
    assert steps.ask("look")["guards"] == 100
    daemon.restore(steps.pid)
    assert steps.ask("look")["guards"] == 100


def test_bulk_copies_leave_guards_alone_that_nobody_heard_of(steps: Target, daemon: Daemon) -> None:
    if steps.ask("fence", 300, 1).get("unsupported"):  # and a look, which starts prefetch between them
        lacking("the kernel has no MADV_GUARD_INSTALL")
    assert steps.ask("look")["guards"] == 300
    daemon.dump(steps.pid)
    steps.ask("fence", 300, 2)
    daemon.restore(steps.pid)
    assert steps.ask("look")["guards"] == 600


def test_protection_stays_and_read_only_pages_are_served(steps: Target, daemon: Daemon) -> None:
    assert steps.ask("protect", 1)["right"] == HEAP_PAGES
    daemon.dump(steps.pid)
    everything_right(steps)
    assert steps.ask("protect", 0)["right"] == HEAP_PAGES
    daemon.dump(steps.pid)
    everything_right(steps)


def test_child_and_its_child_see_what_the_parent_had(steps: Target, daemon: Daemon) -> None:
    assert steps.ask("grandchild")["right"] == HEAP_PAGES
    daemon.dump(steps.pid)
    assert steps.ask("grandchild")["right"] == HEAP_PAGES


def test_child_that_was_forked_by_a_raw_call_sees_no_wrong_byte(steps: Target) -> None:
    steps.ask("rawfork")
    everything_right(steps)


def test_forked_child_that_writes_and_discards_changes_nothing_of_its_parent(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    for seed in range(3):
        daemon.dump(hold.pid)
        hold.ask("fork", 2000, seed)
    hold.quit()


def test_forks_in_the_middle_of_a_dump_give_child_and_grandchild_everything(daemon: Daemon, spawn: Spawner) -> None:
    steps = spawn("steps", "--mib", HEAP_MIB)
    for seed in range(8):
        dump = RunningDump(daemon, steps.pid)
        steps.ask("grandchild")
        assert not isinstance(dump.outcome(), Exception)
        steps.ask("write", HEAP_PAGES, seed)


# Without fresh mappings in the middle of the heap: those make it several mappings, which no mremap takes in one call.
STEPS: dict[str, Callable[[random.Random], tuple[int, ...]]] = {
    "write": lambda rng: (rng.randrange(1, 2000), rng.randrange(1000)),
    "readin": lambda rng: (rng.randrange(1, 500), rng.randrange(1000)),
    "vmwrite": lambda rng: (rng.randrange(1, 500), rng.randrange(1000)),
    "discard": lambda rng: (rng.randrange(1, 500), rng.randrange(1000)),
    "lazy": lambda rng: (rng.randrange(1, 500), rng.randrange(1000)),
    "move": lambda _: (),
    "keep": lambda _: (),
    "grandchild": lambda _: (),
    "look": lambda _: (),
}


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.torture) for seed in range(2, 8))])
def test_any_order_of_steps_under_back_to_back_dumps_is_right(daemon: Daemon, spawn: Spawner, seed: int) -> None:
    rng = random.Random(seed)
    steps = spawn("steps", "--mib", HEAP_MIB, "--seed", seed)
    with BackToBack(daemon, steps.pid, pause_s=0.02) as dumps:
        for _ in range(25):
            name = rng.choice(list(STEPS))
            steps.ask(name, *STEPS[name](rng))
    everything_right(steps)
    assert len(dumps.reports) > 2


def test_kinds_of_memory_that_must_stay_are_left_alone_and_named(daemon: Daemon, spawn: Spawner) -> None:
    steps = spawn("steps", "--mib", 8)
    steps.ask("kinds")
    skipped = daemon.dump(steps.pid).skipped
    for reason in ("locked", "not_forked", "wiped_on_fork", "shared", "file", "foreign"):
        assert skipped.get(reason, 0) >= MIB, (reason, skipped)
    everything_right(steps)


def test_program_that_closed_all_its_descriptors_is_dumped_and_served(daemon: Daemon, spawn: Spawner) -> None:
    steps = spawn("steps", "--mib", HEAP_MIB)
    assert steps.ask("closefds")["status"] == 0
    for _ in range(2):
        daemon.dump(steps.pid)
        everything_right(steps)


def test_program_that_changed_its_user_gets_everything_back_and_is_refused(daemon: Daemon, spawn: Spawner) -> None:
    steps = spawn("steps", "--mib", HEAP_MIB)
    daemon.allow("its user is 0 no longer")
    daemon.dump(steps.pid)
    assert steps.ask("setuid", 65534)["status"] == 0
    with pytest.raises(SnapdError):
        daemon.dump(steps.pid)
    assert out_bytes(daemon, steps.pid) == 0
    everything_right(steps)


def shuffled(daemon: Daemon, spawn: Spawner, threads: int, rounds: int, dumps: int = 5) -> None:
    """Have threads move into each other's holes, after dumps."""
    # One dump before and none meanwhile: what can go wrong here is the order of events of different threads alone.
    shuffle = spawn("shuffle", "--threads", threads, "--pages", 4096)
    for _ in range(dumps):
        daemon.dump(shuffle.pid)
        shuffle.ask("go", rounds)
    shuffle.ask("sum")
    with BackToBack(daemon, shuffle.pid) as back_to_back:
        for _ in back_to_back.until(dumps):
            shuffle.ask("go", rounds // 6)
    shuffle.ask("sum")
    shuffle.quit()


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_that_move_into_each_others_holes_keep_their_bytes(
    daemon: Daemon, spawn: Spawner, threads: int
) -> None:
    shuffled(daemon, spawn, threads, 300)


def test_one_read_never_shows_two_events_of_one_thread() -> None:
    shim = build("slow_reads", "-shared", "-fPIC")
    with Daemon(env={"LD_PRELOAD": str(shim)}) as daemon, Spawner(daemon) as spawn:
        shuffled(daemon, spawn, 4, 60, 2)
