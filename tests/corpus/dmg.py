"""Hostile DMG images: trailers, property lists, tables of chunks, and what is packed in them."""

from __future__ import annotations

import bz2
import lzma
import plistlib
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.corpus.bases import KIB, MIB, Base, Maker
from tests.corpus.mutations import ANY, OPENS, Edit, Field, Mutation, Writes, grid, nothing
from tests.formats import make_dmg
from tests.formats.make_dmg import (
    ADC,
    BZIP2,
    IGNORED,
    LZFSE,
    PLAIN,
    SECTOR,
    XZ,
    ZEROS,
    ZLIB,
    Part,
    cut,
)

CHUNK, SECTORS = 64 * KIB, 128  # each; a chunk is a cluster here
METHODS = (ZLIB, PLAIN, ZEROS, BZIP2, XZ, LZFSE, ADC, IGNORED, ZLIB, PLAIN)
CHUNKS = len(METHODS)
TOTAL = CHUNKS * SECTORS
ROWS_AT, ROW = 204, 40
COUNT_AT = 200
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
ONLY_READ = "only read"


def content() -> bytes:
    random_ = random.Random(1)
    parts = (random_.randbytes(1000) + bytes([i]) * (CHUNK - 1000) for i in range(CHUNKS))
    return b"".join(
        bytes(CHUNK) if method in (ZEROS, IGNORED) else part
        for method, part in zip(METHODS, parts, strict=True)
    )


def _make(path: Path) -> bytes:
    parts = [Part("whole", 0, TOTAL, cut(0, TOTAL, SECTORS, METHODS))]
    make_dmg.make(path, content(), parts, backwards=False)
    return content()


def _locate(base: Base) -> None:
    trailer = base.size - 512
    base.at = {"trailer": trailer, "xml": base.number(trailer + 216, 8)}
    first = base.content.index(b"<data>") + 6  # of the table, in base64
    base.metadata = [(trailer, 512), (base.at["xml"], 256), (first, 1000)]


MAKERS = {"dmg": Maker("dmg", _make, CHUNK, _locate, big=True)}

FIELDS = (
    Field("version", 4, 4, "version .*, know 4", {4: OPENS}),
    Field("header_size", 8, 4, "bytes, expected 512", {512: OPENS}),
    Field("flags", 12, 4, OPENS, {}),
    Field("segment", 56, 4, OPENS, {}),
    Field("segments", 60, 4, "an image in .* files", {0: OPENS, 1: OPENS}),
    Field("resource_fork", 40, 8, OPENS, {}),
    Field("xml_offset", 216, 8, "property list", {0: "not a property list"}),
    Field("xml_length", 224, 8, "a property list of", {0: "resource forks", 1: "not a property"}),
    Field(
        "sectors",
        492,
        8,
        "sectors, know 1 to",
        {1: "the disk has 1", TOTAL: OPENS, TOTAL + 1: OPENS, TOTAL - 1: "the disk has 1279"}
        | {1 << 31: OPENS, (1 << 31) - 1: OPENS, (1 << 32) - 1: OPENS, 1 << 32: OPENS},
    ),
)


def mutations() -> Iterator[Mutation]:
    for field, value, read, _ in grid(FIELDS):
        yield Mutation(
            f"dmg: {field.name}={value:#x}",
            "dmg",
            lambda base, field=field, value=value: [  # type: ignore[misc]
                (base.at["trailer"] + field.offset, value.to_bytes(field.width, "big"))
            ],
            read,
            ONLY_READ,
        )
    yield from forks()
    yield from lists()
    yield from tables()
    yield from chunks()
    yield from files()


def forks() -> Iterator[Mutation]:
    """Where chunks are counted from."""
    for value in (1 << 31, 1 << 32, 1 << 62, 1 << 63, U64):
        yield one(
            f"data_fork_offset={value:#x}",
            lambda base, value=value: [  # type: ignore[misc]
                (base.at["trailer"] + 24, struct.pack(">Q", value))
            ],
            "the file ends at",
        )


