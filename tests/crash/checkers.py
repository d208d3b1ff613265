"""What must hold of an image's metadata after any cut, read without the drivers.

qemu-img check says the same of a file, but one process a state is too slow for every state.
test_simulate.py holds these against it.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.crash.simulate import Store

OFFSET = 0x00FFFFFFFFFFFE00  # bits 9-55 of an L1, L2 or refcount table entry
COPIED = 1 << 63
COMPRESSED = 1 << 62


@dataclass(slots=True)
class Findings:
    """`wrong` is corruption; `leaked` is space that nothing uses and nothing will reuse."""

    wrong: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)


def check_qcow2(store: Store) -> Findings:
    """Every host cluster's refcount against the references to it; COPIED flags; the file's end.

    Source: qemu's docs/interop/qcow2.rst.  Images without bitmaps; data in an external data file
    is not looked at.
    """
    found = Findings()
    header = store.read(0, 112)
    (
        magic,
        version,
        _,
        _,
        bits,
        _,
        _,
        l1_size,
        l1,
        table,
        table_clusters,
        snapshots,
        snapshots_at,
    ) = struct.unpack_from(">4sIQIIQIIQQIIQ", header)
    assert magic == b"QFI\xfb"
    order = struct.unpack_from(">I", header, 96)[0] if version > 2 else 4
    features = struct.unpack_from(">Q", header, 72)[0] if version > 2 else 0
    data_file, extended = bool(features & 4), bool(features & 16)
    if features & ~0b11100:
        found.wrong.append("marked as dirty or corrupt, or with unknown features")
    cluster = 1 << bits
    counts = refcounts(store, table, table_clusters, cluster, order)
    used: Counter[int] = Counter()

    def use(offset: int, length: int, what: str) -> None:
        if offset % 512 or offset >= store.size:
            found.wrong.append(f"{what} at {offset:#x}, file ends at {store.size:#x}")
            return
        for index in range(offset >> bits, (offset + length - 1 >> bits) + 1):
            used[index] += 1

    def copied(entry: int, offset: int, what: str) -> None:
        if bool(entry & COPIED) != (counts.get(offset >> bits, 0) == 1):
            found.wrong.append(
                f"{what}: COPIED is {bool(entry & COPIED)}, refcount "
                f"{counts.get(offset >> bits, 0)}"
            )

    use(0, cluster, "header")
    use(table, table_clusters * cluster, "refcount table")
    for i, entry in enumerate(used_entries(store, table, table_clusters << bits, ">Q")):
        if entry:
            use(entry, cluster, f"refcount block {i}")
    states = [("", l1, l1_size)]
    at = snapshots_at
    for number in range(snapshots):
        l1_of, size_of, id_length, name_length, extra = struct.unpack(
            ">QIHH20xI", store.read(at, 40)
        )
        states.append((f"snapshot {number}: ", l1_of, size_of))
        at += -(-(40 + id_length + name_length + extra) // 8) * 8
    if snapshots:
        use(snapshots_at, at - snapshots_at, "snapshot table")
    words = 2 if extended else 1
    per_table = cluster // 8 // words
    for state, l1_of, size_of in states:
        if size_of:
            use(l1_of, size_of * 8, f"{state}L1 table")
        for i, entry in enumerate(used_entries(store, l1_of, size_of * 8, ">Q")):
            l2 = entry & OFFSET
            if not l2:
                continue
            use(l2, cluster, f"{state}L2 table {i}")
            if not state:
                copied(entry, l2, f"L1 entry {i}")
            if l2 % cluster:
                found.wrong.append(f"{state}L2 table {i} at {l2:#x}")
            table_words = used_entries(store, l2, cluster, ">Q")
            for j in range(0, len(table_words), words):
                entry2 = table_words[j]
                what = f"{state}guest cluster {i * per_table + j // words}"
                bitmap = 0
                if extended:
                    bitmap = table_words[j + 1] if j + 1 < len(table_words) else 0
                    if bitmap >> 32 & bitmap:
                        found.wrong.append(f"{what}: subclusters that are there and zero")
                if entry2 & COMPRESSED:
                    shift = 62 - (bits - 8)
                    offset = entry2 & ((1 << shift) - 1)
                    sectors = (entry2 >> shift) & ((1 << (bits - 8)) - 1)
                    end = (offset & ~511) + (sectors + 1) * 512
                    for index in range(offset >> bits, (end - 1 >> bits) + 1):
                        used[index] += 1
                    continue
                offset = entry2 & OFFSET
                if data_file:
                    if entry2 & COPIED and offset != (i * per_table + j // words) * cluster:
                        found.wrong.append(f"{what}: at {offset:#x} of the data file")
                    continue
                if not offset:
                    if bitmap & 0xFFFFFFFF:
                        found.wrong.append(f"{what}: subclusters that are nowhere")
                    continue
                if entry2 & 1 and version < 3:
                    found.wrong.append(f"{what}: zero flag in version 2")
                if offset % cluster:
                    found.wrong.append(f"{what} at {offset:#x}, not a cluster")
                use(offset, cluster, what)
                if not state:
                    copied(entry2, offset, what)
    for index in used.keys() | counts.keys():
        have, want = counts.get(index, 0), used[index]
        if have < want:
            found.wrong.append(f"cluster {index:#x}: refcount {have}, {want} references")
        elif have > want:
            found.leaked.append(f"cluster {index:#x}: refcount {have - want} too high")
    return found


def refcounts(
    store: Store, table: int, table_clusters: int, cluster: int, order: int
) -> dict[int, int]:
    """Host cluster -> refcount, where it is not zero."""
    counts = {}
    per_block = cluster * 8 >> order
    for i, offset in enumerate(used_entries(store, table, table_clusters * cluster, ">Q")):
        if not offset or offset >= store.size:
            continue
        for j, count in enumerate(unpack_counts(store.read(offset, cluster).rstrip(b"\0"), order)):
            if count:
                counts[i * per_block + j] = count
    return counts


def used_entries(store: Store, offset: int, length: int, code: str) -> Sequence[int]:
    """A table without the zeros at its end, which are most of it."""
    size = struct.calcsize(code)
    raw = store.read(offset, length).rstrip(b"\0")
    count = -(-len(raw) // size)
    return struct.unpack(f"{code[0]}{count}{code[1]}", raw.ljust(count * size, b"\0"))


def unpack_counts(raw: bytes, order: int) -> Sequence[int]:
    if order >= 3:
        count = -(-len(raw) * 8 >> order)
        return struct.unpack(f">{count}{'BHIQ'[order - 3]}", raw.ljust(count << order >> 3, b"\0"))
    width = 1 << order
    mask = (1 << width) - 1
    # The first count is in the lowest bits.
    return [(byte >> shift) & mask for byte in raw for shift in range(0, 8, width)]


def check_vdi(store: Store) -> Findings:
    """No block twice, every block inside the file, and the count no lower than the highest + 1.

    Source: VirtualBox, VDICore.h.  The count is where qemu and VirtualBox put the next block, so
    one that is too low costs the data of a live block; one that is too high costs a gap.
    """
    found = Findings()
    map_offset, data_offset = struct.unpack_from("<II", store.read(0x154, 8))
    block, extra, blocks, allocated = struct.unpack_from("<IIII", store.read(0x178, 16))
    entries = struct.unpack(f"<{blocks}I", store.read(map_offset, 4 * blocks))
    owner: dict[int, int] = {}
    for i, entry in enumerate(entries):
        if entry >= 0xFFFFFFFE:
            continue
        if entry in owner:
            found.wrong.append(f"guest blocks {owner[entry]} and {i} both at block {entry}")
        owner[entry] = i
        if data_offset + (entry + 1) * (block + extra) > store.size:
            found.wrong.append(f"guest block {i} at block {entry}, past the file's end")
    highest = max(owner, default=-1)
    if allocated <= highest:
        found.wrong.append(f"count {allocated}, but block {highest} is used")
    if allocated != len(owner):
        found.leaked.append(f"count {allocated}, {len(owner)} blocks are used")
    room = max(0, store.size - data_offset) // (block + extra)
    if room > highest + 1:
        found.leaked.append(f"room for {room} blocks, block {highest} is the last one used")
    return found


def check_vhdx(store: Store, before: int) -> Findings:
    """Headers, region tables, BAT.  What a log still has to bring is not looked into.

    `before`: the length that the file had when it was opened.  What lies behind the last block
    then, after a cut or from its maker, is used by later blocks, so it does not grow.
    """
    found = Findings()
    headers = [header for at in (0x10000, 0x20000) if (header := vhdx_header(store, at))]
    if not headers:
        found.wrong.append("no valid header")
        return found
    if max(headers)[1]:
        return found  # the log decides
    regions = dict(vhdx_regions(store))
    bat, bat_length = regions[VHDX_BAT]
    metadata = regions[VHDX_METADATA]
    log_length, log = struct.unpack_from("<IQ", store.read(max(headers)[2] + 68, 12))
    taken = [(0, 1 << 20), (bat, bat_length), metadata, (log, log_length)]
    block, ratio = vhdx_geometry(store, *metadata)
    entries = used_entries(store, bat, bat_length, "<Q")
    # Sector bitmaps: differencing images only.
    bitmaps = {i: e >> 20 << 20 for i, e in enumerate(entries) if i % (ratio + 1) == ratio and e}
    taken += [(at, 1 << 20) for at in bitmaps.values()]
    owner: dict[int, int] = {}
    for i, entry in enumerate(entries):
        state, at = entry & 7, entry >> 20 << 20
        if i % (ratio + 1) == ratio:
            continue
        if state == 7 and i // (ratio + 1) * (ratio + 1) + ratio not in bitmaps:
            found.wrong.append(f"BAT entry {i}: partially present, without a bitmap")
        if state not in (0, 1, 2, 3, 6, 7):
            found.wrong.append(f"BAT entry {i}: state {state}")
        if state == 2 and at:
            found.wrong.append(f"BAT entry {i}: ZERO with offset {at:#x}")
        if state not in (6, 7):
            continue
        if at in owner:
            found.wrong.append(f"BAT entries {owner[at]} and {i} both at {at:#x}")
        owner[at] = i
        if at + block > store.size:
            found.wrong.append(f"BAT entry {i}: {at:#x}, file ends at {store.size:#x}")
        if any(at < start + length and start < at + block for start, length in taken):
            found.wrong.append(f"BAT entry {i}: {at:#x} lies in metadata")
    end = max([*owner, *(start + length - block for start, length in taken)]) + block
    if store.size > max(end, before):
        found.leaked.append(f"file ends at {store.size:#x}, the last byte used at {end:#x}")
    return found


def check_vhd(store: Store) -> Findings:
    """A whole footer at both ends, a whole header, no block over another one or over metadata.

    Source: the VHD specification.  Locators are taken to lie behind the table.
    """
    found = Findings()
    tail = store.read(store.size - 512, 512)
    if not vhd_sum(tail, 64) or tail[:8] != b"conectix":
        found.wrong.append("no whole footer at the end")
        return found
    if struct.unpack_from(">I", tail, 60)[0] == 2:
        if struct.unpack_from(">Q", tail, 48)[0] + 512 != store.size:
            found.wrong.append("the footer is not right behind the fixed disk")
        return found
    if store.read(0, 512) != tail:
        found.wrong.append("the two footers differ")
    header = store.read(struct.unpack_from(">Q", tail, 16)[0], 1024)
    if header[:8] != b"cxsparse" or not vhd_sum(header, 36):
        found.wrong.append("no whole header")
        return found
    table, _, entries, block = struct.unpack_from(">QIII", header, 16)
    stride = -(-block // 4096 // 512) * 512 + block
    end = table + -(-entries * 4 // 512) * 512
    for at in range(576, 768, 24):
        code, _, length, place = struct.unpack_from(">4sII4xQ", header, at)
        end = max(end, place + -(-length // 512) * 512) if code != bytes(4) else end
    previous = end
    for start in sorted(
        entry * 512
        for entry in struct.unpack(f">{entries}I", store.read(table, 4 * entries))
        if entry != 0xFFFFFFFF
    ):
        if start < previous:
            found.wrong.append(f"block at {start:#x}, what is before it ends at {previous:#x}")
        previous = start + stride
    if previous > store.size - 512:
        found.wrong.append(f"the last block ends at {previous:#x}, the file at {store.size:#x}")
    elif previous < store.size - 512:
        found.leaked.append(f"footer at {store.size - 512:#x}, blocks end at {previous:#x}")
    return found


def vhd_sum(raw: bytes, at: int) -> bool:
    total = sum(raw) - sum(raw[at : at + 4])
    return int(struct.unpack_from(">I", raw, at)[0]) == ~total & 0xFFFFFFFF


def check_vmdk(store: Store) -> Findings:
    """One hosted sparse file: no two grains or tables in one place, all of it in the file.

    Source: VMware, Virtual Disk Format 5.0.  The copies of the tables may differ only while the
    header says that the file was not closed; a grain that one of them has must be sound as well.
    """
    found = Findings()
    header = store.read(0, 512)
    magic, _, flags, capacity, grain, text, text_size, per_table, redundant, directory, _ = (
        struct.unpack_from("<4sIIQQQQIQQQ", header)
    )
    assert magic == b"KDMV"
    unclean = header[72]
    tables = -(-capacity // (grain * per_table))
    used: dict[int, str] = {}  # sector -> what
    owners: dict[int, str] = {}

    def use(sector: int, count: int, what: str) -> None:
        if (sector + count) * 512 > store.size:
            found.wrong.append(f"{what} at sector {sector}, the file ends at {store.size:#x}")
        for each in range(sector, sector + count):
            if each in used:
                found.wrong.append(f"{what} overlaps {used[each]} at sector {each}")
                return
            used[each] = what

    use(0, 1, "header")
    use(text, text_size, "descriptor")
    copies = []
    for at, what in ((directory, "directory"), (redundant, "second directory")):
        if what == "second directory" and not flags & 2:
            continue
        use(at, -(-tables * 4 // 512), what)
        entries: list[int] = []
        for i, table in enumerate(struct.unpack(f"<{tables}I", store.read(at * 512, tables * 4))):
            if table:
                use(table, -(-per_table * 4 // 512), f"{what}'s table {i}")
            raw = store.read(table * 512, per_table * 4) if table else bytes(per_table * 4)
            entries += struct.unpack(f"<{per_table}I", raw)
        copies.append(entries)
    if copies[0] != copies[-1] and not unclean:
        found.wrong.append("the tables differ, and the file says that it was closed")
    for i, pair in enumerate(zip(copies[0], copies[-1], strict=True)):
        for entry in set(pair) - {0, 1}:
            what = f"guest grain {i}"
            if owners.setdefault(entry, what) is what:
                use(entry, grain, what)
            elif owners[entry] != what:
                found.wrong.append(f"{what} is {owners[entry]}")
    slots = {sector // grain for sector in used}
    first = (text + text_size) // grain + 1
    for slot in range(first, -(-store.size // (grain * 512))):
        if slot not in slots:
            found.leaked.append(f"nothing uses the grain at {slot * grain * 512:#x}")
    return found


VHDX_BAT = bytes.fromhex("6677c22d23f600429d64115e9bfd4a08")
VHDX_METADATA = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
VHDX_FILE_PARAMETERS = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b")
VHDX_SECTOR_SIZE = bytes.fromhex("1dbf41816fa90947ba47f233a8faab5f")


def vhdx_header(store: Store, at: int) -> tuple[int, bool, int] | None:
    """(sequence number, a log is to be replayed, offset) of a header whose checksum is right."""
    raw = store.read(at, 4096)
    signature, checksum, sequence = struct.unpack_from("<4sIQ", raw)
    if signature != b"head" or crc32c(raw[:4] + bytes(4) + raw[8:]) != checksum:
        return None
    return sequence, raw[48:64] != bytes(16), at


def vhdx_regions(store: Store) -> Iterator[tuple[bytes, tuple[int, int]]]:
    raw = store.read(0x30000, 65536)
    (count,) = struct.unpack_from("<I", raw, 8)
    for i in range(count):
        guid, offset, length = struct.unpack_from("<16sQI", raw, 16 + 32 * i)
        yield guid, (offset, length)


def vhdx_geometry(store: Store, offset: int, length: int) -> tuple[int, int]:
    """Block size and payload entries between two sector bitmap entries."""
    raw = store.read(offset, length)
    (count,) = struct.unpack_from("<H", raw, 10)
    items = {}
    for i in range(count):
        guid, at = struct.unpack_from("<16sI", raw, 32 + 32 * i)
        items[guid] = struct.unpack_from("<I", raw, at)[0]
    block = items[VHDX_FILE_PARAMETERS]
    return block, (1 << 23) * items[VHDX_SECTOR_SIZE] // block


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC32C = _crc32c_table()
assert crc32c(b"123456789") == 0xE3069283
