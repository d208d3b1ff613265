"""Hostile VHDX images.  Checksums are right unless they are what is tried."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from crc32c import crc32c

from tests.corpus import bases
from tests.corpus.bases import KIB, MIB, Base, Maker
from tests.corpus.mutations import (
    ANY,
    OPENS,
    PART,
    Edit,
    Field,
    Mutation,
    Writes,
    grid,
    nothing,
    writing,
)
from tests.formats import make_vhdx
from tests.formats.make_vhdx import LOG_GUID, PARTIAL, PRESENT, STRANGER

U32, U64 = 0xFFFFFFFF, (1 << 64) - 1
HEADERS, TABLES = (64 * KIB, 128 * KIB), (192 * KIB, 256 * KIB)
LENGTHS = {**dict.fromkeys(HEADERS, 4096), **dict.fromkeys(TABLES, 64 * KIB)}
OVERLAPS = "overlaps"
REPLAY = "must be replayed before writing"

HEADER = (
    Field("signature", 0, 4, "header 1 at 65536: signature", {}),
    Field(
        "sequence",
        8,
        8,
        OPENS,
        {
            (1 << 62) + 1: (OPENS, "sequence number"),
            (1 << 64) - 1: (OPENS, "sequence number"),
            (1 << 64) - 512: (OPENS, "sequence number"),
            1 << 63: (OPENS, "sequence number"),
            (1 << 63) - 1: (OPENS, "sequence number"),
        },
    ),
    Field("log_version", 64, 2, OPENS, {}),  # no log: nothing to misread
    Field("version", 66, 2, "version", {1: OPENS}),
    Field(
        "log_length",
        68,
        4,
        "header . at .*log",
        {
            0: (OPENS, "without a log"),
            MIB - 1: "1 MiB",
            MIB: OPENS,
            2 * MIB: OVERLAPS,  # the BAT lies behind it
            4 * MIB: OVERLAPS,
            (1 << 32) - MIB: "log ends at",
        },
    ),
    Field(
        "log_offset",
        72,
        8,
        "header . at .*log",
        {
            0: "inside the header section",
            MIB + 1: "1 MiB",
            2 * MIB: OVERLAPS,
            3 * MIB: OVERLAPS,
            1 << 62: "log ends at",
            (1 << 64) - MIB: "log ends at",
        },
    ),
)
REGION_TABLE = (
    Field("signature", 0, 4, "region table 1 at 196608: signature", {}),
    Field(
        "entry_count",
        8,
        4,
        "region table 1 at 196608.*entries",
        {
            0: "no BAT",
            1: "no metadata",
            2: OPENS,
            3: "entry 2.*0 bytes",
            4: "entry 2.*0 bytes",
            2047: "entry 2.*0 bytes",
            2048: "2048 entries",
        },
    ),
)
BAT = (
    Field("guid", 0, 4, "required region|no BAT", {}),
    Field(
        "offset",
        16,
        8,
        "entry 0",
        {
            0: "inside the header section",
            MIB: OVERLAPS,  # the log
            2 * MIB: OPENS,
            3 * MIB: OVERLAPS,
            4 * MIB: OPENS,  # in what is data, or a hole
            1 << 62: "BAT ends at",
            (1 << 64) - MIB: "BAT ends at",
        },
    ),
    Field(
        "length",
        24,
        4,
        "entry 0",
        {0: "0 bytes", MIB: OPENS, 2 * MIB: OVERLAPS, (1 << 32) - MIB: "BAT ends at"},
    ),
    Field("required", 28, 4, OPENS, {}),
)
METADATA = (
    Field("guid", 0, 4, "required region|no metadata", {}),
    Field(
        "offset",
        16,
        8,
        "entry 1",
        {
            0: "inside the header section",
            MIB: OVERLAPS,
            2 * MIB: OVERLAPS,
            3 * MIB: OPENS,
            4 * MIB: "metadata table at 4194304: signature",
            1 << 62: "metadata region ends at",
            (1 << 64) - MIB: "metadata region ends at",
        },
    ),
    Field("length", 24, 4, "entry 1", {0: "0 bytes", MIB: OPENS, (1 << 32) - MIB: "ends at"}),
    Field("required", 28, 4, OPENS, {}),
)
ITEM_TABLE = (
    Field("signature", 0, 8, "metadata table at 3145728: signature", {}),
    Field(
        "entry_count",
        10,
        2,
        "metadata table at 3145728: .* entries",
        {
            0: "no file parameters",
            1: "no virtual disk size",
            4: "no physical sector size",
            5: OPENS,
            6: OPENS,  # of zeros: an unknown item that is not required
            2047: OPENS,
            2048: "2048 entries",
        },
    ),
)
ITEM = (
    Field("guid", 0, 4, "required system metadata item", {}),
    Field(
        "offset",
        16,
        4,
        "outside the metadata region",
        {
            64 * KIB - 1: "outside the metadata region",
            64 * KIB: OPENS,
            64 * KIB + 32: "file parameters at",  # other items
            MIB - 8: "must be",
            MIB - 7: "outside the metadata region",
        },
    ),
    Field("length", 20, 4, "has|outside the metadata region", {8: OPENS, 7: "has 7 bytes"}),
    Field(
        "flags",
        24,
        4,
        "required user metadata item",
        {0: OPENS, 1: "no file parameters", 2: OPENS, 4: OPENS, 6: OPENS, 1 << 31: OPENS},
    ),
)
VALUES = {
    "parameters": (
        Field(
            "block_size",
            0,
            4,
            "file parameters.*block size",
            {
                512 * KIB: "block size",
                MIB + 1: "block size",
                MIB: OPENS,
                2 * MIB: OPENS,
                256 * MIB: OPENS,
                512 * MIB: "block size",
            },
        ),
        Field(
            "flags",
            4,
            4,
            "file parameters",
            {0: OPENS, 1: OPENS, 2: "no parent locator", 3: "no parent locator", 4: "flags 0x4"},
        ),
    ),
    "size": (
        Field(
            "size",
            0,
            8,
            "virtual disk size",
            {
                512: OPENS,
                513: "multiple of the sector",
                8 * MIB: OPENS,
                # A BAT of 1 MiB: one of 4097 entries is for a bitmap.
                (131072 - 31) * MIB: OPENS,
                (131072 - 31) * MIB + 512: "BAT at",
                1 << 32: OPENS,
                1 << 31: OPENS,
                (1 << 46) + 512: "virtual disk size",
                1 << 46: "BAT at",
            },
        ),
    ),
    "sector": (
        Field("sector", 0, 4, "logical sector size", {512: OPENS, 4096: OPENS, 1024: "1024"}),
    ),
    "physical": (
        Field("physical", 0, 4, "physical sector size", {512: OPENS, 4096: OPENS, 8192: "8192"}),
    ),
}
OTHER_BYTES = {
    ("offset", 4 * MIB),
    ("block_size", 2 * MIB),
    ("block_size", 256 * MIB),
}


def sealed(raw: bytes) -> bytes:
    """With its checksum in bytes 4 to 8."""
    return raw[:4] + struct.pack("<I", crc32c(raw[:4] + bytes(4) + raw[8:])) + raw[8:]


def patched(raw: bytes, *changes: tuple[int, bytes]) -> bytes:
    copy = bytearray(raw)
    for offset, data in changes:
        copy[offset : offset + len(data)] = data
    return bytes(copy)


def both(places: Sequence[int], *changes: tuple[int, bytes]) -> Edit:
    """The same change in both copies of a structure.

    Both headers become the newer one, with different numbers unless the number is changed.
    """

    def edit(base: Base) -> Writes:
        newest = max(places, key=lambda at: base.number(at + 8, 8)) if places == HEADERS else 0
        writes = []
        for at in places:
            source = newest or at
            raw = base.content[source : source + LENGTHS[at]]
            writes.append((at, sealed(patched(raw, *changes))))
        return writes

    return edit


def one(place: int, *changes: tuple[int, bytes], seal: bool = True) -> Edit:
    def edit(base: Base) -> Writes:
        raw = patched(base.content[place : place + LENGTHS[place]], *changes)
        return [(place, sealed(raw) if seal else raw)]

    return edit


def put(name: str, offset: int, data: bytes) -> Edit:
    return lambda base: [(base.at[name] + offset, data)]


def put_change(name: str, change: tuple[int, bytes]) -> Edit:
    return put(name, *change)


def in_place(base: Base) -> int:
    """The BAT entry of block 5."""
    return base.number(base.at["bat"] + 40, 8)


def with_state(state: int, base: Base) -> int:
    return in_place(base) & ~7 | state


def bat(block: int, entry: int | Callable[[Base], int]) -> Edit:
    def edit(base: Base) -> Writes:
        value = entry if isinstance(entry, int) else entry(base)
        return [(base.at["bat"] + 8 * block, struct.pack("<Q", value))]

    return edit


def mutations() -> Iterator[Mutation]:
    for what, fields, edit in (
        ("header", HEADER, lambda change: both(HEADERS, change)),
        ("region table", REGION_TABLE, lambda change: both(TABLES, change)),
        ("BAT's region", BAT, lambda change: both(TABLES, (16 + change[0], change[1]))),
        ("metadata's region", METADATA, lambda change: both(TABLES, (48 + change[0], change[1]))),
        ("metadata table", ITEM_TABLE, lambda change: put("metadata", *change)),
        ("first item", ITEM, lambda change: put("metadata", 32 + change[0], change[1])),
    ):
        yield from fields_of(what, fields, edit)
    for name, values in VALUES.items():
        yield from fields_of(name, values, partial(put_change, name))
    yield from copies()
    yield from items()
    yield from entries()
    yield from logs()
    yield from files()
    yield from large()
    yield from locators()
    yield from bitmaps()


def fields_of(
    what: str,
    fields: Sequence[Field],
    edit: Callable[[tuple[int, bytes]], Edit],
) -> Iterator[Mutation]:
    for field, value, read, write in grid(fields):
        yield Mutation(
            f"vhdx: {what}: {field.name}={value:#x}",
            "vhdx",
            edit((field.offset, value.to_bytes(field.width, "little"))),
            read,
            write,
            guest=(field.name, value) not in OTHER_BYTES,
        )


def copies() -> Iterator[Mutation]:
    """Two headers, two region tables: one may be wrong, both may not."""
    for number, place in enumerate(HEADERS, 1):
        yield Mutation(
            f"vhdx: header {number} with a bad checksum",
            "vhdx",
            one(place, (4, b"evil"), seal=False),
        )
        yield Mutation(f"vhdx: header {number} is zero", "vhdx", writing((place, bytes(4096))))
    for number, place in enumerate(TABLES, 1):
        yield Mutation(
            f"vhdx: region table {number} with a bad checksum",
            "vhdx",
            one(place, (4, b"evil"), seal=False),
        )
    yield Mutation(
        "vhdx: both headers with bad checksums",
        "vhdx",
        lambda base: [(at + 4, b"evil") for at in HEADERS],
        "header 1 at 65536: checksum.*header 2 at 131072: checksum",
    )
    yield Mutation(
        "vhdx: both region tables with bad checksums",
        "vhdx",
        lambda base: [(at + 4, b"evil") for at in TABLES],
        "region table 1 at 196608: checksum.*region table 2 at 262144: checksum",
    )
    yield Mutation(
        "vhdx: two headers, one number",
        "vhdx",
        lambda base: [
            *one(HEADERS[0], (8, struct.pack("<Q", 9)))(base),
            *one(HEADERS[1], (8, struct.pack("<Q", 9)), (16, b"\1"))(base),
        ],
        "both have sequence number 9",
    )
    yield Mutation(
        "vhdx: the second region table is another, but the first is used",
        "vhdx",
        one(TABLES[1], (16 + 16, struct.pack("<Q", 1 << 62))),
    )
    yield Mutation(
        "vhdx: the second region table is used, and is hostile",
        "vhdx",
        lambda base: [
            (TABLES[0] + 4, b"evil"),
            *one(TABLES[1], (16 + 16, struct.pack("<Q", 1 << 62)))(base),
        ],
        "region table 2 at 262144, entry 0",
    )
    yield Mutation("vhdx: signature", "vhdx", lambda base: [(0, b"vhdxFILE")], "byte 0: signature")
    yield Mutation(
        "vhdx: a creator made to harm terminals",
        "vhdx",
        lambda base: [(8, "\x1b[2Jevil\r\n".encode("utf-16-le") + b"\0\xd8" * 8)],
    )
    region = struct.pack("<16sQII", STRANGER.bytes_le, 4 * MIB, MIB, 0)
    for name, entry, count, read in (
        ("an unknown region, not required", region, 3, OPENS),
        ("an unknown region, required", region[:-4] + b"\1\0\0\0", 3, "entry 2: required region"),
        (
            "an unknown region over the log",
            region[:16] + struct.pack("<QII", MIB, MIB, 0),
            3,
            OVERLAPS,
        ),
        (
            "an unknown region far away",
            region[:16] + struct.pack("<QII", 1 << 60, MIB, 0),
            3,
            "entry 2.*ends at",
        ),
    ):
        yield Mutation(
            f"vhdx: {name}",
            "vhdx",
            both(TABLES, (8, struct.pack("<I", count)), (80, entry)),
            read,
        )
    many = b"".join(struct.pack("<IIIIQII", i, 1, 2, 3, (8 + i) * MIB, MIB, 0) for i in range(2045))
    yield Mutation(
        "vhdx: 2045 more regions",
        "vhdx",
        both(TABLES, (8, struct.pack("<I", 2047)), (80, many)),
        OPENS,
        ANY,
        guest=False,
        size=2100 * MIB,
    )
    yield Mutation(
        "vhdx: the BAT a second time",
        "vhdx",
        lambda base: both(
            TABLES, (8, struct.pack("<I", 3)), (80, base.content[TABLES[0] + 16 : TABLES[0] + 48])
        )(base),
        "a second time",
    )
    yield Mutation(
        "vhdx: BAT and metadata are one region",
        "vhdx",
        both(TABLES, (16 + 16, struct.pack("<Q", 3 * MIB))),
        OVERLAPS,
    )
    yield Mutation(
        "vhdx: the BAT lies in the metadata's table",
        "vhdx",
        both(TABLES, (16 + 16, struct.pack("<QI", 3 * MIB, MIB))),
        OVERLAPS,
    )


def items() -> Iterator[Mutation]:
    """The metadata table."""

    def raw(index: int, data: bytes, at: int = 0) -> Edit:
        return put("metadata", 32 + 32 * index + at, data)

    unknown = struct.pack("<16sIIII", STRANGER.bytes_le, 64 * KIB, 8, 0, 0)
    for name, edit, read in (
        ("required and unknown", raw(4, unknown[:24] + struct.pack("<I", 4)), "required system"),
        (
            "the user's, required and unknown",
            raw(4, unknown[:24] + struct.pack("<I", 5)),
            "required user",
        ),
        ("of the user, but known", raw(0, struct.pack("<I", 1), 24), "no file parameters"),
        ("twice", raw(1, b"", 0), OPENS),
    ):
        yield Mutation(f"vhdx: an item {name}", "vhdx", edit, read)
    yield Mutation(
        "vhdx: all items at one place",
        "vhdx",
        lambda base: [
            (base.at["metadata"] + 32 + 32 * i + 16, struct.pack("<I", 64 * KIB)) for i in range(5)
        ],
        ANY,
    )
    yield Mutation(
        "vhdx: an item a second time",
        "vhdx",
        lambda base: [
            (base.at["metadata"] + 32 + 32 * 5, base.content[base.at["metadata"] + 32 :][:32]),
            (base.at["metadata"] + 10, struct.pack("<H", 6)),
        ],
        "entry 5: file parameters a second time",
    )
    yield Mutation(
        "vhdx: 2047 unknown items",
        "vhdx",
        lambda base: [
            (base.at["metadata"] + 32 + 32 * 5, (unknown * 2042)),
            (base.at["metadata"] + 10, struct.pack("<H", 2047)),
        ],
        # The table of 64 KiB ends after 2047 entries.
        OPENS,
    )


def entries() -> Iterator[Mutation]:
    """BAT entries: block 5 is at a place of its own, block 1 at none."""
    for state in range(8):
        kept = state == 6
        yield Mutation(
            f"vhdx: block 5 has state {state}",
            "vhdx",
            bat(5, partial(with_state, state)),
            eio=(5,) if state in (4, 7) else (),
            guest=kept or state in (4, 7),
        )
        yield Mutation(
            f"vhdx: block 1 has state {state}, and no place",
            "vhdx",
            bat(1, state),
            eio=(1,) if state in (4, 6, 7) else (),
        )
    for name, at in (
        ("header section", 0),
        ("log", MIB),
        ("BAT", 2 * MIB),
        ("metadata", 3 * MIB),
    ):
        yield Mutation(
            f"vhdx: block 1 in the {name}",
            "vhdx",
            bat(1, at | PRESENT),
            OPENS,
            "BAT entry of block 1" if at else OPENS,
            eio=(1,),
        )
        # No data there, but a discard of it must not reach the place either.
        yield Mutation(f"vhdx: block 1 is zero, in the {name}", "vhdx", bat(1, at | 2), guest=True)
    for name, at in (
        ("end of the file", 12 * MIB),
        ("2^40", 1 << 40),
        ("2^62", 1 << 62),
        ("the end of numbers", U64 - MIB + 1),
    ):
        yield Mutation(
            f"vhdx: block 1 at {name}",
            "vhdx",
            bat(1, at | PRESENT),
            OPENS,
            "BAT entry of block 1",
            eio=(1,),
        )
        yield Mutation(f"vhdx: block 1 is zero, at {name}", "vhdx", bat(1, at | 2))
    yield Mutation(
        "vhdx: reserved bits",
        "vhdx",
        bat(5, lambda base: in_place(base) | 0xFFFF8),
    )
    yield Mutation(
        "vhdx: two owners",
        "vhdx",
        bat(1, in_place),
        OPENS,
        "BAT entry of block 5",
        guest=False,
    )
    yield Mutation(
        "vhdx: blocks of 2 MiB that overlap by half",
        "vhdx",
        lambda base: [
            (base.at["parameters"], struct.pack("<I", 2 * MIB)),
            *bat(0, 8 * MIB | PRESENT)(base),
            *bat(1, 9 * MIB | PRESENT)(base),
            *bat(2, 0)(base),
            *bat(3, 0)(base),
        ],
        OPENS,
        "BAT entry of block 1",
        guest=False,
    )
    yield Mutation(
        "vhdx: a block of 8 MiB that reaches over the regions",
        "vhdx",
        lambda base: [
            (base.at["parameters"], struct.pack("<I", 4 * MIB)),
            (base.at["bat"], struct.pack("<QQ", 1 * MIB | PRESENT, 0)),
        ],
        OPENS,
        "BAT entry of block 0",
        guest=False,
    )
    yield Mutation(
        "vhdx: fixed, but not in order",
        "vhdx-fixed",
        lambda base: [
            (base.at["bat"], base.content[base.at["bat"] + 8 :][:8]),
            (base.at["bat"] + 8, base.content[base.at["bat"] :][:8]),
        ],
        guest=False,
    )
    yield Mutation(
        "vhdx: fixed, in the regions",
        "vhdx-fixed",
        lambda base: [(base.at["bat"], struct.pack("<QQQ", MIB | 6, 2 * MIB | 6, 3 * MIB | 6))],
        OPENS,
        "BAT entry of block 0",
        eio=(0, 1, 2),
    )


def log_entry(
    base: Base,
    changes: Sequence[tuple[int, bytes | int]],
    *,
    sequence: int = 7,
    tail: int = 0,
    flushed: int | None = None,
    last: int | None = None,
    length: int | None = None,
    count: int | None = None,
    guid: bytes = LOG_GUID.bytes_le,
) -> bytes:
    """An entry with its checksum; each change is (offset, 4096 bytes), or (offset, zeros)."""
    number = struct.pack("<Q", sequence)
    descriptors, sectors = [], []
    for offset, change in changes:
        rest = struct.pack("<Q", offset) + number
        if isinstance(change, int):
            descriptors.append(struct.pack("<4sIQ", b"zero", 0, change) + rest)
        else:
            descriptors.append(b"desc" + change[4092:] + change[:8] + rest)
            sectors.append(b"data" + number[4:] + change[8:4092] + number[:4])
    table = b"".join(descriptors)
    size = -(-(64 + len(table)) // 4096) * 4096
    body = table.ljust(size - 64, b"\0") + b"".join(sectors)
    head = struct.pack(
        "<4sIIIQII16sQQ",
        b"loge",
        0,
        64 + len(body) if length is None else length,
        tail,
        sequence,
        len(changes) if count is None else count,
        0,
        guid,
        base.size if flushed is None else flushed,
        base.size if last is None else last,
    )
    return sealed(head + body)


def logged(*parts: tuple[int, Callable[[Base], bytes]]) -> Edit:
    """A log of these entries, each at its place in the ring."""
    return lambda base: [
        (base.at["log"], bytes(8192)),
        *((base.at["log"] + at, make(base)) for at, make in parts),
    ]


def logs() -> Iterator[Mutation]:
    """What a log that is to be replayed asks for.  The base is vhdx-logged."""
    page = b"\x5a" * 4096

    def single(changes: Sequence[tuple[int, bytes | int]], **options: Any) -> Edit:
        return logged((0, lambda base: log_entry(base, changes, **options)))

    def entry(sequence: int, tail: int) -> Callable[[Base], bytes]:
        return lambda base: log_entry(base, [(5 * MIB, page)], sequence=sequence, tail=tail)

    def as_it_is(sequence: int, base: Base) -> bytes:
        return log_entry(base, [(3 * MIB, base.content[3 * MIB :][:4096])], sequence=sequence)

    def named(name: str, edit: Edit, read: str = OPENS, **options: Any) -> Mutation:
        return Mutation(f"vhdx-logged: {name}", "vhdx-logged", edit, read, **options)

    inside = "where the headers or the log lie"
    for name, at in (
        ("the file identifier", 0),
        ("header 1", 64 * KIB),
        ("header 2", 128 * KIB),
        ("the last page before the region tables", 188 * KIB),
        ("the log itself", MIB),
        ("the log's end", 2 * MIB - 4096),
    ):
        yield named(f"changes {name}", single([(at, page)]), inside)
        yield named(f"zeroes {name}", single([(at, 4096)]), inside)
    yield named("zeroes from before the log to behind it", single([(192 * KIB, 4 * MIB)]), inside)
    yield named("breaks region table 1", single([(192 * KIB, page)]), guest=False)
    yield named(
        "breaks both region tables",
        single([(192 * KIB, page), (256 * KIB, page)]),
        "region table 1 at 196608: signature",
    )
    yield named("breaks the metadata table", single([(2 * MIB, page)]), "metadata table.*signature")
    yield named(
        "makes the block size 0",
        lambda base: single(
            [
                (
                    2 * MIB + 64 * KIB,
                    patched(base.content[2 * MIB + 64 * KIB :][:4096], (3, bytes(4))),
                )
            ]
        )(base),
        "block size 0",
    )
    yield named(
        "puts block 1 into the BAT",
        single([(3 * MIB, struct.pack("<QQ", 0, 3 * MIB | PRESENT).ljust(4096, b"\0"))]),
        write="BAT entry of block 1",
        eio=(1,),
        guest=False,
    )
    for name, at in (
        ("past the limit", 1 << 47),
        ("2^62", 1 << 62),
        ("the end of numbers", U64 - 4095),
        ("2^63", 1 << 63),
    ):
        yield named(f"changes {name}", single([(at, page)]), "bytes long, the limit")
        yield named(f"zeroes {name}", single([(at, 4096)]), "bytes long, the limit")
    for length in (1 << 47, 1 << 62, U64 - 4095):
        yield named(
            f"zeroes {length:#x} bytes", single([(4 * MIB, length)]), "bytes long, the limit"
        )
    yield named(
        "zeroes all the data, to 8 TiB",
        single([(4 * MIB, 1 << 43)]),
        write=REPLAY,
        guest=False,
    )
    yield named("changes a block", single([(5 * MIB, page)]), write=REPLAY, guest=False)
    # Not whole sectors: such an entry is torn, and the header names a log without one.
    for name, changes in (
        ("unaligned", [(4 * MIB + 512, page)]),
        ("zeroes at an unaligned place", [(4 * MIB + 512, 4096)]),
        ("zeroes an odd length", [(4 * MIB, 4095)]),
    ):
        yield named(name, single(changes), guest=False)
    for length in (0, 1, 64, 4095, 4096, 4097, 2 * MIB, 1 << 31, U32):
        yield named(
            f"entry of {length} bytes", single([(3 * MIB, page)], length=length), guest=False
        )
    for count in (0, 2, 126, 127, 1 << 31, U32):
        yield named(f"{count} descriptors", single([(3 * MIB, page)], count=count), guest=False)
    for tail in (4096, MIB - 4096):
        yield named(f"tail at {tail}", single([(3 * MIB, page)], tail=tail), "no whole sequence")
    for tail in (1, MIB, MIB + 4096, U32):
        yield named(f"tail at {tail}", single([(3 * MIB, page)], tail=tail), guest=False)
    for sequence in (0, 1, 1 << 63, U64):
        yield named(
            f"sequence number {sequence}",
            logged((0, partial(as_it_is, sequence))),
            guest=False,
        )
    for name, value, read in (
        ("0", 0, (OPENS, REPLAY)),
        ("a MiB more than there is", 9 * MIB, "truncated"),
        ("2^63", 1 << 63, "truncated"),
        ("the end of numbers", U64, "truncated"),
    ):
        read, write = read if isinstance(read, tuple) else (read, None)
        yield named(
            f"flushed size {name}",
            single([(5 * MIB, page)], flushed=value),
            read,
            write=write,
            guest=False,
        )
    for name, value, read in (
        ("0", 0, OPENS),
        ("8 GiB", 1 << 33, OPENS),
        ("8 TiB", 1 << 43, OPENS),
        ("the limit", 1 << 47, OPENS),
        ("a byte past the limit", (1 << 47) + 1, "bytes long, the limit"),
        ("the end of numbers", U64, "bytes long, the limit"),
    ):
        yield named(
            f"last size {name}",
            single([(5 * MIB, page)], last=value),
            read,
            write=read or REPLAY,
            guest=False,
        )
    # Tricks with sequences.
    for name, parts, read in (
        ("two entries", ((0, entry(7, 0)), (8192, entry(8, 0))), OPENS),
        ("tails that point at each other", ((0, entry(7, 8192)), (8192, entry(8, 8192))), OPENS),
        ("a tail behind the head", ((0, entry(7, 8192)), (8192, entry(9, 0))), "no whole sequence"),
        (
            "a ring that is a circle",
            tuple((i * 8192, entry(i + 1, (i + 1) * 8192 % MIB)) for i in range(128)),
            OPENS,
        ),
        ("a full ring", tuple((i * 8192, entry(i + 1, 0)) for i in range(128)), OPENS),
        ("one number twice", ((0, entry(7, 0)), (8192, entry(7, 8192))), OPENS),
        ("numbers that fall", ((0, entry(8, 0)), (8192, entry(7, 0))), OPENS),
        ("around the end", ((MIB - 8192, entry(7, MIB - 8192)), (0, entry(8, MIB - 8192))), OPENS),
    ):
        yield named(name, logged(*parts), read, write=read or REPLAY, guest=False)
    yield named(
        "another log's entries",
        logged((0, lambda base: log_entry(base, [(3 * MIB, page)], guid=STRANGER.bytes_le))),
        guest=False,
    )
    yield named(
        "a bad checksum",
        logged((0, lambda base: patched(log_entry(base, [(3 * MIB, page)]), (4, b"evil")))),
        guest=False,
    )
    for length, read in ((0, "a log of 0 bytes"), (2 * MIB, OVERLAPS), (128 * MIB, "log ends at")):
        yield named(f"a log of {length} bytes", header_of_log(68, length, 4), read)
    yield named("a log in the header section", header_of_log(72, 0, 8), "inside the header section")
    yield named("a log in the BAT", header_of_log(72, 3 * MIB, 8), OVERLAPS)
    yield named("log version 1", header_of_log(64, 1, 2), "log version 1")
    yield Mutation(
        "vhdx-logged: a log of 128 MiB to replay",
        "vhdx-logged",
        both(HEADERS, (68, struct.pack("<IQ", 128 * MIB, 16 * MIB))),
        "a log of 134217728 bytes to replay",
        size=256 * MIB,
    )


def header_of_log(offset: int, value: int, width: int) -> Edit:
    return both(HEADERS, (offset, value.to_bytes(width, "little")))


def files() -> Iterator[Mutation]:
    """Cut short, lengthened."""
    for size, read in (
        (0, "byte 0: signature"),
        (8, "header 1 at 65536: signature"),
        (64 * KIB, "header 1 at 65536: signature"),
        (64 * KIB + 80, "header 1|log ends at"),
        (132 * KIB, "log ends at|region table"),
        (192 * KIB, "log ends at|region table"),
        (512 * KIB, "log ends at"),
        (MIB, "log ends at"),
        (2 * MIB - 1, "log ends at"),
        (2 * MIB, "ends at"),
        (3 * MIB, "ends at"),
        (4 * MIB - 1, "ends at"),
    ):
        yield Mutation(f"vhdx: cut at {size}", "vhdx", nothing, read, size=size)
    yield Mutation(
        "vhdx: cut behind the metadata",
        "vhdx",
        nothing,
        OPENS,
        "BAT entry of block",
        eio=(0, 3, 5, 7),
        size=4 * MIB,
    )
    yield Mutation(
        "vhdx: cut in the last block",
        "vhdx",
        nothing,
        guest=False,
        size=12 * MIB - 512 * KIB,
    )
    yield Mutation("vhdx: 8 TiB of file", "vhdx", nothing, size=1 << 43)


def large() -> Iterator[Mutation]:
    """Few bytes that could ask for much time or memory."""

    def bigger(
        size: int, block: int, bat_at: int, bat_length: int, *more: tuple[int, bytes]
    ) -> Edit:
        return lambda base: [
            *both(TABLES, (32, struct.pack("<QI", bat_at, bat_length)))(base),
            (base.at["parameters"], struct.pack("<I", block)),
            (base.at["size"], struct.pack("<Q", size)),
            *more,
        ]

    tib = 1 << 40
    many = MIB // PART
    ring = 64 * MIB // PART
    yield Mutation(
        "vhdx: a long sparse BAT",
        "vhdx",
        bigger(64 * tib // PART, MIB, 16 * MIB, 513 * MIB),
        guest=False,
        size=600 * MIB,
    )
    yield Mutation(
        "vhdx: many blocks of 1 MiB in a BAT",
        "vhdx",
        lambda base: [
            *bigger(many * MIB, MIB, 16 * MIB, 9 * MIB)(base),
            (16 * MIB, struct.pack(f"<{many}Q", *((64 + i) * MIB | PRESENT for i in range(many)))),
        ],
        guest=False,
        size=(MIB + 512) * MIB,
    )
    yield Mutation(
        "vhdx: 256 Ki blocks of 256 MiB",
        "vhdx",
        bigger(
            64 * tib,
            256 * MIB,
            16 * MIB,
            3 * MIB,
            (16 * MIB, struct.pack("<Q", 15 * tib | PRESENT)),
        ),
        guest=False,
        size=15 * tib + 256 * MIB,
    )
    # All that lies before the only block is a hole that could be used.
    yield Mutation(
        "vhdx: one block at 15 TiB",
        "vhdx",
        bigger(tib, MIB, 16 * MIB, 9 * MIB, (16 * MIB, struct.pack("<Q", 15 * tib | PRESENT))),
        guest=False,
        size=15 * tib + MIB,
    )

    def long_log(length: int, entry: Callable[[Base], bytes], *more: tuple[int, bytes]) -> Edit:
        at = 16 * MIB
        return lambda base: [
            *both(HEADERS, (68, struct.pack("<IQ", length, at)))(base),
            (at, entry(base)),
            *more,
        ]

    def zeroing(count: int) -> Callable[[Base], bytes]:
        return lambda base: log_entry(
            base, [(4 * MIB + 4096 * (i % 64), 4096) for i in range(count)], flushed=8 * MIB
        )

    too_many = "changes to replay"
    for count, read in ((16384, OPENS), (16385, too_many), (500_000, too_many)):
        yield Mutation(
            f"vhdx-logged: {count} changes",
            "vhdx-logged",
            long_log(64 * MIB, zeroing(count)),
            read,
            write=read or REPLAY,
            guest=False,
            size=81 * MIB,
        )

    def patched_and_large(base: Base) -> Writes:
        """Every piece of a long BAT is asked for, and each has all the changes to look through."""
        return [
            *long_log(64 * MIB, zeroing(16384))(base),
            *bigger(64 * tib, 256 * MIB, 96 * MIB, 3 * MIB)(base),
        ]

    yield Mutation(
        "vhdx-logged: 16384 changes and a long BAT",
        "vhdx-logged",
        patched_and_large,
        guest=False,
        size=100 * MIB,
    )

    def overlapping(base: Base) -> bytes:
        """Headers of entries without number, each said to be as long as the ring."""
        head = log_entry(base, [], length=ring, flushed=8 * MIB)[:64].ljust(4096, b"\0")
        return head * (ring // 4096)

    yield Mutation(
        "vhdx-logged: a long log of entries that overlap",
        "vhdx-logged",
        long_log(ring, overlapping),
        "entries overlap",
        guest=False,
        size=81 * MIB,
    )


# Differencing disks: blocks 5 and 0 are the child's, 3 and 7 in part, 2 is zero.

PARENT_ID = "{00000000-0000-0000-0000-00000000f00d}"
IN_PART = {3: b"\x0f" * 256, 7: bytes(128) + b"\xff" * 128}


def below(path: Path) -> None:
    make_vhdx.make(
        path.parent / "parent.vhdx",
        8 * MIB,
        {1: b"\xd1" * MIB, 3: b"\xd3" * MIB, 2: b"\xd2" * MIB},
        data_write=make_vhdx.UUID(PARENT_ID),
    )


def child(path: Path) -> bytes:
    whole = {5: b"\x51" * MIB, 0: b"\x50" * MIB}
    above = {5: whole[5], 3: b"\x53" * MIB, 7: b"\x57" * MIB, 0: whole[0]}
    make_vhdx.make(
        path,
        8 * MIB,
        above,
        parent=make_vhdx.below(make_vhdx.UUID(PARENT_ID), "parent.vhdx"),
        partial=IN_PART,
        entries={2: make_vhdx.ZERO},
    )
    fourth = (b"\x53" * 2048 + b"\xd3" * 2048) * 256
    last = bytes(MIB // 2) + b"\x57" * (MIB // 2)
    shown = {**whole, 1: b"\xd1" * MIB, 3: fourth, 7: last}
    return b"".join(shown.get(block, bytes(MIB)) for block in range(8))


def locate(base: Base) -> None:
    """As for the others, and the item that they do not have, which is the last."""
    item = make_vhdx.PARENT_LOCATOR.bytes_le
    at = base.content.index(item)
    plain = replace(base)
    plain.content = base.content[:at] + b"\0" * 16 + base.content[at + 16 :]
    metadata = plain.content.index(b"metadata")
    plain.content = patched(plain.content, (metadata + 10, b"\5\0"))
    bases._map_vhdx(plain)
    base.at, base.metadata = plain.at, plain.metadata
    base.at["locator"] = metadata + base.number(at + 16, 4)
    base.at["locator_length"] = base.number(at + 20, 4)
    base.at["locator_entry"] = at
    base.at["bitmap_entry"] = base.at["bat"] + 4096 * 8
    base.at["bitmap"] = base.number(base.at["bitmap_entry"], 8) >> 20 << 20
    base.metadata += [
        (at, 32),
        (base.at["locator"], base.at["locator_length"]),
        (base.at["bitmap_entry"], 8),
        (base.at["bitmap"], 2048),
    ]


MAKERS = {"vhdx-child": Maker("vhdx", child, MIB, locate, beside=below)}


def locators() -> Iterator[Mutation]:
    """What a child says of its parent."""

    def named(name: str, edit: Edit, read: str = OPENS, **options: Any) -> Mutation:
        options = {"file_name": "images/image", **options}
        return Mutation(f"vhdx-child: {name}", "vhdx-child", edit, read, **options)

    def said(*pairs: tuple[str, str], **options: Any) -> Edit:
        """Another locator in the old one's place."""
        raw = make_vhdx.locator(pairs, **options)
        return lambda base: [
            (base.at["locator"], raw),
            (base.at["locator_entry"] + 20, struct.pack("<I", len(raw))),
        ]

    def leads(path: str, key: str = "relative_path") -> Edit:
        return said(("parent_linkage", PARENT_ID), (key, path))

    yield named("as it was", nothing)
    for field, value, read in (
        ("type", STRANGER.bytes_le, "parent locator at .*: type"),
        ("count", b"\0\0", "no parent_linkage"),
        ("count", b"\1\0", "none of relative_path"),
        ("count", b"\6\0", "parent locator"),
        ("count", b"\x41\0", "65 keys"),
        ("count", b"\xff\xff", "65535 keys"),
    ):
        at = 0 if field == "type" else 18
        edit = put("locator", at, value)
        yield named(f"locator: {field}={value[:2].hex()}", edit, read, guest=False)
    for name, at in (("key offset", 20), ("value offset", 24)):
        for value in (0, 19, 1 << 31, U32, U32 - 1):
            edit = put("locator", at, struct.pack("<I", value))
            yield named(f"{name} {value:#x}", edit, "parent locator", guest=False)
    for name, at in (("key length", 28), ("value length", 30)):
        for value in (0, 1, 0x7FFF, 0xFFFF):
            edit = put("locator", at, struct.pack("<H", value))
            yield named(f"{name} {value}", edit, "parent locator", guest=False)
    for name, at, value, read in (
        ("offset 0", 16, 0, "outside the metadata"),
        ("offset in the table", 16, 64 * KIB - 1, "outside the metadata"),
        ("offset past the end", 16, MIB - 8, "outside the metadata"),
        ("offset on other items", 16, 64 * KIB, "parent locator at .*: type"),
        ("length 0", 20, 0, ": 0 bytes"),
        ("length 19", 20, 19, "19 bytes"),
        ("length too much", 20, 300 << 10, "at most 262144"),
        ("length of everything", 20, U32, "outside the metadata"),
    ):
        edit = put("locator_entry", at, struct.pack("<I", value))
        yield named(f"locator item: {name}", edit, read, guest=False)
    yield named("no locator", put("locator_entry", 0, bytes(28)), "no parent locator")
    yield named(
        "a locator, but not HasParent: blocks in part are nothing then",
        put("parameters", 4, bytes(4)),
        eio=(3, 7),
        guest=False,
    )
    yield named(
        "another identity",
        said(("parent_linkage", f"{{{STRANGER}}}"), ("relative_path", "parent.vhdx")),
        "expected 99999999",
    )
    yield named(
        "an identity that is none",
        said(("parent_linkage", "parent"), ("relative_path", "parent.vhdx")),
        "not a GUID",
    )
    yield named("no identity", said(("relative_path", "parent.vhdx")), "no parent_linkage")
    yield named(
        "a long identity",
        said(("parent_linkage", "0" * 20_000), ("relative_path", "x")),
        "not a GUID",
    )
    out = "outside of the image's folder"
    for name, path, read in (
        ("above", "..\\secret", out),
        ("above, said at length", ".\\..\\images\\..\\secret", out),
        ("with slashes", "../secret", out),
        ("far above", "..\\" * 40 + "etc\\passwd", out),
        ("itself", "image", "the chain comes back"),
        ("its folder", "..\\images", "not a regular file"),
        ("missing", "missing", "not found: 'missing'"),
        ("with a NUL", "parent\0.vhdx", "no possible file name"),
        ("half a surrogate pair", "\ud800", "no possible file name"),
        ("long", "x" * 30_000, "no possible file name"),
        ("json:", "json:{}", "not a local file"),
        ("nbd:", ".\\nbd:localhost", "not a local file"),
    ):
        yield named(f"relative path: {name}", leads(path), read, beside=around)
    for key in ("absolute_win32_path", "volume_path"):
        for name, path, read in (
            ("of Windows", "C:\\Windows\\parent.vhdx", OPENS),
            ("of a share", "\\\\server\\share\\parent.vhdx", OPENS),
            ("of nothing", "C:\\", "none of relative_path"),
            ("of nothing above", "C:\\..", "none of relative_path"),
        ):
            yield named(f"{key}: {name}", leads(path, key), read)
    yield named("absolute path: of ours", leads("/etc/passwd", "absolute_win32_path"), out)
    yield named("absolute path: a device", leads("/dev/zero", "absolute_win32_path"), out)
    yield named("volume path: of ours", leads("/etc/passwd", "volume_path"), "not found: 'passwd'")


