"""VHDX, written: the order of the plans, where blocks go, and what qemu and we read afterwards."""

from __future__ import annotations

import errno
import os
import random
import struct
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from unittest.mock import ANY
from uuid import UUID

import pytest

from tests.formats import make_vhdx as mk
from tests.formats.make_vhdx import MIB, Made, make
from tests.reference import Reference
from virtmount import hostfile
from virtmount.errors import Corrupt, Unsupported
from virtmount.formats import vhdx
from virtmount.formats.vhdx import VHDX
from virtmount.formats.vhdx_log import ENTRY_CHANGES
from virtmount.hostfile import HostFile
from virtmount.image import Dirty, Run, extents
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Truncate, Write

TIB = 1 << 40


def qemu_create(path: Path, size: object, options: str = "block_size=1M") -> None:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "vhdx", "-o", options, path, str(size)], check=True
    )


def check(path: Path) -> None:
    done = subprocess.run(
        ["qemu-img", "check", "-f", "vhdx", path], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "No errors were found on the image.\n", done.stderr


def contents_by_qemu(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", "vhdx", "-O", "raw", path, raw], check=True)
    return raw.read_bytes()


def contents(path: Path) -> bytes:
    with HostFile(path) as file, Reference([VHDX(file)]) as disk:
        return disk.pread(0, disk.size)


class Session:
    """A driver whose plans are carried out and kept."""

    def __init__(self, path: Path) -> None:
        self.file = HostFile(path, writable=True)
        self.image = VHDX(self.file)
        self.pool: list[int] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def do(self, plan: Plan) -> list[Step]:
        hostfile.execute(plan, [self.file])
        return list(plan)

    def begin(self) -> list[Step]:
        return self.do(self.image.begin())

    def reserve(self, count: int) -> list[int]:
        """At least `count` host blocks."""
        hosts: list[int] = []
        while len(hosts) < count:
            reservation = self.image.reserve(count - len(hosts))
            self.do(reservation.plan)
            for run in reservation.runs:
                hosts += (run.host_offset + i * self.image.cluster_size for i in range(run.count))
        return hosts

    def commit(self, blocks: Iterable[int], barrier: bool = False) -> list[Step]:
        blocks = sorted(blocks)
        if len(self.pool) < len(blocks):
            self.pool += self.reserve(len(blocks) - len(self.pool))
        dirty = [Dirty(block, self.pool.pop(0), barrier) for block in blocks]
        return self.do(self.image.commit(dirty))

    def end(self) -> list[Step]:
        self.image.release([Run(host, 1) for host in self.pool])
        return self.do(self.image.end())


def log_guid(step: Step) -> bytes:
    assert isinstance(step, Write)
    assert step.data[:4] == b"head"
    return step.data[48:64]


# Whole sessions


@pytest.mark.parametrize(
    "options",
    [
        "subformat=dynamic,block_size=1M",
        "subformat=dynamic,block_size=4M,block_state_zero=off",
        "subformat=dynamic,block_size=256M",
        "subformat=fixed,block_size=1M",
        "subformat=fixed,block_size=2M,block_state_zero=off",
    ],
)
def test_several_sessions_read_back_by_qemu(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk.vhdx"
    size = 45 * MIB + 512 * 3
    qemu_create(path, size, options)
    rng = random.Random(options)
    model = bytearray(size)
    for session in range(3):
        with HostFile(path, writable=True) as file, Reference([VHDX(file)]) as disk:
            for i in range(60):
                length = rng.randrange(512, 300_000, 512)
                offset = rng.randrange(0, size - length) // 512 * 512
                data = rng.randbytes(length)
                if i % 15 == 7:
                    disk.write_zeroes(offset, length * 8 if offset + length * 8 < size else length)
                    length = length * 8 if offset + length * 8 < size else length
                    data = bytes(length)
                else:
                    disk.pwrite(offset, data)
                model[offset : offset + length] = data
                if rng.random() < 0.4:
                    disk.flush()
            assert disk.pread(0, size) == model
        check(path)
        assert contents_by_qemu(path) == model, session
        at = rng.randrange(0, size - 512) // 512 * 512
        subprocess.run(
            ["qemu-io", "-f", "vhdx", "-c", f"write -P {session + 1} {at} 512", path],
            check=True,
            capture_output=True,
        )
        model[at : at + 512] = bytes([session + 1]) * 512
    assert contents(path) == model


@pytest.mark.parametrize("block_size", [MIB, 32 * MIB])
def test_sectors_of_4096_bytes(tmp_path: Path, block_size: int) -> None:
    """qemu does not read these; the BAT is read here by the specification."""
    chunk = (4096 << 23) // block_size
    size = (chunk + 7) * block_size + 8192
    made = make(tmp_path / "disk.vhdx", size, block_size=block_size, sector_size=4096)
    blocks = [chunk + 7, 3, chunk - 1, chunk, 0]
    content = {block: os.urandom(4096) for block in blocks}
    with HostFile(made.path, writable=True) as file, Reference([VHDX(file)]) as disk:
        assert disk.top.sector_size == 4096
        for block in blocks:
            disk.pwrite(block * block_size + 4096, content[block])
            disk.flush()
    for block in blocks:
        (entry,) = struct.unpack("<Q", made.read(made.entry_offset(block), 8))
        assert entry & 0xFFFFF == mk.PRESENT
        assert made.read(entry - mk.PRESENT, 8192) == bytes(4096) + content[block]
    assert made.read(made.bat + chunk * 8, 8) == bytes(8)  # the sector bitmap's
    with HostFile(made.path) as file:
        disk = Reference([VHDX(file)])
        for block in blocks:
            assert disk.pread(block * block_size + 4096, 4096) == content[block]


def test_blocks_on_both_sides_of_a_sector_bitmap_entry(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    qemu_create(path, "5G")
    with HostFile(path, writable=True) as file, Reference([VHDX(file)]) as disk:
        for block in (4097, 4095, 4096, 0, 5119):
            disk.pwrite(block * MIB + 512, bytes([block & 0xFF]) * 512)
        disk.flush()
    check(path)
    for block in (4097, 4095, 4096, 0, 5119):
        done = subprocess.run(
            [
                "qemu-io",
                "-f",
                "vhdx",
                "-c",
                f"read -P {block & 0xFF} {block * MIB + 512} 512",
                path,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "verification failed" not in done.stdout


# The plans


def test_begin_renames_the_file_in_both_headers_first(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 4 * MIB)
    with Session(made.path) as session:
        before = made.path.read_bytes()
        assert session.image.identity == str(mk.DATA_WRITE)
        first, barrier, second, barrier2 = session.begin()
        assert (barrier, barrier2) == (Barrier, Barrier)
        for step, offset, sequence in ((first, 65536, 3), (second, 131072, 4)):
            assert isinstance(step, Write)
            assert step.offset == offset
            assert step.data == mk.sealed(step.data)
            assert int.from_bytes(step.data[8:16], "little") == sequence
            file_write, data_write = step.data[16:32], step.data[32:48]
            assert file_write not in (bytes(16), mk.FILE_WRITE.bytes_le)
            assert data_write not in (bytes(16), mk.DATA_WRITE.bytes_le, file_write)
            assert log_guid(step) == bytes(16)
            assert step.data[64:80] == struct.pack("<HHIQ", 0, 1, MIB, MIB)
            assert step.data[80:] == bytes(4016)
            assert session.image.identity == str(UUID(bytes_le=data_write))
        after = made.path.read_bytes()
        assert before[: 64 << 10] == after[: 64 << 10]
        assert before[192 << 10 :] == after[192 << 10 :]


def test_the_older_header_is_replaced_first_whichever_it_is(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 4 * MIB)
    made.put_headers(mk.header(9), mk.header(8))
    with Session(made.path) as session:
        first, _, second, _ = session.begin()
        assert isinstance(first, Write)
        assert isinstance(second, Write)
        assert (first.offset, second.offset) == (131072, 65536)


def test_the_header_names_the_log_once_its_first_entry_is_durable(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 40 * MIB)
    with Session(made.path) as session:
        session.begin()
        entry, barrier, header, barrier2, other, bat = session.commit([5])
        assert (barrier, barrier2) == (Barrier, Barrier)
        assert isinstance(entry, Write)
        assert entry.offset == MIB
        assert entry.data[:4] == b"loge"
        guid = entry.data[32:48]
        assert log_guid(header) == log_guid(other) == guid != bytes(16)
        assert bat == Write(*made.bat_sector({5: 5 * MIB | mk.PRESENT})) or isinstance(bat, Write)
        # The second commit: nothing but the entry, one barrier, the table.
        entry2, barrier, bat2 = session.commit([6])
        assert barrier is Barrier
        assert isinstance(entry2, Write)
        assert entry2.offset == entry.offset + len(entry.data)
        assert entry2.data[32:48] == guid
        assert isinstance(bat2, Write)
        assert bat2.offset == made.bat
        # Data that hides other data is durable before its mapping is logged.
        first, entry3, barrier, _ = session.commit([7], barrier=True)
        assert (first, barrier) == (Barrier, Barrier)
        assert isinstance(entry3, Write)
        barrier, header, barrier2, other, barrier3, truncate = session.end()
        assert (barrier, barrier2, barrier3) == (Barrier,) * 3
        assert log_guid(header) == log_guid(other) == bytes(16)
        assert isinstance(truncate, Truncate)
    check(made.path)


def entry_fields(step: Step) -> tuple[int, int, int, int, int, int]:
    """Offset in the ring, length, tail, sequence, flushed and last size, by the specification."""
    assert isinstance(step, Write)
    signature, _, length, tail, sequence, _, _, _, flushed, last = struct.unpack_from(
        "<4sIIIQII16sQQ", step.data
    )
    assert signature == b"loge"
    assert length == len(step.data)
    assert step.data == mk.sealed(step.data)
    return step.offset - MIB, length, tail, sequence, flushed, last


def test_an_entry_holds_what_may_not_be_in_place_yet(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 3000 * MIB)
    with Session(made.path) as session:
        session.begin()
        first = session.commit([0])[0]
        second = session.commit([600])[0]
        third = session.commit([1200], barrier=True)[1]
        fourth = session.commit([1201])[0]
        for step, offsets in (
            (first, {0}),
            (second, {0, 4096}),
            (third, {8192}),  # the barrier before it has settled the others
            (fourth, {8192}),
        ):
            at, length, tail, _, flushed, last = entry_fields(step)
            assert isinstance(step, Write)
            assert tail == at
            assert length == (1 + len(offsets)) * 4096
            found = {
                int.from_bytes(step.data[64 + i * 32 + 16 :][:8], "little") - made.bat
                for i in range(len(offsets))
            }
            assert found == offsets
            assert flushed == os.stat(made.path).st_size
            assert last == flushed


def test_a_large_commit_is_a_batch_of_short_entries(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 64 * 1024 * MIB)
    blocks = range(0, 64 * 1024, 1024)  # 64 BAT sectors
    with Session(made.path) as session:
        session.begin()
        session.pool = session.reserve(80)
        steps = session.commit(blocks)
        barrier = steps.index(Barrier)
        entries = [entry_fields(step) for step in steps[:barrier]]
        assert len(entries) == -(-64 // ENTRY_CHANGES)
        assert [sequence for _, _, _, sequence, _, _ in entries] == [1, 2, 3, 4, 5]
        assert {tail for _, _, tail, _, _, _ in entries} == {0}
        at = 0
        for offset, length, *_ in entries:
            assert offset == at
            at += length
        # The next one cannot hold all that in one entry: first it is made durable.
        first, _, second, *_ = session.commit([1, 3000])
        assert first is Barrier
        assert second is Barrier
        session.end()
    check(made.path)
    with HostFile(made.path) as file:
        image = VHDX(file)
        held = [block for block in blocks if next(extents(image, block * MIB, 1)).host_offset != 0]
        assert held == list(blocks)


def test_a_commit_larger_than_the_ring(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 2 * TIB)
    blocks = range(0, 2 << 20, 1024)  # 2048 BAT sectors, 8 MiB; the ring has 1 MiB
    with Session(made.path) as session:
        session.begin()
        steps = session.commit(blocks)
        entries = [
            entry_fields(step)
            for step in steps
            if isinstance(step, Write) and step.data[:4] == b"loge"
        ]
        assert sum(length // 4096 - 1 for _, length, *_ in entries) >= 2048
        assert all(offset + length <= MIB - 8192 for offset, length, *_ in entries)
        session.end()
    check(made.path)
    with HostFile(made.path) as file:
        image = VHDX(file)
        hosts = {next(extents(image, block * MIB, 1)).host_offset for block in blocks}
        assert len(hosts - {0}) == len(blocks)


@pytest.mark.parametrize("parent", [False, True])
def test_one_flush_is_one_commit_however_many_blocks_are_new(tmp_path: Path, parent: bool) -> None:
    """qemu syncs seven times for each block.  Here: the data (if it hides other data), the entry,
    and what is asked for anyway at the end."""
    locator = mk.below(mk.DATA_WRITE, "parent.vhdx") if parent else None
    child = make(tmp_path / "disk.vhdx", 3000 * MIB, parent=locator, file_write=UUID(int=3))
    blocks = range(0, 3000, 37)  # 6 BAT sectors
    below = make(tmp_path / "parent.vhdx", 3000 * MIB, {74: b"x"})
    syncs: list[int] = []

    class Counted(HostFile):
        def sync(self) -> None:
            syncs.append(1)

    with Counted(child.path, writable=True) as file, HostFile(below.path) as under:
        images = [VHDX(file), VHDX(under)] if parent else [VHDX(file)]
        with Reference(images) as disk:
            disk.pwrite(0, b"first")
            disk.flush()
            for block in blocks:
                disk.pwrite(block * MIB + 512, b"x" * 512)
            syncs.clear()
            disk.flush()
            assert len(syncs) == (3 if parent else 2)


def newest_batch(made: Made) -> list[tuple[int, int]]:
    """(offset, length) in the ring of the newest batch that the newest header makes valid."""
    newest = max((made.read(at, 4096) for at in (65536, 131072)), key=lambda raw: raw[8:16][::-1])
    found = []
    for at in range(0, MIB, 4096):
        raw = made.read(made.log + at, 64)
        if raw[:4] == b"loge" and raw[32:48] == newest[48:64]:
            length, tail, sequence = struct.unpack_from("<IIQ", raw, 8)
            found.append((sequence, at, length, tail))
    if not found:
        return []
    tail = max(found)[3]
    return [(at, length) for _, at, length, own in found if own == tail]


def test_the_ring_wraps_and_the_batch_before_is_never_overwritten(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 512 * 1024 * MIB)
    rng = random.Random(5)
    laps = set()
    with Session(made.path) as session:
        session.begin()
        free = list(range(0, 512 * 1024, 200))
        rng.shuffle(free)
        for count in [1, 200, 150, 1, 2, 60, 60, 60, 60, 1, 1, 70, 71, 14, 15, 5, 180] * 2:
            blocks = sorted(free.pop() for _ in range(count))
            hosts = session.reserve(count)
            session.image.release([Run(host, 1) for host in hosts[count:]])
            hides = rng.random() < 0.1
            dirty = [Dirty(b, host, hides) for b, host in zip(blocks, hosts, strict=False)]
            safe = newest_batch(made)
            for step in session.image.commit(dirty):
                session.do(Plan(step))
                if step is Barrier:
                    safe = newest_batch(made)
                elif isinstance(step, Write) and step.data[:4] == b"loge":
                    at, length, *_ = entry_fields(step)
                    assert at + length <= MIB - 8192, "qemu would hang: vhdx_log.py, 6"
                    assert all(at + length <= low or low + size <= at for low, size in safe), (
                        "the newest durable batch is overwritten"
                    )
                elif isinstance(step, Write) and step.data[:4] == b"head":
                    laps.add(log_guid(step))
        session.end()
    assert len(laps) >= 6
    check(made.path)


def test_many_flushes_over_many_laps(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    qemu_create(path, "64M")
    model = bytearray(64 * MIB)
    with HostFile(path, writable=True) as file:
        image = VHDX(file)
        with Reference([image]) as disk:
            for i in range(400):  # an entry of 8 KiB each, and as many for the discards
                block = i % 7 * 9
                disk.discard(block * MIB, MIB)
                disk.pwrite(block * MIB + 512 * i, bytes([i & 0xFF]) * 512)
                model[block * MIB : (block + 1) * MIB] = bytes(MIB)
                model[block * MIB + 512 * i : block * MIB + 512 * i + 512] = bytes([i & 0xFF]) * 512
                disk.flush()
            # begin has written two headers, each lap two.
            assert image.details()["header_sequence"] > 2 + 2 * 5
    check(path)
    assert contents_by_qemu(path) == model
    assert os.stat(path).st_size < 24 * MIB


# Where blocks go


def test_new_blocks_go_to_the_end_and_the_length_is_durable_first(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 100 * MIB, {3: b"x" * MIB})
    with Session(made.path) as session:
        session.begin()
        reservation = session.image.reserve(2)
        assert reservation.runs == (Run(made.end, 2),)
        assert list(reservation.plan) == [Extend(made.end + 2 * MIB + vhdx.GROWTH), Barrier]
        assert not reservation.reused
        session.do(reservation.plan)
        # There is room now: no barrier.
        assert session.image.reserve(1) == ((Run(made.end + 2 * MIB, 1),), ANY, False)
        reservation = session.image.reserve(vhdx.GROWTH // MIB)
        end = made.end + 3 * MIB + vhdx.GROWTH
        assert list(reservation.plan) == [Extend(end + vhdx.GROWTH), Barrier]


def test_a_file_that_could_not_be_made_longer_is_not_taken_for_longer(tmp_path: Path) -> None:
    """Else an entry would say so, and the file would be taken for a truncated one."""
    made = make(tmp_path / "disk.vhdx", 3000 * MIB, {3: b"x" * MIB})
    with Session(made.path) as session:
        session.begin()
        hosts = session.reserve(1)
        room = os.stat(made.path).st_size
        session.do(session.image.commit([Dirty(0, hosts[0])]))
        reservation = session.image.reserve(40)
        assert next(iter(reservation.plan)) == Extend(made.end + 41 * MIB + vhdx.GROWTH)
        # Not carried out: no space.
        session.image.release(reservation.runs)
        (entry, *_) = session.do(session.image.discard(3, 1))
        _, length, _, _, flushed, last = entry_fields(entry)
        assert flushed == last == room
        assert length == 2 * 4096
        # Blocks that are given back past the end of the file make it longer when they are used.
        session.image.reserve(1)
        hosts = session.reserve(40)
        assert max(hosts) + MIB <= os.stat(made.path).st_size
        assert session.file.pread(max(hosts), MIB) == bytes(MIB)
        (entry, *_) = session.do(session.image.commit([Dirty(1200, max(hosts), False)]))
        _, length, _, _, flushed, _ = entry_fields(entry)
        assert flushed == os.stat(made.path).st_size
        assert length == 3 * 4096  # the discard's sector is in it: no barrier has been since
        session.end()
    check(made.path)


def test_what_was_not_used_is_cut_off_at_the_end(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 100 * MIB, {3: b"x" * MIB})
    with Session(made.path) as session:
        session.begin()
        hosts = session.reserve(5)
        assert os.stat(made.path).st_size >= made.end + 5 * MIB
        session.do(session.image.commit([Dirty(7, hosts[1])]))
        session.image.release([Run(host, 1) for host in hosts if host != hosts[1]])
        session.end()
    assert os.stat(made.path).st_size == made.end + 2 * MIB
    check(made.path)
    # The gap before the used block is found again, and may hold anything.
    with Session(made.path) as session:
        session.begin()
        reservation = session.image.reserve(9)
        assert reservation.runs == (Run(made.end, 1),)
        assert reservation.reused
        assert list(reservation.plan) == [Punch(made.end, MIB)]


def test_released_blocks_are_cleared_before_they_are_used(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 100 * MIB)
    with Session(made.path) as session:
        session.begin()
        hosts = session.reserve(1)
        session.file.pwrite(hosts[0], b"dirt")
        session.image.release([Run(hosts[0], 1)])
        reservation = session.image.reserve(1)
        assert reservation.runs == (Run(hosts[0], 1),)
        assert reservation.reused
        session.do(reservation.plan)
        assert session.file.pread(hosts[0], MIB) == bytes(MIB)


def test_what_a_cut_off_session_left_behind_is_cleared_and_used(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 100 * MIB, {3: b"x" * MIB})
    made.write(made.end + 100, b"dirt" * 100_000)  # the file ends inside a block now
    size = os.stat(made.path).st_size
    with Session(made.path) as session:
        session.begin()
        reservation = session.image.reserve(1)
        assert reservation.runs == (Run(made.end, 1),)
        assert reservation.reused
        punch, *extend = reservation.plan
        assert punch == Punch(made.end, size - made.end)
        assert extend == [Extend(made.end + MIB + vhdx.GROWTH), Barrier]
        session.do(reservation.plan)
        assert session.file.pread(made.end, MIB) == bytes(MIB)
        assert not session.image.reserve(1).reused


def test_a_block_that_the_file_cuts_short_keeps_its_place(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 8 * MIB, {0: b"x" * MIB, 1: b"y" * MIB})
    made.write(made.entry_offset(2), struct.pack("<Q", made.end - MIB + mk.PRESENT))
    made.write(made.entry_offset(1), bytes(8))
    os.truncate(made.path, made.end - 4096)
    with Session(made.path) as session:
        session.begin()
        assert session.reserve(1)[0] == made.end


def test_places_that_unmapped_blocks_name_are_left_alone(tmp_path: Path) -> None:
    """Their data may be wanted: a block that is not present may keep its place (2.5.1.1)."""
    made = make(tmp_path / "disk.vhdx", 8 * MIB, {0: b"x" * MIB, 1: b"y" * MIB})
    made.write(made.entry_offset(1), struct.pack("<Q", made.hosts[1] | mk.UNMAPPED))
    with Session(made.path) as session:
        session.begin()
        assert session.reserve(1)[0] == made.end


def test_a_device_cannot_grow(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 8 * MIB, file_length=6 * MIB)
    with Session(made.path) as session:
        session.file.is_device = True
        session.image._initial_size = session.image._durable_size = 6 * MIB
        session.begin()
        assert session.reserve(2) == [4 * MIB, 5 * MIB]
        with pytest.raises(OSError, match="space") as caught:
            session.image.reserve(1)
        assert caught.value.errno == errno.ENOSPC


def test_no_block_goes_past_what_the_map_can_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path / "disk.vhdx", 100 * MIB)
    monkeypatch.setattr(vhdx, "MAX_HOST", made.end + 40 * MIB)
    with Session(made.path) as session:
        session.begin()
        session.reserve(30)
        with pytest.raises(OSError, match="large") as caught:
            session.image.reserve(20)
        assert caught.value.errno == errno.EFBIG


def test_64_tib_are_not_surveyed_but_written(tmp_path: Path) -> None:
    made = make(
        tmp_path / "disk.vhdx", 64 * TIB, {(64 << 20) - 1: b"end".ljust(MIB), 5: b"5" * MIB}
    )
    made.write(made.end, b"dirt")
    with HostFile(made.path, writable=True) as file, Reference([VHDX(file)]) as disk:
        disk.pwrite(30 * TIB + 1024, b"middle".ljust(512))
        disk.flush()
    with HostFile(made.path) as file:
        disk = Reference([VHDX(file)])
        assert disk.pread(64 * TIB - MIB, 3) == b"end"
        assert disk.pread(5 * MIB, MIB) == b"5" * MIB
        assert disk.pread(30 * TIB, 2048) == bytes(1024) + b"middle".ljust(512) + bytes(512)


# Discard


def test_discard_is_durable_before_the_block_is_punched(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 8 * MIB, {i: bytes([65 + i]) * MIB for i in (4, 3, 2, 6)})
    with Session(made.path) as session:
        session.begin()
        steps = session.do(session.image.discard(2, 3))
        entry, barrier, header, barrier2, other, bat, punch = steps
        assert (barrier, barrier2) == (Barrier, Barrier)
        assert isinstance(entry, Write)
        assert log_guid(header) == log_guid(other) == entry.data[32:48]
        assert punch == Punch(made.hosts[4], 3 * MIB)  # blocks 4, 3 and 2 lie side by side
        assert isinstance(bat, Write)
        entries = struct.unpack("<8Q", bat.data[:64])
        assert entries[2:5] == (mk.ZERO,) * 3  # and no place: Hyper-V does not read ZERO with one
        assert entries[6] == made.hosts[6] | mk.PRESENT
        # Used again, lowest first, in whatever order.
        reservation = session.image.reserve(2)
        assert reservation == ((Run(made.hosts[4], 2),), reservation.plan, True)
        assert len(reservation.plan) == 0
        session.image.release(reservation.runs)
        session.end()
    check(made.path)
    content = contents(made.path)
    assert content == bytes(6 * MIB) + b"G" * MIB + bytes(MIB)
    assert contents_by_qemu(made.path) == content


def test_discard_of_nothing_writes_nothing(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 8 * MIB, {1: b"x"}, entries={2: mk.UNMAPPED, 3: mk.ZERO})
    with Session(made.path) as session:
        session.begin()
        assert len(session.image.discard(2, 6)) == 0


def test_a_discarded_block_with_an_impossible_place_is_not_punched(tmp_path: Path) -> None:
    made = make(
        tmp_path / "disk.vhdx",
        8 * MIB,
        {1: b"x"},
        entries={2: mk.PRESENT, 3: (1 << 50) | 5},
    )
    with Session(made.path) as session:
        session.begin()
        steps = session.do(session.image.discard(2, 2))
        assert not any(isinstance(step, Punch) for step in steps)
        assert session.reserve(1)[0] == made.end
        session.end()
    assert contents(made.path)[2 * MIB : 4 * MIB] == bytes(2 * MIB)


def test_blocks_discarded_at_the_end_of_the_file_are_cut_off(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 8 * MIB, {i: bytes([65 + i]) * MIB for i in range(4)})
    with HostFile(made.path, writable=True) as file, Reference([VHDX(file)]) as disk:
        disk.discard(2 * MIB, 6 * MIB)
    assert os.stat(made.path).st_size == made.end - 2 * MIB
    check(made.path)
    assert contents_by_qemu(made.path) == b"A" * MIB + b"B" * MIB + bytes(6 * MIB)


def test_a_discard_over_many_bat_sectors(tmp_path: Path) -> None:
    size = 80 * 1024 * MIB
    blocks = [*range(0, 80 * 1024, 700), 4095, 4096, 8191, 8192]
    made = make(tmp_path / "disk.vhdx", size, dict.fromkeys(blocks, b"data"))
    with Session(made.path) as session:
        session.begin()
        plan = session.image.discard(1, 80 * 1024 - 2)
        kinds = [type(step) for step in plan]
        assert kinds.index(Punch) > len(kinds) - 1 - kinds[::-1].index(type(Barrier))
        session.do(plan)
        session.end()
    check(made.path)
    with HostFile(made.path) as file:
        image = VHDX(file)
        held = [b for b in sorted(blocks) if next(extents(image, b * MIB, 1)).host_offset]
        assert held == [0]


def test_a_fixed_disk_gives_nothing_back(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 4 * MIB, dict.fromkeys(range(4), b"x" * MIB), fixed=True)
    with HostFile(made.path, writable=True) as file:
        image = VHDX(file)
        assert image.flat == made.hosts[0]
        assert not image.caps.discard
        with Reference([image]) as disk:
            disk.discard(0, 4 * MIB)
            disk.write_zeroes(MIB, MIB)
            disk.pwrite(512, b"y" * 512)
            disk.flush()
    expected = bytearray(b"x" * 4 * MIB)
    expected[MIB : 2 * MIB] = bytes(MIB)
    expected[512:1024] = b"y" * 512
    assert contents_by_qemu(made.path) == expected
    assert os.stat(made.path).st_size == made.end


def test_a_fixed_disk_is_never_made_shorter(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 4 * MIB, {0: b"x" * MIB}, fixed=True, file_length=20 * MIB)
    with Session(made.path) as session:
        session.begin()
        hosts = session.reserve(14)
        session.do(session.image.commit([Dirty(1, hosts[0])]))
        session.image.release([Run(host, 1) for host in hosts[1:]])
        session.reserve(30)
        session.end()
    assert os.stat(made.path).st_size >= 20 * MIB
    check(made.path)


# What is not written


def test_read_only_writes_nothing(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 4 * MIB, {1: b"x" * MIB})
    before = made.path.read_bytes()
    with HostFile(made.path) as file, Reference([VHDX(file)]) as disk:
        assert not disk.top.caps.write
        with pytest.raises(OSError, match="Read-only"):
            disk.pwrite(0, bytes(512))
        disk.flush()
    assert made.path.read_bytes() == before


def test_opened_for_writing_but_not_written(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 4 * MIB, {1: b"x" * MIB})
    before = made.path.read_bytes()
    with HostFile(made.path, writable=True) as file, Reference([VHDX(file)]) as disk:
        disk.pread(0, 4 * MIB)
        disk.flush()
        assert len(disk.top.end()) == 0
    assert made.path.read_bytes() == before


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ({2: 5 * MIB}, "block 2.*at 5242880, where another block"),
        ({2: 2 * MIB}, "block 2.*where another block or the metadata"),
        ({2: 100 * MIB}, "block 2.*at 104857600, the file ends at"),
    ],
)
def test_a_bat_that_would_lose_data_is_refused_for_writing_only(
    tmp_path: Path, entries: dict[int, int], complaint: str
) -> None:
    made = make(
        tmp_path / "disk.vhdx",
        4 * MIB,
        {0: b"x" * MIB, 1: b"y" * MIB},
        entries={block: host | mk.PRESENT for block, host in entries.items()},
    )
    with HostFile(made.path, writable=True) as file, pytest.raises(Corrupt, match=complaint):
        VHDX(file)
    with HostFile(made.path) as file:
        assert Reference([VHDX(file)]).pread(0, 2 * MIB) == b"x" * MIB + b"y" * MIB


def test_blocks_that_overlap_in_part_are_refused_for_writing(tmp_path: Path) -> None:
    made = make(
        tmp_path / "disk.vhdx",
        32 * MIB,
        {0: b"x" * 8 * MIB, 2: b"z" * 8 * MIB},
        entries={1: 9 * MIB | mk.PRESENT},
        block_size=8 * MIB,
    )
    with HostFile(made.path, writable=True) as file, pytest.raises(Corrupt, match="another block"):
        VHDX(file)


def test_writing_needs_a_log_and_room_for_header_numbers(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 4 * MIB, {0: b"x" * MIB})
    for header, kind, complaint in (
        (mk.header(3, log_length=0), Unsupported, "without a log"),
        (mk.header((1 << 64) - 1), Corrupt, "sequence number 18446744073709551615"),
    ):
        made.put_headers(header, header)
        with HostFile(made.path, writable=True) as file, pytest.raises(kind, match=complaint):
            VHDX(file)
        assert contents(made.path)[:MIB] == b"x" * MIB


def test_a_log_version_without_a_log_is_brought_up_to_ours(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 4 * MIB)
    made.put_headers(mk.header(3, log_version=7), mk.header(3, log_version=7))
    with Session(made.path) as session:
        for step in session.begin():
            assert step is Barrier or (isinstance(step, Write) and step.data[64:66] == b"\0\0")


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5])
def test_a_commit_that_fails_is_the_last_and_reads_go_on(tmp_path: Path, after: int) -> None:
    made = make(tmp_path / "disk.vhdx", 8 * MIB, {0: b"x" * MIB})
    commits = 0

    def execute(plan: Plan, files: Sequence[HostFile]) -> None:
        nonlocal commits
        if any(isinstance(s, Write) and s.data[:4] == b"loge" for s in plan):
            commits += 1
            if commits == 2:
                hostfile.execute(Plan(*plan.steps[:after]), files)
                raise OSError(errno.ENOSPC, "as asked")
        hostfile.execute(plan, files)

    with HostFile(made.path, writable=True) as file:
        disk = Reference([VHDX(file)], files_execute=execute)
        disk.pwrite(MIB, b"1" * 512)
        disk.flush()
        disk.pwrite(5 * MIB, b"2" * 512)
        with pytest.raises(OSError, match="as asked"):
            disk.flush()
        with pytest.raises(OSError, match="earlier"):
            disk.pwrite(7 * MIB, b"3" * 512)
        assert disk.pread(MIB, 512) == b"1" * 512
        assert disk.pread(5 * MIB, 512) == b"2" * 512
    found = contents(made.path)
    assert found[: MIB + 512] == b"x" * MIB + b"1" * 512
    assert found[5 * MIB : 5 * MIB + 512] in (b"2" * 512, bytes(512))
    subprocess.run(["qemu-img", "check", "-q", "-r", "all", made.path], check=True)
    assert contents_by_qemu(made.path) == found


def test_what_is_too_small_for_a_block_is_cut_off_as_well(tmp_path: Path) -> None:
    """Between blocks of 4 MiB, where something else lay once."""
    made = make(
        tmp_path / "disk.vhdx",
        32 * MIB,
        {0: b"a" * 4 * MIB, 1: b"b" * 4 * MIB},
        block_size=4 * MIB,
    )
    far = made.hosts[1] + 7 * MIB  # a gap of 3 MiB before it
    made.write(far, b"b" * 4 * MIB)
    made.write(made.entry_offset(1), struct.pack("<Q", far | mk.PRESENT))
    with HostFile(made.path, writable=True) as file, Reference([VHDX(file)]) as disk:
        disk.discard(4 * MIB, 4 * MIB)
    assert os.stat(made.path).st_size == made.hosts[0] + 4 * MIB
    check(made.path)
    assert contents_by_qemu(made.path) == b"a" * 4 * MIB + bytes(28 * MIB)