def one(
    name: str, edit: Edit, read: str = OPENS, eio: tuple[int, ...] = (), guest: bool = True
) -> Mutation:
    return Mutation(f"dmg: {name}", "dmg", edit, read, ONLY_READ, eio=eio, guest=guest)


def with_xml(xml: Callable[[bytes], bytes]) -> Edit:
    """Another property list."""

    def edit(base: Base) -> Writes:
        at, end = base.at["xml"], base.at["trailer"]
        new = xml(base.content[at:end]).ljust(end - at)
        trailer = bytearray(base.content[end:])
        struct.pack_into(">Q", trailer, 224, len(new))
        return [(at, new + trailer)]

    return edit


def with_table(change: Callable[[bytearray], bytes]) -> Edit:
    """Another table of chunks."""

    def xml(old: bytes) -> bytes:
        plist = plistlib.loads(old)
        item = plist["resource-fork"]["blkx"][0]
        item["Data"] = bytes(change(bytearray(item["Data"])))
        return plistlib.dumps(plist)

    return with_xml(xml)


def row(number: int, **changes: int) -> Edit:
    """Fields of a chunk's row; the first row is a comment."""
    names = ("method", "comment", "first", "sectors", "offset", "length")

    def change(table: bytearray) -> bytes:
        at = ROWS_AT + ROW * (number + 1)
        values = dict(zip(names, struct.unpack_from(">IIQQQQ", table, at), strict=True))
        struct.pack_into(">IIQQQQ", table, at, *{**values, **changes}.values())
        return table

    return with_table(change)


def put(offset: int, format: str, value: int) -> Edit:
    def change(table: bytearray) -> bytes:
        struct.pack_into(format, table, offset, value)
        return table

    return with_table(change)


