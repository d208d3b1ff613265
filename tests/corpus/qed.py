"""Hostile QED images."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.corpus.bases import DATA, KIB, MIB, PARENT, Base, Maker, below, run
from tests.corpus.mutations import ANY, OPENS, Edit, Field, Mutation, grid, nothing

CLUSTER = 4 * KIB
TABLE = 2 * CLUSTER
SIZE = 5 * MIB  # more than the 4 MiB of one table
FAR = 1026  # guest cluster of the second table
ZEROED = 20
NEED_CHECK = 2


def _make(path: Path, *more: str | Path) -> None:
    options = ("-o", f"cluster_size={CLUSTER}", "-o", "table_size=2")
    run("qemu-img", "create", "-q", "-f", "qed", *options, *more, path, str(SIZE))
    commands = [f"write -q -P {c % 251 + 1} {c * CLUSTER} {CLUSTER}" for c in (*DATA, FAR)]
    commands.append(f"write -q -z {ZEROED * CLUSTER} {CLUSTER}")
    run("qemu-io", "-f", "qed", *(word for text in commands for word in ("-c", text)), path)


def _plain(path: Path) -> None:
    _make(path)


def _child(path: Path) -> None:
    (path.parent / PARENT).write_bytes(b"\xee" * 192 * 512)
    _make(path, "-F", "raw", "-b", PARENT)


def _locate(base: Base) -> None:
    l1 = base.number(40, 8)
    base.at = {"l1": l1, "l2": base.number(l1, 8), "far": base.number(l1 + 8, 8)}
    base.metadata = [
        (0, 512),
        (l1, 64),
        (base.at["l2"], 24 * 8),
        (base.at["far"], 64),
    ]


MAKERS = {
    "qed": Maker("qed", _plain, CLUSTER, _locate),
    "qed-child": Maker("qed", _child, CLUSTER, _locate, beside=below),
}

FIELDS = (
    Field("magic", 0, 4, ANY, {}),
    Field("cluster_size", 4, 4, r"header\+4", {CLUSTER: OPENS, 2048: r"header\+4"}),
    Field(
        "table_size", 8, 4, r"header\+8", {1: OPENS, 2: OPENS, 3: r"header\+8", 32: r"header\+8"}
    ),
    Field("header_size", 12, 4, r"header\+12", {1: OPENS, 2: r"header\+40"}),
    Field(
        "features",
        16,
        8,
        r"header\+16: unknown feature bits",
        {0: OPENS, 1: r"header\+56", NEED_CHECK: OPENS, 4: OPENS, 6: OPENS, 8: r"header\+16"},
    ),
    Field("compat_features", 24, 8, OPENS, {}),
    Field("autoclear_features", 32, 8, OPENS, {}),
    Field("l1_offset", 40, 8, r"header\+40", {CLUSTER: OPENS, 512: r"header\+40"}),
    Field(
        "image_size",
        48,
        8,
        r"header\+48",
        {
            SIZE: OPENS,
            511: r"header\+48",
            2 << 30: OPENS,
            4 << 30: OPENS,
            (4 << 30) + 512: r"header\+48",
        },
    ),
    Field("name_offset", 56, 4, OPENS, {}),
    Field("name_size", 60, 4, OPENS, {}),
)


def put(offset: int, value: int, width: int = 8) -> Edit:
    return lambda base: [(offset, value.to_bytes(width, "little"))]


def at(table: str, index: int, value: int | str) -> Edit:
    """An entry of a table; `value` may be the name of another place."""

    def edit(base: Base) -> list[tuple[int, bytes]]:
        number = base.at[value] if isinstance(value, str) else value
        return [(base.at[table] + 8 * index, struct.pack("<Q", number))]

    return edit


def mutations() -> Iterator[Mutation]:
    for field, value, read, write in grid(FIELDS):
        name = f"qed: {field.name}={value:#x}"
        # Tables that hold what the guest wrote have entries of all kinds.
        loose = (field.name, value) in (("image_size", 4 << 30), ("table_size", 1))
        yield Mutation(
            name, "qed", put(field.offset, value, field.width), read, write, guest=not loose
        )
    yield from first_level()
    yield from second_level()
    yield from files()
    yield from children()


def first_level() -> Iterator[Mutation]:
    whole = tuple(sorted((*DATA,)))
    for name, value, text in (
        ("1", 1, "multiple of"),
        ("misaligned", CLUSTER + 512, "multiple of"),
        ("the header", 0x800 << 12 << 40, "multiple of|the file at"),
        ("past the end", 1 << 30, "the file at"),
        ("2^63", 1 << 63, "the file at"),
        ("itself", "l1", "over another table"),
    ):
        # The leaf cannot be read, so all its clusters fail.
        yield Mutation(
            f"qed: L1[0] is {name}",
            "qed",
            at("l1", 0, value),
            OPENS,
            text,
            eio=whole if name != "itself" else (),
            guest=False,
        )
    yield Mutation(
        "qed: L1[1] is the table of L1[0]",
        "qed",
        at("l1", 1, "l2"),
        OPENS,
        "over another table",
        guest=False,
        loose=True,
    )
    yield Mutation(
        "qed: no tables", "qed", lambda base: [(base.at["l1"], bytes(16))], guest=False, loose=True
    )
    yield Mutation(
        "qed: a table cut short",
        "qed",
        lambda base: [(base.at["l1"], struct.pack("<Q", base.size - CLUSTER))],
        OPENS,
        "the file at",
        guest=False,
    )


def second_level() -> Iterator[Mutation]:
    for name, value, text, eio in (
        ("misaligned", CLUSTER * 8 + 512, "multiple of", True),
        ("in the header", 2, "multiple of", True),
        ("past the end", 1 << 30, "past the end", True),
        ("2^63", 1 << 63, "past the end", True),
        ("all ones", (1 << 64) - 1, "multiple of", True),
        ("the first level", "l1", "over a table", True),
        ("its own table", "l2", "over a table", True),
        ("another table", "far", "over a table", True),
    ):
        yield Mutation(
            f"qed: L2[1] is {name}",
            "qed",
            at("l2", 1, value),
            OPENS,
            text,
            eio=(1,) if eio else (),
        )
    yield Mutation("qed: L2[1]=1", "qed", at("l2", 1, 1))
    yield Mutation("qed: L2[0]=0", "qed", at("l2", 0, 0), guest=False)
    yield Mutation(
        "qed: two owners",
        "qed",
        lambda base: [
            (base.at["l2"] + 8, base.content[base.at["l2"] + 24 : base.at["l2"] + 32]),
        ],
        OPENS,
        "another owner",
        guest=False,
    )
    yield Mutation(
        "qed: entries behind the disk's end",
        "qed",
        at("far", 900, 1 << 40),
        OPENS,
        "past the end",
    )
    yield Mutation(
        "qed: a table of zeros and ones",
        "qed",
        lambda base: [(base.at["l2"], struct.pack("<QQ", 0, 1) * 512)],
        guest=False,
    )
    yield Mutation(
        "qed: a table of garbage",
        "qed",
        lambda base: [(base.at["far"], b"\xa5" * TABLE)],
        OPENS,
        "multiple of",
        guest=False,
    )


def files() -> Iterator[Mutation]:
    for size, read, write in (
        (0, ANY, ANY),
        (1, ANY, ANY),
        (63, ANY, ANY),
        (64, r"header\+12", None),
        (CLUSTER, r"header\+40", None),
        (CLUSTER + TABLE - 1, r"header\+40", None),
        (CLUSTER + TABLE, OPENS, "the file at"),
    ):
        yield Mutation(f"qed: cut at {size}", "qed", nothing, read, write, guest=False, size=size)
    yield Mutation(
        "qed: 8 TiB of file", "qed", nothing, OPENS, "clusters are only read", size=1 << 43
    )
    yield Mutation("qed: 1 GiB of file", "qed", nothing, size=1 << 30)

    def large(base: Base) -> list[tuple[int, bytes]]:
        """1 GiB tables; the first level has one entry."""
        return [
            (4, struct.pack("<II", 64 * MIB, 16)),
            (40, struct.pack("<QQ", 64 * MIB, 1 << 50)),
            (64 * MIB, struct.pack("<Q", 64 * MIB * 17)),
        ]

    yield Mutation(
        "qed: tables of 1 GiB",
        "qed",
        large,
        OPENS,
        "of tables are only read|",
        guest=False,
        size=64 * MIB * 33,
    )

    def many(base: Base) -> list[tuple[int, bytes]]:
        """A full first level of sparse tables."""
        count = TABLE // 8
        tables = struct.pack(f"<{count}Q", *range(MIB, MIB + count * TABLE, TABLE))
        return [(48, struct.pack("<Q", 4 << 30)), (CLUSTER, tables)]

    yield Mutation("qed: 1024 sparse tables", "qed", many, guest=False, size=MIB + 1024 * TABLE)

    def full(base: Base) -> list[tuple[int, bytes]]:
        """As many entries as there may be, backwards, so that none follows its neighbour."""
        count = TABLE // 8
        tables = struct.pack(f"<{count}Q", *range(MIB, MIB + count * TABLE, TABLE))
        first = MIB + count * TABLE
        last, step = first + count * count * CLUSTER, count * CLUSTER
        data = b"".join(
            struct.pack(f"<{count}Q", *range(high - CLUSTER, high - CLUSTER - step, -CLUSTER))
            for high in range(last, first, -step)
        )
        return [(48, struct.pack("<Q", 4 << 30)), (CLUSTER, tables), (MIB, data)]

    yield Mutation(
        "qed: a million entries in reverse",
        "qed",
        full,
        guest=False,
        size=MIB + 1024 * TABLE + (4 << 30),
    )
    yield Mutation(
        "qed: 2^63 bytes",
        "qed",
        lambda base: [(4, struct.pack("<II", 256 * KIB, 16)), (48, struct.pack("<Q", 1 << 62))],
        r"header\+40|header\+48|header\+12",
    )


def children() -> Iterator[Mutation]:
    def child(
        name: str,
        edit: Edit,
        read: str = OPENS,
        *,
        guest: bool = True,
        beside: Callable[[Path], None] | None = below,
    ) -> Mutation:
        return Mutation(f"qed child: {name}", "qed-child", edit, read, guest=guest, beside=beside)

    def named(name: bytes, features: int = 5) -> Edit:
        return lambda base: [
            (16, struct.pack("<Q", features)),
            (56, struct.pack("<II", 512, len(name))),
            (512, name),
        ]

    yield child("parent", named(PARENT.encode()))
    yield child("without its format", named(PARENT.encode(), 1))
    yield child("name at 0", put(56, 0, 4), r"header\+56")
    yield child("name in the header's fields", put(56, 63, 4), r"header\+56")
    yield child("name behind the header", put(56, CLUSTER - 4, 4), r"header\+56")
    yield child("name at 2^32", put(56, (1 << 32) - 1, 4), r"header\+56")
    yield child("no name", put(60, 0, 4), r"header\+56")
    yield child("long name", named(b"n" * 1024), r"header\+56")
    yield child("longest name", named(b"n" * 1023), "not found")
    yield child("NUL in the name", named(b"a\0b"), "no possible file name")
    yield child("not UTF-8", named(b"\xff\xfe"), "not found")
    yield child("URL", named(b"nbd://host/x"), "not a local file")
    yield child("json", named(b'json:{"driver":"raw"}'), "not a local file|not found")
    yield child("absolute", named(b"/etc/passwd"), "outside")
    yield child("dots", named(b"../../../../etc/passwd"), "outside|not found")
    yield child("itself", named(b"image"), "comes back")
    yield child("nobody", named(b"nobody.raw"), "not found")
    yield child("not one of its own", put(16, 0), guest=False)
