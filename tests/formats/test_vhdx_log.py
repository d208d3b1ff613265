"""The log of a VHDX file, as others leave it: found, refused, applied in memory and in the file."""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import virtmount
from tests.formats import make_vhdx as mk
from tests.formats.make_vhdx import MIB, Made, log_entry, make
from tests.formats.vhdx_chains import make_pair
from tests.reference import Reference
from virtmount import hostfile
from virtmount.chain import open_chain
from virtmount.errors import Corrupt, NeedsRecovery, Unsupported, VirtmountError
from virtmount.formats.vhdx import VHDX
from virtmount.formats.vhdx_log import MAX_CHANGES
from virtmount.hostfile import HostFile
from virtmount.image import Kind, extents
from virtmount.plan import Barrier, Extend, Plan, Punch, Write

OLD, NEW, NEWER = b"o" * MIB, b"n" * MIB, b"N" * MIB


def dirty(tmp_path: Path, entries: Sequence[bytes] = (), position: int = 0, **options: Any) -> Made:
    """A disk of three blocks; the log in its header holds `entries` from `position` on.

    Block 0 is mapped to OLD.  NEW and NEWER are in the file too, and only an entry can map them.
    """
    made = make(tmp_path / "disk.vhdx", 3 * MIB, {0: OLD, 1: NEW, 2: NEWER}, **options)
    for block in (1, 2):
        made.write(made.entry_offset(block), bytes(8))
    made.put_headers(
        mk.header(1, log_guid=mk.LOG_GUID, log_length=made.log_length),
        mk.header(2, log_guid=mk.LOG_GUID, log_length=made.log_length),
    )
    for entry in entries:
        position = made.put_entry(position, entry)
    return made


LENGTH = 7 * MIB  # of the file that dirty() makes


def maps(**blocks: int) -> list[tuple[int, bytes | int]]:
    """A change of the first BAT sector: b0=4 means that block 0 lies at 4 MiB."""
    sector = bytearray(4096)
    for name, place in blocks.items():
        struct.pack_into("<Q", sector, int(name[1:]) * 8, place * MIB | mk.PRESENT if place else 0)
    return [(3 * MIB, bytes(sector))]


def entry(sequence: int, changes: Any, **options: Any) -> bytes:
    return log_entry(sequence, changes, **{"flushed": LENGTH, **options})


def read(path: Path) -> bytes:
    """The disk through a driver that was opened for reading, which leaves the file alone."""
    before = path.read_bytes()
    with HostFile(path) as file:
        disk = Reference([VHDX(file)])
        content = disk.pread(0, disk.size)
        disk.close()
    assert path.read_bytes() == before
    return content


def replayed_by_qemu(path: Path) -> bytes:
    copy = path.with_suffix(".qemu")
    shutil.copy(path, copy)
    subprocess.run(["qemu-img", "check", "-q", "-r", "all", copy], check=True, timeout=60)
    raw = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", "vhdx", "-O", "raw", copy, raw], check=True)
    return raw.read_bytes()


def replayed_by_us(path: Path) -> bytes:
    """Opened for writing and written to, which applies the log; then read by qemu."""
    copy = path.with_suffix(".ours")
    shutil.copy(path, copy)
    with HostFile(copy, writable=True) as file, Reference([VHDX(file)]) as disk:
        before = disk.pread(0, disk.size)
        disk.pwrite(0, disk.pread(0, 512))
        assert disk.pread(0, disk.size) == before
    done = subprocess.run(["qemu-img", "check", copy], capture_output=True, text=True, timeout=60)
    assert "No errors" in done.stdout
    raw = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", "vhdx", "-O", "raw", copy, raw], check=True)
    assert raw.read_bytes() == before
    return before


def all_agree(made: Made, expected: bytes, qemu: bool = True) -> None:
    assert read(made.path) == expected
    if qemu:
        assert replayed_by_qemu(made.path) == expected
    assert replayed_by_us(made.path) == expected


# What is replayed


