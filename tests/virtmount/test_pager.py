"""The miss loop with the real engine: what is read, what is written in which order, what fails how.

The oracle is tests/reference.py, which asks the drivers again for every byte.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import random
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.reference import Reference
from tests.virtmount import toy
from tests.virtmount.chains import KIB, make_chain
from tests.virtmount.toy import Toy, make_toy
from virtmount import hostfile, pager
from virtmount.chain import open_chain
from virtmount.disk import Disk
from virtmount.engine import Engine, FaultType, IoFlag, Op
from virtmount.errors import Corrupt, NoTransport, Unsupported
from virtmount.hostfile import HostFile
from virtmount.image import Dirty, Extent, Kind, Leaf, Options, Reservation, Run
from virtmount.pager import Pager
from virtmount.plan import Barrier, Plan, Step, Write

pytestmark = pytest.mark.usefixtures("toy_format")


class Served:
    """An image served by engine and Pager, with a diary of what reached the driver and the file."""

    def __init__(self, path: Path, *, writable: bool = True, cache: str = "writeback") -> None:
        self.disk = Disk(
            open_chain(path, writable=writable, options=Options(allow_outside=True)), cache=cache
        )
        self.image: Toy = self.disk.image  # type: ignore[assignment]
        self.pager = Pager(self.disk).start()
        self.engine: Engine = self.pager.engine

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exc: object) -> None:
        self.pager.close()

    def calls(self) -> list[str]:
        """Of the driver, without the reading ones."""
        return [name for name in self.image.log if name not in ("leaf", "slow", "inflate")]


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.CRITICAL, logger="virtmount")
    return caplog


def errno_of(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.mark.parametrize("seed", range(20))
def test_reads_what_the_reference_reads(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = make_chain(tmp_path, rng)
    with Served(path, writable=False) as served, Reference(served.disk.chain.images) as oracle:
        for _ in range(20):
            start = rng.randrange(0, served.disk.size, 512)
            length = min(rng.randrange(512, 64 * KIB, 512), served.disk.size - start)
            assert served.engine.read(start, length) == oracle.pread(start, length)
        whole = oracle.pread(0, oracle.size)
        assert served.engine.read(0, served.disk.size) == whole
        assert any(whole)
        assert served.calls() == []


@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_reads_back_and_is_in_the_file(tmp_path: Path, seed: int) -> None:
    rng = random.Random(1000 + seed)
    path = make_chain(tmp_path, rng, writable=True)
    parents = {p: p.read_bytes() for p in tmp_path.iterdir() if p != path}
    with Served(path) as served:
        size = served.disk.size
        model = bytearray(served.engine.read(0, size))
        for _ in range(80):
            start = rng.randrange(0, size, 512)
            length = min(rng.choice([512, 1024, 4096, 20 * KIB]), size - start)
            match rng.choice("wwwwwrrzdf"):
                case "w":
                    data = rng.randbytes(length)
                    flags = IoFlag.FUA if rng.random() < 0.2 else IoFlag(0)
                    served.engine.write(start, data, flags)
                    model[start : start + length] = data
                case "r":
                    assert served.engine.read(start, length) == model[start : start + length]
                case "z":
                    served.engine.io(Op.WRITE_ZEROES, start, length)
                    model[start : start + length] = bytes(length)
                case "d":
                    served.engine.io(Op.DISCARD, start, length)
                    now = served.engine.read(start, length)
                    for at in range(0, length, 512):
                        old = model[start + at : start + at + 512]
                        assert now[at : at + 512] in (old, bytes(512))
                    model[start : start + length] = now
                case "f":
                    served.engine.io(Op.FLUSH)
        assert served.engine.read(0, size) == model
        assert served.engine.stats()["failed"] == 0
    assert served.calls()[0] == "begin"
    assert served.calls()[-1] == "end"
    with Served(path, writable=False) as served, Reference(served.disk.chain.images) as oracle:
        assert oracle.pread(0, size) == model
        assert served.engine.read(0, size) == model
        assert served.image.header.get("dirty") is None
    assert {p: p.read_bytes() for p in parents} == parents


@pytest.mark.parametrize("seed", range(12))
def test_writers_that_share_clusters_do_not_disturb_each_other(tmp_path: Path, seed: int) -> None:
    """Each thread owns a stripe of a few sectors in every cluster, and knows what it holds."""
    rng = random.Random(2000 + seed)
    path = make_chain(tmp_path, rng, writable=True)
    stripe, count = rng.choice([512, 1024, 2560]), 6
    failures: list[object] = []
    with Served(path, cache=rng.choice(["writeback", "none", "writethrough"])) as served:
        engine, size = served.engine, served.disk.size
        model = bytearray(engine.read(0, size))

        def work(number: int) -> None:
            mine = random.Random(seed * 100 + number)
            for _ in range(40):
                start = mine.randrange(-(-size // (stripe * count))) * stripe * count
                start += number * stripe
                length = min(stripe, size - start)
                if length <= 0:
                    continue
                match mine.choice("wwwrrzfs"):
                    case "w":
                        data = mine.randbytes(length)
                        engine.write(start, data)
                        model[start : start + length] = data
                    case "r":
                        if engine.read(start, length) != model[start : start + length]:
                            failures.append((start, length))
                    case "z":
                        engine.io(Op.WRITE_ZEROES, start, length)
                        model[start : start + length] = bytes(length)
                    case "f":
                        engine.io(Op.FLUSH)
                    case "s":
                        engine.read(0, size)

        def guarded(number: int) -> None:
            try:
                work(number)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert engine.read(0, size) == model
    with Served(path, writable=False) as served:
        assert served.engine.read(0, size) == model


def test_racing_writers_allocate_each_cluster_once(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a.toy", 256 * KIB, {}, cluster=16 * KIB, grain=16 * KIB)
    with Served(path) as served:

        def write(number: int) -> None:
            for start in range(number * 512, 256 * KIB, 16 * 512):
                served.engine.write(start, bytes([number + 1]) * 512)

        threads = [threading.Thread(target=write, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = served.engine.stats()
        assert stats["allocations"] == 16
        expected = b"".join(bytes([n + 1]) * 512 for n in range(16)) * 32
        assert served.engine.read(0, 256 * KIB) == expected
    with Served(path, writable=False) as served:
        assert served.engine.read(0, 256 * KIB) == expected


def test_small_reservations_are_enough_for_many_writers(tmp_path: Path) -> None:
    """What one refill brings may be gone before its answer: that is not the end of the space."""
    path = make_toy(tmp_path / "a.toy", 256 * KIB, {}, cluster=512, grain=512, at_once=3)
    errors: list[int] = []
    with Served(path) as served:

        def write(number: int) -> None:
            for start in range(number * 8 * KIB, 256 * KIB, 64 * KIB):
                data = bytes([number + 1]) * 8 * KIB
                errors.append(errno_of(lambda: served.engine.write(start, data)))  # noqa: B023

        threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(errors) == {0}
        assert served.engine.stats()["allocations"] == 512


def test_a_driver_that_reserves_nothing_is_out_of_space(
    tmp_path: Path, quiet: pytest.LogCaptureFixture
) -> None:
    with Served(make_toy(tmp_path / "a.toy", 64 * KIB, {})) as served:
        served.image.reserve = lambda count: Reservation((), Plan())  # type: ignore[method-assign]
        assert errno_of(lambda: served.engine.write(0, b"x" * 512)) == errno.ENOSPC


def test_a_mapped_read_or_write_never_enters_python(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {i: bytes([i]) * 4096 for i in range(16)})
    with Served(path) as served:
        served.engine.write(0, b"x" * 512)
        before = served.engine.stats()["faults"]["all"]
        for i in range(100):
            served.engine.write(i * 512, b"y" * 512)
            served.engine.read(i * 512, 512)
        assert served.engine.stats()["faults"]["all"] == before


# The order of things


class Diary:
    """What reached the file, in order; `at` raises an OSError at the n-th step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[str] = []
        self.fail_at: tuple[str, int] | None = None
        for name in ("pwrite", "sync", "punch"):
            monkeypatch.setattr(HostFile, name, self.wrap(name, getattr(HostFile, name)))

    def wrap(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(file: HostFile, *args: object) -> None:
            self.steps.append(name)
            if self.fail_at is not None and self.fail_at[0] == name:
                raise OSError(self.fail_at[1], os.strerror(self.fail_at[1]))
            real(file, *args)

        return call


def test_a_flush_commits_and_its_barrier_is_the_only_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diary = Diary(monkeypatch)
    with Served(make_toy(tmp_path / "a.toy", 64 * KIB, {})) as served:
        served.engine.write(0, b"x" * 512)
        assert diary.steps == ["pwrite", "sync", "sync"]  # begin, reserve
        diary.steps.clear()
        served.engine.io(Op.FLUSH)
        assert diary.steps == ["pwrite", "sync"]  # an entry; nothing is hidden by it
        assert served.calls() == ["begin", "reserve", "commit"]
        diary.steps.clear()
        served.engine.io(Op.FLUSH)
        assert diary.steps == []  # in C
        assert served.calls() == ["begin", "reserve", "commit"]


def test_flushes_that_wait_together_share_a_commit(tmp_path: Path) -> None:
    with Served(make_toy(tmp_path / "a.toy", 64 * KIB, {})) as served:
        served.engine.write(0, b"x" * 512)
        go, held = threading.Event(), threading.Event()
        real = served.image.commit

        def commit(dirty: list[Dirty]) -> Plan:
            held.set()
            assert go.wait(10)
            return real(dirty)

        served.image.commit = commit  # type: ignore[method-assign, assignment]
        flushes = [threading.Thread(target=served.engine.io, args=(Op.FLUSH,)) for _ in range(5)]
        flushes[0].start()
        assert held.wait(10)
        for flush in flushes[1:]:
            flush.start()
        served.engine.write(4096 * 3, b"y" * 512)  # new while the commit is under way
        while served.engine.stats()["flushes"] < 5:
            os.sched_yield()
        go.set()
        for flush in flushes:
            flush.join()
        assert served.engine.stats()["dirty"] == 0
        assert served.calls().count("commit") == 2


def test_a_commit_without_a_barrier_is_followed_by_a_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Served(make_toy(tmp_path / "a.toy", 64 * KIB, {})) as served:
        served.engine.write(0, b"x" * 512)
        monkeypatch.setattr(served.image, "commit", lambda dirty: Plan())
        diary = Diary(monkeypatch)
        served.engine.io(Op.FLUSH)
        assert diary.steps == ["sync"]


def test_new_mappings_are_committed_without_a_flush_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pager, "IDLE_MS", 1)
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {})
    committed = threading.Event()
    with Served(path) as served:
        real = served.engine.dirty_done

        def done(error: int = 0) -> None:
            real(error)
            committed.set()

        monkeypatch.setattr(served.engine, "dirty_done", done)
        served.engine.write(0, b"x" * 512)
        assert committed.wait(10)
        assert served.engine.stats()["dirty"] == 0
        entry = path.read_bytes()[toy.TABLE : toy.TABLE + 8]
        assert int.from_bytes(entry, "little") >= toy.TABLE


