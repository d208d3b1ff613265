"""Hostile EWF images, of one segment and of three."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.corpus.bases import KIB, Base, Maker
from tests.corpus.mutations import ANY, OPENS, Edit, Mutation, Writes, extremes, link, nothing
from tests.formats.make_ewf import GUID, make_segments

CHUNK, CHUNKS = 4 * KIB, 32
SECTORS = CHUNK * CHUNKS // 512
SHARE = CHUNKS // 2  # chunks in each of the two tables
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
ONLY_READ = "only read"
SECTION, VOLUME = 76, 1052


def content() -> bytes:
    random_ = random.Random(1)
    return b"".join(random_.randbytes(1000) + bytes([i]) * (CHUNK - 1000) for i in range(CHUNKS))


def _make(path: Path) -> bytes:
    path.write_bytes(make_segments(content())[0])
    return content()


def _make_three(path: Path) -> bytes:
    path.write_bytes(make_segments(content(), segments=3)[0])
    return content()


def _others(path: Path) -> None:
    for number, raw in enumerate(make_segments(content(), segments=3)[1:], 2):
        path.with_suffix(f".E{number:02}").write_bytes(raw)


def _locate(base: Base) -> None:
    at = 13
    base.metadata = [(0, 13)]
    while True:
        kind = base.content[at : at + 16].split(b"\0")[0].decode()
        count = sum(name.partition(".")[0] == kind for name in base.at)
        base.at[f"{kind}.{count}"] = at
        base.metadata.append((at, SECTION))
        if kind in ("volume", "table", "table2"):
            base.metadata.append((at + SECTION, 40))
        if kind in ("done", "next"):
            return
        at = base.number(at + 16, 8)


def seal(image: dict[int, bytearray]) -> None:
    """All checksums of section headers and of what volumes and tables begin with."""
    for part in image.values():
        for kind in (b"volume", b"sectors", b"table", b"table2", b"hash", b"next", b"done"):
            name, at = kind.ljust(16, b"\0"), -1
            while (at := part.find(name, at + 1)) >= 0:
                for start, length in (
                    (at, SECTION),
                    (at + SECTION, VOLUME if kind == b"volume" else 24),
                ):
                    if kind not in (b"volume", b"table", b"table2") and start != at:
                        continue
                    raw = part[start : start + length]
                    if len(raw) == length:
                        part[start : start + length] = resealed(bytes(raw))


def resealed(raw: bytes) -> bytes:
    return raw[:-4] + struct.pack("<I", zlib.adler32(raw[:-4]))


MAKERS = {
    "ewf": Maker("ewf", _make, CHUNK, _locate, file_name="image.E01", seal=seal),
    "ewf-three": Maker(
        "ewf", _make_three, CHUNK, _locate, file_name="image.E01", beside=_others, seal=seal
    ),
}


def put(where: str, length: int, offset: int, value: int, width: int, *, skip: int = 0) -> Edit:
    """A number in a sealed structure, `skip` bytes behind the beginning of section `where`."""

    def edit(base: Base) -> Writes:
        at = base.at[where] + skip
        raw = bytearray(base.content[at : at + length])
        raw[offset : offset + width] = value.to_bytes(width, "little")
        return [(at, resealed(bytes(raw)))]

    return edit


def section(where: str, offset: int, value: int) -> Edit:
    return put(where, SECTION, offset, value, 8)


def volume(offset: int, value: int, width: int) -> Edit:
    return put("volume.0", VOLUME, offset, value, width, skip=SECTION)


def table(number: int, offset: int, value: int, width: int) -> Edit:
    return put(f"table.{number}", 24, offset, value, width, skip=SECTION)


def entry(number: int, index: int, value: int) -> Edit:
    """An offset in a table and in its copy."""

    def edit(base: Base) -> Writes:
        writes = []
        for name in ("table", "table2"):
            at = base.at[f"{name}.{number}"] + SECTION + 24
            raw = bytearray(base.content[at : at + 4 * SHARE + 4])
            struct.pack_into("<I", raw, 4 * index, value)
            writes.append((at, resealed(bytes(raw))))
        return writes

    return edit


def one(
    name: str, edit: Edit, read: str = OPENS, eio: tuple[int, ...] = (), guest: bool = True
) -> Mutation:
    return Mutation(f"ewf: {name}", "ewf", edit, read, ONLY_READ, eio=eio, guest=guest)


def mutations() -> Iterator[Mutation]:
    yield from volumes()
    yield from sections()
    yield from tables()
    yield from data()
    yield from files()
    yield from sets()


def volumes() -> Iterator[Mutation]:
    few = "chunks of .* for"
    for value in sorted(extremes(4) | {CHUNKS - 1, CHUNKS, CHUNKS + 1}):
        read = OPENS if value >= CHUNKS else few
        yield one(f"{value:#x} chunks", volume(4, value, 4), read)
    for value, read in (
        (0, "0 sectors in a chunk"),
        (1, few),
        (7, few),
        (8, OPENS),
        (9, OPENS),
        (16, OPENS),
        (16384, OPENS),
        (16385, "chunks of 8389120 bytes, the most is"),
        (1 << 31, "chunks of .* bytes, the most is"),
        (U32, "chunks of .* bytes, the most is"),
    ):
        yield one(f"chunks of {value} sectors", volume(8, value, 4), read, guest=value == 8)
    for value in sorted(extremes(4) | {256, 511, 512, 513, 1024, 4096, 8192}):
        read = OPENS if value in (512, 1024, 4096) else "sector size"
        yield one(f"sectors of {value:#x} bytes", volume(12, value, 4), read, guest=value == 512)
    for value in sorted(extremes(8) | {SECTORS - 1, SECTORS, SECTORS + 1}):
        read = OPENS if value <= SECTORS else few
        yield one(f"{value:#x} sectors", volume(16, value, 8), read if value else "0 sectors")
    yield one(
        "a volume whose checksum is wrong",
        lambda base: [(base.at["volume.0"] + SECTION + 4, b"evil")],
        "volume section at .*: checksum",
    )


def sections() -> Iterator[Mutation]:
    beyond = "bytes, the file has"
    for name in ("volume.0", "sectors.0", "table.0", "table2.0", "hash.0"):
        for value in (0, 1, 75, 1 << 31, 1 << 63, U64):
            yield one(f"{name} of {value:#x} bytes", section(name, 24, value), beyond)
        for value, read in (
            (0, "not behind this one"),
            (13, "not behind this one"),
            (1 << 31, "wanted, the file ends"),
            (1 << 63, "wanted, the file ends"),
            (U64, "wanted, the file ends"),
        ):
            yield one(f"behind {name} comes {value:#x}", section(name, 16, value), read)
    # What is not known is skipped.
    for name, read in (
        ("volume.0", "no volume section before"),
        ("table.0", "chunks in all tables"),
        ("hash.0", OPENS),
        ("table2.0", OPENS),
        ("done.0", "0 bytes, the file has"),
    ):
        yield one(f"{name} has no known type", put(name, SECTION, 0, 0x7878, 8), read)
    yield one(
        "no sectors section",
        put("sectors.0", SECTION, 0, 0x7878, 8),
        OPENS,
        eio=tuple(range(SHARE)),
    )
    yield one(
        "a section whose checksum is wrong",
        lambda base: [(base.at["table.0"] + 40, b"evil")],
        "section at .*: checksum",
    )
    yield one("logical evidence", put("sectors.0", SECTION, 0, 0x6565_7274_6C, 8), "logical")
    count = 1 << 14

    def many(base: Base) -> Writes:
        at = base.at["done.0"]
        heads = []
        for i in range(count):
            here = at + i * SECTION
            heads.append(
                resealed(struct.pack("<16sQQ44x", b"x", here + SECTION, SECTION).ljust(SECTION))
            )
        return [(at, b"".join(heads))]

    yield one("16384 more sections", many, "more than 16384 sections")


def tables() -> Iterator[Mutation]:
    few, first, second = "chunks in all tables", range(SHARE), range(SHARE, CHUNKS)
    for value, read in (
        (0, few),
        (1, few),
        (SHARE - 1, few),
        (SHARE, OPENS),
        (1 << 18, OPENS),  # that cannot be: its copy is taken
        ((1 << 18) + 1, "entries, the most is"),
        (1 << 31, "entries, the most is"),
        (U32, "entries, the most is"),
    ):
        yield one(f"a table of {value:#x} entries", table(0, 0, value, 4), read)
    for value in (1, 1 << 31, 1 << 62, 1 << 63, U64):
        # A byte further a zlib stream does not begin, but a plain chunk ends.
        yield one(f"offsets from {value:#x} on", table(0, 8, value, 8), OPENS, eio=tuple(first))
        yield one(f"later ones from {value:#x} on", table(1, 8, value, 8), OPENS, tuple(second))
    for value in (0, 1, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, U32):
        yield one(f"offset 5 is {value:#x}", entry(0, 5, value), OPENS, eio=(4, 5))
        yield one(f"offset 0 is {value:#x}", entry(0, 0, value), OPENS, eio=(0,))
        yield one(f"the last offset is {value:#x}", entry(1, 15, value), OPENS, eio=(30, 31))
    yield one(
        "plain is said to be packed",
        lambda base: entry(0, 3, base.number(base.at["table.0"] + 100 + 12, 4) | 1 << 31)(base),
        OPENS,
        eio=(3,),
    )
    yield one(
        "packed is said to be plain",
        lambda base: entry(0, 4, base.number(base.at["table.0"] + 100 + 16, 4) & ~(1 << 31))(base),
        OPENS,
        eio=(4,),
    )
    yield one(
        "a table whose checksum is wrong has a copy",
        lambda base: [(base.at["table.0"] + SECTION, b"evil")],
    )
    yield one(
        "offsets whose checksum is wrong have a copy",
        lambda base: [(base.at["table.0"] + SECTION + 30, b"evil")],
    )
    yield one(
        "both are wrong",
        lambda base: [
            (base.at[f"{name}.0"] + SECTION + 30, b"evil") for name in ("table", "table2")
        ],
        OPENS,
        eio=tuple(first),
    )


def data() -> Iterator[Mutation]:
    def chunk(number: int, make: Callable[[bytes], bytes]) -> Edit:
        """What lies where this chunk of the first table does."""

        def edit(base: Base) -> Writes:
            at = base.number(base.at["table.0"] + 100 + 4 * number, 4) & 0x7FFFFFFF
            end = base.number(base.at["table.0"] + 100 + 4 * number + 4, 4) & 0x7FFFFFFF
            return [(at, make(base.content[at:end]))]

        return edit

    for name, number, make in (
        ("a bit of a packed chunk", 4, lambda old: old[:50] + bytes([old[50] ^ 1])),
        ("a bit of a plain chunk", 3, lambda old: old[:50] + bytes([old[50] ^ 1])),
        ("the checksum of a plain chunk", 3, lambda old: old[:-4] + b"evil"),
        ("no zlib", 4, lambda old: b"evil" * (len(old) // 4)),
        ("a bomb", 4, lambda old: zlib.compress(bytes(1 << 18), 9)),
        ("an empty stream", 4, lambda old: zlib.compress(b"")),
        ("a stream of one byte less", 4, lambda old: zlib.compress(bytes(CHUNK - 1))),
    ):
        yield one(f"data: {name}", chunk(number, make), OPENS, eio=(number,))


def files() -> Iterator[Mutation]:
    for size, read in (
        (0, r"header\+0"),
        (1, r"header\+0"),
        (13, "section at 13"),
        (88, "section at 13"),
        (200, "bytes, the file has"),
        (13 + SECTION + VOLUME, "section at 1141"),
        (20000, "bytes, the file has"),
    ):
        yield Mutation(f"ewf: cut at {size}", "ewf", nothing, read, ANY, size=size)
    yield Mutation("ewf: 8 TiB of file", "ewf", nothing, OPENS, ONLY_READ, size=1 << 43)
    for number in (0, 2, 0xFFFF):
        yield one(
            f"segment {number}",
            lambda base, number=number: [(9, struct.pack("<H", number))],  # type: ignore[misc]
            r"header\+9: segment",
        )


def sets() -> Iterator[Mutation]:
    def named(
        name: str,
        read: str,
        *beside: Callable[[Path], None],
        edit: Edit = nothing,
        guest: bool = True,
    ) -> Mutation:
        def act(path: Path) -> None:
            _others(path)
            for each in beside:
                each(path)

        return Mutation(
            f"ewf-three: {name}",
            "ewf-three",
            edit,
            read,
            ANY,
            guest=guest,
            beside=act,
            file_name="images/image.E01",
        )

    def second(make: Callable[[Path], None]) -> Callable[[Path], None]:
        def act(path: Path) -> None:
            (path.parent / "image.E02").unlink()
            make(path)

        return act

    def written(data: bytes) -> Callable[[Path], None]:
        return second(lambda path: (path.parent / "image.E02").write_bytes(data))

    def secret(path: Path) -> None:
        target = path.parent.parent / "secret"
        target.write_bytes(make_segments(content(), segments=3)[1])
        os.symlink("../secret", path.parent / "image.E02")

    segments = make_segments(content(), segments=3)
    yield named("as it was", OPENS)
    yield named("no second segment", r"segment 2: not found", second(lambda path: None))
    yield named("the second is empty", r"E02: header\+0", written(b""))
    yield named("the second is text", r"E02: header\+0", written(b"text" * 100))
    yield named("the second is the third", r"E02: header\+9", written(segments[2]))
    yield named("the second is the first", r"E02: header\+9", written(segments[0]))
    yield named("the second is cut short", "E02: section", written(segments[1][:5000]))
    yield named(
        "the second is of another set",
        "E02: data section at .*: set",
        written(segments[1].replace(GUID, b"x" * 16)),
    )
    yield named(
        "the second is a hard link to the first",
        r"E01 itself",
        second(lambda path: os.link(path, path.parent / "image.E02")),
    )
    yield named(
        "the second is a link to the first", "itself", second(link("image.E02", "image.E01"))
    )
    yield named(
        "the second is a link to itself", "not found", second(link("image.E02", "image.E02"))
    )
    yield named("the second lies above", "outside of the image's folder", second(secret))
    yield named(
        "the second is /dev/zero",
        "outside of the image's folder",
        second(link("image.E02", "/dev/zero")),
    )
    yield named(
        "the second is a FIFO",
        "not a regular file",
        second(lambda path: os.mkfifo(path.parent / "image.E02")),
    )
    yield named(
        "the second is a folder",
        "not a regular file",
        second(lambda path: (path.parent / "image.E02").mkdir()),
    )
    # A disk of the first segment's chunks alone would be too short.
    yield named(
        "the first says that it is the last",
        "chunks in all tables",
        edit=put("next.0", SECTION, 0, int.from_bytes(b"done\0\0\0\0", "little"), 8),
    )

    def endless(path: Path) -> None:
        for number in range(3, 100):
            raw = segments[1][:9] + struct.pack("<H", number) + segments[1][11:]
            (path.parent / f"image.E{number:02}").write_bytes(raw)

    yield named("99 segments, and no end", "not found: 'image.EAA'", endless)
