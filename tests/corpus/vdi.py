"""Hostile VDI images."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

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
)
from tests.formats import make_vdi

DISCARDED, NEVER = 0xFFFFFFFE, 0xFFFFFFFF
U32 = 0xFFFFFFFF

FIELDS = (
    Field("signature", 64, 4, r"header\+64", {}),
    # Of version 0.x the image type lies where the header's size is now.
    Field(
        "version",
        68,
        4,
        r"header\+68",
        {
            0: r"header\+72.*image type 384",
            1: r"header\+72.*image type 384",
            0x00010000: r"header\+68",
            0x00010001: OPENS,
        },
    ),
    # What is behind the fields that we know is skipped; the map must not lie in there.
    Field(
        "header_size",
        72,
        4,
        r"header\+340",
        {
            0: r"header\+72",
            1: r"header\+72",
            383: r"header\+72",
            384: OPENS,
            440: OPENS,  # up to the map at 512
            441: r"header\+340",
        },
    ),
    Field(
        "type",
        76,
        4,
        r"header\+76",
        {1: OPENS, 2: OPENS, 3: r"header\+424.*undo", 4: r"header\+424"},
    ),
    Field("flags", 80, 4, OPENS, {}),
    Field(
        "map_offset",
        340,
        4,
        r"header\+340",
        {0: "inside the header", 1: "multiple of 512", 512: OPENS, 1024: r"header\+344"},
    ),
    Field(
        "data_offset",
        344,
        4,
        r"header\+344",
        {
            0: r"header\+344",
            512: r"header\+344",
            513: "multiple of 512",
            1024: OPENS,
            # The file then ends inside of the last block.
            1536: (OPENS, OPENS),
            1 << 31: (OPENS, "past the end"),
            U32 - 511: (OPENS, "past the end"),
        },
    ),
    Field("sector_size", 360, 4, OPENS, {}),
    Field(
        "disk_size",
        368,
        8,
        r"header\+384",
        {0: r"header\+368", 1: OPENS, 511: OPENS, 8 * MIB - 1: OPENS, 8 * MIB + 1: r"header\+384"},
    ),
    Field(
        "block_size",
        376,
        4,
        r"header\+376",
        {
            256: r"header\+376",
            512: r"header\+384",
            2048: r"header\+384",
            4096: r"header\+384",  # then 8 blocks are too few
            MIB - 1: r"header\+376",
            MIB: OPENS,
            2 * MIB: (OPENS, "past the end"),
            256 * MIB: (OPENS, "past the end"),
            512 * MIB: r"header\+376",
        },
    ),
    Field(
        "block_extra",
        380,
        4,
        r"header\+380",
        {
            0: OPENS,
            1: (OPENS, r"header\+380"),
            511: (OPENS, r"header\+380"),
            512: OPENS,
            MIB: (OPENS, "past the end"),
            256 * MIB: (OPENS, "past the end"),
            (256 * MIB) + 1: r"header\+380",
        },
    ),
    Field(
        "blocks",
        384,
        4,
        r"header\+384",
        {
            7: r"header\+384",
            9: OPENS,
            128: OPENS,  # a map of 512 bytes, up to the data
            129: r"header\+344",
            1 << 26: r"header\+340",  # a map longer than the file
            (1 << 26) + 1: r"header\+384",
        },
    ),
    Field("blocks_allocated", 388, 4, OPENS, {4: OPENS}),
)
# Of these the guest's bytes are others.
MOVED = {("data_offset", 1536), ("data_offset", 1 << 31), ("data_offset", U32 - 511)}
MOVED |= {("block_size", 2 * MIB), ("block_size", 256 * MIB)}
MOVED |= {("block_extra", value) for value in (1, 511, 512, MIB, 256 * MIB)}
# Map entries behind the disk's end are 0, which is one more owner of block 0.
TWICE = {("blocks", 9), ("blocks", 128)}


def put(offset: int, value: int, width: int = 4) -> Edit:
    return lambda base: [(offset, value.to_bytes(width, "little"))]


def entry(index: int, value: int) -> Edit:
    return lambda base: [(base.at["map"] + 4 * index, struct.pack("<I", value))]


def header(**changes: int) -> list[tuple[int, bytes]]:
    known = {field.name: field for field in FIELDS}
    return [
        (known[name].offset, value.to_bytes(known[name].width, "little"))
        for name, value in changes.items()
    ]


def with_map(entries: bytes, block_size: int, **changes: int) -> Edit:
    """A map of any length at 1 MiB, the data behind it."""
    count = len(entries) // 4
    data = -(-(MIB + len(entries)) // MIB) * MIB
    fields = {
        "map_offset": MIB,
        "data_offset": data,
        "blocks": count,
        "block_size": block_size,
        "disk_size": count * block_size,
        **changes,
    }
    return lambda base: [*header(**fields), (MIB, entries)]


BASE = "base.vdi"


def below(path: Path) -> None:
    """The parent of make_child().  At once: another process may be reading it."""
    made = path.parent / f"{BASE}.{os.getpid()}"
    make_vdi.make_base(made)
    made.replace(path.parent / BASE)


def _child(path: Path) -> bytes:
    make_vdi.make_child(path)
    return b"\1" * 2 * MIB + bytes(2 * MIB)


def _old(path: Path) -> bytes:
    make_vdi.make_old(path, [2, NEVER, 0, DISCARDED, 1])
    return b"".join(bytes([value]) * MIB for value in (3, 0, 1, 0, 2))


def _locate(base: Base) -> None:
    base.at = {"map": base.number(340, 4), "data": base.number(344, 4)}
    base.metadata = [(0, 512), (base.at["map"], base.number(384, 4) * 4)]


def _locate_old(base: Base) -> None:
    base.at = {"map": 420, "data": 420 + base.number(364, 4) * 4}
    base.metadata = [(0, base.at["data"])]


MAKERS = {
    "vdi-child": Maker("vdi", _child, MIB, _locate, file_name="image.vdi", beside=below),
    "vdi-old": Maker("vdi", _old, MIB, _locate_old),
}


def mutations() -> Iterator[Mutation]:
    for field, value, read, write in grid(FIELDS):
        place = (field.name, value)
        if place in TWICE:
            read = write = "another owner"
        yield Mutation(
            f"vdi: {field.name}={value:#x}",
            "vdi",
            put(field.offset, value, field.width),
            read,
            write,
            guest=place not in MOVED,
        )
    for name, offset in (("linkage uuid", 424), ("parent's uuid", 440)):
        yield Mutation(
            f"vdi: {name}", "vdi", put(offset, 1 << 127, 16), rf"header\+{offset}.*parent"
        )
    yield from maps()
    yield from files()
    yield from large()
    yield from children()
    yield from old_headers()


def maps() -> Iterator[Mutation]:
    for value, read in (
        (8, "map entry 1 at 516: block 8"),
        (1 << 31, "map entry 1 at 516: block 2147483648"),
        (0xFFFFFFFD, "map entry 1 at 516: block 4294967293"),
        (0, "map entry 3.*another owner"),  # block 5 has file block 0, block 3 has 1
        (DISCARDED, OPENS),
        (NEVER, OPENS),
    ):
        yield Mutation(
            f"vdi: map[1]={value:#x}",
            "vdi",
            entry(1, value),
            read if value else "map entry 5 at 532: block 0 has another owner",
        )
    # The file ends before the block: its clusters read as EIO, and it is not written.
    yield Mutation("vdi: map[1] past the end", "vdi", entry(1, 7), OPENS, "past the end", (1,))
    yield Mutation(
        "vdi: all map entries 0", "vdi", lambda base: [(512, bytes(32))], "another owner"
    )
    yield Mutation(
        "vdi: all map entries discarded",
        "vdi",
        lambda base: [(512, struct.pack("<I", DISCARDED) * 8)],
        guest=False,
    )
    yield Mutation(
        "vdi: the map is the header",
        "vdi",
        put(340, 0),
        "inside the header",
    )
    yield Mutation(
        "vdi: the map lies in the data",
        "vdi",
        lambda base: header(map_offset=1024 + 64 * KIB),
        r"header\+344",
    )
    yield Mutation(
        "vdi: fixed, but its map is out of order",
        "vdi-fixed",
        lambda base: [(512, struct.pack("<III", 2, 1, 0))],
        guest=False,
    )
    yield Mutation("vdi: fixed, with a hole", "vdi-fixed", entry(1, NEVER), OPENS)
    yield Mutation(
        "vdi: fixed, cut short",
        "vdi-fixed",
        nothing,
        OPENS,
        "past the end",
        eio=(2,),
        size=1024 + 2 * MIB,
    )


def files() -> Iterator[Mutation]:
    """Cut short, lengthened."""
    for size, read, write in (
        (0, ANY, ANY),
        (1, ANY, ANY),
        (64, ANY, ANY),
        (68, ANY, ANY),
        (455, ANY, ANY),
        (511, r"byte 0: 512 bytes wanted", None),
        (512, r"header\+340: map ends", None),
        (543, r"header\+340: map ends", None),
    ):
        yield Mutation(f"vdi: cut at {size}", "vdi", nothing, read, write, size=size)
    for size, eio in ((544, (0, 3, 5, 7)), (1024, (0, 3, 5, 7)), (1025, (0, 3, 7))):
        yield Mutation(
            f"vdi: cut at {size}",
            "vdi",
            nothing,
            OPENS,
            "past the end",
            eio=eio,
            guest=size != 1025,
            size=size,
        )
    yield Mutation(
        "vdi: cut in the last block",
        "vdi",
        nothing,
        size=1024 + 3 * MIB + 64 * KIB,
    )
    yield Mutation("vdi: 8 TiB of file", "vdi", nothing, size=1 << 43)


def large() -> Iterator[Mutation]:
    """Few bytes that could ask for much time or memory; 64 MiB of them are the most."""
    most = 16 * MIB // PART // PART  # entries of a map of 64 MiB

    def backwards(base: Base) -> Writes:
        entries = b"".join(
            struct.pack(f"<{64 * KIB}I", *range(high - 1, high - 1 - 64 * KIB, -1))
            for high in range(most, 0, -64 * KIB)
        )
        return with_map(entries, 4096)(base)

    yield Mutation(
        "vdi: many blocks in reverse", "vdi", backwards, OPENS, "past the end", guest=False
    )
    yield Mutation(
        "vdi: many blocks, every second discarded",
        "vdi",
        lambda base: with_map(struct.pack("<II", NEVER, DISCARDED) * (most // 2), 4096)(base),
        guest=False,
    )
    yield Mutation(
        "vdi: 64 Mi blocks, a sparse map",
        "vdi",
        lambda base: header(
            map_offset=MIB,
            data_offset=257 * MIB,
            blocks=1 << 26,
            block_size=4096,
            disk_size=1 << 38,
        ),
        "another owner",
        size=258 * MIB,
    )

    def last_of_many(base: Base) -> Writes:
        entries = bytearray(b"\xff" * 64 * MIB)
        entries[-4:] = struct.pack("<I", 16 * MIB - 1)
        return with_map(bytes(entries), 4096)(base)

    yield Mutation(
        "vdi: 16 Mi blocks, the last one in use",
        "vdi",
        last_of_many,
        guest=False,
        size=65 * MIB + 16 * MIB * 4096,
    )
    yield Mutation(
        "vdi: a disk of 16 PiB",
        "vdi",
        lambda base: header(disk_size=1 << 54),
        r"header\+384",
    )


def children() -> Iterator[Mutation]:
    """What a differencing image may say of its parent, and what may lie around it."""

    def child(
        name: str,
        edit: Edit,
        read: str = OPENS,
        *,
        write: str | None = None,
        guest: bool = True,
        eio: tuple[int, ...] = (),
        beside: Callable[[Path], None] = below,
    ) -> Mutation:
        return Mutation(
            f"vdi child: {name}", "vdi-child", edit, read, write, eio, guest, beside=beside
        )

    yield child("undo", put(76, 3))
    yield child("dynamic", put(76, 1), r"header\+424: linkage_uuid names a parent")
    yield child("fixed", put(76, 2), r"header\+424: linkage_uuid names a parent")
    yield child("no parent named", put(424, 0, 16), r"header\+424: no parent is named")
    yield child("another parent", put(424, 9, 16), "parent: no image .* found around it")
    yield child(
        "its own parent",
        put(392, 1, 16),
        "parent: no image .* found around it",
        beside=lambda path: None,
    )
    yield child(
        "nobody there", nothing, "parent: no image .* found around it", beside=lambda path: None
    )
    yield child("parent written since", put(440, 9, 16), "was written since")
    yield child("no state of the parent", put(440, 0, 16))
    yield child(
        "map of discarded",
        lambda base: [(512, struct.pack("<I", DISCARDED) * 4)],
        guest=False,
    )
    yield child("map[1]=4", lambda base: [(516, struct.pack("<I", 4))], "block 4, know 0 to 3")

    def edited(offset: int, data: bytes, size: int | None = None) -> Callable[[Path], None]:
        def act(path: Path) -> None:
            below(path)
            with (path.parent / BASE).open("r+b") as file:
                file.seek(offset)
                file.write(data)
                if size is not None:
                    file.truncate(size)

        return act

    def cycle(path: Path) -> None:
        make_vdi.make_child(path.parent / BASE, number=1)
        make_vdi.name(path.parent / BASE, linkage=2, parent_modification=102)

    def link_outside(path: Path) -> None:
        make_vdi.make_base(path.parent.parent / f"outside-{path.parent.name}.img")
        os.symlink(f"../outside-{path.parent.name}.img", path.parent / BASE)

    def strange(path: Path) -> None:
        os.mkfifo(path.parent / "a.vdi")
        os.symlink("/dev/zero", path.parent / "b.vdi")
        os.symlink("c.vdi", path.parent / "c.vdi")
        os.mkdir(path.parent / "d.vdi")
        (path.parent / "e.vdi").write_bytes(b"")
        below(path)

    def many(path: Path) -> None:
        for number in range(5000):
            (path.parent / f"{number:04}.vdi").touch()
        below(path)

    def deep(path: Path) -> None:
        """Every one over the next, where the state of the parent may be any."""
        for number in range(72):
            own = path.parent / f"{number}.vdi"
            make_vdi.make_child(own, [NEVER] * 4)
            make_vdi.name(own, uuid=1000 + number, linkage=1001 + number, parent_modification=0)
        make_vdi.name(path.parent / "0.vdi", uuid=1, modification=101)

    yield child("strange things beside", nothing, beside=strange)
    yield child("5000 images beside", nothing, "parent: no image .* found around it", beside=many)
    yield child("a chain of 72", nothing, "more than 64 images", beside=deep)
    yield child("parents of each other", nothing, "the chain comes back to", beside=cycle)
    yield child("a parent with two owners", nothing, "owner", beside=edited(512, bytes(8)))
    yield child("a parent cut short", nothing, eio=(0,), beside=edited(0, b"<", size=1024))
    yield child("a parent of 16 EiB", nothing, r"header\+384", beside=edited(368, b"\xff" * 8))
    yield child("a smaller parent", nothing, beside=edited(368, struct.pack("<Q", MIB)))
    yield child(
        "a parent with small blocks", nothing, r"header\+384", beside=edited(376, b"\0\2\0")
    )


def old_headers() -> Iterator[Mutation]:
    fields = (
        Field(
            "type", 72, 4, r"header\+72", {1: OPENS, 2: OPENS, 3: r"header\+404", 4: r"header\+404"}
        ),
        Field(
            "disk_size",
            352,
            8,
            r"header\+364",
            {0: r"header\+352", 1: OPENS, 5 * MIB: OPENS},
        ),
        Field(
            "block_size",
            360,
            4,
            r"header\+360",
            {MIB: OPENS, 2 * MIB: OPENS, 16 * MIB: OPENS, 32 * MIB: r"header\+360"},
        ),
        Field("blocks", 364, 4, r"header\+364", {5: OPENS, 6: "owner|know 0"}),
        Field("blocks_allocated", 368, 4, OPENS, {}),
        Field("linkage_uuid", 404, 8, r"header\+404", {0: OPENS}),
    )
    for field, value, read, _ in grid(fields):
        yield Mutation(
            f"vdi 0.2: {field.name}={value:#x}",
            "vdi-old",
            put(field.offset, value, field.width),
            read,
            read if "header" in read else "version 0.2 is only read",
            guest=field.name != "block_size" and value != 1,
        )
    for size, read, eio in (
        (419, r"byte 0: 420 bytes wanted", ()),
        (420, r"header\+364: map ends", ()),
        (440, OPENS, (0, 2, 4)),
        (440 + MIB, OPENS, (0, 4)),
        (440 + 2 * MIB + 1, OPENS, ()),
    ):
        yield Mutation(
            f"vdi 0.2: cut at {size}",
            "vdi-old",
            nothing,
            read,
            read or "version 0.2 is only read",
            eio,
            guest=size != 440 + 2 * MIB + 1,
            size=size,
        )
    yield Mutation("vdi 0.2: written", "vdi-old", nothing, OPENS, "version 0.2 is only read")
    yield Mutation(
        "vdi 0.2: map[0]=5",
        "vdi-old",
        lambda base: [(420, struct.pack("<I", 5))],
        "map entry 0 at 420: block 5, know 0 to 4",
        "version 0.2 is only read",
    )
