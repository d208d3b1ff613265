"""Hostile VMDK images: headers and tables, compressed grains, descriptors, ESX's extents."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.corpus.bases import DATA, KIB, MIB, Base, Maker, run
from tests.corpus.chains import both, outside
from tests.corpus.mutations import (
    ANY,
    OPENS,
    PART,
    Edit,
    Field,
    Mutation,
    Writes,
    grid,
    link,
    nothing,
)
from tests.formats import make_vmdk
from tests.formats.make_vmdk import descriptor, guest, pattern

CLUSTER = 64 * KIB
COUNT = 8
SECTORS = COUNT * 128
SECTOR = 512
U64 = (1 << 64) - 1
PAST = "not written|past the end"
Beside = Callable[[Path], None]


def _sparse(path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "vmdk", path, str(COUNT * CLUSTER))
    commands = [f"write -q -P {c + 1} {c * CLUSTER} {CLUSTER}" for c in DATA]
    run("qemu-io", "-f", "vmdk", *(word for text in commands for word in ("-c", text)), path)


HELD: dict[int, bytes | int] = {c: pattern(c, CLUSTER) for c in DATA}


def _stream(path: Path) -> bytes:
    text = descriptor(f'RW {SECTORS} SPARSE "image"', create_type="streamOptimized")
    path.write_bytes(make_vmdk.stream(SECTORS, HELD, text, footer=True))
    return guest(SECTORS, HELD, 128)


def _text(path: Path) -> bytes:
    """A flat extent, one of zeros, and a sparse one."""
    path.write_bytes(
        descriptor('RW 128 FLAT "flat" 128', "RW 128 ZERO", f'RW {SECTORS - 256} SPARSE "sparse"')
    )
    extents(path)
    return pattern(77, CLUSTER) + bytes(CLUSTER) + guest(SECTORS - 256, SMALL, 128)


SMALL: dict[int, bytes | int] = {c: pattern(c, CLUSTER) for c in (4, 0, 1)}


def extents(path: Path) -> None:
    (path.parent / "flat").write_bytes(bytes(CLUSTER) + pattern(77, CLUSTER))
    (path.parent / "sparse").write_bytes(make_vmdk.sparse(SECTORS - 256, SMALL))


def _locate(base: Base) -> None:
    if base.name == "vmdk-text":
        base.metadata = [(0, base.size)]
        return
    footer = base.name == "vmdk-stream"
    header = base.size - 1024 if footer else 0
    directory = base.number(header + 56, 8) * SECTOR
    base.at = {"header": header, "directory": directory}
    base.at["table"] = base.number(directory, 4) * SECTOR
    base.metadata = [(0, 79), (directory, 4), (base.at["table"], COUNT * 4), (SECTOR, 400)]
    if footer:
        base.metadata.append((header, 79))
        base.at["grain"] = base.number(base.at["table"] + DATA[0] * 4, 4) * SECTOR
        base.metadata.append((base.at["grain"], 64))
    else:
        base.at["second"] = base.number(48, 8) * SECTOR
        base.at["copy"] = base.number(base.at["second"], 4) * SECTOR
        base.metadata += [(base.at["second"], 4), (base.at["copy"], COUNT * 4)]


MAKERS = {
    "vmdk": Maker("vmdk", _sparse, CLUSTER, _locate),
    "vmdk-stream": Maker("vmdk", _stream, CLUSTER, _locate),
    "vmdk-text": Maker("vmdk", _text, CLUSTER, _locate, beside=extents),
}

FIELDS = (
    Field("magic", 0, 4, ANY, {}),
    Field("version", 4, 4, r"header\+4", {1: OPENS, 2: OPENS, 3: OPENS}),
    # Without the flag the second tables are not looked at; with unknown lower ones they are.
    Field(
        "flags",
        8,
        4,
        r"header\+8|header\+77",
        {
            0: OPENS,
            1: OPENS,
            2: OPENS,
            3: OPENS,
            7: OPENS,
            0xFF03: OPENS,
            (1 << 31) - 1: r"header\+8",
            1 << 16: r"header\+77",
            1 << 17: OPENS,
            1 << 18: r"header\+8: unknown incompatible flags 0x40000",
        },
    ),
    Field(
        "capacity",
        12,
        8,
        r"header\+12",
        {
            0: r"header\+12",
            1: OPENS,
            SECTORS: OPENS,
            SECTORS + 1: OPENS,
            # More tables than the directory has: what follows it is taken for entries.
            (1 << 31) - 1: ("", ANY),
            1 << 31: ("", ANY),
            (1 << 32) - 1: ("", ANY),
            1 << 32: ("", ANY),
            1 << 42: r"grain tables|header\+56",
        },
    ),
    Field(
        "grain_size",
        20,
        8,
        r"header\+20",
        {
            1: OPENS,
            64: OPENS,
            128: OPENS,
            127: r"header\+20",
            256: OPENS,
            1 << 17: OPENS,
            1 << 18: r"header\+20",
        },
    ),
    Field("descriptor_offset", 28, 8, ANY, {1: OPENS}),
    Field("descriptor_size", 36, 8, r"header\+28", {0: "extent of an image", 1: OPENS, 20: OPENS}),
    Field("entries_per_table", 44, 4, r"header\+44", {128: OPENS, 512: OPENS, 8192: OPENS}),
    Field(
        "redundant_offset",
        48,
        8,
        (OPENS, r"header\+48"),
        {21: OPENS, 26: (OPENS, "another owner"), 22: (OPENS, ANY), 1: (OPENS, ANY)},
    ),
    Field(
        "directory_offset",
        56,
        8,
        r"header\+56|footer at",
        {26: OPENS, 21: (OPENS, "another owner"), 1: ("", ANY)},
    ),
    Field("overhead", 64, 8, OPENS, {}),
    Field("unclean_shutdown", 72, 1, OPENS, {}),
    Field("newlines", 73, 4, r"header\+73", {}),
    Field("compression", 77, 2, r"header\+77", {0: OPENS, 1: OPENS}),
)
# Of these the guest's bytes are others, or cannot be compared.
OTHER = {"capacity", "grain_size", "entries_per_table", "directory_offset", "flags"}
SAME = {("capacity", SECTORS), ("grain_size", 128), ("flags", 3), ("flags", 1), ("flags", 0)}
SAME |= {("entries_per_table", 512), ("directory_offset", 26)}


def put(offset: int, value: int, width: int = 4) -> Edit:
    return lambda base: [(offset, value.to_bytes(width, "little"))]


def entry(index: int, value: int, *, copies: int = 2, add: int = 0) -> Edit:
    """An entry of the table; with `add` the same as another's, so much further on."""

    def edit(base: Base) -> Writes:
        found = value
        if add or value < 0:
            found = base.number(base.at["table"] + -value * 4, 4) + add
        raw = struct.pack("<I", found)
        places = [base.at["table"], base.at.get("copy", 0)][:copies]
        return [(at + index * 4, raw) for at in places if at]

    return edit


