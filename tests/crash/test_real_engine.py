"""The C engine and the Pager over a file system that records, and fails, what they do to the host.

One part records workloads of several threads and cuts the power over what really reached the
host, in the order in which it did.  The other lets the Nth change fail, for N = 1, 2, ….
How much is tried: budget.py.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash.budget import FAILURES, POINTS, TIMEOUT, seeds
from tests.crash.cases import CASES, Made, make
from tests.crash.faultfs import Mounted
from tests.crash.judge import Judge, Recorded, points, qemu_check
from tests.crash.simulate import Log, Mark, Store
from tests.crash.workload import History, Op, Request, perform, requests, striped
from virtmount import api, hostfile
from virtmount.engine import IoFlag

THREADS = 3
ROUNDS = 3
EACH = 10  # requests of a thread in a round
NAMES = (
    "raw",
    "qcow2-64k",
    "qcow2-4k",
    "qcow2-parent",
    "qcow2-compressed",
    "qcow2-snapshot",
    "qcow2-extended-parent",
    "vdi",
    "vdi-fixed",
    "vhd-exact",
    "vhdx",
    "vhdx-4096",
)
FAILED_NAMES = ("qcow2-4k", "qcow2-parent", "vdi", "vhdx")

pytestmark = pytest.mark.timeout(TIMEOUT)


@dataclass
class Place:
    """A case's image in a file system that fails and records."""

    made: Made
    fs: Mounted

    def fresh(self) -> None:
        self.fs.heal()
        self.made.store.save(self.fs.source)
        self.fs.reset()

    def open(self, cache: str = "writeback") -> api.OpenDisk:
        return api.open(self.fs.path, self.made.case.format, writable=True, cache=cache)


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest, folder: Path) -> Iterator[Place]:
    (case,) = (case for case in CASES if case.name == request.param)
    source = folder / f"{case.name}-source"
    source.mkdir(exist_ok=True)
    made = make(case, source)
    mountpoint = folder / f"{case.name}-mounted"
    with Mounted(source, f"image.{case.format}", mountpoint) as fs:
        yield Place(made, fs)


class Asked:
    """Marks every request in the log, before it is made and after it was acknowledged."""

    def __init__(self, disk: api.OpenDisk, fs: Mounted, writethrough: bool = False) -> None:
        self._disk, self._fs, self._writethrough = disk, fs, writethrough
        self.seen: dict[int, bytes | None] = {}
        self.errors: list[tuple[Request, OSError]] = []
        self._lock = threading.Lock()

    def ask(self, asked: Request) -> None:
        self._fs.mark(f"ask {asked.text}")
        fua = asked.op is Op.WRITE and asked.number % 7 == 0
        seen = None
        try:
            if fua:
                self._disk._engine.write(asked.offset, asked.data, IoFlag.FUA)
            else:
                seen = perform(self._disk, asked)
        except OSError as error:
            with self._lock:
                self.errors.append((asked, error))
            return
        with self._lock:
            self.seen[asked.number] = seen
        durable = fua or self._writethrough
        self._fs.mark(
            f"{'kept' if durable else 'done'} {asked.text}",
            flushed=durable or asked.op is Op.FLUSH,
        )

    def ask_side_by_side(self, lists: Sequence[Sequence[Request]]) -> None:
        def run(mine: Sequence[Request]) -> None:
            for asked in mine:
                self.ask(asked)

        threads = [threading.Thread(target=run, args=(mine,)) for mine in lists]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def history(self, log: Log, base: Store) -> History:
        history = History(base)
        for number, event in enumerate(log.events):
            if isinstance(event, Mark):
                what, _, text = event.text.partition(" ")
                asked = Request.parse(text)
                if what == "ask":
                    history.issued(number, asked)
                else:
                    seen = self.seen[asked.number]
                    history.acknowledged(number + 1, asked, seen, what == "kept")
        return history


def rounds(made: Made, rng: random.Random) -> Iterator[list[list[Request]]]:
    """Lists for several threads, then one for a single one, and again."""
    case = made.case
    number = 1
    for _ in range(ROUNDS):
        lists = []
        for owner in range(THREADS):
            lists.append(list(striped(rng, case.size, case.sector, EACH, number, owner, THREADS)))
            number += EACH
        yield lists
        alone = requests(rng, case.size, case.cluster, EACH, case.mix, number, case.sector)
        yield [list(alone)]
        number += EACH