def test_one_entry(tmp_path: Path) -> None:
    made = dirty(tmp_path, [entry(1, maps(b0=4, b1=5))])
    with HostFile(made.path) as file:
        assert VHDX(file).details()["log"] == "to be replayed, 1 entries"
    all_agree(made, OLD + NEW + bytes(MIB))


def test_several_entries_from_the_tail_on(tmp_path: Path) -> None:
    made = dirty(
        tmp_path,
        [
            entry(7, maps(b0=4, b1=5)),
            entry(8, maps(b0=5, b1=4)),
            entry(9, maps(b0=4, b2=6)),
        ],
    )
    all_agree(made, OLD + bytes(MIB) + NEWER)


def test_entries_before_the_tail_are_not_replayed(tmp_path: Path) -> None:
    """They are in place already, or worse: the change of a later session.

    qemu replays them all the same, so it is not asked.
    """
    second = 3 * MIB + 4096
    made = dirty(
        tmp_path,
        [
            entry(1, [(second, b"\xff" * 4096)]),
            entry(2, maps(b0=4, b1=5), tail=8192),
            entry(3, maps(b0=4, b2=6), tail=8192),
        ],
    )
    all_agree(made, OLD + bytes(MIB) + NEWER, qemu=False)
    with HostFile(made.path) as file:
        VHDX(file)
        assert file.pread(second, 4096) == bytes(4096)


@pytest.mark.parametrize("position", [MIB - 4096, MIB - 8192, MIB - 12288, MIB - 16384])
def test_a_sequence_wraps_around_the_end_of_the_ring(tmp_path: Path, position: int) -> None:
    made = dirty(
        tmp_path,
        [
            entry(1, maps(b0=4, b1=5), tail=position),
            entry(2, maps(b0=6, b1=5), tail=position),
            entry(3, maps(b0=6, b1=4), tail=position),
        ],
        position,
    )
    assert read(made.path) == NEWER + OLD + bytes(MIB)
    assert replayed_by_us(made.path) == NEWER + OLD + bytes(MIB)


@pytest.mark.parametrize("position", [MIB - 4096, MIB - 8192])
def test_an_entry_wraps_around_the_end_of_the_ring(tmp_path: Path, position: int) -> None:
    changes = [*maps(b0=6), *[(3 * MIB + 4096 * i, bytes(4096)) for i in range(1, 5)]]
    made = dirty(tmp_path, [entry(1, changes, tail=position)], position)
    all_agree(made, NEWER + bytes(2 * MIB))


def damaged(sequence: int, changes: Any, where: int) -> bytes:
    whole = entry(sequence, changes)
    return whole[:where] + bytes(4) + whole[where + 4 :]


@pytest.mark.parametrize("where", [0, 16, 80, 8188])
def test_a_torn_last_entry_ends_the_sequence(tmp_path: Path, where: int) -> None:
    made = dirty(
        tmp_path,
        [entry(1, maps(b0=5)), entry(2, maps(b0=4, b2=6)), damaged(3, maps(b0=6, b1=5), where)],
    )
    # 16 and 80 tear a number that qemu 7.2 gives up on.
    all_agree(made, OLD + bytes(MIB) + NEWER, qemu=where in (0, 8188))


def test_of_two_sequences_the_newer_is_replayed_wherever_it_lies(tmp_path: Path) -> None:
    for newer_first in (True, False):
        made = dirty(tmp_path)
        old = [entry(5, maps(b0=5)), entry(6, maps(b0=5, b1=6))]
        new = [entry(9, maps(b0=6)), entry(10, maps(b0=6, b1=4))]
        for sequence, position in ((old, 0 if not newer_first else 65536), (new, 32768)):
            for i, raw in enumerate(sequence):
                at = position + i * 8192
                raw = mk.sealed(raw[:12] + struct.pack("<I", position) + raw[16:])
                made.put_entry(at, raw)
        assert read(made.path) == NEWER + OLD + bytes(MIB)