def test_a_discard_commits_first_and_its_clusters_come_back(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {}, at_once=16)
    with Served(path) as served:
        served.engine.write(0, b"x" * 16 * KIB)
        served.engine.io(Op.DISCARD, 0, 8 * KIB)
        assert served.calls() == ["begin", "reserve", "commit", "discard"]
        assert served.engine.read(0, 16 * KIB) == bytes(8 * KIB) + b"x" * 8 * KIB


@pytest.mark.parametrize("batch", [1, 3])
def test_large_discards_go_in_several_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(pager, "DISCARD_BATCH", batch)
    path = make_toy(tmp_path / "a.toy", 10 * 4096, dict.fromkeys(range(10), b"x" * 4096))
    with Served(path) as served:
        served.engine.io(Op.WRITE_ZEROES, 4096, 7 * 4096)
        assert served.calls().count("discard") == -(-7 // batch)
        expected = b"x" * 4096 + bytes(7 * 4096) + b"x" * 2 * 4096
        assert served.engine.read(0, 10 * 4096) == expected


def test_unused_clusters_come_back_before_the_end(tmp_path: Path) -> None:
    with Served(make_toy(tmp_path / "a.toy", 64 * KIB, {}, at_once=8)) as served:
        served.engine.write(0, b"x" * 512)
        image = served.image
    assert served.calls() == ["begin", "reserve", "commit", "release", "end"]
    assert sum(run.count for run in image.reused) == 7


def test_reading_writes_nothing(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {})
    before = path.read_bytes()
    with Served(path) as served:
        served.engine.read(0, 64 * KIB)
        served.engine.io(Op.FLUSH)
    assert served.calls() == []
    assert path.read_bytes() == before


def test_writethrough_leaves_nothing_uncommitted(tmp_path: Path) -> None:
    with Served(make_toy(tmp_path / "a.toy", 64 * KIB, {}), cache="writethrough") as served:
        served.engine.write(0, b"x" * 512)
        assert served.engine.stats()["dirty"] == 0
        assert served.calls() == ["begin", "reserve", "commit"]


# Errors


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError("no number"), errno.EIO),
        (Corrupt("file", "field", "wrong"), errno.EIO),
        (KeyError("a bug"), errno.EIO),
        (MemoryError(), errno.ENOMEM),
        (SystemExit(), errno.EIO),
    ],
)
@pytest.mark.parametrize("call", ["leaf", "inflate"])
def test_an_exception_fails_the_read_and_nothing_else(
    tmp_path: Path,
    quiet: pytest.LogCaptureFixture,
    call: str,
    error: BaseException,
    expected: int,
) -> None:
    table: dict[int, int | bytes] = {0: toy.COMPRESSED, 1: b"x" * 4096}
    with Served(make_toy(tmp_path / "a.toy", 64 * KIB, table)) as served:
        served.image.fail[call] = error
        assert errno_of(lambda: served.engine.read(0, 512)) == expected
        served.image.fail.clear()
        if not (call == "leaf" and isinstance(error, Corrupt)):  # that one is remembered
            assert served.engine.read(0, 512) == bytes([1]) * 512
            assert served.engine.read(4096, 512) == b"x" * 512


