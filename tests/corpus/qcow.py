"""Hostile QCOW images, version 1."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tests.corpus.bases import DATA, KIB, MIB, PACKED, PARENT, Base, Maker, below, run
from tests.corpus.mutations import ANY, OPENS, Edit, Field, Mutation, grid, link, nothing

CLUSTER = 4 * KIB
TABLE = 4 * KIB  # 512 entries
SIZE = 5 * MIB  # more than the 2 MiB of one table
FAR = 514  # guest cluster of the second table
FLAG = 1 << 63
CHILD_CLUSTER = 512


def _make(path: Path, cluster: int, *more: str | Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow", *more, path, str(SIZE))
    commands = [f"write -q -P {c % 251 + 1} {c * cluster} {cluster}" for c in (*DATA, FAR)]
    commands += [f"write -q -c -P {c} {c * cluster} {cluster}" for c in PACKED]
    run("qemu-io", "-f", "qcow", *(word for text in commands for word in ("-c", text)), path)


def _plain(path: Path) -> None:
    _make(path, CLUSTER)


def _child(path: Path) -> None:
    (path.parent / PARENT).write_bytes(b"\xee" * 192 * 512)
    _make(path, CHILD_CLUSTER, "-F", "raw", "-b", PARENT)


def _locate(base: Base) -> None:
    l1 = base.number(40, 8)
    first = base.number(l1, 8)
    base.at = {"l1": l1, "l2": first, "far": base.number(l1 + 8, 8)}
    base.at["data"] = base.number(first + 8 * DATA[0], 8)
    packed = base.number(first + 8 * PACKED[0], 8)
    base.at["packed"] = packed & (1 << 63 - (base.cluster.bit_length() - 1)) - 1
    base.metadata = [(0, 48), (l1, 24), (first, 24 * 8)]
    if base.at["far"]:
        base.metadata.append((base.at["far"], 64))


MAKERS = {
    "qcow": Maker("qcow", _plain, CLUSTER, _locate, big=True),
    "qcow-child": Maker("qcow", _child, CHILD_CLUSTER, _locate, big=True, beside=below),
}

# A changed geometry makes other tables and other clusters of what is there.
FIELDS = (
    Field("magic", 0, 4, ANY, {}),
    Field("version", 4, 4, r"header\+4", {1: OPENS}),
    Field("backing_length", 16, 4, OPENS, {}),  # without a place there is no name
    Field("mtime", 20, 4, OPENS, {}),
    Field(
        "size",
        24,
        8,
        r"header\+24",
        {
            1: OPENS,
            SIZE: OPENS,
            (1 << 31) - 1: OPENS,
            1 << 31: OPENS,
            (1 << 32) - 1: OPENS,
            1 << 32: OPENS,
        },
    ),
    Field("cluster_bits", 32, 1, r"header\+32", {8: r"header\+32", 12: OPENS, 17: r"header\+32"}),
    Field("l2_bits", 33, 1, r"header\+33", {5: r"header\+33", 9: OPENS, 14: r"header\+33"}),
    Field("crypt_method", 36, 4, r"header\+36", {0: OPENS, 1: "no passphrase|encrypted image"}),
    Field("l1_offset", 40, 8, r"header\+40", {48: OPENS, 47: r"header\+40"}),
)


def put(offset: int, value: int, width: int = 8) -> Edit:
    return lambda base: [(offset, value.to_bytes(width, "big"))]


def at(table: str, index: int, value: int | str, flags: int = 0) -> Edit:
    """An entry of a table; `value` may be the name of another place."""

    def edit(base: Base) -> list[tuple[int, bytes]]:
        number = base.at[value] if isinstance(value, str) else value
        return [(base.at[table] + 8 * index, struct.pack(">Q", number | flags))]

    return edit


def mutations() -> Iterator[Mutation]:
    for field, value, read, write in grid(FIELDS):
        # With a longer disk the L1 table reaches into what lies behind it.
        guest = field.name != "size" or value in (1, SIZE)
        answer = write if guest or read else ("overlaps|the file ends at|" if not read else write)
        yield Mutation(
            f"qcow: {field.name}={value:#x}",
            "qcow",
            put(field.offset, value, field.width),
            read,
            answer,
            guest=guest and not (field.name == "size" and value == 1),
        )
    yield from geometry()
    yield from first_level()
    yield from second_level()
    yield from packed()
    yield from files()
    yield from children()


def geometry() -> Iterator[Mutation]:
    """Other clusters and tables than the image was made with."""
    for name, value in (("small clusters", (9, 9)), ("large clusters", (16, 9))):
        yield Mutation(
            f"qcow: {name}",
            "qcow",
            lambda base, value=value: [(32, bytes(value))],
            OPENS,
            "the file ends at|overlaps|lies|not a multiple|",
            guest=False,
            loose=True,
        )
    for name, value in (("short tables", (12, 6)), ("long tables", (12, 13))):
        yield Mutation(
            f"qcow: {name}",
            "qcow",
            lambda base, value=value: [(32, bytes(value))],
            OPENS,
            "the file ends at|overlaps|lies|",
            guest=False,
            loose=True,
        )
    yield Mutation(
        "qcow: L1 table at 49", "qcow", put(40, 49), OPENS, "not a multiple of 8", guest=False
    )
    yield Mutation(
        "qcow: the L1 table lies over the data",
        "qcow",
        lambda base: [(40, struct.pack(">Q", base.at["data"]))],
        OPENS,
        "the file ends at|overlaps|lies",
        guest=False,
    )


def first_level() -> Iterator[Mutation]:
    for name, value, text, eio in (
        ("misaligned", CLUSTER + 3, "overlaps|the file ends at|lies", False),
        ("the header", 8, "overlaps|the file ends at", False),
        ("past the end", 1 << 30, "the file ends at", True),
        ("2^63", FLAG, "the file ends at", True),
        ("all ones", (1 << 64) - 1, "the file ends at", True),
        ("itself", "l1", "overlaps", False),
    ):
        yield Mutation(
            f"qcow: L1[0] is {name}",
            "qcow",
            at("l1", 0, value),
            OPENS,
            text,
            eio=tuple(sorted((*DATA, *PACKED))) if eio else (),
            guest=False,
        )
    yield Mutation(
        "qcow: L1[1] is the table of L1[0]",
        "qcow",
        at("l1", 1, "l2"),
        OPENS,
        "overlaps another table",
        guest=False,
    )
    yield Mutation(
        "qcow: no tables", "qcow", lambda base: [(base.at["l1"], bytes(24))], guest=False
    )
    yield Mutation(
        "qcow: a table cut short",
        "qcow",
        lambda base: [(base.at["l1"], struct.pack(">Q", base.size // 8 * 8 - 8))],
        OPENS,
        "the file ends at",
        guest=False,
    )


def second_level() -> Iterator[Mutation]:
    for name, value, text in (
        ("not at a sector", CLUSTER * 8 + 3, "clusters have 4096 bytes"),
        ("in the header", 5, "clusters have 4096 bytes"),
        ("past the end", 1 << 30, "the file ends at"),
        ("2^62", 1 << 62, "the file ends at"),
        ("the largest", FLAG - 1, "the file ends at"),
        ("its own table", "l2", "where a table or compressed data lies"),
        ("another table", "far", "where a table or compressed data lies"),
    ):
        yield Mutation(f"qcow: L2[1] is {name}", "qcow", at("l2", 1, value), OPENS, text, eio=(1,))
    yield Mutation(
        "qcow: L2[1] is not at a cluster",
        "qcow",
        lambda base: [(base.at["l2"] + 8, struct.pack(">Q", base.at["data"] + 512))],
        OPENS,
        "clusters have 4096 bytes",
        guest=False,
    )
    yield Mutation("qcow: L2[0]=0", "qcow", at("l2", 0, 0), guest=False)
    yield Mutation(
        "qcow: two owners",
        "qcow",
        at("l2", 1, "data"),
        OPENS,
        "where another one lies",
        guest=False,
    )
    yield Mutation(
        "qcow: entries behind the disk's end",
        "qcow",
        lambda base: [
            (24, struct.pack(">Q", FAR * CLUSTER + CLUSTER)),
            (base.at["far"] + 8 * 100, struct.pack(">Q", 1 << 40)),
        ],
        OPENS,
        "the file ends at",
        guest=False,
    )
    yield Mutation(
        "qcow: a table of one cluster",
        "qcow",
        lambda base: [(base.at["l2"], struct.pack(">Q", base.at["data"]) * 512)],
        OPENS,
        "where another one lies",
        guest=False,
    )
    yield Mutation(
        "qcow: a table of garbage",
        "qcow",
        lambda base: [(base.at["far"], b"\x25" * TABLE)],
        OPENS,
        "the file ends at",
        guest=False,
    )


def packed() -> Iterator[Mutation]:
    size = 1 << 51  # a byte of length

    for name, value, text, eio in (
        ("nothing", FLAG, "0 bytes of compressed data", True),
        ("nowhere", FLAG | 20 * size | 1 << 40, "the file ends at", True),
        ("far away", (1 << 64) - 1, "the file ends at", True),
        ("the header", FLAG | 48 * size, "", True),
        ("too long", FLAG | 4095 * size | 1 << 15, "the file ends at|where another", True),
    ):
        yield Mutation(
            f"qcow: compressed: {name}",
            "qcow",
            at("l2", PACKED[0], value),
            OPENS,
            text,
            eio=(PACKED[0],) if eio else (),
        )
    yield Mutation(
        "qcow: compressed: garbage",
        "qcow",
        lambda base: [(base.at["packed"], b"\xff" * 16)],
        eio=(PACKED[0],),
    )
    yield Mutation(
        "qcow: compressed: a cluster of data",
        "qcow",
        at("l2", PACKED[0], "data", FLAG | 100 * size),
        OPENS,
        "lies",
        eio=(PACKED[0],),
    )
    yield Mutation(
        "qcow: compressed: twice the same",
        "qcow",
        lambda base: [
            (
                base.at["l2"] + 8 * 1,
                base.content[base.at["l2"] + 8 * PACKED[0] :][:8],
            )
        ],
        guest=False,
    )
    # A bomb: a stored block of deflate is as long as it says; this one says more than there is.
    yield Mutation(
        "qcow: compressed: a block that is longer than its data",
        "qcow",
        lambda base: [(base.at["packed"], b"\x01\xff\xff\0\0")],
        eio=(PACKED[0],),
    )


def files() -> Iterator[Mutation]:
    for size, read, write in (
        (0, ANY, ANY),
        (7, ANY, ANY),
        (47, r"header\+24|header\+40|NotAnImage|", None),
        (48, OPENS, OPENS),
        (CLUSTER + 1, OPENS, "the file ends at"),
    ):
        yield Mutation(f"qcow: cut at {size}", "qcow", nothing, read, write, guest=False, size=size)
    yield Mutation("qcow: 1 GiB of file", "qcow", nothing, size=1 << 30)
    yield Mutation("qcow: 8 TiB of file", "qcow", nothing, OPENS, "the most is", size=1 << 43)

    def many(base: Base) -> list[tuple[int, bytes]]:
        """A full L1 table of sparse L2 tables, one after the other."""
        count = MIB
        first = 16 * MIB
        tables = struct.pack(f">{count}Q", *range(first, first + count * TABLE, TABLE))
        return [
            (24, struct.pack(">Q", count * 512 * CLUSTER)),
            (40, struct.pack(">Q", MIB)),
            (MIB, tables),
        ]

    yield Mutation(
        "qcow: a million tables",
        "qcow",
        many,
        OPENS,
        "the most is|writing to an image with",
        guest=False,
        size=16 * MIB + MIB * TABLE,
    )

    def one(base: Base) -> list[tuple[int, bytes]]:
        """A full L1 table of one L2 table."""
        return [
            (24, struct.pack(">Q", MIB * 512 * CLUSTER)),
            (40, struct.pack(">Q", MIB)),
            (MIB, struct.pack(">Q", base.at["l2"]) * MIB),
        ]

    yield Mutation(
        "qcow: one table a million times",
        "qcow",
        one,
        OPENS,
        "the most is|writing to an image with|overlaps",
        guest=False,
    )


def children() -> Iterator[Mutation]:
    def named(text: bytes) -> Edit:
        """The parent's name is another one, in a place of its own."""
        place = 8 * MIB
        return lambda base: [(place, text), (8, struct.pack(">QI", place, len(text)))]

    outside = "outside of the image's folder"
    names: tuple[tuple[str, bytes, str], ...] = (
        ("absolute", b"/etc/hostname", outside),
        ("above", b"../" * 20 + b"etc/hostname", outside),
        ("missing", b"missing.raw", "missing.raw"),
        ("itself", b"image", "comes back"),
        ("a device", b"/dev/zero", ANY),
        ("a URL", b"nbd://localhost/x", "not a local file"),
        ("a protocol", b"json:{}", "not a local file"),
        ("with a zero byte", b"a\0b", ANY),
    )
    for name, text, pattern in names:
        yield Mutation(f"qcow: parent: {name}", "qcow-child", named(text), pattern)
    yield Mutation(
        "qcow: parent: a link that leads outside",
        "qcow-child",
        named(b"link"),
        outside,
        beside=link("link", "/etc/hostname"),
    )
    for name, offset, length, pattern in (
        ("past the end", 1 << 40, 9, r"header\+8"),
        ("too long", 48, 1024, r"header\+16"),
        ("as long as can be", 48, 0xFFFFFFFF, r"header\+16"),
        ("in the header", 4, 9, r"header\+8"),
        ("at 2^63", 1 << 63, 9, r"header\+8"),
    ):
        yield Mutation(
            f"qcow: parent's name {name}",
            "qcow-child",
            lambda base, place=(offset, length): [(8, struct.pack(">QI", *place))],
            pattern,
        )
    yield Mutation("qcow: no parent", "qcow-child", put(8, 0), guest=False)
