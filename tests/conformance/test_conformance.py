"""What every image has to do, in every format and with every engine.

qemu-img is the other side: it made the images, says what is in them, and reads what we wrote.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conformance.cases import WIDE, Case, build, piece, run
from tests.conformance.conftest import Subject, check_sound
from tests.conformance.disks import Open
from tests.reference import Reference
from virtmount.chain import open_chain
from virtmount.image import Extent, Kind, extents

# Reading


def test_size_and_content_are_what_qemu_img_says(subject: Subject) -> None:
    format = subject.case.top.format
    info = json.loads(run("qemu-img", "info", "-f", format, "--output=json", subject.path))
    disk = subject.open()
    try:
        assert disk.size == info["virtual-size"] == subject.size
        subject.expect_all(disk)
    finally:
        disk.close()


def test_reads_of_every_shape(subject: Subject) -> None:
    size = subject.size
    disk = subject.open()
    try:
        for offset, length in ranges(subject.case, size, subject.random):
            subject.expect(disk, offset, length)
        subject.expect(disk, 0, 512)
        subject.expect(disk, size - 512, 512)
    finally:
        disk.close()


def test_nothing_is_read_past_the_end(subject: Subject) -> None:
    """An engine may refuse or answer with less, as a file does."""
    disk = subject.open()
    try:
        for offset, length in ((subject.size, 512), (subject.size - 512, 1024), (1 << 60, 512)):
            try:
                data = disk.pread(offset, length)
            except (ValueError, OSError):
                continue
            assert len(data) == max(0, subject.size - offset)
    finally:
        disk.close()


def test_opened_for_reading_no_byte_of_any_file_changes(subject: Subject) -> None:
    before = hashes(subject.path.parent)
    disk = subject.open()
    try:
        subject.expect_all(disk)
        with pytest.raises((ValueError, OSError)):
            disk.pwrite(0, bytes(512))
        with pytest.raises((ValueError, OSError)):
            disk.write_zeroes(0, 512)
        disk.flush()
        subject.expect(disk, 0, 4096)
    finally:
        disk.close()
    assert hashes(subject.path.parent) == before


def test_a_writable_disk_that_nobody_wrote_to_is_not_written(subject: Subject) -> None:
    before = hashes(subject.path.parent)
    disk = subject.open(writable=True)
    try:
        subject.expect_all(disk)
        disk.flush()
    finally:
        disk.close()
    assert hashes(subject.path.parent) == before


# Writing


def test_writes_of_every_shape_over_every_kind(subject: Subject) -> None:
    random_ = subject.random
    own = files_of(subject)
    parents = hashes(subject.path.parent, but=own)
    places = over_every_kind(subject, random_)
    disk = subject.open(writable=True)
    try:
        for offset, length in places:
            subject.write(disk, offset, random_.randbytes(length))
            subject.expect(disk, *around(subject, offset, length))
        subject.expect_all(disk)
        disk.flush()
        subject.expect_all(disk)
    finally:
        disk.close()
    subject.expect_valid()
    assert hashes(subject.path.parent, but=own) == parents
    reopened = subject.open()
    try:
        subject.expect_all(reopened)
    finally:
        reopened.close()


def test_many_writes_with_flushes_between(subject: Subject) -> None:
    random_ = subject.random
    disk = subject.open(writable=True)
    try:
        for number, (offset, length) in enumerate(ranges(subject.case, subject.size, random_)):
            subject.write(disk, offset, random_.randbytes(length))
            if number % 5 == 0:
                disk.flush()
            if number % 7 == 0:
                subject.expect_all(disk)
        subject.expect_all(disk)
    finally:
        disk.close()
    subject.expect_valid()


def test_the_whole_disk_written_in_order_and_then_read_back(subject: Subject) -> None:
    step = max(64 << 10, subject.case.top.cluster * 3 // 2)
    random_ = subject.random
    disk = subject.open(writable=True)
    try:
        for offset in range(0, subject.size, step):
            length = min(step, subject.size - offset)
            subject.write(disk, offset, random_.randbytes(length))
        subject.expect_all(disk)
    finally:
        disk.close()
    subject.expect_valid()


def test_what_a_flush_returned_for_is_in_the_file(subject: Subject) -> None:
    """A copy of the files after the flush, without the orderly end, holds what was written."""
    random_ = subject.random
    places = over_every_kind(subject, random_)
    disk = subject.open(writable=True)
    try:
        for offset, length in places:
            subject.write(disk, offset, random_.randbytes(length))
        disk.flush()
        saved = {
            file.name: file.read_bytes() for file in subject.path.parent.iterdir() if file.is_file()
        }
    finally:
        disk.close()
    for name, content in saved.items():
        (subject.path.parent / name).write_bytes(content)
    # Writable, so that a log or a dirty flag is dealt with.
    again = subject.open(writable=True)
    try:
        subject.expect_all(again)
        subject.write(again, 0, b"on we go".ljust(512, b"\0"))
        subject.expect_all(again)
    finally:
        again.close()
    subject.expect_valid()


def test_sessions_leave_no_unused_clusters_behind(subject: Subject) -> None:
    """What was reserved and not used is not in the file after a detach, or used the next time."""
    top = subject.case.top
    chain = open_chain(subject.path, top.format)
    absent = [
        extent.guest_offset
        for extent in extents(chain.top, 0, subject.size)
        if extent.kind is Kind.ABSENT
    ]
    chain.close()
    before = subject.path.stat().st_size
    sessions = absent[:: max(1, len(absent) // 6)][:6]
    for guest_offset in sessions:
        disk = subject.open(writable=True)
        try:
            subject.write(disk, guest_offset, b"x" * 512)
        finally:
            disk.close()
    subject.expect_valid()
    growth = subject.path.stat().st_size - before
    allowed = len(sessions) * top.cluster
    if top.format == "qcow":
        allowed += top.cluster  # qemu's end of the file lies inside of one
    if top.format == "vpc":
        allowed += (len(sessions) + 1) * 4096  # bitmaps, so that data is aligned
    if top.format == "qed":
        allowed += 6 * top.cluster  # three tables
    if top.format == "qcow2":
        # Tables, and room that was kept for tables of all that was reserved, which a later
        # session uses once there is enough of it.  Tables of 512 bytes hold so little that this
        # is more than the data.
        allowed += 64 * top.cluster
    if top.cluster > 512:
        assert growth <= allowed


def test_taking_turns_with_qemu(subject: Subject) -> None:
    """Either program finds what the other wrote, and takes no cluster that is in use."""
    random_ = subject.random
    sequence = list(ranges(subject.case, subject.size, random_))
    for turn in range(3):
        disk = subject.open(writable=True)
        try:
            subject.expect_all(disk)
            for offset, length in sequence[turn * 4 : turn * 4 + 2]:
                subject.write(disk, offset, random_.randbytes(length))
        finally:
            disk.close()
        commands: list[str] = []
        for offset, length in sequence[turn * 4 + 2 : turn * 4 + 4]:
            value = random_.randrange(1, 256)
            commands += ["-c", f"write -q -P {value} {offset} {length}"]
            subject.content[offset : offset + length] = bytes([value]) * length
        run("qemu-io", "-f", subject.case.top.format, *commands, subject.path)
        subject.expect_valid()


# Zeros and discard


def test_zeros_of_every_shape(subject: Subject) -> None:
    places = over_every_kind(subject, subject.random)
    disk = subject.open(writable=True)
    try:
        for offset, length in places:
            disk.write_zeroes(offset, length)
            subject.content[offset : offset + length] = bytes(length)
            subject.expect(disk, *around(subject, offset, length))
        disk.flush()
        subject.expect_all(disk)
    finally:
        disk.close()
    subject.expect_valid()


def test_discarded_clusters_read_as_zeros_and_the_rest_stays(subject: Subject) -> None:
    discards, cluster = discard_rule(subject)
    disk = subject.open(writable=True)
    try:
        for offset, length in ranges(subject.case, subject.size, subject.random):
            disk.discard(offset, length)
            end = offset + length
            first = -(-offset // cluster) * cluster
            last = end if end == subject.size else end // cluster * cluster
            if discards and first < last:
                subject.content[first:last] = bytes(last - first)
            subject.expect(disk, *around(subject, offset, length))
        subject.expect_all(disk)
    finally:
        disk.close()
    subject.expect_valid()


def test_discarding_everything_gives_the_space_back(subject: Subject) -> None:
    discards, _ = discard_rule(subject)
    own = files_of(subject)
    before = sum(map(blocks, own))
    disk = subject.open(writable=True)
    try:
        disk.discard(0, subject.size)
        if discards:
            subject.content[:] = bytes(subject.size)
        subject.expect_all(disk)
    finally:
        disk.close()
    subject.expect_valid()
    if (
        discards and len(subject.case.layers) == 1
    ):  # over a parent the marks may need more room than the data
        assert sum(map(blocks, own)) < before


def test_what_was_discarded_can_be_written_again(subject: Subject) -> None:
    random_ = subject.random
    discards, cluster = discard_rule(subject)
    count = -(-subject.size // cluster)
    disk = subject.open(writable=True)
    try:
        for _ in range(12):
            first = random_.randrange(count)
            start, end = first * cluster, min((first + 3) * cluster, subject.size)
            disk.discard(start, end - start)
            if discards:
                subject.content[start:end] = bytes(end - start)
            at = random_.randrange(start, end, 512)
            subject.write(disk, at, random_.randbytes(min(1024, end - at)))
            subject.expect(disk, start, end - start)
        subject.expect_all(disk)
    finally:
        disk.close()
    subject.expect_valid()


def test_churn_does_not_grow_the_file_without_end(subject: Subject) -> None:
    """Discard and rewrite again and again: the file holds what is in use, not its history."""
    discards, cluster = discard_rule(subject)
    end = min(8 * cluster, subject.size)
    random_ = subject.random
    sizes: list[int] = []
    disk = subject.open(writable=True)
    try:
        for _ in range(6):
            subject.write(disk, 0, random_.randbytes(end))
            disk.flush()
            disk.discard(0, end)
            if discards:
                subject.content[:end] = bytes(end)
            sizes.append(subject.path.stat().st_size)
        subject.expect_all(disk)
    finally:
        disk.close()
    subject.expect_valid()
    # The second round has to find the clusters that the first gave back, or nearly all of them.
    assert sizes[-1] - sizes[1] <= end


# Where the data is


def test_extents_agree_with_qemu_img_map(case: Case, built: object, tmp_path: Path) -> None:
    path = build(case, tmp_path)
    found = json.loads(run("qemu-img", "map", "--output=json", path))
    chain = open_chain(path, case.top.format)
    try:
        ours = list(Reference(chain.images).extents(0, chain.top.size))
    finally:
        chain.close()
    assert sum(extent.length for _, extent in ours) == chain.top.size
    for layer, extent in ours:
        for start, end, theirs in overlaps(extent, found):
            if extent.kind is Kind.ZERO:
                assert theirs["zero"] or not case.mapped, (extent, theirs)
            if theirs["data"] and not theirs["zero"] and case.mapped:
                assert extent.kind in (Kind.DATA, Kind.SHARED, Kind.COMPRESSED), (extent, theirs)
                assert theirs["depth"] == layer, (extent, theirs)
            if extent.kind in (Kind.DATA, Kind.SHARED) and "offset" in theirs:
                host = extent.host_offset + start - extent.guest_offset
                assert host == theirs["offset"] + start - theirs["start"], (extent, theirs)
            assert start < end


# Leaves


@pytest.mark.parametrize("wide", WIDE, ids=str)
def test_across_leaves(wide: Case, opener: Open, tmp_path: Path) -> None:
    path = build(wide, tmp_path)
    format = wide.top.format
    chain = open_chain(path, format)
    leaf = chain.top.entries_per_leaf * chain.top.cluster_size
    chain.close()
    cluster = wide.top.cluster
    assert leaf < wide.top.size, "no second leaf: the case has to be larger"
    edges = sorted({leaf, (wide.top.size - 512) // leaf * leaf})
    disk = opener(path, format, True)
    commands: list[str] = []
    try:
        for value, edge in enumerate(edges, 0x51):
            start, length = edge - cluster - 1024, 2 * cluster + 1536
            length = min(length, wide.top.size - start)
            disk.pwrite(start, bytes([value]) * length)
            assert disk.pread(start - 512, 512 + length) == bytes(512) + bytes([value]) * length
            commands += ["-c", f"read -q -P {value} {start} {length}"]
            commands += ["-c", f"read -q -P 0 {start - 512} 512"]
    finally:
        disk.close()
    check_sound(path, format)
    run("qemu-io", "-r", "-f", format, *commands, path)
    disk = opener(path, format, False)
    try:
        for value, edge in enumerate(edges, 0x51):
            assert disk.pread(edge - 1024, 1536) == bytes([value]) * 1536
    finally:
        disk.close()


# What the tests ask for


def ranges(case: Case, size: int, random_: random.Random) -> Iterator[tuple[int, int]]:
    """Ranges of all shapes relative to the clusters of every layer."""
    for layer in case.layers:
        for _ in range(12):
            offset, length = piece(size, layer.cluster, random_)
            yield offset, length
    for layer in case.layers:
        if layer.size < size:  # where a shorter parent ends
            yield layer.size - 512, 1024
    yield 512, 1
    yield 1023, 2
    yield size - 700, 700


def over_every_kind(subject: Subject, random_: random.Random) -> list[tuple[int, int]]:
    """For each kind of cluster that the image has: whole, head, tail, middle, and across.

    Opens the image, so nobody else may have.
    """
    cluster = subject.case.top.cluster
    chain = open_chain(subject.path, subject.case.top.format)
    try:
        places: dict[tuple[int, Kind], list[int]] = {}
        for layer, extent in Reference(chain.images).extents(0, subject.size):
            found = places.setdefault((layer, extent.kind), [])
            found.append(extent.guest_offset // cluster * cluster)
    finally:
        chain.close()
    shapes = [
        (0, cluster),
        (0, 512),
        (cluster - 512, 512),
        (cluster // 2, 512),
        (cluster // 2, cluster),
        (cluster - 1, 2),
    ]
    picked: list[tuple[int, int]] = []
    for starts in places.values():
        for start, (within, length) in zip(
            random_.choices(sorted(set(starts)), k=len(shapes)), shapes, strict=True
        ):
            offset = start + within
            if offset < subject.size:
                picked.append((offset, min(length, subject.size - offset)))
    random_.shuffle(picked)
    return picked


def around(subject: Subject, offset: int, length: int) -> tuple[int, int]:
    """The range and a cluster on either side of it."""
    cluster = subject.case.top.cluster
    start = max(0, offset - cluster)
    return start, min(subject.size, offset + length + cluster) - start


def discard_rule(subject: Subject) -> tuple[bool, int]:
    """Whether discard does anything to this image, and its unit."""
    chain = open_chain(subject.path, subject.case.top.format, writable=True)
    try:
        caps = chain.top.caps
        able = caps.discard and (caps.zero_hides_parent or len(chain.images) == 1)
        return able, chain.top.cluster_size
    finally:
        chain.close()


def files_of(subject: Subject) -> list[Path]:
    """The files of the image itself: with extents or a data file there are several."""
    chain = open_chain(subject.path, subject.case.top.format)
    try:
        return [file.path for file in chain.top.files]
    finally:
        chain.close()


def hashes(folder: Path, but: Sequence[Path] = ()) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.is_file() and file not in but
    }


def blocks(path: Path) -> int:
    return path.stat().st_blocks


def overlaps(
    extent: Extent, found: list[dict[str, int]]
) -> Iterator[tuple[int, int, dict[str, int]]]:
    for entry in found:
        start = max(extent.guest_offset, entry["start"])
        end = min(extent.guest_offset + extent.length, entry["start"] + entry["length"])
        if start < end:
            yield start, end, entry