def test_a_corrupt_leaf_fails_its_own_clusters_only(
    tmp_path: Path, quiet: pytest.LogCaptureFixture
) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {9: b"x" * 4096}, per_leaf=8)
    with Served(path) as served:
        real = served.image.leaf

        def leaf(index: int) -> Leaf:
            return Leaf(table=1 << 40) if index == 0 else real(index)

        served.image.leaf = leaf  # type: ignore[method-assign]
        assert errno_of(lambda: served.engine.read(0, 512)) == errno.EIO
        assert errno_of(lambda: served.engine.write(0, b"y" * 512)) == errno.EIO
        assert served.engine.read(9 * 4096, 512) == b"x" * 512
        served.engine.write(8 * 4096, b"y" * 512)


@pytest.mark.parametrize("entry", [1024, 4096, 1 << 40, 512])
def test_a_mapping_into_metadata_or_past_the_end_is_eio(
    tmp_path: Path, quiet: pytest.LogCaptureFixture, entry: int
) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {0: entry, 1: b"x" * 4096})
    before = path.read_bytes()
    with Served(path) as served:
        assert errno_of(lambda: served.engine.read(0, 512)) == errno.EIO
        assert errno_of(lambda: served.engine.write(0, b"y" * 512)) == errno.EIO
        assert served.engine.read(4096, 512) == b"x" * 512
    assert path.read_bytes()[toy.TABLE :] == before[toy.TABLE :]


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [Extent(0, 2048, Kind.ZERO)],
        [Extent(0, 2048, Kind.ZERO), Extent(1024, 3072, Kind.ZERO)],
        [Extent(0, 1000, Kind.ZERO), Extent(1000, 3096, Kind.ZERO)],
        [Extent(0, 8192, Kind.ZERO)],
        [Extent(0, 0, Kind.ZERO), Extent(0, 4096, Kind.ZERO)],
        [Extent(0, 4096, Kind.DATA, 100)],
        [Extent(0, 4096, Kind.DATA, 4096)],
        [Extent(0, 4096, Kind.DATA, -4096)],
        [Extent(0, 4096, Kind.DATA, 1 << 50)],
        [Extent(0, 4096, Kind.PARTIAL)],
    ],
)
def test_strange_pieces_of_a_partial_cluster_are_eio(
    tmp_path: Path, quiet: pytest.LogCaptureFixture, pieces: list[Extent]
) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {0: toy.PARTIAL}, grain=1024)
    with Served(path, writable=False) as served:
        served.image.slow = lambda cluster: pieces  # type: ignore[method-assign]
        assert errno_of(lambda: served.engine.read(0, 512)) == errno.EIO


