"""Hostile Parallels images."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tests.corpus.bases import DATA, KIB, MIB, Base, Maker, run
from tests.corpus.mutations import ANY, OPENS, Edit, Field, Mutation, grid, nothing

CLUSTER = 64 * KIB
SIZE = 8 * MIB
ENTRIES = SIZE // CLUSTER
IN_USE, EXTENSION_VALID = 0x746F6E59, 0x312E3276
OLD = b"WithoutFreeSpace"


def _make(path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "parallels", "-o", "cluster_size=64k", path, str(SIZE))
    commands = [f"write -q -P {c % 251 + 1} {c * CLUSTER} {CLUSTER}" for c in DATA]
    run("qemu-io", "-f", "parallels", *(word for text in commands for word in ("-c", text)), path)


def _odd(path: Path) -> bytes:
    """As VirtualBox makes them: clusters of 63 sectors, behind the table."""
    cluster = 63 * 512
    numbers = (5, 3, 0, 64)
    head = struct.pack("<16sIIIIIQIIIQ", OLD, 2, 16, 8, 63, 65, 65 * 63, 0, 0, 0, 0)
    table = [0] * 65
    guest = bytearray(65 * cluster)
    data = b""
    for slot, number in enumerate(numbers):
        table[number] = 1 + slot * 63
        guest[number * cluster : (number + 1) * cluster] = bytes([number + 1]) * cluster
        data += bytes([number + 1]) * cluster
    path.write_bytes((head + struct.pack("<65I", *table)).ljust(512, b"\0") + data)
    return bytes(guest)


def _locate(base: Base) -> None:
    base.at = {"table": 64, "data": base.number(48, 4) * 512 or 512}
    base.metadata = [(0, 64), (64, 40 * 4)]


MAKERS = {
    "parallels": Maker("parallels", _make, CLUSTER, _locate),
    "parallels-odd": Maker("parallels", _odd, 63 * 512, _locate),
}

FIELDS = (
    Field("version", 16, 4, r"header\+16: version", {2: OPENS}),
    Field("heads", 20, 4, OPENS, {}),
    Field("cylinders", 24, 4, OPENS, {}),
    Field(
        "cluster",
        28,
        4,
        r"header\+28",
        {
            # Too small for the disk; larger ones, of which the second is no power of two.
            1: r"header\+36",
            63: r"header\+36",
            127: r"header\+36",
            128: OPENS,
            129: (OPENS, r"header\+28"),
            256: (OPENS, ""),
            1 << 19: (OPENS, ""),
            (1 << 19) + 1: r"header\+28",
        },
    ),
    Field(
        "entries",
        32,
        4,
        r"header\+32",
        {
            0: r"header\+36",
            1: r"header\+36",
            ENTRIES - 1: r"header\+36",
            ENTRIES: OPENS,
            ENTRIES + 1: OPENS,
            (CLUSTER - 64) // 4 + 1: r"header\+48",
            1 << 24: r"header\+32",
            (1 << 24) + 1: r"header\+32",
        },
    ),
    Field(
        "sectors",
        36,
        8,
        r"header\+36",
        {1: OPENS, SIZE // 512: OPENS, SIZE // 512 + 1: r"header\+36"},
    ),
    Field("in_use", 44, 4, OPENS, {IN_USE: OPENS, EXTENSION_VALID: OPENS}),
    Field(
        "data_offset",
        48,
        4,
        # Clusters before it are not read.
        (OPENS, "before the data"),
        {0: OPENS, 1: r"header\+48", 2: OPENS, 128: OPENS, 129: (OPENS, "before the data")},
    ),
    Field("flags", 52, 4, OPENS, {}),
    Field("extension", 56, 8, (OPENS, r"header\+56: a format extension"), {0: OPENS}),
)
LARGER = {("cluster", value) for value in (129, 256, 1 << 19)}
LATER = {("data_offset", value) for value in (129, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)}


def put(offset: int, value: int, width: int = 4) -> Edit:
    return lambda base: [(offset, value.to_bytes(width, "little"))]


def entry(number: int, value: int) -> Edit:
    return put(64 + 4 * number, value)


def mutations() -> Iterator[Mutation]:
    for field, value, read, write in grid(FIELDS):
        place = (field.name, value)
        if place in LARGER and value != 129:
            write = "past the end"
        yield Mutation(
            f"parallels: {field.name}={value:#x}",
            "parallels",
            put(field.offset, value, field.width),
            read,
            write,
            guest=place not in LARGER | LATER,
        )
    yield Mutation("parallels: magic", "parallels", lambda base: [(0, b"x")], "Parallels magic")
    yield from tables()
    yield from files()
    yield from odd()


def tables() -> Iterator[Mutation]:
    for name, value, text in (
        ("past the end", 6, "past the end"),
        ("far past the end", 1 << 31, "past the end"),
        ("2^32-1", (1 << 32) - 1, "past the end"),
    ):
        yield Mutation(
            f"parallels: table[1] {name}", "parallels", entry(1, value), OPENS, text, eio=(1,)
        )
    yield Mutation(
        "parallels: two owners", "parallels", entry(1, 1), OPENS, "another owner", guest=False
    )
    yield Mutation("parallels: table[5]=0", "parallels", entry(5, 0), guest=False)
    yield Mutation(
        "parallels: an extension",
        "parallels",
        lambda base: [
            (44, struct.pack("<I", EXTENSION_VALID)),
            (56, struct.pack("<Q", 5 * CLUSTER // 512)),
        ],
        OPENS,
        r"header\+56: a format extension",
    )
    yield Mutation(
        "parallels: the old magic",
        "parallels",
        lambda base: [(0, OLD)],
        OPENS,
        "before the data",
        eio=tuple(sorted(DATA)),
        guest=False,
    )
    yield Mutation(
        "parallels: the old magic, off the grid",
        "parallels",
        lambda base: [
            (0, OLD),
            (64, struct.pack("<8I", 129, 0, 0, 0, 0, 0, 0, 0)),
            (64 + 20, bytes(12)),
        ],
        OPENS,
        "from its neighbours",
        guest=False,
    )
    yield Mutation(
        "parallels: sectors beyond 32 bits, the old magic",
        "parallels",
        lambda base: [(0, OLD), (40, b"\xff" * 4), (64, bytes(4 * ENTRIES))],
        guest=False,
    )

    def many(base: Base) -> list[tuple[int, bytes]]:
        """As many entries as there may be, backwards, so that none follows its neighbour."""
        count = 1 << 20
        table = struct.pack(f"<{count}I", *range(count + 127, 127, -1))
        return [
            (32, struct.pack("<IQIII", count, count, 0, 128 * 128, 0)),
            (64, table),
        ]

    yield Mutation(
        "parallels: a million entries in reverse",
        "parallels",
        many,
        guest=False,
        size=(1 << 20) * CLUSTER + 128 * CLUSTER,
    )


def files() -> Iterator[Mutation]:
    for size, read, write in (
        (0, ANY, ANY),
        (1, ANY, ANY),
        (15, ANY, ANY),
        (16, "byte 0: 64 bytes wanted", None),
        (63, "byte 0: 64 bytes wanted", None),
        (64, r"header\+32", None),
        (64 + 4 * ENTRIES - 1, r"header\+32", None),
    ):
        yield Mutation(f"parallels: cut at {size}", "parallels", nothing, read, write, size=size)
    yield Mutation(
        "parallels: no data",
        "parallels",
        nothing,
        OPENS,
        "past the end",
        eio=tuple(sorted(DATA)),
        size=CLUSTER,
    )
    yield Mutation(
        "parallels: cut in the last cluster",
        "parallels",
        nothing,
        guest=False,
        size=5 * CLUSTER - 7,
    )
    yield Mutation("parallels: 1 GiB of file", "parallels", nothing, size=1 << 30)
    yield Mutation(
        "parallels: a bundle",
        "parallels",
        lambda base: [(0, b"<?xml version='1.0'?>\n<Parallels_disk_image Version='1.0'>")],
        "the description of a bundle",
        format=None,
    )


def odd() -> Iterator[Mutation]:
    only = r"header\+28: clusters of 32256 bytes are only read"
    yield Mutation("parallels odd: unchanged", "parallels-odd", nothing, OPENS, only)
    yield Mutation(
        "parallels odd: table[1]=1", "parallels-odd", entry(1, 1), OPENS, only, guest=False
    )
    for value, text in ((1 << 31, "past"), (500, "past"), (253, "past")):
        yield Mutation(
            f"parallels odd: table[1]={value} {text} the end",
            "parallels-odd",
            entry(1, value),
            OPENS,
            only,
            eio=(1,),
        )
    yield Mutation(
        "parallels odd: the new magic",
        "parallels-odd",
        lambda base: [(0, b"WithouFreSpacExt")],
        OPENS,
        only,
        guest=False,
    )
    yield Mutation(
        "parallels odd: cut", "parallels-odd", nothing, OPENS, only, guest=False, size=40000
    )
    yield Mutation(
        "parallels odd: data_offset", "parallels-odd", put(48, 100), OPENS, only, guest=False
    )
    yield Mutation("parallels odd: one sector", "parallels-odd", put(28, 1), r"header\+36")
    yield Mutation(
        "parallels odd: three sectors",
        "parallels-odd",
        lambda base: [(28, struct.pack("<IIQ", 3, 65, 65 * 3))],
        OPENS,
        r"header\+28",
        guest=False,
    )