@pytest.mark.parametrize("seed", seeds())
@pytest.mark.parametrize("place", NAMES, indirect=True)
def test_power_cut_under_the_real_engine(place: Place, seed: int, folder: Path) -> None:
    cut_power(place, seed, folder, POINTS)


@pytest.mark.parametrize("seed", seeds())
@pytest.mark.parametrize(
    ("place", "cache"),
    [
        ("qcow2-4k", "none"),
        ("vhdx", "none"),
        ("qcow2-parent", "writethrough"),
        ("vdi", "writethrough"),
        ("vhdx", "writethrough"),
    ],
    indirect=["place"],
)
def test_power_cut_in_other_cache_modes(place: Place, cache: str, seed: int, folder: Path) -> None:
    cut_power(place, seed, folder, POINTS // 2, cache)


def cut_power(place: Place, seed: int, folder: Path, most: int, cache: str = "writeback") -> None:
    made = place.made
    place.fresh()
    rng = random.Random(f"{made.case.name} {seed} real {cache}")
    with place.open(cache) as disk:
        asked = Asked(disk, place.fs, writethrough=cache == "writethrough")
        for lists in rounds(made, rng):
            asked.ask_side_by_side(lists)
        now = Store.of(disk.pread(0, disk.size))
    assert not asked.errors
    log = place.fs.log()
    history = asked.history(log, made.content)
    judge = Judge(made, seed, folder)
    judge.demand("live, before closing", history.model.wrong_now(now))
    closed = Store.load(place.fs.source)
    judge.demand("I7: leaks without a cut", made.check(closed, made.store).leaked)
    replay = history.replay()
    found = points(Recorded(made, log, history, 0, closed), rng, most)
    for i, (epoch, cut) in enumerate(found):
        judge.place = epoch.describe(cut)
        store = epoch.build(cut)
        judge.judge(store, replay.advance(cut.at), rng, again=False)
        if i % (len(found) // 2) == 1 and made.case.foreign:
            judge.foreign(store, rng)


@dataclass(frozen=True)
class Failure:
    name: str
    code: int
    forever: bool = False
    only: tuple[str, ...] = Mounted.KINDS

    def __str__(self) -> str:
        return self.name


FAILURES_TRIED = (
    Failure("EIO once", errno.EIO),
    Failure("ENOSPC for ever", errno.ENOSPC, forever=True),
    Failure("sync EIO once", errno.EIO, only=("fsync",)),
    Failure("read EIO once", errno.EIO, only=("read",)),
    Failure("EINTR once", errno.EINTR, only=("write", "truncate", "fallocate")),
)


@pytest.mark.parametrize("failure", FAILURES_TRIED, ids=str)
@pytest.mark.parametrize("place", FAILED_NAMES, indirect=True)
def test_nth_change_fails(place: Place, failure: Failure, folder: Path) -> None:
    """The request gets that errno, the others none; nothing that was acknowledged is lost."""
    made = place.made
    rng = random.Random(f"{made.case.name} {failure}")
    for at in numbers(rng, most=count(place, reads="read" in failure.only)):
        failed = fail_at(place, failure, at, rng, folder)
        if not failed:
            break


def numbers(rng: random.Random, most: int) -> Iterator[int]:
    """Which N to try: all of them, until one is not reached, or a sample."""
    yield from range(1, most + 20) if not FAILURES else sorted(rng.sample(range(1, most), FAILURES))


def count(place: Place, reads: bool) -> int:
    place.fresh()
    with place.open() as disk:
        for lists in failing_rounds(place.made):
            Asked(disk, place.fs).ask_side_by_side(lists)
    return place.fs.reads if reads else place.fs.count


def failing_rounds(made: Made) -> Iterator[list[list[Request]]]:
    """A short workload, always the same."""
    case = made.case
    rng = random.Random(case.name)
    yield [list(requests(rng, case.size, case.cluster, 16, case.mix, 1, case.sector))]
    yield [
        list(striped(rng, case.size, case.sector, 5, 100 * (owner + 1), owner, THREADS))
        for owner in range(THREADS)
    ]
    yield [list(requests(rng, case.size, case.cluster, 4, case.mix, 1000, case.sector))]


def fail_at(place: Place, failure: Failure, at: int, rng: random.Random, folder: Path) -> bool:
    """Whether anything failed at all."""
    made, fs = place.made, place.fs
    place.fresh()
    judge = Judge(made, 0, folder)
    disk = place.open()
    closing: OSError | None = None
    try:
        fs.fail(at, failure.code, forever=failure.forever, only=failure.only)
        asked = Asked(disk, fs)
        for lists in failing_rounds(made):
            asked.ask_side_by_side(lists)
        failed = fs.failed
        if "read" in failure.only:
            fs.heal()
        readable = Store.of(disk.pread(0, disk.size))
        stopped = disk.stats()["failed"]
    finally:
        try:
            disk.close()
        except OSError as error:
            closing = error
    fs.heal()
    log = fs.log()
    history = asked.history(log, made.content)
    # What a person needs to see it again.
    said = [f"{request} -> {error}" for request, error in asked.errors]
    judge.place = "\n".join(
        [f"{failure} at {at}: {failed}", *said, f"stopped: {stopped}, closing: {closing}"]
    )

    wrong = [line for line, (_, error) in zip(said, asked.errors, strict=True)
             if error.errno != failure.code]  # fmt: skip
    judge.demand("a request got another errno", wrong)
    judge.demand("live: reads after the failure", history.model.wrong_with_failures(readable))
    if not failed:
        judge.demand("errors without a failure", said)
    elif not failure.forever and not stopped:
        judge.demand("one failure hit several requests", said[1:])
    if "fsync" in failed:
        flushes = [error for request, error in asked.errors if request.op is Op.FLUSH]
        last = asked.errors and asked.errors[-1][0].number == 1003
        judge.demand(
            "a flush after a failed sync", [] if flushes and last else ["was acknowledged"]
        )
        lost = asked.seen and not closing  # something was acknowledged that may be gone
        judge.demand("closing after a failed sync", ["raised nothing"] if lost else [])

    left = Store.load(fs.source)
    after = judge.read(left, "reading after the failure")
    if stopped or closing:
        judge.demand("what was flushed", history.model.wrong_after_cut(after))
    else:
        judge.demand("what was acknowledged", history.model.wrong_with_failures(after))
        judge.demand("I7: leaks after an orderly close", made.check(left, made.store).leaked)
    judge.judge(left, history.model, rng, again=False)
    if made.case.foreign:
        judge.demand("I5: qemu-img check", qemu_check(made.case.format, made.save(left, folder)))
    # And the power goes as well.
    replay = history.replay()
    for epoch, cut in points(Recorded(made, log, history, 0, left), rng, 4):
        judge.place += "\n" + epoch.describe(cut)
        judge.judge(epoch.build(cut), replay.advance(cut.at), rng, again=False)
    return bool(failed)


@pytest.mark.parametrize("place", FAILED_NAMES, indirect=True)
def test_writes_that_stop_short_are_finished(place: Place, folder: Path) -> None:
    made = place.made
    place.fresh()
    place.fs.cut()
    with place.open() as disk:
        asked = Asked(disk, place.fs)
        for lists in failing_rounds(made):
            asked.ask_side_by_side(lists)
        now = Store.of(disk.pread(0, disk.size))
    assert not asked.errors
    model = asked.history(place.fs.log(), made.content).model
    assert not model.wrong_now(now)
    closed = Store.load(place.fs.source)
    judge = Judge(made, 0, folder)
    assert not model.wrong_now(judge.read(closed, "reading after the close"))
    judge.judge(closed, model, random.Random(0), again=False)


@pytest.mark.parametrize("place", ["qcow2-parent", "vhdx"], indirect=True)
def test_nothing_is_written_after_a_failed_sync_of_the_engine(place: Place) -> None:
    """A flush that has no mapping to commit is synced by the engine without the Pager."""
    place.fresh()
    disk = place.open()
    data = bytes(4096)
    try:
        disk.pwrite(0, data)
        disk.flush()
        disk.pwrite(0, data)  # in place
        place.fs.fail(1, errno.EIO, only=("fsync",))
        with pytest.raises(OSError, match="Input/output error"):
            disk.flush()
        changes = place.fs.count
        with pytest.raises(OSError, match="Input/output error"):
            disk.flush()
        with pytest.raises(OSError, match="Input/output error"):
            disk.pwrite(1 << 20, data)
        assert disk.pread(0, 4096) == data
    finally:
        with pytest.raises(OSError, match="Input/output error"):
            disk.close()
    assert place.fs.count == changes


@pytest.mark.parametrize("place", ["qcow2-parent", "vdi", "vhdx"], indirect=True)
def test_the_judge_finds_an_engine_whose_barriers_do_nothing(
    place: Place, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostfile, "sync_all", lambda files: None)
    with pytest.raises(pytest.fail.Exception):
        cut_power(place, 0, folder, 400)