def around(path: Path) -> None:
    below(path)
    (path.parent.parent / "secret").write_bytes(b"secret" * 1000)


def bitmaps() -> Iterator[Mutation]:
    """Blocks 3 and 7 need one; nobody else looks at it."""

    def named(name: str, edit: Edit, **options: Any) -> Mutation:
        return Mutation(f"vhdx-child: {name}", "vhdx-child", edit, **options)

    def entry(value: int) -> Edit:
        return put("bitmap_entry", 0, struct.pack("<Q", value))

    for state in (0, 1, 2, 3, 4, 5, 7):
        edit = put("bitmap_entry", 0, bytes([state]))
        yield named(f"the bitmap has state {state}", edit, eio=(3, 7))
    for name, at in (
        ("nowhere", 0),
        ("the log", MIB),
        ("the metadata", 2 * MIB),
        ("the BAT", 3 * MIB),
        ("the end of the file", 9 * MIB),
        ("2^40", 1 << 40),
        ("2^62", 1 << 62),
        ("the end of numbers", U64 - MIB + 1),
    ):
        yield named(f"the bitmap lies in {name}", entry(at | PRESENT), eio=(3, 7))
    # Then that block is no data any more.
    yield named(
        "the bitmap lies in block 5",
        entry(4 * MIB | PRESENT),
        write="BAT entry of block 5",
        eio=(5,),
        guest=False,
    )
    for name, bits in (("none", b"\0"), ("all", b"\xff"), ("every second", b"\x55")):
        edit = put("bitmap", 3 * 256, bits * 256)
        yield named(f"bits of block 3: {name}", edit, guest=False)
    for block, at in ((1, 0), (1, MIB), (1, 3 * MIB), (1, 1 << 44)):
        yield named(
            f"block {block} in part, at {at}",
            bat(block, at | PARTIAL),
            write=f"BAT entry of block {block}" if at else OPENS,
            eio=(block,),
        )
    yield named(
        "block 1 in part, where the bitmap is",
        lambda base: bat(1, base.at["bitmap"] | PARTIAL)(base),
        write="BAT entry of block 1",
        eio=(1,),
    )
    yield named(
        "all blocks in part, at one place",
        lambda base: [w for block in range(8) for w in bat(block, 4 * MIB | PARTIAL)(base)],
        write="BAT entry of block 1",
        guest=False,
    )
    yield named(
        "a block of 128 MiB, every second sector",
        lambda base: [
            (base.at["parameters"], struct.pack("<I", 128 * MIB)),
            (base.at["size"], struct.pack("<Q", 128 * MIB)),
            (base.at["bat"], struct.pack("<Q", 16 * MIB | PARTIAL)),
            (base.at["bat"] + 32 * 8, struct.pack("<Q", base.at["bitmap"] | PRESENT)),
            (base.at["bitmap"], b"\x55" * 32 * KIB),
        ],
        guest=False,
        size=144 * MIB,
    )