def mutations() -> Iterator[Mutation]:
    for field, value, read, write in grid(FIELDS):
        place = (field.name, value)
        yield Mutation(
            f"vmdk: {field.name}={value:#x}",
            "vmdk",
            put(field.offset, value, field.width),
            read,
            write,
            guest=field.name not in OTHER or place in SAME,
            loose=place not in SAME,
        )
    yield from tables()
    yield from large()
    yield from packed()
    yield from texts()
    yield from others()


def tables() -> Iterator[Mutation]:
    def one(
        name: str, edit: Edit, read: str = OPENS, write: str | None = None, **more: object
    ) -> Mutation:
        return Mutation(f"vmdk: {name}", "vmdk", edit, read, write, **more)  # type: ignore[arg-type]

    for value in (1, 26, 21):
        yield one(f"entry 1 is sector {value}", entry(1, value), write="overlaps", eio=(1,))
    for value in (1 << 20, 1 << 31, (1 << 32) - 1):
        yield one(f"entry 1 is sector {value}", entry(1, value), OPENS, PAST, eio=(1,))
    yield one("entry 1 is entry 3", entry(1, -3), OPENS, "overlaps", guest=False)
    yield one(
        "entry 1 is a bit behind entry 3", entry(1, -3, add=1), OPENS, "overlaps", guest=False
    )
    yield one("copies differ", entry(5, 0, copies=1), guest=False, loose=True)
    yield one(
        "copies differ, unclean",
        lambda base: [*entry(5, 0, copies=1)(base), (72, b"\1")],
    )
    yield one(
        "the copy is nonsense, unclean",
        lambda base: [(base.at["copy"], b"\xff" * 32), (72, b"\1")],
        OPENS,
        PAST,
        eio=(1, 2, 4, 6),
    )
    for name, place in (("directory", "directory"), ("second directory", "second")):
        for value in (1 << 20, (1 << 32) - 1):
            yield one(
                f"{name} names sector {value}",
                lambda base, place=place, value=value: [  # type: ignore[misc]
                    (base.at[place], struct.pack("<I", value))
                ],
                OPENS,
                "grain directory entry 0",
                eio=tuple(range(8)) if place == "directory" else (),
                guest=place == "second",
            )
    yield one(
        "the directory names itself",
        lambda base: [(base.at["directory"], struct.pack("<I", base.at["directory"] // 512))],
        OPENS,
        ANY,
        guest=False,
    )
    yield one(
        "the directory names the header",
        lambda base: [(base.at["directory"], struct.pack("<I", 0))],
        guest=False,
        loose=True,
    )
    yield one(
        "both directories have no tables",
        lambda base: [(base.at["directory"], bytes(4)), (base.at["second"], bytes(4))],
        guest=False,
    )
    yield one(
        "both directories have the same table",
        lambda base: [(base.at["second"], struct.pack("<I", base.at["table"] // 512))],
        OPENS,
        "another owner",
    )
    for size in (1, 78, 511, 512, 1024, 11 * KIB):
        yield one(f"cut to {size} bytes", nothing, ANY, size=size, guest=False)
    yield one("cut before the tables", nothing, r"header\+56", size=26 * 512, guest=False)
    yield one("cut behind the tables", nothing, OPENS, PAST, size=70 * KIB, guest=False)


def large() -> Iterator[Mutation]:
    """As much as there may be of everything."""

    def full(count: int, grain: int, same: bool) -> Edit:
        """`count` tables of 512 entries each, every entry used, from 1 MiB on."""

        def edit(base: Base) -> Writes:
            first = 2048 + -(-count * 4 // 512)
            places = [first] * count if same else range(first, first + count * 4, 4)
            directory = struct.pack(f"<{count}I", *places)
            data = first + count * 4
            numbers = range(data, data + count * 512 * grain, grain)
            order = numbers if same else reversed(numbers)
            raw = b"" if same else struct.pack(f"<{count * 512}I", *order)
            return [
                (8, struct.pack("<IQQ", 1, count * 512 * grain, grain)),
                (56, struct.pack("<Q", 2048)),
                (MIB, directory),
                (first * 512, raw),
            ]

        return edit

    count = (1 << 13) // PART
    yield Mutation(
        "vmdk: a million entries in reverse",
        "vmdk",
        full(count // 4, 1, False),
        OPENS,
        guest=False,
        size=MIB + count // 4 * (2048 + 512 * 512 + 4) + MIB,
    )
    yield Mutation(
        "vmdk: a directory that names one table as often as may be",
        "vmdk",
        full(1 << 17, 1, True),
        OPENS,
        "another owner",
        guest=False,
        size=8 * MIB,
    )
    yield Mutation(
        "vmdk: more tables than are supported",
        "vmdk",
        full((1 << 17) + 1, 1, True),
        r"header\+56: 131073 grain tables",
        guest=False,
    )
    yield Mutation(
        "vmdk: a directory that is too long",
        "vmdk",
        lambda base: [(12, struct.pack("<QQ", (1 << 20) * 512 + 1, 1))],
        r"header\+56: 1048577 grain tables",
        guest=False,
    )
    yield Mutation(
        "vmdk: sparse file of 2 TiB",
        "vmdk",
        lambda base: [(12, struct.pack("<Q", 1 << 32))],
        OPENS,
        ANY,
        guest=False,
        size=1 << 41,
    )


def packed() -> Iterator[Mutation]:
    def one(name: str, edit: Edit, read: str = OPENS, **more: object) -> Mutation:
        how = {"eio": (DATA[0],), "guest": True} | more
        refused = read or "written once"
        return Mutation(f"vmdk stream: {name}", "vmdk-stream", edit, read, refused, **how)  # type: ignore[arg-type]

    def grain(offset: int, raw: bytes) -> Edit:
        return lambda base: [(base.at["grain"] + offset, raw)]

    yield one("as it is", nothing, eio=())
    yield one("marker of another sector", grain(0, b"\1"))
    yield one("marker of no length", grain(8, bytes(4)))
    yield one("marker of 2^32 bytes", grain(8, b"\xff" * 4))
    yield one("marker of 64 KiB too much", grain(8, struct.pack("<I", CLUSTER)), eio=())
    yield one("not deflated", grain(12, b"\0\0\0\0"))
    yield one("cut short", grain(8, struct.pack("<I", 20)))
    bomb = zlib.compress(bytes(64 * MIB), 9)
    yield one(
        "64 MiB in a grain",
        lambda base: [
            (base.size, struct.pack("<QI", DATA[0] * 128, len(bomb)) + bomb),
            (base.at["table"] + DATA[0] * 4, struct.pack("<I", base.size // 512)),
            (0, base.content[base.at["header"] : base.at["header"] + 512]),
        ],
        eio=(),
        guest=False,
    )
    long = zlib.compress(bytes(CLUSTER + 1))
    yield one(
        "one byte too much",
        grain(8, struct.pack("<I", len(long)) + long),
        eio=(),
        guest=False,
    )
    yield one(
        "entry past the end",
        lambda base: [(base.at["table"] + DATA[0] * 4, struct.pack("<I", 1 << 30))],
    )
    yield one(
        "entry in the header", lambda base: [(base.at["table"] + DATA[0] * 4, struct.pack("<I", 1))]
    )
    yield one("no footer", lambda base: [(base.size - 1024, bytes(4))], "footer at")
    yield one(
        "footer of version 9", lambda base: [(base.size - 1020, b"\x09")], r"footer at \d+\+4"
    )
    yield one(
        "the footer says that there is a footer",
        lambda base: [(base.size - 1024 + 56, b"\xff" * 8)],
        r"footer at \d+\+56",
    )
    yield one(
        "grains of 64 MiB",
        lambda base: [(base.at["header"] + 20, struct.pack("<Q", 1 << 17))],
        r"footer at \d+\+20",
    )


def texts() -> Iterator[Mutation]:
    def text(
        name: str, *lines: str, read: str = OPENS, beside: Beside = extents, **more: object
    ) -> Mutation:
        how: dict[str, object] = {"guest": False, "file_name": "images/image"} | more
        cut = descriptor(*lines)
        return Mutation(
            f"vmdk text: {name}",
            "vmdk-text",
            lambda base: [(0, cut.ljust(base.size, b"\0"))],
            read,
            beside=both(extents, outside, beside),
            **how,  # type: ignore[arg-type]
        )

    flat = 'RW 128 FLAT "flat" 128'
    out = "outside of the image's folder"
    yield text("above", 'RW 8 FLAT "../secret" 0', read=out)
    yield text("absolute", 'RW 8 FLAT "/etc/passwd" 0', read=out)
    yield text("a device", 'RW 8 FLAT "/dev/zero" 0', read=out)
    yield text("a disk of Windows", r'RW 8 FLAT "\\.\PhysicalDrive0" 0', read="not found")
    yield text("a link to above", 'RW 8 FLAT "l" 0', read=out, beside=link("l", "../secret"))
    yield text("itself", 'RW 8 FLAT "image" 0', read="is .*image itself")
    yield text("a URL", 'RW 8 FLAT "http://x/y" 0', read="not a local file")
    yield text("a missing file", 'RW 8 FLAT "missing" 0', read="line 8: not found")
    yield text("its folder", 'RW 8 FLAT "." 0', read="not a regular file")
    yield text("a long name", f'RW 8 FLAT "{"x" * 300}" 0', read="line 8")
    yield text("no extents", read="descriptor: no extents")
    yield text("a flat one twice", flat, flat, write="another extent's too")
    yield text("a flat one past the end", 'RW 128 FLAT "flat" 129', read=OPENS, write="ends at")
    yield text("a flat one at 2^63", f'RW 1 FLAT "flat" {1 << 63}', read="line 8: extent at sector")
    yield text("a sparse one twice", *['RW 128 SPARSE "sparse"'] * 2, read="another extent too")
    yield text(
        "sparse and flat",
        'RW 128 SPARSE "sparse"',
        'RW 8 FLAT "sparse" 0',
        read="a sparse extent too",
    )
    yield text(
        "flat and sparse",
        'RW 8 FLAT "sparse" 0',
        'RW 128 SPARSE "sparse"',
        read="another extent too",
    )
    yield text("longer than its extent", 'RW 1024 SPARSE "sparse"', read="line 8: 524288 bytes")
    yield text("2^50 sectors of zeros", f"RW {1 << 50} ZERO", read="the most is")
    yield text("2^60 bytes", *[f"RW {1 << 50} ZERO"] * 3000, read="more than|line|CPU")
    yield text("2^64 sectors", f"RW {1 << 64} ZERO", read="line 8")
    yield text("5000 extents", *["RW 8 ZERO"] * 5000, read="more than 4096 extents")
    yield text("4096 extents", *["RW 1 ZERO"] * 4096, write=OPENS)
    yield text(
        "300 files",
        *[f'RW 1 FLAT "f{n}" 0' for n in range(300)],
        read="more than 255 host files",
        beside=many(300),
    )
    yield text("a type that nobody knows", 'RW 8 VMFSRDM "flat"', read="extent type VMFSRDM")
    yield text("no number", 'RW x FLAT "flat"', read="line 8: no extent")
    yield text("a name with a NUL", 'RW 8 FLAT "fl\0at"', read="line 8: no extent")
    for number, raw in enumerate((b"\0", b"=\n" * 5000, b"RW" * 5000, b'"' * 9999, b"\n" * 9999)):
        yield Mutation(
            f"vmdk text: nonsense {number}",
            "vmdk-text",
            lambda base, raw=raw: [  # type: ignore[misc]
                (0, b"# Disk DescriptorFile\n" + raw + b"\n")
            ],
            ANY,
            guest=False,
        )
    yield Mutation(
        "vmdk text: 2 MiB of text",
        "vmdk-text",
        lambda base: [(0, b"# Disk DescriptorFile\n" + b"a=b\n" * (MIB // 2))],
        "a descriptor of",
        guest=False,
    )
    yield Mutation(
        "vmdk text: 1 MiB of keys",
        "vmdk-text",
        lambda base: [
            (0, b"# Disk DescriptorFile\n" + b"".join(b"k%d=v\n" % n for n in range(90000)))
        ],
        "no extents",
        guest=False,
    )


def many(count: int) -> Beside:
    def act(path: Path) -> None:
        for n in range(count):
            (path.parent / f"f{n}").write_bytes(bytes(512))

    return act


def others() -> Iterator[Mutation]:
    """COWD and seSparse extents: the descriptor is right, the extent is not."""

    def one(
        name: str,
        kind: str,
        made: bytes,
        *,
        at: int = 0,
        raw: bytes = b"",
        read: str = OPENS,
        write: str | None = None,
    ) -> Mutation:
        changed = bytearray(made)
        changed[at : at + len(raw)] = raw

        def beside(path: Path) -> None:
            (path.parent / "extent").write_bytes(changed)

        text = descriptor(f'RW {4096 * 8} {kind} "extent"')
        return Mutation(
            f"vmdk {kind}: {name}",
            "vmdk-text",
            lambda base: [(0, text.ljust(base.size, b"\0"))],
            read,
            write,
            guest=False,
            beside=beside,
            loose=True,
        )

    small: dict[int, bytes | int] = {n: pattern(n, 512) for n in (0, 5, 4096)}
    cowd = make_vmdk.cowd(4096 * 8, small)
    for name, at, raw, read in (
        ("as it is", 0, b"", OPENS),
        ("no magic", 0, b"X", "without a signature"),
        ("version", 4, b"\7", r"header\+4"),
        ("capacity 0", 12, bytes(4), r"header\+12"),
        ("capacity 1", 12, b"\1\0\0\0", "line 8"),
        ("grain 0", 16, bytes(4), r"header\+16"),
        ("grain 3", 16, b"\3", r"header\+16"),
        ("directory at 0", 20, bytes(4), r"header\+20"),
        ("directory past the end", 20, b"\xff" * 4, r"header\+20"),
        ("no directory", 24, bytes(4), r"header\+24"),
        ("free sector 0", 28, bytes(4), OPENS),
        ("free sector 2^32", 28, b"\xff" * 4, OPENS),
    ):
        yield one(name, "VMFSSPARSE", cowd, at=at, raw=raw, read=read)
    yield one(
        "table past the end",
        "VMFSSPARSE",
        cowd,
        at=2048,
        raw=b"\xff" * 4,
        read=OPENS,
        write="grain directory entry 0",
    )
    yield one(
        "table in the header",
        "VMFSSPARSE",
        cowd,
        at=2048,
        raw=b"\1\0\0\0",
        read=OPENS,
        write="grain directory entry 0",
    )
    held: dict[int, bytes | int] = {n: pattern(n, 4096) for n in (0, 5, 4095)}
    se_sparse = make_vmdk.se_sparse(4096 * 8, held)
    for name, at, raw, read in (
        ("as it is", 0, b"", OPENS),
        ("no magic", 0, b"X", "signature"),
        ("version", 8, b"\7", r"header\+8"),
        ("capacity 0", 16, bytes(8), r"header\+16"),
        ("capacity 2^63", 16, bytes(7) + b"\x80", r"header\+16"),
        ("grain", 24, b"\x10", r"header\+24"),
        ("table", 32, b"\x10", r"header\+32"),
        ("flags", 40, b"\1", r"header\+40"),
        ("volatile header past the end", 80, b"\xff" * 8, r"header\+80"),
        ("journal", 512 + 24, b"\1", "journal"),
        ("no volatile header", 512, b"\0", "volatile header"),
        ("directory past the end", 128, b"\xff" * 8, r"header\+128"),
        ("directory of nothing", 136, bytes(8), r"header\+136"),
        ("tables past the end", 144, b"\xff" * 8, r"header\+144"),
        ("grains past the end", 192, b"\xff" * 8, r"header\+192"),
        ("directory entry of another kind", 1024, b"\0" * 7 + b"\x20", OPENS),
        ("table number 2^32", 1024, b"\xff" * 4, OPENS),
        ("grain number 2^60", 1536, b"\xff" * 7 + b"\x3f", OPENS),
        ("kind 9", 1536, b"\0" * 7 + b"\x90", OPENS),
    ):
        yield one(
            name,
            "SESPARSE",
            se_sparse,
            at=at,
            raw=raw,
            read=read,
            write="cannot be written",
        )
