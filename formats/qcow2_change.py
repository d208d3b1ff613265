"""Changing a whole QCOW2 image: another size, another parent.

Source: qemu's docs/interop/qcow2.rst.  Used by qcow2.py only.  In both the header's first sector
is what switches from old to new, and all that it names is durable before.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator

from virtmount.errors import Unsupported
from virtmount.formats.qcow2_data_file import incomplete
from virtmount.formats.qcow2_entries import COPIED, OFFSET, ZERO
from virtmount.formats.qcow2_header import (
    BACKING_FORMAT,
    END_OF_EXTENSIONS,
    EXTENSION,
    FEATURE_NAMES,
    MAX_L1,
    Header,
)
from virtmount.formats.qcow2_names import backing, extension_area
from virtmount.formats.qcow2_refcount import SECTOR, Draft, table_bytes
from virtmount.formats.qcow2_tables import ENTRY, Tables, round_up
from virtmount.hostfile import HostFile
from virtmount.image import Image
from virtmount.plan import Barrier, Plan, Step, Write

SIZE_AT, L1_SIZE_AT, L1_OFFSET_AT = 24, 36, 40
BACKING_AT = 8  # offset (64 bits) and length (32 bits) of the parent's name


# Size


def grow(
    file: HostFile,
    tables: Tables,
    draft: Draft,
    old: int,
    size: int,
    *,
    inflate: Callable[[int], bytes],
    encrypted: bool,
    all_mapped: bool,
) -> list[Step]:
    """Draft a disk of `size` bytes, `old` before; what has to be written before the draft's plan.

    `all_mapped`: every cluster of the new space is data, in a raw data file.
    """
    entries = tables.entries
    clusters = -(-size // entries.cluster_size)
    before = -(-old // entries.cluster_size)
    needed = -(-clusters // entries.per_table)
    if needed * ENTRY > MAX_L1:
        text = f"{size} bytes in clusters of {entries.cluster_size} need a larger L1 table than any"
        raise Unsupported(file, "size", text)
    steps: list[Step] = []
    if entries.data_file and encrypted and old % entries.cluster_size:
        raise _unaligned(file, old)
    if not entries.data_file and old % entries.cluster_size:
        steps = _empty_tail(file, tables, draft, old, inflate, encrypted)
    if not all_mapped:
        # Another writer may have left entries behind the end; nothing of them may show.
        _clear(tables, draft, before, clusters, hides=False)
    if needed > len(tables.l1):
        _move_l1(tables, draft, needed)
    if all_mapped:
        parts = incomplete(file, tables.l1, entries, clusters)
        tables.own(draft, {first // entries.per_table for first, _ in parts})
        for first, count in parts:
            tables.map_all(draft, first, first + count)
    if draft.moved_l1:
        draft.fresh[tables.l1_offset] = bytearray(table_bytes(tables.l1))
        draft.roots.clear()
    draft.head[SIZE_AT] = size.to_bytes(8, "big")
    return steps


def _unaligned(file: HostFile, old: int) -> Unsupported:
    text = f"its end at {old} lies inside of an encrypted cluster, whose rest cannot be zeroed"
    return Unsupported(file, "size", text)


def shrink(tables: Tables, draft: Draft, old: int, size: int, *, hides: bool) -> None:
    """Draft a smaller disk.  What is behind its end is lost, and is given back first."""
    cluster = tables.entries.cluster_size
    _clear(tables, draft, -(-size // cluster), -(-old // cluster), hides=hides)
    draft.head[SIZE_AT] = size.to_bytes(8, "big")


def _parts(tables: Tables, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Clusters first … last-1 by table."""
    while first < last:
        stop = min(last, round_up(first + 1, tables.entries.per_table))
        yield first, stop
        first = stop