def test_a_gap_in_the_numbers_parts_two_sequences(tmp_path: Path) -> None:
    made = dirty(
        tmp_path,
        [entry(1, maps(b0=5)), entry(2, maps(b0=5, b1=6)), entry(4, maps(b0=6), tail=16384)],
    )
    assert read(made.path) == NEWER + bytes(2 * MIB)


def test_a_newer_sequence_whose_tail_is_lost_is_not_replayed(tmp_path: Path) -> None:
    made = dirty(tmp_path, [entry(1, maps(b0=4, b1=5)), entry(3, maps(b0=6), tail=0)])
    assert read(made.path) == OLD + NEW + bytes(MIB)


def test_entries_of_another_log_are_not_replayed(tmp_path: Path) -> None:
    made = dirty(tmp_path, [entry(1, maps(b0=4, b1=5)), entry(2, maps(b0=6), guid=UUID(int=77))])
    assert read(made.path) == OLD + NEW + bytes(MIB)


def test_zero_descriptors_and_later_data_over_them(tmp_path: Path) -> None:
    made = dirty(
        tmp_path,
        [
            entry(1, [(3 * MIB, b"\xff" * 4096), (3 * MIB + 4096, b"\xff" * 4096)]),
            entry(2, [(3 * MIB, MIB), *maps(b0=4, b1=6)]),
        ],
    )
    all_agree(made, OLD + NEWER + bytes(MIB))


@pytest.mark.parametrize("count", [126, 127, 254, 255])
def test_as_many_descriptors_as_one_sector_holds_and_more(tmp_path: Path, count: int) -> None:
    made = dirty(tmp_path, log_length=2 * MIB)  # everything lies one MiB further than elsewhere
    sector = bytearray(4096)
    struct.pack_into("<QQQ", sector, 0, 7 * MIB | 6, 0, 5 * MIB | 6)
    others = [(made.bat + 4096 * (1 + i % 255), bytes(4096)) for i in range(count - 1)]
    made.put_entry(0, entry(1, [*others, (made.bat, bytes(sector))], flushed=8 * MIB))
    # qemu 7.2 does not open a log with more than 126.
    all_agree(made, NEWER + bytes(MIB) + OLD, qemu=count <= 126)


def test_an_entry_without_descriptors(tmp_path: Path) -> None:
    made = dirty(tmp_path, [entry(1, [])])
    all_agree(made, OLD + bytes(2 * MIB))


def test_an_entry_that_is_longer_than_it_needs_to_be(tmp_path: Path) -> None:
    """2.3.1: the alignment of entries may be larger than 4 KiB."""
    made = dirty(tmp_path, [entry(1, maps(b0=5), padding=8192), entry(2, maps(b0=6), padding=4096)])
    assert read(made.path) == NEWER + bytes(2 * MIB)


def test_region_tables_and_metadata_are_read_after_the_replay(tmp_path: Path) -> None:
    made = dirty(tmp_path)
    item = struct.pack("<16sIIII", mk.VIRTUAL_DISK_SIZE.bytes_le, 65536 + 3 + 8, 8, 6, 0)
    metadata = bytearray(made.read(2 * MIB + 65536, 4096))
    assert item in made.read(2 * MIB, 4096)
    struct.pack_into("<Q", metadata, 3 + 8, 2 * MIB)
    table = made.read(192 << 10, 4096)
    made.write(192 << 10, bytes(65536))
    made.write(256 << 10, bytes(65536))
    made.put_entry(
        0, entry(1, [(192 << 10, table), (2 * MIB + 65536, bytes(metadata)), *maps(b0=5)])
    )
    all_agree(made, NEW + bytes(MIB))