def test_an_inflated_cluster_of_the_wrong_size_is_eio(
    tmp_path: Path, quiet: pytest.LogCaptureFixture
) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {0: toy.COMPRESSED})
    with Served(path, writable=False) as served:
        served.image.inflate = lambda cluster: b"x" * 4095  # type: ignore[method-assign]
        assert errno_of(lambda: served.engine.read(0, 512)) == errno.EIO


def test_no_space_fails_the_write_and_goes_when_there_is_space(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {})
    with Served(path) as served:
        served.image.fail["reserve"] = OSError(errno.ENOSPC, "full")
        assert errno_of(lambda: served.engine.write(0, b"x" * 512)) == errno.ENOSPC
        assert served.engine.read(0, 512) == bytes(512)
        served.image.fail.clear()
        served.engine.write(0, b"x" * 512)
        assert served.pager.failed == 0
    assert served.calls()[-1] == "end"


def test_a_file_that_cannot_grow_fails_the_write_and_gives_the_clusters_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: pytest.LogCaptureFixture
) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {})
    with Served(path) as served:
        real = os.ftruncate

        def ftruncate(fd: int, size: int) -> None:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

        monkeypatch.setattr(os, "ftruncate", ftruncate)
        assert errno_of(lambda: served.engine.write(0, b"x" * 512)) == errno.EFBIG
        assert served.calls() == ["begin", "reserve", "release"]
        monkeypatch.setattr(os, "ftruncate", real)
        served.engine.write(0, b"x" * 512)
        assert served.pager.failed == 0


