"""QCOW2, writing: allocation, reference counts, and what a crash may leave behind."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.formats.qcow2_images import (
    check,
    content_of,
    create,
    l1_offset,
    l2_offset,
    number,
    opened,
    patch,
    qemu_io,
    raw_of,
    run,
    scatter,
    u64,
)
from tests.reference import Reference
from virtmount import hostfile
from virtmount.errors import Corrupt, Unsupported
from virtmount.formats.qcow2 import QCOW2
from virtmount.hostfile import HostFile, execute
from virtmount.image import Dirty, Kind, Run, extents
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Truncate, Write

KIB, MIB = 1 << 10, 1 << 20
COPIED = 1 << 63


@pytest.fixture(autouse=True)
def _nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power fails in these tests: cuts are made up from plans."""
    monkeypatch.setattr(HostFile, "sync", lambda self: None)


class Model:
    """A disk and what it must hold."""

    def __init__(self, disk: Reference, content: bytearray) -> None:
        self.disk, self.content = disk, content

    def write(self, offset: int, data: bytes) -> None:
        self.disk.pwrite(offset, data)
        self.content[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self.disk.write_zeroes(offset, length)
        self.content[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self.disk.discard(offset, length)
        now = self.disk.pread(offset, length)
        old = self.content[offset : offset + length]
        for at in range(0, length, 512):
            assert now[at : at + 512] in (old[at : at + 512], bytes(512))
        self.content[offset : offset + length] = now

    def verify(self) -> None:
        assert self.disk.pread(0, self.disk.size) == self.content


def work(model: Model, rng: random.Random, cluster: int, count: int) -> None:
    size = model.disk.size
    for _ in range(count):
        length = min(size, 512 * rng.randrange(1, max(2, min(4 * cluster, 256 * KIB) // 512)))
        offset = 512 * rng.randrange((size - length) // 512 + 1)
        what = rng.random()
        if what < 0.65:
            model.write(offset, rng.randbytes(length))
        elif what < 0.8:
            model.disk.flush()
        elif what < 0.9:
            model.discard(offset, length)
        else:
            model.zero(offset, length)


def judge(path: Path, content: bytes) -> None:
    check(path)
    assert raw_of(path) == content
    assert content_of(path) == content


@pytest.mark.parametrize(
    ("cluster", "options"),
    [
        (512, "cluster_size=512,refcount_bits=1"),
        (512, "cluster_size=512,refcount_bits=4"),
        (512, "cluster_size=512"),
        (512, "cluster_size=512,refcount_bits=64"),
        (4 * KIB, "cluster_size=4k,refcount_bits=8"),
        (4 * KIB, "cluster_size=4k,compat=0.10"),
        (64 * KIB, "refcount_bits=1"),
        (64 * KIB, "lazy_refcounts=on"),
        (64 * KIB, "preallocation=metadata"),
        (2 * MIB, "cluster_size=2M,refcount_bits=64"),
    ],
)
def test_qemu_reads_what_we_wrote(tmp_path: Path, cluster: int, options: str) -> None:
    size = max(MIB, 12 * cluster) + 3 * 512
    path = create(tmp_path / "disk.qcow2", size, options)
    scatter(path, size, cluster)
    content = bytearray(raw_of(path))
    rng = random.Random(options)
    for _ in range(2):
        with opened(path, writable=True) as disk:
            model = Model(disk, content)
            work(model, rng, cluster, 60)
            model.verify()
        judge(path, content)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_over_a_parent(tmp_path: Path, compat: str) -> None:
    size = 2 * MIB
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(size - 5 * 512))
    path = create(tmp_path / "disk.qcow2", size, f"compat={compat},cluster_size=4k", parent=base)
    content = bytearray(raw_of(path))
    with opened(path, writable=True, parent=base) as disk:
        assert disk.top.caps.zero_hides_parent == (compat == "1.1")
        model = Model(disk, content)
        work(model, random.Random(2), 4 * KIB, 60)
        model.verify()
    check(path)
    assert raw_of(path) == content


def test_version_2_cannot_hide_a_parent(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(MIB))
    path = create(tmp_path / "disk.qcow2", MIB, "compat=0.10", parent=base)
    with HostFile(path, writable=True) as file, pytest.raises(Unsupported, match="version 2"):
        QCOW2(file).discard(0, 1)


def test_zeroes_over_a_parent_need_a_table_but_no_cluster(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(2 * MIB))
    path = create(tmp_path / "disk.qcow2", 2 * MIB, parent=base)
    with opened(path, writable=True, parent=base) as disk:
        disk.write_zeroes(MIB, 256 * KIB)
        assert disk.pread(MIB, 256 * KIB) == bytes(256 * KIB)
    assert path.stat().st_size == 5 * 64 * KIB
    check(path)
    assert (
        raw_of(path)
        == base.read_bytes()[:MIB] + bytes(256 * KIB) + base.read_bytes()[MIB + 256 * KIB :]
    )


@pytest.mark.parametrize("bits", [16, 64])
def test_the_refcount_table_grows(tmp_path: Path, bits: int) -> None:
    """A table cluster of 512 bytes has 64 entries, for 512 * 8 / bits counts each."""
    covered = 64 * 512 * (512 * 8 // bits)
    size = min(2 * covered, 40 * MIB)
    path = create(tmp_path / "disk.qcow2", size, f"cluster_size=512,refcount_bits={bits}")
    table, clusters = number(path, 48), number(path, 56, 4)
    rng = random.Random(bits)
    data = {}
    with HostFile(path, writable=True) as file:
        image = QCOW2(file)
        execute(image.begin(), image.files)
        guest = list(range(size // 512))
        rng.shuffle(guest)
        while guest:
            reservation = image.reserve(2000)
            execute(reservation.plan, image.files)
            hosts = [
                run.host_offset + i * 512 for run in reservation.runs for i in range(run.count)
            ]
            dirty = sorted((guest.pop(), host) for host in hosts[: len(guest)])
            for cluster, host in dirty[:: max(1, len(dirty) // 8)]:
                data[cluster] = rng.randbytes(512)
                file.pwrite(host, data[cluster])
            execute(image.commit([Dirty(*new) for new in dirty]), image.files)
            unused = hosts[len(dirty) :]
            image.release([Run(host, 1) for host in unused])
        execute(image.end(), image.files)
    assert number(path, 48) != table
    assert number(path, 56, 4) > clusters
    check(path)
    content = bytearray(size)
    for cluster, piece in data.items():
        content[cluster * 512 : cluster * 512 + 512] = piece
    assert raw_of(path) == content


def test_the_refcount_table_has_a_largest_size(tmp_path: Path) -> None:
    """1 Mi entries, for 64 counts each."""
    path = create(tmp_path / "disk.qcow2", MIB, "cluster_size=512,refcount_bits=64")
    with HostFile(path, writable=True) as file:
        image = QCOW2(file)
        counts = image._counts
        os.truncate(path, (counts._most - 60) * 512)
        counts.end = counts._most - 60
        assert image.reserve(64).reused  # the rest of the block that was there
        reservation = image.reserve(100)
        (run,) = reservation.runs
        execute(reservation.plan, image.files)
        assert 1 < run.count < 60
        with pytest.raises(OSError, match="File too large"):
            image.reserve(1)
        # All that was reserved can be mapped, each in a table of its own.
        new = [Dirty(i * 64, run.host_offset + i * 512) for i in range(run.count)]
        execute(image.commit(new), image.files)
        assert number(path, 56, 4) == 16384
    check(path)


def test_a_reservation_that_failed_is_undone_by_its_release(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 4 * MIB, "cluster_size=512,refcount_bits=64")
    size = -(-path.stat().st_size // 512) * 512
    content = bytearray(4 * MIB)
    with HostFile(path, writable=True) as file:
        image = QCOW2(file)
        execute(image.begin(), image.files)
        for _ in range(3):  # as if the host had no space
            reservation = image.reserve(5000)
            assert {type(step) for step in reservation.plan} == {Extend}
            image.release(reservation.runs)
            assert path.stat().st_size == size
        offsets, reused = reserve(image, 50)
        assert not reused
        assert max(offsets) < size + 100 * 512
        for i, offset in enumerate(offsets[:40]):
            file.pwrite(offset, bytes([i + 1]) * 512)
            content[i * 65536 : i * 65536 + 512] = bytes([i + 1]) * 512
        execute(image.commit([Dirty(i * 128, offsets[i]) for i in range(40)]), image.files)
        image.release([Run(offset, 1) for offset in offsets[40:]])
        failed = image.reserve(8)
        assert failed.reused
        image.release(failed.runs)
        execute(image.end(), image.files)
    judge(path, content)


def test_a_table_that_may_be_shared_is_copied(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 2 * MIB)
    qemu_io(path, "write -q -P 1 0 1M")
    content = bytearray(raw_of(path))
    table = l2_offset(path)
    patch(path, l1_offset(path), u64(table))  # without COPIED
    with opened(path, writable=True) as disk:
        model = Model(disk, content)
        model.write(1536 * KIB, b"y" * 512)
        disk.flush()
        assert l2_offset(path) != table
        model.verify()
    assert number(path, l1_offset(path)) >> 63
    judge(path, content)


def test_a_shared_cluster_is_copied_and_keeps_its_other_references(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 2 * MIB)
    qemu_io(path, "write -q -P 1 0 64k")
    entry = number(path, l2_offset(path)) & ~COPIED
    block = number(path, number(path, 48))
    patch(path, l2_offset(path), u64(entry) * 3)
    patch(path, block + 2 * (entry >> 16), b"\0\3")
    check(path)
    content = bytearray(raw_of(path))
    with opened(path, writable=True) as disk:
        model = Model(disk, content)
        model.write(64 * KIB + 512, b"z" * 1024)
        model.verify()
    assert number(path, block + 2 * (entry >> 16), 2) == 2
    judge(path, content)


@pytest.mark.parametrize("cluster", [512, 4 * KIB, 64 * KIB])
def test_overwriting_compressed_clusters(tmp_path: Path, cluster: int) -> None:
    rng = random.Random(cluster)
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    content = bytearray(b"".join(rng.randbytes(300) + bytes(1748) for _ in range(400)))
    raw.write_bytes(content)
    options = f"cluster_size={cluster}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    with opened(path, writable=True) as disk:
        model = Model(disk, content)
        for _ in range(12):
            model.write(512 * rng.randrange(1590), rng.randbytes(512 * rng.randrange(1, 10)))
        model.discard(0, 8 * cluster)
        model.verify()
    judge(path, content)


def test_a_preallocated_zero_cluster_is_given_back(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    qemu_io(path, "write -q -P 1 0 256k", "write -q -z 0 128k")
    content = bytearray(raw_of(path))
    with HostFile(path) as file:
        assert next(iter(extents(QCOW2(file), 0, 512))).kind is Kind.ZERO
    with opened(path, writable=True) as disk:
        model = Model(disk, content)
        model.write(4096, b"w" * 4096)  # into the first
        model.discard(64 * KIB, 64 * KIB)  # the second
        model.verify()
    judge(path, content)


def test_discarded_space_is_given_back_and_used_again(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 8 * MIB)
    rng = random.Random(4)
    content = bytearray(8 * MIB)
    with opened(path, writable=True) as disk:
        model = Model(disk, content)
        model.write(0, rng.randbytes(4 * MIB))
    full, used = path.stat().st_size, path.stat().st_blocks
    with opened(path, writable=True) as disk:
        model = Model(disk, content)
        model.discard(MIB, 2 * MIB)
        assert path.stat().st_blocks <= used - 2 * MIB // 512
        for _ in range(3):
            model.write(5 * MIB, rng.randbytes(2 * MIB))
            model.verify()
            model.discard(5 * MIB, 2 * MIB)
        model.write(5 * MIB, rng.randbytes(2 * MIB))
    assert path.stat().st_size <= full + 64 * KIB
    judge(path, content)


def test_churn_does_not_grow_the_file(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 4 * MIB, "cluster_size=4k")
    rng = random.Random(6)
    content = bytearray(4 * MIB)
    with opened(path, writable=True) as disk:
        model = Model(disk, content)
        for _ in range(300):
            offset = 4096 * rng.randrange(900)
            if rng.random() < 0.5:
                model.write(offset, rng.randbytes(4096 * rng.randrange(1, 30)))
            else:
                model.discard(offset, 4096 * rng.randrange(1, 100))
            if rng.random() < 0.2:
                disk.flush()
        live = sum(
            extent.length for extent in extents(disk.top, 0, 4 * MIB) if extent.kind is Kind.DATA
        )
    assert path.stat().st_size <= 4 * MIB + 128 * KIB
    assert path.stat().st_blocks * 512 <= live * 1.05 + 128 * KIB
    judge(path, content)


def reserve(image: QCOW2, count: int) -> tuple[list[int], bool]:
    reservation = image.reserve(count)
    execute(reservation.plan, image.files)
    size = image.cluster_size
    offsets = [run.host_offset + i * size for run in reservation.runs for i in range(run.count)]
    for offset in offsets:
        assert image.files[0].pread(offset, size) == bytes(size)
    return offsets, reservation.reused


def test_what_is_reserved_is_not_reserved_again_until_released(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 8 * MIB, "cluster_size=4k")
    scatter(path, 8 * MIB, 4 * KIB)
    size = path.stat().st_size
    with HostFile(path, writable=True) as file:
        image = QCOW2(file)
        execute(image.begin(), image.files)
        first, reused = reserve(image, 500)
        assert len(first) == 500
        assert not reused
        assert first == list(range(first[0], first[0] + 500 * 4096, 4096)), "one run"
        for offset in first:
            file.pwrite(offset, b"stale" * 100)
        second, _ = reserve(image, 100)
        assert not set(first) & set(second)
        image.release([Run(first[0], 250), Run(first[400], 100)])
        third, reused = reserve(image, 300)
        assert reused
        assert set(third) <= set(first[:250] + first[400:])
        fourth, reused = reserve(image, 1000)
        assert len(set(third + fourth + first[250:400] + second)) == len(
            third + fourth + first[250:400] + second
        )
        assert path.stat().st_size > size
        image.release([Run(offset, 1) for offset in third + fourth + first[250:400] + second])
        execute(image.end(), image.files)
    assert path.stat().st_size <= size + 4096
    check(path)


def test_the_plan_of_a_reservation_wipes_what_is_stale_before_it_is_used(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    qemu_io(path, "write -q -P 1 0 1M", "discard -q 0 1M")
    with HostFile(path, writable=True) as file:
        image = QCOW2(file)
        reservation = image.reserve(4)
        assert reservation.reused
        punch, barrier = reservation.plan.steps
        assert isinstance(punch, Punch)
        assert barrier is Barrier


def test_a_first_write_needs_two_barriers_before_the_flush_is_acknowledged(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    qemu_io(path, "write -q -P 1 0 64k")
    with HostFile(path, writable=True) as file:
        image = QCOW2(file)
        offsets, _ = reserve(image, 8)
        plan = image.commit([Dirty(3 + i, offset) for i, offset in enumerate(offsets)])
        counts, first, entries, second = plan.steps
        assert isinstance(counts, Write)
        assert len(counts.data) == 512
        assert isinstance(entries, Write)
        assert len(entries.data) == 512
        assert first is second is Barrier


def test_autoclear_bits_are_cleared_and_everything_else_in_the_header_is_kept(
    tmp_path: Path,
) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(MIB))
    path = create(tmp_path / "disk.qcow2", MIB, "lazy_refcounts=on", parent=base)
    patch(path, 88, u64(1 << 40 | 1))
    patch(path, 80, u64(1 << 40 | 1))
    before = path.read_bytes()[:65536]
    with opened(path, writable=True, parent=base) as disk:
        assert disk.pread(0, 512) == bytes(512)
        assert path.read_bytes()[:65536] == before, "reading changes nothing"
        disk.pwrite(0, b"x" * 512)
    assert path.read_bytes()[:65536] == before[:88] + bytes(8) + before[96:]
    check(path)


def test_nothing_is_written_without_a_write(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    scatter(path, MIB, 64 * KIB)
    patch(path, 88, u64(1 << 40))
    before = path.read_bytes()
    with opened(path, writable=True) as disk:
        disk.pread(0, MIB)
        disk.flush()
    assert path.read_bytes() == before
    with HostFile(path) as file:
        image = QCOW2(file)
        assert not image.caps.write
        assert not image.end().steps
        with pytest.raises(Unsupported, match="opened read-only"):
            image.reserve(1)


def test_a_free_count_on_a_table_stops_all_writing(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    qemu_io(path, "write -q -P 1 0 64k")
    with HostFile(path, writable=True) as file:
        image = QCOW2(file)
        patch(path, number(path, number(path, 48)) + 2 * (l2_offset(path) >> 16), b"\0\0")
        with pytest.raises(Corrupt, match="a table lies here, but the reference count is 0"):
            image.reserve(1)
        with pytest.raises(OSError, match="an earlier change"):
            image.reserve(1)
        assert not image.end().steps


def test_an_entry_that_names_a_table_does_not_free_it(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    qemu_io(path, "write -q -P 1 0 128k")
    l1 = l1_offset(path)
    patch(path, l2_offset(path) + 16, u64(COPIED | l1 | 1) + u64(COPIED | 1 << 40 | 1))
    with opened(path, writable=True) as disk:
        disk.pwrite(128 * KIB, b"x" * 512)
        disk.discard(128 * KIB, 256 * KIB)
    block = number(path, number(path, 48))
    assert number(path, block + 2 * (l1 >> 16), 2) == 1
    assert content_of(path)[: 128 * KIB] == b"\1" * (128 * KIB)
    check(path)


def test_a_short_last_cluster_is_completed_before_anything_else(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    assert path.stat().st_size % 65536
    with HostFile(path, writable=True) as file:
        assert QCOW2(file).begin().steps == (Extend(0x40000), Barrier)


def test_counts_past_the_end_of_the_file_are_respected(tmp_path: Path) -> None:
    """As a crash leaves them that kept the counts and not the new length."""
    path = create(tmp_path / "disk.qcow2", MIB)
    block = number(path, number(path, 48))
    patch(path, block + 2 * 7, b"\0\1")
    with HostFile(path, writable=True) as file:
        image = QCOW2(file)
        execute(image.begin(), image.files)
        offsets, _ = reserve(image, 2)
        more, _ = reserve(image, 40)
        assert 7 << 16 not in offsets + more
        assert len({*offsets, *more}) == len(offsets) + len(more)


def test_a_count_far_past_the_end_is_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    table = number(path, 48)
    patch(path, table + 8 * 100, u64(0x50000))  # the block for 200 GiB and on
    patch(path, 0x50000, b"\0\1".ljust(65536, b"\0"))
    with (
        HostFile(path, writable=True) as file,
        pytest.raises(Corrupt, match="is counted, the file"),
    ):
        QCOW2(file)


# Crashes: tests/crash has the whole of it; here, each step of each kind of plan.


def states(before: bytes, plan: Plan) -> Iterator[tuple[str, bytes]]:
    """The file after a crash anywhere in the plan, with any prefix, one or all but one step."""
    base = before
    epoch: list[Step] = []
    for step in [*plan.steps, Barrier]:
        if step is not Barrier:
            epoch.append(step)
            continue
        count = len(epoch)
        kept = {frozenset(range(n)) for n in range(count + 1)}
        kept |= {frozenset(range(count)) - {n} for n in range(count)}
        kept |= {frozenset((n,)) for n in range(count)}
        for some in kept:
            yield f"{sorted(some)} of {epoch}", applied(base, [epoch[n] for n in sorted(some)])
        base = applied(base, epoch)
        epoch = []


def applied(content: bytes, steps: list[Step]) -> bytes:
    file = bytearray(content)
    for step in steps:
        if isinstance(step, Write):
            file.extend(bytes(max(0, step.offset + len(step.data) - len(file))))
            file[step.offset : step.offset + len(step.data)] = step.data
        elif isinstance(step, Extend):
            file.extend(bytes(max(0, step.size - len(file))))
        elif isinstance(step, Truncate):
            del file[step.size :]
        elif isinstance(step, Punch):
            length = max(0, min(step.length, len(file) - step.offset))
            file[step.offset : step.offset + length] = bytes(length)
    return bytes(file)


@pytest.mark.parametrize("bits", [1, 64])
def test_a_crash_leaves_leaks_at_most(tmp_path: Path, bits: int) -> None:
    path, probe = tmp_path / "disk.qcow2", tmp_path / "probe.qcow2"
    create(path, 4 * MIB, f"cluster_size=512,refcount_bits={bits}")
    qemu_io(path, "write -q -P 1 0 20k", "write -q -z 10k 4k")
    seen = 0
    kinds = set()

    def tried(plan: Plan, files: list[HostFile]) -> None:
        nonlocal seen
        kinds.update(type(step).__name__ for step in plan)
        for what, content in states(path.read_bytes(), plan):
            seen += 1
            if seen % 3:
                continue
            probe.write_bytes(content)
            said = run("qemu-img", "check", "-f", "qcow2", probe, allowed=(0, 3))
            assert "ERROR" not in said, what
        hostfile.execute(plan, files)

    with HostFile(path, writable=True) as file:
        disk = Reference([QCOW2(file)], files_execute=tried)  # type: ignore[arg-type]
        disk.pwrite(8 * KIB, b"a" * (4 * KIB))
        disk.flush()
        disk.discard(0, 4 * KIB)
        disk.pwrite(MIB, b"b" * (40 * KIB))
        disk.flush()
        disk.write_zeroes(MIB + 512, 8 * KIB)
        disk.pwrite(3 * MIB, b"c" * KIB)
        disk.close()
    assert seen > 90
    assert kinds >= {"Write", "Extend", "Truncate", "Punch", "_Barrier"}
    check(path)


@pytest.mark.parametrize("grows", ["block", "table"])
def test_a_crash_while_blocks_or_the_table_are_added(tmp_path: Path, grows: str) -> None:
    path, probe = tmp_path / "disk.qcow2", tmp_path / "probe.qcow2"
    create(path, 8 * MIB, "cluster_size=512,refcount_bits=64")
    with HostFile(path, writable=True) as file:
        image = QCOW2(file)
        execute(image.begin(), image.files)
        offsets, _ = reserve(image, 64 * 64)
        new = offsets[-5:] if grows == "table" else offsets[64:66]
        plan = image.commit([Dirty(5000 + i, offset) for i, offset in enumerate(new)])
        header = [step for step in plan if isinstance(step, Write) and step.offset == 0]
        assert bool(header) == (grows == "table")
        tried = 0
        for what, content in states(path.read_bytes(), plan):
            probe.write_bytes(content)
            said = run("qemu-img", "check", "-f", "qcow2", probe, allowed=(0, 3))
            assert "ERROR" not in said, what
            tried += 1
        assert tried > 8
        execute(plan, image.files)
    run("qemu-img", "check", "-f", "qcow2", path)


def test_blocks_and_tables_are_whole_where_the_space_was_stale(tmp_path: Path) -> None:
    """On a device, which cannot grow, everything new lies where something else was."""
    path = create(tmp_path / "disk.qcow2", 4 * MIB, "cluster_size=512,refcount_bits=64")
    end = -(-path.stat().st_size // 512) * 512
    patch(path, end, b"\xee" * (4 * MIB - end))
    content = bytearray(4 * MIB)
    with HostFile(path, writable=True) as file:
        file.is_device = True
        with Reference([QCOW2(file)]) as disk:
            model = Model(disk, content)
            work(model, random.Random(3), 512, 60)
            model.write(0, b"long" * 512 * KIB)  # past one table
            model.verify()
        with pytest.raises(OSError, match="No space left"), Reference([QCOW2(file)]) as disk:
            disk.pwrite(2 * MIB, b"x" * (2 * MIB))
    assert path.stat().st_size == 4 * MIB
    check(path)


def everything(image: QCOW2) -> list[int]:
    hosts: list[int] = []
    try:
        while True:
            hosts += reserve(image, 100)[0]
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return hosts


def test_what_a_full_device_gave_can_be_mapped(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 64 * MIB, "cluster_size=512,refcount_bits=64")
    os.truncate(path, 2 * MIB)
    with HostFile(path, writable=True) as file:
        file.is_device = True
        image = QCOW2(file)
        hosts = everything(image)
        assert len(hosts) > 1000
        assert len(set(hosts)) == len(hosts)
        new = [Dirty(i * 64, host) for i, host in enumerate(hosts)]  # a table for each
        execute(image.commit(new), image.files)
    check(path)


def test_only_what_was_reserved_is_mapped(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    with HostFile(path, writable=True) as file:
        image = QCOW2(file)
        offsets, _ = reserve(image, 2)
        with pytest.raises(ValueError, match="not reserved"):
            image.commit([Dirty(0, offsets[0]), Dirty(1, offsets[-1] + 65536)])
        with pytest.raises(OSError, match="an earlier change"):
            image.commit([Dirty(0, offsets[0])])


@pytest.mark.device
def test_on_a_block_device(tmp_path: Path) -> None:
    """It cannot grow, and what lies behind the image is stale."""
    backing = tmp_path / "device"
    backing.write_bytes(b"\xee" * (4 * MIB))
    loop = subprocess.run(
        ["losetup", "--find", "--show", backing], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        device = Path(loop)
        create(device, 8 * MIB)
        content = bytearray(8 * MIB)
        rng = random.Random(8)
        with opened(device, writable=True) as disk:
            model = Model(disk, content)
            model.write(MIB, rng.randbytes(MIB))
            model.write(5 * MIB + 512, rng.randbytes(512))
            model.discard(MIB, 512 * KIB)
            model.write(7 * MIB, rng.randbytes(MIB))
            model.verify()
        check(device)
        with opened(device, writable=True) as disk:
            model = Model(disk, content)
            with pytest.raises(OSError, match="No space left") as caught:
                model.write(2 * MIB, rng.randbytes(3 * MIB))
            assert caught.value.errno == errno.ENOSPC
            disk.flush()
            content = bytearray(disk.pread(0, 8 * MIB))
            model = Model(disk, content)
            model.discard(7 * MIB, MIB)
            model.write(0, rng.randbytes(MIB // 2))
            model.verify()
        check(device)
        assert content_of(device) == content
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