def test_the_file_becomes_as_long_as_the_log_says(tmp_path: Path) -> None:
    made = dirty(tmp_path, [entry(1, maps(b0=4, b1=9), last=11 * MIB)])
    with HostFile(made.path) as file:
        image = VHDX(file)
        assert file.size == 11 * MIB
        assert Reference([image]).pread(0, 2 * MIB) == OLD + bytes(MIB)
    with HostFile(made.path, writable=True) as file, Reference([VHDX(file)]) as disk:
        disk.pwrite(MIB, b"x" * 512)
        assert os.stat(made.path).st_size == 11 * MIB
    done = subprocess.run(["qemu-img", "check", made.path], capture_output=True, text=True)
    assert "No errors" in done.stdout
    assert read(made.path)[: MIB + 512] == OLD + b"x" * 512


def test_a_change_past_the_end_makes_the_file_longer(tmp_path: Path) -> None:
    made = dirty(tmp_path, [entry(1, [(9 * MIB, b"\x11" * 4096), *maps(b0=4, b1=9)])])
    with HostFile(made.path) as file:
        assert Reference([VHDX(file)]).pread(MIB, 4097) == b"\x11" * 4096 + b"\0"


# What is not there, and what is refused


@pytest.mark.parametrize(
    "raw",
    [
        entry(1, maps(b0=6), bad_checksum=True),
        entry(1, maps(b0=6), descriptor_sequence=2),
        entry(1, maps(b0=6), data_sequence=2),
        entry(1, maps(b0=6), data_sequence=1 << 32 | 1),
        entry(1, [(3 * MIB + 512, bytes(4096))]),
        entry(1, [(3 * MIB, 512)]),
        entry(0, maps(b0=6)),
        entry(1, maps(b0=6), tail=100),
        entry(1, maps(b0=6), tail=MIB),
        entry(1, maps(b0=6), guid=UUID(int=1)),
        mk.sealed(entry(1, maps(b0=6)).replace(b"desc", b"desk")),
        mk.sealed(entry(1, maps(b0=6)).replace(b"data", b"dada")),
        mk.sealed(b"logf" + entry(1, maps(b0=6))[4:]),
        mk.sealed(entry(1, maps(b0=6))[:8] + struct.pack("<I", 4096) + bytes(4084)),
        mk.sealed(entry(1, maps(b0=6))[:24] + b"\xff\xff\xff\x0f" + entry(1, maps(b0=6))[28:]),
        bytes(4096),
    ],
)
def test_a_log_without_a_valid_entry_is_empty(tmp_path: Path, raw: bytes) -> None:
    """qemu leaves such files after a crash, and never writes to them again: we do."""
    made = dirty(tmp_path, [raw])
    with HostFile(made.path) as file:
        assert VHDX(file).details()["log"] == "empty, though the header names one"
    assert read(made.path) == OLD + bytes(2 * MIB)
    assert replayed_by_us(made.path) == OLD + bytes(2 * MIB)
    ours = made.path.with_suffix(".ours")
    subprocess.run(["qemu-io", "-f", "vhdx", "-c", "write -P 5 2M 512", ours], check=True)
    assert read(ours)[2 * MIB : 2 * MIB + 512] == b"\x05" * 512


@pytest.mark.parametrize(
    ("entries", "kind", "complaint"),
    [
        ([entry(1, maps(b0=6), tail=4096)], Corrupt, "1 valid entries, but no whole sequence"),
        ([entry(1, maps(b0=6), flushed=8 * MIB)], Corrupt, "was 8388608 bytes long, now 7340032"),
        ([entry(1, maps(b0=6), last=(1 << 47) + MIB)], Corrupt, "file 140737489403904 bytes long"),
        ([entry(1, [(1 << 62, bytes(4096))])], Corrupt, "file 4611686018427392000 bytes long"),
        ([entry(1, [(0, 1 << 62)])], Corrupt, "file 4611686018427387904 bytes long"),
        ([entry(1, [(65536, bytes(4096))])], Corrupt, "changes bytes 65536 to 69632"),
        ([entry(1, [(192 * 1024 - 4096, 8192)])], Corrupt, "where the headers or the log lie"),
        ([entry(1, [(2 * MIB - 4096, bytes(4096))])], Corrupt, "where the headers or the log lie"),
        ([entry(1, [(512 * 1024, 4 * MIB)])], Corrupt, "where the headers or the log lie"),
    ],
)
def test_refuses_a_log(
    tmp_path: Path, entries: list[bytes], kind: type[VirtmountError], complaint: str
) -> None:
    made = dirty(tmp_path, entries)
    check_refusal(made.path, kind, complaint)