def lists() -> Iterator[Mutation]:
    bad, none = "not a property list", "no list resource-fork/blkx"
    head = b'<?xml version="1.0"?><!DOCTYPE plist SYSTEM "x"><plist version="1.0">'
    laughs = b"".join(
        b'<!ENTITY l%d "%s">' % (i, (b"&l%d;" % (i - 1)) * 10 if i else b"ha") for i in range(10)
    )
    for name, xml, read in (
        ("empty", b"", bad),
        ("text", b"no XML at all", bad),
        ("cut short", None, bad),
        ("binary", plistlib.dumps({"resource-fork": {"blkx": []}}, fmt=plistlib.FMT_BINARY), bad),
        ("no dictionary", plistlib.dumps([1, 2]), none),
        ("no resource fork", plistlib.dumps({"a": 1}), none),
        ("a resource fork of text", plistlib.dumps({"resource-fork": "x"}), none),
        ("no blkx", plistlib.dumps({"resource-fork": {}}), none),
        ("a dictionary blkx", plistlib.dumps({"resource-fork": {"blkx": {"a": 1}}}), none),
        ("a blkx of numbers", plistlib.dumps({"resource-fork": {"blkx": [1]}}), "blkx 0: no data"),
        (
            "a blkx without data",
            plistlib.dumps({"resource-fork": {"blkx": [{"Name": "x"}]}}),
            "blkx 0: no data",
        ),
        (
            "data that is text",
            plistlib.dumps({"resource-fork": {"blkx": [{"Data": "x"}]}}),
            "blkx 0: no data",
        ),
        (
            "empty data",
            plistlib.dumps({"resource-fork": {"blkx": [{"Data": b""}]}}),
            "blkx 0: no mish signature",
        ),
        (
            "a billion laughs",
            b'<?xml version="1.0"?><!DOCTYPE plist [' + laughs + b"]><plist>"
            b"<string>&l9;</string></plist>",
            bad,
        ),
        (
            "an entity from elsewhere",
            b'<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY e SYSTEM "/etc/passwd">]>'
            b"<plist><string>&e;</string></plist>",
            bad,
        ),
        ("a key twice as long as a list", head + b"<array><key>x</key></array></plist>", bad),
        ("a value without a key", head + b"<dict><string>x</string></dict></plist>", bad),
        ("a number that is none", head + b"<integer>x</integer></plist>", bad),
        ("a date that is none", head + b"<date>x</date></plist>", bad),
        ("a number of 5000 digits", head + b"<integer>" + b"9" * 5000 + b"</integer></plist>", bad),
        ("base64 that is none", head + b"<data>!</data></plist>", none),
        ("an encoding that is unknown", b'<?xml version="1.0" encoding="evil"?><plist/>', bad),
        ("nested 10000 deep", head + b"<array>" * 10000 + b"</array>" * 10000 + b"</plist>", none),
        ("nested 40000 deep", head + b"<array>" * 40000 + b"</plist>", "tags, the most is"),
        ("200000 dictionaries", head + b"<dict/>" * 200_000, "tags, the most is"),
        ("16 MiB of one text", head + b"<string>" + b"x" * (15 << 20) + b"</string></plist>", none),
        ("17 MiB", b" " * (17 << 20), "a property list of"),
    ):
        yield one(
            f"list: {name}",
            with_xml(lambda old, xml=xml: old[: len(old) // 2] if xml is None else xml),  # type: ignore[misc]
            read,
        )


def tables() -> Iterator[Mutation]:
    yield one("table: as it was", with_table(bytes))
    yield one("table: no mish", put(0, ">I", 0), "blkx 0: no mish signature")
    for value in (0, 2, U32):
        yield one(f"table: version {value}", put(4, ">I", value), "version .*, know 1")
    for value in (1, CHUNKS * SECTORS, 1 << 31, 1 << 62, 1 << 63, U64):
        yield one(f"table: first sector {value:#x}", put(8, ">Q", value), "the disk has 1280")
    for value in (0, 1, 1 << 63, U64):
        yield one(f"table: {value:#x} sectors", put(16, ">Q", value))
    for value in (1 << 31, 1 << 62, 1 << 63, U64):
        yield one(f"table: data at {value:#x}", put(24, ">Q", value), "the file ends at")
    for value, read in (
        (0, OPENS),
        (1, OPENS),
        (CHUNKS + 2, OPENS),
        (CHUNKS + 3, "are there"),
        (1 << 31, "are there"),
        (U32, "are there"),
    ):
        yield one(f"table: {value} chunks", put(COUNT_AT, ">I", value), read, guest=value > 1)
    for length in (4, 203, ROWS_AT, ROWS_AT + ROW):
        yield one(
            f"table: cut at {length}",
            with_table(lambda table, length=length: table[:length]),  # type: ignore[misc]
            "no mish signature, or 4|203 bytes|are there|no mish",
        )
    yield one(
        "table: without an end",
        with_table(
            lambda table: (
                table[:COUNT_AT] + struct.pack(">I", CHUNKS + 1) + table[COUNT_AT + 4 : -ROW]
            )
        ),
    )

    def many(count: int, new: Callable[[int], bytes]) -> Edit:
        return with_table(
            lambda table: (
                table[:COUNT_AT] + struct.pack(">I", count) + b"".join(new(i) for i in range(count))
            )
        )

    def tiny(i: int) -> bytes:
        """Packed sectors in reverse: they all are one."""
        return struct.pack(">IIQQQQ", ZLIB, 0, TOTAL - 1 - i, 1, 0, 20)

    yield one("table: a chunk for each sector", many(TOTAL, tiny), OPENS, tuple(range(CHUNKS)))
    most = 1 << 18
    plain = struct.pack(">IIQQQQ", PLAIN, 0, 0, 1, 0, SECTOR)
    yield one("table: one sector 262144 times", many(most, lambda i: plain), "two chunks for")
    yield one("table: 262145 chunks", many(most + 1, lambda i: plain), "the most of an image is")
    yield one(
        "table: 262144 comments",
        many(most, lambda i: struct.pack(">I36x", 0x7FFFFFFE)),
        guest=False,
    )
    # The disk has more sectors then.
    wide = many(most, lambda i: struct.pack(">IIQQQQ", PLAIN, 0, 2 * (most - i), 1, 0, SECTOR))

    def edit(base: Base) -> Writes:
        ((at, data),) = wide(base)
        raw = bytearray(data)
        struct.pack_into(">Q", raw, len(raw) - 512 + 492, 4 * most)
        return [(at, bytes(raw))]

    yield one("table: 262144 chunks in reverse", edit, guest=False)


def chunks() -> Iterator[Mutation]:
    for method in (3, 0x80000003, 0x80000009, 0x8000000A, U32 - 1):
        yield one(f"chunk: type {method:#x}", row(0, method=method), f"chunk 1: type {method:#x}")
    for name, method, eio in (
        ("zlib is said to be bzip2", BZIP2, (0,)),
        ("zlib is said to be xz", XZ, (0,)),
        ("zlib is said to be LZFSE", LZFSE, (0,)),
        ("zlib is said to be ADC", ADC, (0,)),
    ):
        yield one(f"chunk: {name}", row(0, method=method), OPENS, eio)
    yield one("chunk: zlib is said to be plain", row(0, method=PLAIN), "bytes for 128 sectors")
    yield one("chunk: zlib is said to be zeros", row(0, method=ZEROS), guest=False)
    yield one("chunk: the end is at the beginning", row(0, method=U32), guest=False)
    for value in (TOTAL, 1 << 31, 1 << 62, 1 << 63, U64):
        yield one(f"chunk: sector {value:#x}", row(0, first=value), "the disk has 1280")
        for number in (0, 1):
            yield one(
                f"chunk {number}: {value + 1:#x} sectors",
                row(number, sectors=min(value + 1, U64)),
                "the disk has 1280",
            )
    yield one("chunk: 0 sectors", row(0, sectors=0), guest=False)
    yield one("chunk: 127 sectors", row(0, sectors=127), OPENS, (0,))
    yield one("chunk: 129 sectors", row(0, sectors=129), "two chunks for sector 128")
    yield one("chunk: over another", row(3, first=4 * SECTORS), "two chunks for sector 512")
    yield one("chunk: over half of another", row(0, first=64), "two chunks for sector 128")
    for value in (1 << 31, 1 << 32, 1 << 62, 1 << 63, U64):
        yield one(f"chunk: at {value:#x}", row(0, offset=value), "the file ends at")
        yield one(f"chunk: {value:#x} bytes", row(0, length=value), "the file ends at")
        yield one(f"chunk: plain, {value:#x} bytes", row(1, length=value), "the file ends at")
    yield one("chunk: 0 bytes", row(0, length=0), "0 bytes stored for 128 sectors")
    yield one("chunk: plain, 0 bytes", row(1, length=0), "0 bytes for 128 sectors")
    yield one("chunk: plain, a byte too few", row(1, length=CHUNK - 1), "65535 bytes for 128")
    yield one("chunk: a byte further", row(0, offset=1), OPENS, (0,))
    yield one("chunk: the trailer", row(1, offset=0), guest=False)
    yield from packed()


def packed() -> Iterator[Mutation]:
    """What the data itself can do: in front of the list, in place of chunk 0."""

    def instead(method: int, pack: Callable[[], bytes]) -> Edit:
        def edit(base: Base) -> Writes:
            at, data = base.at["xml"], pack()
            ((_, rest),) = row(0, method=method, offset=at, length=len(data))(base)
            moved = bytearray(rest)
            struct.pack_into(">Q", moved, len(moved) - 512 + 216, at + len(data))
            return [(at, data + moved)]

        return edit

    whole = content()[:CHUNK]
    large = bytes(16 * MIB)
    for method, name, pack in (
        (ZLIB, "a bomb", lambda: zlib.compress(large, 9)),
        (BZIP2, "a bomb", lambda: bz2.compress(large)),
        (XZ, "a bomb", lambda: lzma.compress(large)),
        (LZFSE, "a bomb", lambda: make_dmg.pack_lzfse(large)),
        (ADC, "a bomb", lambda: b"\x80x" + b"\x7f\0\0" * 2000),
        (ZLIB, "a byte too few", lambda: zlib.compress(whole[:-1])),
        (BZIP2, "a byte too few", lambda: bz2.compress(whole[:-1])),
        (XZ, "a byte too few", lambda: lzma.compress(whole[:-1])),
        (LZFSE, "a byte too few", lambda: make_dmg.pack_lzfse(whole[:-1])),
        (ADC, "a byte too few", lambda: make_dmg.pack_adc(whole[:-1])),
        (ADC, "a copy from before", lambda: b"\x40\0\0" * 100),
        (ADC, "a literal that is cut short", lambda: make_dmg.pack_adc(whole[:500]) + b"\xff"),
        (ADC, "a copy that is cut short", lambda: make_dmg.pack_adc(whole[:500]) + b"\x7f\0"),
        (XZ, "an xz stream that wants 4 GiB", lambda: _greedy(whole)),
        (ZLIB, "the checksum is wrong", lambda: zlib.compress(whole)[:-4] + b"evil"),
        (BZIP2, "the checksum is wrong", lambda: bz2.compress(whole)[:-5] + b"evils"),
        (XZ, "the checksum is wrong", lambda: lzma.compress(whole)[:-40] + b"e" * 40),
        (LZFSE, "noise", lambda: b"bvx2" + random.Random(2).randbytes(5000)),
        (LZFSE, "an endless block", lambda: b"bvx-" + struct.pack("<I", U32) + bytes(5000)),
    ):
        # LZFSE and ADC end nowhere: a longer one may have what is wanted at its beginning.
        eio = () if name == "a bomb" and method in (LZFSE, ADC) else (0,)
        yield one(
            f"packed, {method:#x}: {name}", instead(method, pack), OPENS, eio, guest=bool(eio)
        )


def _greedy(data: bytes) -> bytes:
    """A dictionary of 1 GiB, said to be needed."""
    made = lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16}])
    # The dictionary's size is one byte, behind the filter's number and its length of 1.
    at = made.index(b"\x21\x01", 12) + 2
    head = bytearray(made[12 : 12 + (made[12] + 1) * 4])
    head[at - 12] = 36
    struct.pack_into("<I", head, len(head) - 4, zlib.crc32(bytes(head[:-4])))
    return made[:12] + bytes(head) + made[12 + len(head) :]


def files() -> Iterator[Mutation]:
    for size in (0, 1, 511, 512, 5000):
        yield Mutation(f"dmg: cut at {size}", "dmg", nothing, "no koly signature", ANY, size=size)
    yield Mutation(
        "dmg: only a trailer",
        "dmg",
        lambda base: [(0, base.content[-512:])],
        "property list ends at",
        ANY,
        size=512,
    )
    yield Mutation(
        "dmg: an xz file that ends like one",
        "dmg",
        lambda base: [(0, b"\xfd7zXZ\0")],
        OPENS,
        ONLY_READ,
        eio=(0,),
        format=None,
    )
    yield Mutation(
        "dmg: a raw disk that ends like one",
        "dmg",
        nothing,
        "named like a raw disk",
        ANY,
        format=None,
        file_name="image.img",
    )
    yield Mutation(
        "dmg: QCOW2 as well",
        "dmg",
        lambda base: [(0, b"QFI\xfb\0\0\0\3")],
        "looks like",
        ANY,
        format=None,
    )