def test_a_full_host_does_not_make_the_file_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: pytest.LogCaptureFixture
) -> None:
    """/dev/full takes the engine's writes; the metadata goes to the file."""
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {}, at_once=1)
    add_file = Engine.add_file
    full = os.open("/dev/full", os.O_RDWR)
    monkeypatch.setattr(
        Engine, "add_file", lambda self, fd, **options: add_file(self, full, **options)
    )
    with Served(path) as served:
        for _ in range(5):
            assert errno_of(lambda: served.engine.write(0, b"x" * 512)) == errno.ENOSPC
        assert served.engine.read(0, 512) == bytes(512)
        size = path.stat().st_size
    assert size <= -(-toy.TABLE // 4096) * 4096 + 4 * 4096
    assert served.calls().count("reserve") >= 5
    os.close(full)
    with Served(path, writable=False) as served:
        assert served.engine.read(0, 64 * KIB) == bytes(64 * KIB)


def test_a_bad_place_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: pytest.LogCaptureFixture
) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {}, at_once=1)
    add_file = Engine.add_file
    bad = os.open(path, os.O_RDONLY)
    monkeypatch.setattr(
        Engine, "add_file", lambda self, fd, **options: add_file(self, bad, **options)
    )
    with Served(path) as served:
        for _ in range(3):
            assert errno_of(lambda: served.engine.write(0, b"x" * 512)) == errno.EBADF
        served.engine.stats()
        image = served.image
    os.close(bad)
    hosts = [run.host_offset for run in image.reused for _ in range(run.count)]
    assert (
        len(hosts) == len(set(hosts)) >= 3
    )  # each cluster went out once, and came back at the end