def _clear(tables: Tables, draft: Draft, first: int, last: int, *, hides: bool) -> None:
    per_table = tables.entries.per_table
    last = min(last, len(tables.l1) * per_table)
    parts = []
    for low, high in _parts(tables, first, last):
        table = tables.l1[low // per_table] & OFFSET
        if table and (table in draft.tables or not tables.is_empty(low, high, hides)):
            parts.append((low, high))
    tables.own(draft, {low // per_table for low, _ in parts})
    for low, high in parts:
        tables.clear(draft, low, high, tables.entries.empty(hides))


def _empty_tail(
    file: HostFile,
    tables: Tables,
    draft: Draft,
    old: int,
    inflate: Callable[[int], bytes],
    encrypted: bool,
) -> list[Step]:
    """Make zeros of what the last cluster holds behind the old end: it will be part of the disk."""
    entries = tables.entries
    size = entries.cluster_size
    cluster, within = divmod(old, size)
    index, place = divmod(cluster, entries.per_table)
    table = tables.l1[index] & OFFSET
    if not table:
        return []
    raw = file.pread(table + place * entries.width, entries.width)
    words = struct.unpack(f">{entries.words}Q", raw)
    packed = entries.is_compressed(words[0])
    if not entries.holds(words[0]) or (not entries.extended and words[0] & ZERO and not packed):
        return []
    if encrypted:
        raise _unaligned(file, old)
    host = words[0] & OFFSET
    if not packed and words[0] & COPIED and tables.alone(words[0]):
        return [Write(host + within, bytes(size - within))]
    content = bytearray(inflate(cluster) if packed else file.pread_padded(host, size))
    content[within:] = bytes(size - within)
    (new,) = tables.counts.allocate(draft, 1)
    tables.own(draft, (index,))
    draft.fresh[new * size] = content
    mapped = entries.mapped(new * size)
    if entries.extended and not packed:
        mapped = (mapped[0], words[1])
    tables.set(draft, cluster, mapped)
    return []


def _move_l1(tables: Tables, draft: Draft, needed: int) -> None:
    """A longer L1 table at another place; it is written when all its entries are known."""
    size = tables.entries.cluster_size
    old = range(tables.l1_offset // size, -(-(tables.l1_offset + len(tables.l1) * ENTRY) // size))
    draft.retired += old
    tables.l1.extend(array("Q", bytes((needed - len(tables.l1)) * ENTRY)))
    first = tables.counts.allocate_run(draft, -(-needed * ENTRY // size))
    tables.l1_offset = first * size
    draft.moved_l1 = True
    draft.head[L1_SIZE_AT] = needed.to_bytes(4, "big")
    draft.head[L1_OFFSET_AT] = tables.l1_offset.to_bytes(8, "big")


# Parent


def rebase(file: HostFile, head: bytes, header: Header, parent: Image | None, name: str) -> Plan:
    """A header that names another parent; its first sector is `head` now.

    Bytes behind the first sector that the old header uses stay as they are until the first sector,
    which is never torn, has been written.
    """
    cluster = header.cluster_size
    old = head + file.pread_padded(SECTOR, cluster - SECTOR)
    offset, length = struct.unpack_from(">QI", old, BACKING_AT)
    used = [(header.length, _end_of_extensions(old, header.length, offset or cluster))]
    if offset and length:
        used.append((offset, offset + length))
    encoded = b""
    first: dict[int, bytes] = {}
    if parent is not None:
        encoded, first = backing(file, parent, name)
    others = {kind: data for kind, data in header.extensions.items() if kind != BACKING_FORMAT}
    few = {kind: data for kind, data in others.items() if kind != FEATURE_NAMES}
    for extensions in ({**first, **others}, {**first, **few}):
        area = extension_area(extensions)
        end = header.length + len(area)
        for at in (end, max(end, *(stop for _, stop in used)), max(end, SECTOR)):
            if not encoded:
                at = end
            if at + len(encoded) > cluster:
                continue
            new = bytearray(old)
            new[header.length : end] = area
            new[at : at + len(encoded)] = encoded
            struct.pack_into(">QI", new, BACKING_AT, at if encoded else 0, len(encoded))
            if _keeps(old, bytes(new), used):
                steps: list[Step] = []
                if new[SECTOR:] != old[SECTOR:]:
                    steps = [Write(SECTOR, bytes(new[SECTOR:])), Barrier]
                return Plan(*steps, Write(0, bytes(new[:SECTOR])), Barrier)
    raise Unsupported(
        file,
        "header",
        "no room to write another parent's name without losing the old one first",
        hint=f"qemu-img rebase -u -b NAME {file}",
    )


def _keeps(old: bytes, new: bytes, used: list[tuple[int, int]]) -> bool:
    """Whether nothing in use is changed behind the first sector."""
    return all(
        old[max(start, SECTOR) : end] == new[max(start, SECTOR) : end] for start, end in used
    )


def _end_of_extensions(raw: bytes, at: int, end: int) -> int:
    while at + EXTENSION.size <= end:
        kind, length = EXTENSION.unpack_from(raw, at)
        at += EXTENSION.size
        if kind == END_OF_EXTENSIONS:
            return at
        at += round_up(length, 8)
    return end
