"""The external data file of a QCOW2 image: what of it the L2 tables use.

Source: qemu's docs/interop/qcow2.rst, "Header" (incompatible bit 2, autoclear bit 1), "Header
extensions".  Used by qcow2.py only.

Every guest cluster lies at its guest offset there.  A new one therefore takes a place that was its
own all along, and what nobody mapped has to be zeros before; see wipe().  With the autoclear bit
for it the data file is a raw image of the disk by itself: then it is the truth, whole, and the
tables are completed before anything is written; see incomplete().
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from virtmount.errors import Unsupported
from virtmount.formats.qcow2_entries import (
    COMPRESSED,
    COPIED,
    OFFSET,
    PRESENT,
    SUBCLUSTERS,
    ZERO,
    Entries,
)
from virtmount.formats.qcow2_refcount import read_table
from virtmount.hostfile import HostFile

MAX_MIXED = 64 << 20  # bytes of L2 tables that are neither empty nor full
MAX_HOLES = 1 << 19
MAX_NEW_TABLES = 64 << 20  # bytes


def tables(
    file: HostFile, l1: array[int], entries: Entries, clusters: int
) -> Iterator[tuple[int, int, array[int] | None, bool]]:
    """First cluster, clusters, the table's words, and whether it is full.

    The words are None for all the tables in a row that are not there.
    """
    size, per_table = entries.cluster_size, entries.per_table
    index, end = 0, -(-clusters // per_table)
    while index < end:
        first = index * per_table
        table = l1[index] & OFFSET
        index += 1
        if not table:
            while index < end and not l1[index] & OFFSET:
                index += 1
            yield first, min(index * per_table, clusters) - first, None, False
            continue
        count = min(per_table, clusters - first)
        words = read_table(file, table, count * entries.words)
        full = array("Q", bytes(len(words) * 8))
        full[:: entries.words] = array(
            "Q", range(first * size | COPIED, (first + count) * size | COPIED, size)
        )
        if entries.extended:
            full[1::2] = array("Q", [PRESENT]) * count
        yield first, count, words, words == full


def incomplete(
    file: HostFile, l1: array[int], entries: Entries, clusters: int
) -> list[tuple[int, int]]:
    """First cluster and clusters of each table in which some are not mapped."""
    found: list[tuple[int, int]] = []
    per_table = entries.per_table
    for first, count, words, full in tables(file, l1, entries, clusters):
        if full:
            continue
        number = len(found) + -(-count // per_table)
        if words is None and number * entries.cluster_size > MAX_NEW_TABLES:
            raise Unsupported(
                file,
                "L1 table",
                f"more than {MAX_NEW_TABLES} bytes of tables missing, for data that is there",
                hint="open it read-only",
            )
        end = first + count
        found += [(low, min(per_table, end - low)) for low in range(first, end, per_table)]
    return found


def wipe(file: HostFile, l1: array[int], entries: Entries, clusters: int) -> list[tuple[int, int]]:
    """(offset, length) of what no mapping uses of the data file, sorted and joined."""
    holes: list[tuple[int, int]] = []
    mixed = 0
    for start, end in _unused(file, l1, entries, clusters):
        if start < 0:
            mixed += end
        elif holes and holes[-1][1] == start:
            holes[-1] = holes[-1][0], end
        else:
            holes.append((start, end))
        if len(holes) > MAX_HOLES or mixed > MAX_MIXED:
            raise Unsupported(
                file,
                "L2 tables",
                f"writing to a data file in more than {MAX_HOLES} pieces, or with tables of more "
                f"than {MAX_MIXED} bytes for them",
                hint="open it read-only",
            )
    return [(start, end - start) for start, end in holes]


def _unused(
    file: HostFile, l1: array[int], entries: Entries, clusters: int
) -> Iterator[tuple[int, int]]:
    """Start and end; or -1 and the bytes of a table that has to be looked through."""
    size, grain = entries.cluster_size, entries.grain
    for first, count, words, full in tables(file, l1, entries, clusters):
        if words is None:
            yield first * size, (first + count) * size
            continue
        if full:
            continue
        yield -1, len(words) * 8
        for i in range(count):
            at = (first + i) * size
            entry = words[i * entries.words]
            if not entries.extended:
                # What leads elsewhere cannot be written to, so it need not be wiped.
                if entry & ZERO or not entry & (OFFSET | COPIED | COMPRESSED):
                    yield at, at + size
                continue
            present = words[2 * i + 1] & PRESENT
            if not present:
                yield at, at + size
            elif present != PRESENT:
                yield -1, SUBCLUSTERS  # they cost time as well
                for sub in range(SUBCLUSTERS):
                    if not present >> sub & 1:
                        yield at + sub * grain, at + (sub + 1) * grain