FAILURES = [
    ("begin", lambda served: served.engine.write(0, b"y" * 512)),
    ("commit", lambda served: served.engine.io(Op.FLUSH)),
    ("discard", lambda served: served.engine.io(Op.DISCARD, 0, 8 * KIB)),
]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(errno.EDQUOT, "quota"), errno.EDQUOT), (KeyError("a bug"), errno.EIO)],
)
@pytest.mark.parametrize(("call", "act"), FAILURES, ids=[name for name, _ in FAILURES])
def test_after_a_failed_plan_nothing_is_written_any_more(
    tmp_path: Path,
    quiet: pytest.LogCaptureFixture,
    call: str,
    act: Callable[[Served], None],
    error: BaseException,
    expected: int,
) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {0: b"o" * 4096, 1: b"o" * 4096})
    served = Served(path)
    if call != "begin":
        served.engine.write(8 * KIB, b"x" * 512)
    served.image.fail[call] = error
    assert errno_of(lambda: act(served)) == expected
    served.image.fail.clear()
    calls = served.calls()
    frozen = path.read_bytes()
    for request in (
        lambda: served.engine.write(0, b"z" * 512),
        lambda: served.engine.write(40 * KIB, b"z" * 512),
        lambda: served.engine.io(Op.FLUSH),
        lambda: served.engine.io(Op.DISCARD, 0, 8 * KIB),
    ):
        assert errno_of(request) == expected
    assert served.engine.read(0, 512) == b"o" * 512
    if call != "begin":
        assert served.engine.read(8 * KIB, 512) == b"x" * 512
        assert errno_of(served.pager.close) == expected
    served.pager.close()
    assert served.calls() == calls
    assert path.read_bytes() == frozen
    with HostFile(path, writable=True):
        pass  # closed and unlocked


def test_what_could_not_be_committed_still_reads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: pytest.LogCaptureFixture
) -> None:
    """The file does not know these clusters, so their leaf must not be dropped from the map."""
    config = Disk.config
    small = lambda disk: dataclasses.replace(config(disk), map_bytes=1)  # noqa: E731
    monkeypatch.setattr(Disk, "config", small)
    path = make_toy(tmp_path / "a.toy", 8 << 20, {}, cluster=512, grain=512)
    served = Served(path)
    served.engine.write(0, b"x" * 512)
    served.image.fail["commit"] = OSError(errno.EIO, "no")
    assert errno_of(lambda: served.engine.io(Op.FLUSH)) == errno.EIO
    for start in (2 << 20, 4 << 20, 6 << 20):
        served.engine.read(start, 512)
    assert served.engine.stats()["leaves"] < 4
    assert served.engine.read(0, 512) == b"x" * 512
    assert errno_of(served.pager.close) == errno.EIO


@pytest.mark.parametrize("step", ["pwrite", "sync"])
def test_a_failed_step_of_a_commit_fails_the_flush_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: pytest.LogCaptureFixture, step: str
) -> None:
    served = Served(make_toy(tmp_path / "a.toy", 64 * KIB, {}))
    served.engine.write(0, b"x" * 512)
    diary = Diary(monkeypatch)
    diary.fail_at = (step, errno.EIO)
    assert errno_of(lambda: served.engine.io(Op.FLUSH)) == errno.EIO
    diary.fail_at = None
    steps = list(diary.steps)
    # The kernel reports a lost write once: a second fdatasync would claim that all is well.
    assert errno_of(lambda: served.engine.io(Op.FLUSH)) == errno.EIO
    assert errno_of(served.pager.close) == errno.EIO
    assert diary.steps == steps


def test_a_failed_sync_of_a_reservation_is_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: pytest.LogCaptureFixture
) -> None:
    served = Served(make_toy(tmp_path / "a.toy", 64 * KIB, {}))
    served.image.begin = lambda: Plan()  # type: ignore[method-assign]
    diary = Diary(monkeypatch)
    diary.fail_at = ("sync", errno.EIO)
    assert errno_of(lambda: served.engine.write(0, b"x" * 512)) == errno.EIO
    assert served.pager.failed == errno.EIO
    assert errno_of(served.pager.close) == errno.EIO


def test_a_failed_end_is_told_by_close(tmp_path: Path, quiet: pytest.LogCaptureFixture) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {})
    served = Served(path)
    served.engine.write(0, b"x" * 512)
    served.image.fail["end"] = OSError(errno.EIO, "no end")
    assert errno_of(served.pager.close) == errno.EIO
    served.pager.close()
    with Served(path, writable=False) as again:
        assert again.engine.read(0, 512) == b"x" * 512


def test_a_driver_that_hands_out_its_own_table_is_stopped(
    tmp_path: Path, quiet: pytest.LogCaptureFixture
) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {})
    served = Served(path)
    run = Run(4096, 1)
    served.image.reserve = lambda count: Reservation((run,), Plan())  # type: ignore[method-assign]
    assert errno_of(lambda: served.engine.write(0, b"x" * 512)) == errno.EIO
    assert served.pager.failed == errno.EIO
    assert errno_of(served.pager.close) == errno.EIO
    assert path.read_bytes()[4096:4104] == bytes(8)