def test_refuses_a_log_that_is_too_long(tmp_path: Path) -> None:
    made = dirty(tmp_path, log_length=65 * MIB)
    check_refusal(made.path, Unsupported, "a log of 68157440 bytes")
    made.put_headers(mk.header(3, log_length=65 * MIB), mk.header(3, log_length=65 * MIB))
    assert read(made.path) == OLD + bytes(2 * MIB)


def test_refuses_more_changes_than_memory_should_hold(tmp_path: Path) -> None:
    made = dirty(tmp_path, [entry(1, [(3 * MIB, 4096)] * (MAX_CHANGES + 1))])
    check_refusal(made.path, Unsupported, f"{MAX_CHANGES + 1} changes")


def check_refusal(path: Path, kind: type[VirtmountError], complaint: str) -> None:
    before = path.read_bytes()
    for writable in (False, True):
        with HostFile(path, writable=writable) as file:
            with pytest.raises(VirtmountError, match=complaint) as caught:
                VHDX(file)
            assert caught.type is kind
    assert path.read_bytes() == before


def test_a_log_made_to_be_slow_is_not(tmp_path: Path) -> None:
    """Every sector begins an entry that reaches to the end of the ring and has a bad checksum."""
    length = 32 * MIB
    made = dirty(tmp_path, log_length=length)
    ring = bytearray(length)
    raw = entry(1, [], tail=0)
    for at in range(0, length, 4096):
        ring[at : at + 64] = raw[:8] + struct.pack("<I", length - at) + raw[12:64]
    made.write(made.log, bytes(ring))
    start = time.process_time()
    check_refusal(made.path, Corrupt, "entries overlap")
    assert time.process_time() - start < 5


