"""Hostile Bochs images."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

from tests.corpus.bases import KIB, MIB, Base, Maker
from tests.corpus.mutations import ANY, OPENS, Edit, Field, Mutation, grid, nothing
from tests.formats.make_packed import make_bochs

EXTENT, EXTENTS = 64 * KIB, 8
STEP = 512 + EXTENT
DATA = 512 + 128 * 4  # where extents begin
ORDER = (5, 3, 7, 0)  # what there is, as it lies in the file
ABSENT = 0xFFFFFFFF
ONLY_READ = "only read"


def _make(path: Path) -> bytes:
    """Extents that are whole, have a head, a tail, or every second sector."""
    random_ = random.Random(1)
    content = random_.randbytes(EXTENT * EXTENTS)
    sectors = [
        *range(5 * 128, 6 * 128),
        *range(3 * 128, 3 * 128 + 20),
        *range(7 * 128 + 100, 8 * 128),
        *range(0, 128, 2),
    ]
    return make_bochs(path, content, EXTENT, sectors)


def _locate(base: Base) -> None:
    base.at = {"catalog": 512, "data": DATA}
    base.metadata = [(0, 100), (512, 8 * 4), *((DATA + i * STEP, 16) for i in range(4))]


MAKERS = {"bochs": Maker("bochs", _make, EXTENT, _locate)}

SAME = {("version", 0x20000), ("header_size", 512), ("catalog", 128), ("bitmap", 512)}
SAME |= {("extent", EXTENT), ("disk", EXTENT * EXTENTS), ("bitmap", 16), ("bitmap", 511)}
FIELDS = (
    Field(
        "version",
        64,
        4,
        r"header\+64",
        # Version 1 has the size where version 2 has a timestamp, of 0, and half of the size.
        {0x10000: r"header\+84", 0x20000: OPENS, 0x30000: r"header\+64"},
    ),
    Field(
        "header_size",
        68,
        4,
        r"header\+(68|72)",
        {0: r"header\+68", 511: r"header\+68", 512: OPENS, 513: r"header\+68", 1024: OPENS},
    ),
    Field(
        "catalog",
        72,
        4,
        r"header\+72",
        {0: r"header\+72", 8: r"header\+72", 128: OPENS, 256: OPENS, 1 << 16: OPENS},
    ),
    Field(
        "bitmap",
        76,
        4,
        r"header\+76",
        {15: "bitmaps of 15 bytes", 16: OPENS, 511: OPENS, 512: OPENS, 513: OPENS, MIB: OPENS},
    ),
    Field(
        "extent",
        80,
        4,
        r"header\+80",
        {
            512: r"header\+88",
            EXTENT // 2: OPENS,  # the catalog has room for a disk of 128 of them
            EXTENT: OPENS,
            2 * EXTENT: r"header\+76",  # for which the bitmaps are too short
        },
    ),
    Field(
        "disk",
        88,
        8,
        r"header\+88",
        {
            512: OPENS,
            513: r"header\+88",
            EXTENT * EXTENTS: OPENS,
            EXTENT * 128: OPENS,
            EXTENT * 128 + 512: "the catalog has room for",
        },
    ),
)


def entry(index: int, value: int) -> Edit:
    return lambda base: [(512 + 4 * index, struct.pack("<I", value))]


def mutations() -> Iterator[Mutation]:
    for field, value, read, _ in grid(FIELDS):
        unknown = field.name == "version" and value not in (0x10000, 0x20000)
        yield Mutation(
            f"bochs: {field.name}={value:#x}",
            "bochs",
            lambda base, field=field, value=value: [  # type: ignore[misc]
                (field.offset, value.to_bytes(field.width, "little"))
            ],
            read,
            r"header\+64" if unknown else ONLY_READ,
            guest=(field.name, value) in SAME,
        )
    for offset, name in ((0, b"Bochs Virtual HD\0"), (32, b"Flat\0"), (48, b"Undoable\0")):
        yield Mutation(
            f"bochs: {name!r} at {offset}",
            "bochs",
            lambda base, offset=offset, name=name: [(offset, name)],  # type: ignore[misc]
            rf"header\+{offset}",
            rf"header\+{offset}",
        )
    yield from catalogs()
    yield from files()


def catalogs() -> Iterator[Mutation]:
    for value in (4, 5, 1 << 16, 1 << 31, ABSENT - 1):
        yield Mutation(
            f"bochs: extent 1 is {value:#x}",
            "bochs",
            entry(1, value),
            OPENS,
            ONLY_READ,
            eio=(1,),
        )
    yield Mutation("bochs: one extent twice", "bochs", entry(1, 2), OPENS, ONLY_READ, guest=False)
    yield Mutation(
        "bochs: all extents are one",
        "bochs",
        lambda base: [(512, bytes(32))],
        OPENS,
        ONLY_READ,
        guest=False,
    )
    yield Mutation(
        "bochs: none left",
        "bochs",
        lambda base: [(512, b"\xff" * 32)],
        OPENS,
        ONLY_READ,
        guest=False,
    )
    yield Mutation(
        "bochs: a bitmap with more bits than sectors",
        "bochs",
        lambda base: [(DATA + 16, b"\xff" * 496)],
        OPENS,
        ONLY_READ,
    )


def files() -> Iterator[Mutation]:
    """Cut short, lengthened, large."""
    for size, read in (
        (0, r"header\+0"),
        (21, r"header\+0"),
        (48, r"header\+48"),
        (64, r"header\+64"),
        (68, r"header\+68"),
        (96, r"header\+72"),
        (512, r"header\+72"),
        (DATA - 1, r"header\+72"),
    ):
        yield Mutation(f"bochs: cut at {size}", "bochs", nothing, read, ANY, size=size)
    for size, eio in (
        (DATA, (0, 3, 5, 7)),
        (DATA + 512, (0, 3, 5, 7)),
        (DATA + STEP - 512, (0, 3, 5, 7)),
        (DATA + 3 * STEP, (0,)),
    ):
        yield Mutation(
            f"bochs: cut at {size}", "bochs", nothing, OPENS, ONLY_READ, eio=eio, size=size
        )
    yield Mutation("bochs: 8 TiB of file", "bochs", nothing, OPENS, ONLY_READ, size=1 << 43)
    for catalog, extent, read in (
        (1 << 23, 32 * MIB, OPENS),
        ((1 << 23) + 128, 32 * MIB, r"header\+72"),
        (1 << 17, 512 * KIB, OPENS),
        (1 << 16, 512, OPENS),
        ((1 << 16) + 128, 512, r"header\+72"),
        (1 << 20, 64 * MIB, r"header\+80"),
    ):
        yield Mutation(
            f"bochs: {catalog} extents of {extent}, sparse",
            "bochs",
            lambda base, catalog=catalog, extent=extent: [  # type: ignore[misc]
                (72, struct.pack("<III", catalog, max(1, extent // 4096), extent)),
                (88, struct.pack("<Q", catalog * extent)),
            ],
            read,
            ONLY_READ,
            guest=False,
            size=1 << 43,
        )