def test_each_place_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {0: toy.COMPRESSED})
    with Served(path, writable=False) as served:
        served.image.fail["inflate"] = KeyError("a bug")
        for _ in range(5):
            assert errno_of(lambda: served.engine.read(0, 512)) == errno.EIO
    records = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(records) == 1
    text = records[0].getMessage()
    assert "a.toy" in text
    assert "KeyError" in text
    assert "toy.py" in text
    assert "_inflate >" in text
    assert not records[0].exc_info


def test_when_the_pager_dies_requests_fail_rather_than_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: pytest.LogCaptureFixture
) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {})
    with Served(path, writable=False) as served:

        def fill(*args: object) -> None:
            raise RuntimeError("not even an answer")

        monkeypatch.setattr(served.engine, "fill", fill)
        assert errno_of(lambda: served.engine.read(0, 512)) == errno.ESHUTDOWN
        assert served.pager.device_gone.wait(10)  # the daemon ends


def test_requests_that_wait_when_the_engine_stops_fail(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {0: toy.COMPRESSED})
    served = Served(path, writable=False)
    held, go = threading.Event(), threading.Event()

    def inflate(cluster: int) -> bytes:
        held.set()
        assert go.wait(10)
        return bytes(4096)

    served.image.inflate = inflate  # type: ignore[method-assign]
    errors: list[int] = []
    reader = threading.Thread(
        target=lambda: errors.append(errno_of(lambda: served.engine.read(0, 512)))
    )
    reader.start()
    assert held.wait(10)
    served.pager.stop()
    reader.join()
    go.set()
    served.pager.close()
    assert errors == [errno.ESHUTDOWN]


def test_clusters_reserved_while_the_engine_stops_come_back(tmp_path: Path) -> None:
    served = Served(make_toy(tmp_path / "a.toy", 64 * KIB, {}, at_once=8))
    held, go = threading.Event(), threading.Event()
    real = served.image.reserve

    def reserve(count: int) -> Reservation:
        held.set()
        assert go.wait(10)
        return real(count)

    served.image.reserve = reserve  # type: ignore[method-assign]
    errors: list[int] = []
    writer = threading.Thread(
        target=lambda: errors.append(errno_of(lambda: served.engine.write(0, b"x" * 512)))
    )
    writer.start()
    assert held.wait(10)
    served.pager.stop()
    writer.join()
    served.pager._threads[0].join()
    go.set()
    served.pager.close()
    assert errors == [errno.ESHUTDOWN]
    assert sum(run.count for run in served.image.reused) == 8
    assert served.calls()[-1] == "end"


def test_close_is_orderly_whatever_was_going_on(tmp_path: Path) -> None:
    """Everything acknowledged before close() is there, without a flush."""
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {})
    with Served(path) as served:
        for i in range(16):
            served.engine.write(i * 4096, bytes([i + 1]) * 4096)
    with Served(path, writable=False) as served:
        assert served.engine.read(0, 64 * KIB) == b"".join(bytes([i + 1]) * 4096 for i in range(16))