def test_many_runs_into_one_are_not_slow(tmp_path: Path) -> None:
    """Valid entries, each followed by the next, and no valid tail anywhere."""
    length = 4 * MIB
    made = dirty(tmp_path, log_length=length)
    ring = bytearray()
    short = entry(1, [])[:4096]
    for i in range(length // 4096):
        raw = short[:12] + struct.pack("<IQ", i * 4096, i + 1) + short[24:]
        if i + 1 == length // 4096:
            raw = raw[:12] + struct.pack("<I", length - 4096) + raw[16:]
        ring += mk.sealed(raw) if i % 256 < 2 or i + 1 == length // 4096 else bytes(4096)
    made.write(made.log, bytes(ring))
    start = time.process_time()
    assert read(made.path) == OLD + bytes(2 * MIB)
    assert time.process_time() - start < 2


def test_random_damage_to_the_log_raises_nothing_but_our_errors(tmp_path: Path) -> None:
    rng = random.Random(3)
    whole = [entry(1, maps(b0=5)), entry(2, [(3 * MIB, 8192), *maps(b0=6)])]
    made = dirty(tmp_path, whole)
    seen = set()
    for _ in range(200):
        raw = bytearray(whole[1])
        for _ in range(rng.randrange(1, 4)):
            raw[rng.randrange(128)] = rng.choice((0, 1, 0x10, 0x7F, 0x80, 0xFF))
        made.put_entry(8192, mk.sealed(bytes(raw)))
        with HostFile(made.path) as file:
            try:
                disk = Reference([VHDX(file)])
                seen.add(disk.pread(0, 1))
            except (VirtmountError, OSError) as error:
                seen.add(type(error).__name__.encode())
    assert seen >= {b"n", b"N", b"Corrupt"}


# Applying the log to the file


def test_the_plan_that_applies_a_log(tmp_path: Path) -> None:
    second = 3 * MIB + 4096
    made = dirty(
        tmp_path,
        [entry(1, maps(b0=6)), entry(2, [*maps(b0=4, b1=5), (second, 8192)], last=9 * MIB)],
    )
    with HostFile(made.path, writable=True) as file:
        image = VHDX(file)
        header, barrier, *replay, barrier2, clean, barrier3, clean2, barrier4 = image.begin()
        assert (barrier, barrier2, barrier3, barrier4) == (Barrier,) * 4
        # The file has a new name of itself before anything else changes; the log is still named.
        assert isinstance(header, Write)
        assert header.offset == 65536
        assert header.data[32:48] == mk.DATA_WRITE.bytes_le
        assert header.data[16:32] != mk.FILE_WRITE.bytes_le
        assert header.data[48:64] == mk.LOG_GUID.bytes_le
        assert replay == [
            Extend(9 * MIB),
            Write(3 * MIB, maps(b0=6)[0][1]),
            Write(3 * MIB, maps(b0=4, b1=5)[0][1]),
            Punch(second, 8192),
        ]
        for step, offset in ((clean, 131072), (clean2, 65536)):
            assert isinstance(step, Write)
            assert step.offset == offset
            assert step.data[48:64] == bytes(16)
            assert step.data[16:32] == header.data[16:32]
            assert step.data[32:48] != mk.DATA_WRITE.bytes_le
            assert mk.sealed(step.data) == step.data


@pytest.mark.parametrize("fails", range(12))
def test_a_replay_that_fails_half_way_leaves_reads_as_they_were(tmp_path: Path, fails: int) -> None:
    made = dirty(tmp_path, [entry(1, maps(b0=5)), entry(2, [(3 * MIB, MIB), *maps(b0=6, b2=4)])])
    expected = NEWER + bytes(MIB) + OLD

    def execute(plan: Plan, files: Sequence[HostFile]) -> None:
        if fails < len(plan):
            hostfile.execute(Plan(*plan.steps[:fails]), files)
            raise OSError(errno.EIO, "as asked")
        hostfile.execute(plan, files)

    with HostFile(made.path, writable=True) as file:
        disk = Reference([VHDX(file)], files_execute=execute)
        for _ in range(2):
            if fails < 11:
                with pytest.raises(OSError, match=r"as asked|earlier"):
                    disk.pwrite(0, b"x" * 512)
            else:
                disk.pwrite(0, NEWER[:512])
            assert disk.pread(0, 3 * MIB) == expected
    # And the next one to open it finds what there was, or all of it in place.
    assert read(made.path) == expected
    assert replayed_by_qemu(made.path) == expected
    assert replayed_by_us(made.path) == expected


# A log that changes guest data


def test_data_in_a_log_is_read_and_must_be_replayed_before_writing(tmp_path: Path) -> None:
    page = b"\x5a" * 4096
    changes: list[tuple[int, bytes | int]] = [
        *maps(b0=4, b1=5),
        (4 * MIB + 8192, page),
        (5 * MIB + 65536, 65536),
    ]
    made = dirty(tmp_path, [entry(1, changes)])
    expected = bytearray(OLD + NEW + bytes(MIB))
    expected[8192 : 8192 + 4096] = page
    expected[MIB + 65536 : MIB + 131072] = bytes(65536)
    assert read(made.path) == expected
    assert replayed_by_qemu(made.path) == expected
    with virtmount.open(made.path) as disk:
        assert disk.pread(0, disk.size) == expected
    before = made.path.read_bytes()
    with (
        HostFile(made.path, writable=True) as file,
        pytest.raises(NeedsRecovery, match="log at 1048576: changes the data of block 0") as caught,
    ):
        VHDX(file)
    assert caught.value.hint == f"virtmount check --repair {made.path}"
    assert made.path.read_bytes() == before


def test_data_in_a_log_for_large_blocks(tmp_path: Path) -> None:
    """Answered by the MiB, whatever the block."""
    content = os.urandom(8 * MIB)
    made = make(tmp_path / "disk.vhdx", 24 * MIB, {1: content}, block_size=8 * MIB)
    page = b"\x5a" * 4096
    at = made.hosts[1] + 5 * MIB - 4096
    made.put_entry(0, log_entry(1, [(at, page), (at + 4096, page)], flushed=made.end))
    made.put_headers(mk.header(1, log_guid=mk.LOG_GUID), mk.header(2, log_guid=mk.LOG_GUID))
    expected = bytearray(24 * MIB)
    expected[8 * MIB : 16 * MIB] = content
    expected[13 * MIB - 4096 : 13 * MIB + 4096] = page * 2
    assert read(made.path) == expected
    with HostFile(made.path) as file:
        image = VHDX(file)
        assert image.cluster_size == MIB
        kinds = [extent.kind for extent in extents(image, 8 * MIB, 8 * MIB)]
        assert kinds == [Kind.DATA] * 4 + [Kind.COMPRESSED] * 2 + [Kind.DATA] * 2
        with pytest.raises(Corrupt, match="nothing that the log changes"):
            image.inflate(0)
    with virtmount.open(made.path) as disk:
        assert disk.pread(0, disk.size) == expected


def test_data_in_a_log_of_a_child(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 12 * MIB)
    made = pair.child
    block = next(b for b in range(12) if made.read(made.entry_offset(b), 1)[0] & 7 == mk.PARTIAL)
    page = b"\x5a" * 4096
    made.put_entry(0, log_entry(1, [(made.hosts[block] + 16384, page)], flushed=made.end))
    made.put_headers(mk.header(1, log_guid=mk.LOG_GUID), mk.header(2, log_guid=mk.LOG_GUID))
    bits = made.read(made.bitmaps[0] + block * 256 + 4, 1)[0]
    for i in range(8):
        if bits >> i & 1:
            start = block * MIB + 16384 + i * 512
            pair.content[start : start + 512] = page[:512]
    chain = open_chain(made.path)
    assert Reference(chain.images).pread(0, 12 * MIB) == pair.content
    chain.close()
    with virtmount.open(made.path) as disk:
        assert disk.pread(0, disk.size) == pair.content


def test_a_log_that_changes_what_holds_no_data_can_wait(tmp_path: Path) -> None:
    """Place 6 MiB is named by no entry, neither before nor after."""
    made = dirty(tmp_path, [entry(1, [*maps(b0=4, b1=5), (6 * MIB, b"\x5a" * 4096)])])
    all_agree(made, OLD + NEW + bytes(MIB))


def test_data_in_a_log_of_a_parent(tmp_path: Path) -> None:
    """Which is only read, whoever writes to its child."""
    made = make(tmp_path / "parent.vhdx", 8 * MIB, {1: OLD, 4: NEW})
    page = b"\x5a" * 4096
    made.put_entry(0, log_entry(1, [(made.hosts[1] + 8192, page)], flushed=made.end))
    made.put_headers(mk.header(1, log_guid=mk.LOG_GUID), mk.header(2, log_guid=mk.LOG_GUID))
    child = make(
        tmp_path / "child.vhdx",
        8 * MIB,
        {4: NEWER},
        parent=mk.below(mk.DATA_WRITE, "parent.vhdx"),
        partial={4: b"\x0f" * 256},
        file_write=UUID(int=3),
    )
    expected = bytearray(8 * MIB)
    expected[MIB : 2 * MIB] = OLD
    expected[MIB + 8192 : MIB + 12288] = page
    expected[4 * MIB : 5 * MIB] = (NEWER[:2048] + NEW[:2048]) * 256
    before = made.path.read_bytes()
    with virtmount.open(child.path, writable=True) as disk:
        assert disk.pread(0, disk.size) == expected
        disk.pwrite(MIB + 8192 + 512, b"w" * 512)
        expected[MIB + 8704 : MIB + 9216] = b"w" * 512
        assert disk.pread(0, disk.size) == expected
    chain = open_chain(child.path)
    assert Reference(chain.images).pread(0, 8 * MIB) == expected
    chain.close()
    assert made.path.read_bytes() == before
