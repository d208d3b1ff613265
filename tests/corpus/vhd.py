"""Hostile VHD images."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.corpus.bases import DATA, KIB, MIB, Base, Maker
from tests.corpus.mutations import (
    ANY,
    OPENS,
    PART,
    Answer,
    Edit,
    Field,
    Mutation,
    Writes,
    grid,
    link,
    nothing,
)
from tests.formats import make_vhd
from tests.formats.make_vhd import PARENT_UUID, Block, Spec, child_of, summed

BLOCK = 64 * KIB
STRIDE = BLOCK + 512
TABLE, FIRST = 1536, 2048
SIZE = 8 * BLOCK
END = FIRST + 4 * STRIDE  # of the dynamic base's blocks
PARENT = "base.vhd"


def _spec() -> Spec:
    """Of block 3 a part is there; the rest of it is not zeros in the file."""
    blocks = {c: Block(bytes([c % 251 + 1]) * BLOCK) for c in DATA}
    blocks[3].present = [range(7), range(64, 128)]
    return Spec(SIZE, blocks, block=BLOCK)


def _guest(below: bytes) -> bytes:
    guest = bytearray(below)
    for c in DATA:
        for run in (range(7), range(64, 128)) if c == 3 else (range(128),):
            at = c * BLOCK + run.start * 512
            guest[at : at + len(run) * 512] = bytes([c % 251 + 1]) * len(run) * 512
    return bytes(guest)


def _make(path: Path) -> bytes:
    _spec().write(path)
    return _guest(bytes(SIZE))


def _make_fixed(path: Path) -> bytes:
    data = b"\x05" * BLOCK + bytes(BLOCK) + b"\x06" * BLOCK
    make_vhd.fixed(path, data)
    return data


def _child() -> Spec:
    return child_of(Path(PARENT), SIZE, _spec().blocks, block=BLOCK)


def _make_child(path: Path) -> bytes:
    _child().write(path)
    return _guest(b"\xee" * SIZE)


def _beside(path: Path) -> None:
    end = make_vhd.footer(make_vhd.FIXED, SIZE, uuid=PARENT_UUID)
    (path.parent / PARENT).write_bytes(b"\xee" * SIZE + end)


def _locate(base: Base) -> None:
    base.metadata = [(base.size - 512, 512)]
    if base.name != "vhd-fixed":
        base.at = {"header": 512, "table": TABLE}
        base.metadata += [(0, 512), (512, 64), (512 + 576, 192), (TABLE, 32)]
        base.metadata += [(base.number(TABLE + 4 * c, 4) * 512, 16) for c in DATA]


def _seal(image: dict[int, bytearray]) -> None:
    """Sums that are right, so that more than they are looked at."""
    for start, part in image.items():
        if start == 0 and len(part) >= 1536:
            part[:512] = summed(bytes(part[:512]), 64)
            part[512:1536] = summed(bytes(part[512:1536]), 36)
    last = image[max(image)]
    at = last.rfind(b"conectix")
    if at >= 0 and len(last) - at == 512:
        last[at:] = summed(bytes(last[at:]), 64)


MAKERS = {
    "vhd": Maker("vhd", _make, BLOCK, _locate, big=True, seal=_seal),
    "vhd-fixed": Maker("vhd", _make_fixed, BLOCK, _locate, big=True, seal=_seal),
    "vhd-child": Maker("vhd", _make_child, BLOCK, _locate, big=True, beside=_beside, seal=_seal),
}

FOOTER = (
    Field("features", 8, 4, OPENS, {}),
    Field("version", 12, 4, r"footer\+12 at 0", {0x10000: OPENS, 0x10001: OPENS}),
    Field(
        "data_offset",
        16,
        8,
        r"footer\+16: data_offset",
        {512: OPENS, 513: r"footer\+16", 1024: r"header at 1024\+0", END - 512: "header at"},
    ),
    Field("timestamp", 24, 4, OPENS, {}),
    Field("creator", 28, 4, OPENS, {}),
    Field("original_size", 40, 8, OPENS, {}),
    Field(
        "current_size",
        48,
        8,
        r"footer\+48 at 0",
        {
            511: r"footer\+48",
            512: OPENS,
            513: OPENS,
            SIZE - 1: OPENS,
            SIZE + 512: r"header\+28 at 512: 8 table entries, 9 expected",
            1 << 31: r"header\+28",
            (1 << 31) - 1: r"header\+28",
            1 << 32: r"header\+28",
            (1 << 32) - 1: r"header\+28",
            1 << 62: r"header\+32 at 512: \d+ blocks",
        },
    ),
    Field("geometry", 56, 4, OPENS, {}),
    Field(
        "type",
        60,
        4,
        r"footer\+60 at",
        {2: r"footer\+48", 3: OPENS, 4: "parent: not found: no name"},
    ),
    Field("saved_state", 84, 1, OPENS, {}),
)
HEADER = (
    Field("header: cookie", 0, 8, r"header at 512\+0", {}),
    Field("header: data_offset", 8, 8, OPENS, {}),
    Field(
        "header: table_offset",
        16,
        8,
        r"header\+16 at 512",
        {512: "lies over the header", 1024: "lies over the header", 1536: OPENS, 1537: "multiple"},
    ),
    Field("header: version", 24, 4, r"header\+24 at 512", {0x10000: OPENS, 0x1FFFF: OPENS}),
    Field("header: entries", 28, 4, OPENS, {0: r"header\+28", 1: r"header\+28", 7: r"header\+28"}),
    Field(
        "header: block_size",
        32,
        4,
        r"header\+32 at 512: block size",
        {
            512: r"header\+32",
            4096: r"header\+28",
            BLOCK // 2: r"header\+28",
            BLOCK - 1: r"header\+32",
            BLOCK: OPENS,
            2 * BLOCK: (OPENS, "lies over|the blocks end"),
            32 * MIB: (OPENS, "lies over|the blocks end"),
            64 * MIB: r"header\+32",
        },
    ),
    Field("header: parent_uuid", 40, 8, OPENS, {}),
    Field("header: parent_timestamp", 56, 4, OPENS, {}),
)
MOVED = {("header: block_size", 2 * BLOCK), ("header: block_size", 32 * MIB)}


def footers(change: Callable[[bytearray], None], *, head: bool = True, tail: bool = True) -> Edit:
    """The same change in both copies, with right sums."""

    def edit(base: Base) -> Writes:
        writes = []
        for at, wanted in ((0, head), (base.size - 512, tail)):
            raw = bytearray(base.content[at : at + 512])
            change(raw)
            if wanted:
                writes.append((at, summed(bytes(raw), 64)))
        return writes

    return edit


def header(change: Callable[[bytearray], None]) -> Edit:
    def edit(base: Base) -> Writes:
        raw = bytearray(base.content[512:1536])
        change(raw)
        return [(512, summed(bytes(raw), 36))]

    return edit


def put(offset: int, value: int, width: int) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        raw[offset : offset + width] = value.to_bytes(width, "big")

    return change


def entry(index: int, value: int) -> Edit:
    return lambda base: [(TABLE + 4 * index, struct.pack(">I", value))]


def mutations() -> Iterator[Mutation]:
    for fields, edit in ((FOOTER, footers), (HEADER, header)):
        for field, value, read, write in grid(fields):
            yield Mutation(
                f"vhd: {field.name}={value:#x}",
                "vhd",
                edit(put(field.offset, value, field.width)),
                read,
                write,
                guest=(field.name, value) not in MOVED,
            )
    yield from copies()
    yield from tables()
    yield from files()
    yield from fixed()
    yield from children()
    yield from large()


def copies() -> Iterator[Mutation]:
    """Of the two footers one is enough."""
    garbage = b"\xa5" * 512
    for name, edit, answer in (
        ("no head", lambda base: [(0, bytes(512))], OPENS),
        ("garbage as head", lambda base: [(0, garbage)], OPENS),
        ("head's sum", lambda base: [(64, bytes(4))], OPENS),
        ("tail's sum", lambda base: [(END + 64, bytes(4))], OPENS),
        ("no tail", lambda base: [(END, bytes(512))], OPENS),
        ("garbage as tail", lambda base: [(END, garbage)], OPENS),
        ("both sums", lambda base: [(64, bytes(4)), (END + 64, bytes(4))], "no whole copy: at 0"),
        ("no head, the tail's sum", lambda base: [(0, garbage), (END + 64, b"1")], "no whole copy"),
        ("no head, no tail", lambda base: [(0, garbage), (END, garbage)], "no VHD footer"),
        ("two cookies", lambda base: [(0, b"conectix"), (END, b"conectix".ljust(512))], OPENS),
    ):
        yield Mutation(f"vhd: {name}", "vhd", edit, answer)
    # A tail that says another disk: the head goes first, and is what is written.
    for name, at, value, width in (
        ("size", 48, 1 << 40, 8),
        ("type", 60, 4, 4),
        ("type fixed", 60, 2, 4),
        ("header", 16, 1 << 40, 8),
    ):
        yield Mutation(
            f"vhd: another {name} in the tail", "vhd", footers(put(at, value, width), head=False)
        )


def tables() -> Iterator[Mutation]:
    for value, read, eio in (
        (0, OPENS, (1,)),
        (1, OPENS, (1,)),  # the header
        (2, OPENS, (1,)),
        (3, OPENS, (1,)),  # the table itself
        (END // 512 + 200, OPENS, (1,)),
        (1 << 31, OPENS, (1,)),
        (0xFFFFFFFE, OPENS, (1,)),
    ):
        yield Mutation(
            f"vhd: table[1]={value:#x}", "vhd", entry(1, value), read, "table entry 1 at 1540", eio
        )
    for name, value in (("one place twice", FIRST), ("overlapping", FIRST + BLOCK // 2)):
        yield Mutation(
            f"vhd: {name}", "vhd", entry(1, value // 512), OPENS, "lies over", guest=False
        )
    yield Mutation(
        "vhd: over the footer", "vhd", entry(1, END // 512 - 1), OPENS, "table entry", guest=False
    )
    yield Mutation(
        "vhd: a table of zeros",
        "vhd",
        lambda base: [(TABLE, bytes(32))],
        OPENS,
        "table entry 0",
        tuple(range(8)),
    )
    yield Mutation("vhd: an empty table", "vhd", lambda base: [(TABLE, b"\xff" * 32)], guest=False)
    yield Mutation(
        "vhd: all in one place",
        "vhd",
        lambda base: [(TABLE, struct.pack(">I", FIRST // 512) * 8)],
        OPENS,
        "lies over",
        guest=False,
    )
    yield Mutation(
        "vhd: bitmaps of zeros",
        "vhd",
        lambda base: [(FIRST + i * STRIDE, bytes(16)) for i in range(4)],
        guest=False,
    )
    yield Mutation(
        "vhd: bitmaps of every second sector",
        "vhd",
        lambda base: [(FIRST + i * STRIDE, b"\x55" * 16) for i in range(4)],
        guest=False,
    )
    yield Mutation(
        "vhd: header's sum", "vhd", lambda base: [(512 + 36, bytes(4))], OPENS, r"header\+36"
    )


def files() -> Iterator[Mutation]:
    """Cut short, lengthened."""
    for size, read, write in (
        (0, ANY, ANY),
        (8, ANY, ANY),
        (511, ANY, ANY),
        (512, r"footer\+16", None),
        (1535, r"footer\+16", None),
        (1536, r"header\+16", None),
        (1567, r"header\+16", None),
    ):
        yield Mutation(f"vhd: cut at {size}", "vhd", nothing, read, write, size=size)
    for size in (1568, FIRST, FIRST + 511):
        yield Mutation(
            f"vhd: cut at {size}", "vhd", nothing, OPENS, "table entry 0", DATA, size=size
        )
    yield Mutation(
        "vhd: cut in the last block",
        "vhd",
        nothing,
        OPENS,
        "table entry 0.*the blocks end at",
        (0,),
        size=END - 4096,
    )
    yield Mutation("vhd: cut before the footer", "vhd", nothing, size=END)
    yield Mutation("vhd: 511 bytes of footer", "vhd", nothing, size=END + 511)
    yield Mutation("vhd: zeros behind the footer", "vhd", nothing, size=END + 1024)
    yield Mutation("vhd: an odd length", "vhd", nothing, size=END + 100_001)
    yield Mutation("vhd: 8 TiB of file", "vhd", nothing, OPENS, "too many places", size=1 << 43)


def fixed() -> Iterator[Mutation]:
    size = 3 * BLOCK
    for value, answer in (
        (size, OPENS),
        (size - 512, OPENS),
        (size - 1, OPENS),
        (size + 1, r"footer\+48"),
        (size + 512, r"footer\+48"),
        (511, r"footer\+48"),
        (512, OPENS),
        (1 << 62, r"footer\+48"),
        (1 << 63, r"footer\+48"),
        ((1 << 64) - 1, r"footer\+48"),
    ):
        yield Mutation(
            f"vhd: fixed, current_size={value:#x}",
            "vhd-fixed",
            footers(put(48, value, 8), head=False),
            answer,
        )
    for kind, answer in ((3, r"footer\+16"), (4, r"footer\+16"), (7, r"footer\+60")):
        yield Mutation(
            f"vhd: fixed, type={kind}", "vhd-fixed", footers(put(60, kind, 4), head=False), answer
        )
    yield Mutation("vhd: fixed, no footer", "vhd-fixed", nothing, "no VHD footer", size=size)
    yield Mutation("vhd: fixed, 511 bytes of footer", "vhd-fixed", nothing, size=size + 511)
    yield Mutation("vhd: fixed, zeros behind", "vhd-fixed", nothing, size=size + 4096)
    yield Mutation(
        "vhd: fixed, its sum, by content",
        "vhd-fixed",
        lambda base: [(size + 64, bytes(4))],
        "no whole copy",
        format=None,
    )
    yield Mutation(
        "vhd: fixed, named like a raw disk",
        "vhd-fixed",
        nothing,
        "named like a raw disk",
        format=None,
        file_name="disk.img",
    )
    # What a guest may write into its first sectors.
    inner = _child().build()[: 3 * BLOCK]
    yield Mutation(
        "vhd: fixed, a child in it",
        "vhd-fixed",
        lambda base: [(0, inner)],
        guest=False,
        format=None,
    )
    for name, magic in (("QCOW2", b"QFI\xfb\0\0\0\x03"), ("VHDX", b"vhdxfile")):
        yield Mutation(
            f"vhd: fixed, {name} in it",
            "vhd-fixed",
            lambda base, magic=magic: [(0, magic)],  # type: ignore[misc]
            "looks like",
            format=None,
        )


def children() -> Iterator[Mutation]:
    """Paths come from strangers."""

    def named(name: str, code: bytes = b"W2ru", **more: object) -> Edit:
        spec = _child()
        spec.paths = [(code, name.encode("utf-16-le"))]
        spec.name = ""
        raw = spec.build()
        return lambda base: [(0, raw.ljust(base.size, b"\0"))]

    cases: tuple[tuple[str, Edit, Answer], ...] = (
        ("as it is", nothing, OPENS),
        ("parent: none of the name", named(".\\other.vhd"), "not found: 'other.vhd'"),
        ("parent: itself", named(".\\image"), "comes back to"),
        ("parent: by way of its folder", named("..\\.\\image"), "comes back to"),
        ("parent: outside", named("..\\..\\..\\..\\..\\..\\..\\etc\\passwd"), "outside|not found"),
        ("parent: absolute", named("/etc/passwd", b"W2ku"), "outside"),
        ("parent: a device", named("/dev/zero", b"W2ku"), "outside"),
        ("parent: a URL", named("nbd://localhost:10809"), "not a local file"),
        ("parent: json", named('json:{"driver":"raw"}'), "not a local file"),
        ("parent: a folder", named(".\\."), "not found"),
        ("parent: a NUL", named("\0base.vhd"), "not found: no name"),
        ("parent: 8000 letters", named("x" * 8000), "no possible file name"),
        (
            "parent: half a pair",
            named("\ud800.vhd".encode("utf-16-le", "surrogatepass").hex()),
            ANY,
        ),
        ("parent: another", header(put(40, 1, 16)), "expected 0000"),
        ("parent: any", header(put(40, 0, 16)), OPENS),
    )
    for name, edit, answer in cases:
        read, write = answer if isinstance(answer, tuple) else (answer, answer)
        yield Mutation(f"vhd: child, {name}", "vhd-child", edit, read, write)
    for i in (0, 1):
        at = 576 + 24 * i
        place = rf"header\+{at} at 512"
        for name, offset, width, value, wanted in (
            ("length", 8, 4, 0xFFFFFFFF, place),
            ("length", 8, 4, 16 * KIB, OPENS),
            ("length", 8, 4, 16 * KIB + 1, place),
            ("offset", 16, 8, 0, place),
            ("offset", 16, 8, 1 << 63, place),
            ("offset", 16, 8, (1 << 64) - 1, place),
            ("space", 4, 4, 0xFFFFFFFF, OPENS),
        ):
            yield Mutation(
                f"vhd: child, locator {i}, {name}={value:#x}",
                "vhd-child",
                header(put(at + offset, value, width)),
                wanted,
                # Its room then lies over blocks.
                "lies over metadata" if value == 16 * KIB else wanted,
                eio=DATA[:1] if value == 16 * KIB else (),
                guest=value != 16 * KIB,
            )
    yield Mutation(
        "vhd: child, its parent's size",
        "vhd-child",
        nothing,
        guest=False,
        beside=_short,
    )
    yield Mutation(
        "vhd: child, its parent is no VHD",
        "vhd-child",
        nothing,
        "no VHD footer",
        beside=_no_vhd,
    )
    yield Mutation(
        "vhd: child, its parent is its own child",
        "vhd-child",
        nothing,
        "comes back to",
        beside=_loop,
    )
    yield Mutation(
        "vhd: child, its parent is a link outside",
        "vhd-child",
        nothing,
        "outside",
        beside=link(PARENT, "/etc/passwd"),
    )


def _short(path: Path) -> None:
    end = make_vhd.footer(make_vhd.FIXED, 1024, uuid=PARENT_UUID)
    (path.parent / PARENT).write_bytes(b"\xee" * 1024 + end)


def _no_vhd(path: Path) -> None:
    (path.parent / PARENT).write_bytes(b"QFI\xfb" * 4096)


def _loop(path: Path) -> None:
    spec = child_of(path, SIZE, {}, uuid=make_vhd.UUID, block=BLOCK)
    spec.uuid = PARENT_UUID
    spec.write(path.parent / PARENT)


def large() -> Iterator[Mutation]:
    """Few bytes that could ask for much time or memory."""

    def long_table(count: int, entries: bytes) -> Edit:
        def edit(base: Base) -> Writes:
            disk = count * 4096
            raw = make_vhd.header(MIB, count, 4096)
            end = make_vhd.footer(make_vhd.DYNAMIC, disk)
            return [(0, end), (512, raw), (MIB, entries)]

        return edit

    most = (1 << 17) // PART
    # Blocks from 32 MiB on; each 4608 bytes.
    first = 32 * MIB // 512
    rising = b"".join(
        struct.pack(f">{16 * KIB}I", *range(first + 9 * at, first + 9 * (at + 16 * KIB), 9))
        for at in range(0, most, 16 * KIB)
    )
    size = 32 * MIB + most * 4608
    yield Mutation(
        "vhd: many blocks, no sector of them",
        "vhd",
        long_table(most, rising),
        guest=False,
        size=size,
    )
    yield Mutation(
        "vhd: many blocks in one place",
        "vhd",
        long_table(most, struct.pack(">I", first) * most),
        OPENS,
        "lies over",
        guest=False,
        size=size,
    )
    yield Mutation(
        "vhd: many blocks behind the end",
        "vhd",
        long_table(most, b"\x7f" * 4 * most),
        OPENS,
        "the blocks end",
        guest=False,
        size=size,
    )
    yield Mutation(
        "vhd: 4 Mi entries and one more",
        "vhd",
        long_table((1 << 22) + 1, b"\xff" * 4),
        "at most 4194304",
        size=size,
    )
    per_block = 32 * MIB + 8 * KIB
    yield Mutation(
        "vhd: blocks of 32 MiB, every second sector",
        "vhd",
        lambda base: [
            (0, make_vhd.footer(make_vhd.DYNAMIC, 4 << 30)),
            (512, make_vhd.header(MIB, 128, 32 * MIB)),
            (MIB, struct.pack(">128I", *((2 * MIB + i * per_block) // 512 for i in range(128)))),
            *((2 * MIB + i * per_block, b"\x55" * 8 * KIB) for i in range(128)),
        ],
        guest=False,
        size=2 * MIB + 128 * per_block,
    )