def test_without_io_uring_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {})
    real = Engine.run

    def run(self: Engine) -> None:
        """As where it is forbidden, but with another errno: no file may be opened."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            real(self)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    monkeypatch.setattr(Engine, "run", run)
    with pytest.raises(NoTransport, match="io_uring: Too many open files") as caught:
        Served(path)
    assert "io_uring_disabled" in str(caught.value.hint)
    with HostFile(path, writable=True):
        pass


# Sizes


def wanted(
    path: Path, asked: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    disk = Disk(open_chain(path, writable=True))
    answer = Pager(disk)
    clock = [0.0]
    monkeypatch.setattr(pager.time, "monotonic", lambda: clock[0])
    answer._refilled = -100.0
    sizes = []
    for at, count in asked:
        clock[0] = at
        sizes.append(answer._wanted(count))
    answer.close()
    return sizes


def test_a_busy_writer_gets_more_clusters_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_toy(tmp_path / "a.toy", 1 << 30, {}, cluster=1 << 20, grain=1 << 20)
    asked = [(0.0, 1), (0.1, 1), (0.2, 1), (0.3, 1), (9.0, 1), (9.1, 100)]
    assert wanted(path, asked, monkeypatch) == [16, 32, 64, 64, 16, 100]


def test_no_more_clusters_ahead_than_the_disk_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {})
    assert wanted(path, [(0.0, 1)], monkeypatch) == [16]


def test_large_clusters_are_not_reserved_ahead_for_a_single_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_toy(tmp_path / "a.toy", 1 << 30, {}, cluster=32 << 20, grain=32 << 20)
    asked = [(0.0, 1), (5.0, 1), (5.1, 1), (5.2, 1), (9.0, 3)]
    assert wanted(path, asked, monkeypatch) == [1, 1, 1, 2, 3]


# The disk


@pytest.fixture
def chain_of(tmp_path: Path) -> Iterator[Callable[..., Disk]]:
    disks: list[Disk] = []

    def make(sizes: list[tuple[int, int]], **options: str) -> Disk:
        """(size, cluster) from the top down."""
        parents: dict[str, object] = {}
        for i, (size, cluster) in enumerate(reversed(sizes)):
            path = make_toy(
                tmp_path / f"{i}.toy", size, {}, cluster=cluster, grain=cluster, **parents
            )  # type: ignore[arg-type]
            parents = {"parents": [path.name], "parent_format": "toy"}
        disks.append(Disk(open_chain(path, writable=True), **options))
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()


@pytest.mark.parametrize(
    ("sizes", "unit", "leaf_units"),
    [
        ([(1 << 20, 65536)], 65536, 4096),
        ([(1 << 20, 512)], 512, 4096),
        ([(1 << 20, 65536), (1 << 20, 4096)], 4096, 4096),
        ([(1 << 20, 4096), (1 << 20, 65536)], 4096, 4096),
        ([(1 << 20, 65536), (1 << 19, 65536)], 65536, 4096),
        ([(1 << 20, 65536), ((1 << 19) + 512, 65536)], 512, 4096),
        ([(1 << 20, 65536), ((1 << 21) + 512, 65536)], 65536, 4096),
        ([(1 << 26, 1 << 24), (1 << 20, 512)], 512, 32768),
    ],
)
def test_units_are_what_the_layers_can_differ_in(
    chain_of: Callable[..., Disk], sizes: list[tuple[int, int]], unit: int, leaf_units: int
) -> None:
    config = chain_of(sizes).config()
    assert (1 << config.unit_shift, config.leaf_units) == (unit, leaf_units)
    assert 1 << config.cluster_shift == sizes[0][1]


def test_an_image_that_cannot_be_written_is_not_served_read_only_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {})
    chain = open_chain(path, writable=True)
    monkeypatch.setattr(chain.top, "caps", type(chain.top.caps)())
    with pytest.raises(Unsupported, match="cannot be written"):
        Disk(chain)
    chain.close()


def test_direct_io_is_used_where_the_host_can(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {1: b"a" * 4096, 0: b"b" * 4096})
    with Served(path, cache="none") as served:
        if not served.disk.direct:
            pytest.skip("the temporary folder's file system has no O_DIRECT")
        served.engine.write(0, b"x" * 4096)
        served.engine.write(4096, b"y" * 512)  # buffered, in between
        expected = b"x" * 4096 + b"y" * 512 + b"a" * 3584
        assert served.engine.read(0, 8192) == expected
    with Served(path, writable=False) as served:
        assert served.engine.read(0, 8192) == expected


def test_direct_io_is_not_asked_for_where_clusters_are_not_aligned(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a.toy", 64 * KIB, {}, cluster=1024, grain=1024)
    with Served(path, cache="none") as served:
        assert not served.disk.direct


def test_every_fault_type_is_known() -> None:
    assert {int(kind) for kind in FaultType} == set(range(1, 11))


def test_a_plan_is_executed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diary = Diary(monkeypatch)
    steps: list[Step] = [Write(0, b"a"), Barrier, Write(1, b"b")]
    (tmp_path / "file").write_bytes(b"..")
    with HostFile(tmp_path / "file", writable=True) as file:
        hostfile.execute(Plan(*steps), [file])
    assert diary.steps == ["pwrite", "sync", "pwrite"]
