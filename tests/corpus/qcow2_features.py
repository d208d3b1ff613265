"""Hostile QCOW2 images with snapshots, extended L2 entries, data files and bitmaps.

Part of qcow2.py.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.corpus import bases
from tests.corpus.bases import KIB, Base, Maker
from tests.corpus.mutations import OPENS, Edit, Mutation, Writes

COPIED, COMPRESSED = 1 << 63, 1 << 62
U32, U64 = 0xFFFFFFFF, (1 << 64) - 1
EXTENDED, SMALL = 16 * KIB, 4 * KIB  # cluster sizes
CLUSTERS = 24
DATA = (5, 3, 7, 0)
OVERLAP = "two tables overlap"
OUTSIDE = "lies outside of the image's folder"


def _create(path: Path, options: str, cluster: int, *commands: str) -> None:
    """In the image's folder: qemu takes the name of a data file from where it stands."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options]
    subprocess.run([*command, path.name, str(CLUSTERS * cluster)], check=True, cwd=path.parent)
    words = [f"write -q -P {c + 1} {c * cluster} {cluster}" for c in DATA]
    words = [word for command in (*words, *commands) for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, path.name], check=True, cwd=path.parent)


def _guest(cluster: int) -> bytes:
    return b"".join(bytes([c + 1 if c in DATA else 0]) * cluster for c in range(CLUSTERS))


def _extended(path: Path) -> None:
    size = EXTENDED
    parts = [f"write -q -P 9 {8 * size + 512} 1k", f"write -q -z {9 * size} 2k"]
    packed = [f"write -q -c -P {c} {c * size} {size}" for c in (10, 11)]
    _create(path, f"extended_l2=on,cluster_size={size}", size, *parts, *packed)


def _data_file(path: Path) -> bytes:
    _create(path, f"cluster_size={SMALL},data_file=data", SMALL)
    return _guest(SMALL)


def _raw_data_file(path: Path) -> bytes:
    _create(path, f"cluster_size={SMALL},data_file=raw,data_file_raw=on", SMALL)
    return _guest(SMALL)


def _bitmaps(path: Path) -> None:
    _create(path, f"cluster_size={SMALL}", SMALL)
    for name in ("one", "two"):
        bases.run("qemu-img", "bitmap", "--add", "-g", "4k", path, name)


def beside(path: Path) -> None:
    """Beside the bases they are there already, and other processes read them."""
    for name in ("data", "raw"):
        file = path.parent / name
        if not file.exists() or file.read_bytes() != _guest(SMALL):
            file.write_bytes(_guest(SMALL))


MAKERS = {
    "qcow2-extended": Maker("qcow2", _extended, EXTENDED, bases.locate_qcow2, big=True),
    "qcow2-data": Maker("qcow2", _data_file, SMALL, bases.locate_qcow2, big=True, beside=beside),
    "qcow2-raw": Maker("qcow2", _raw_data_file, SMALL, bases.locate_qcow2, big=True, beside=beside),
    "qcow2-bitmaps": Maker("qcow2", _bitmaps, SMALL, bases.locate_qcow2, big=True),
}


def u64(*values: int) -> bytes:
    return struct.pack(f">{len(values)}Q", *values)


def mutations() -> Iterator[Mutation]:
    yield from extended()
    yield from names()
    yield from data_files()
    yield from bitmaps()
    yield from snapshots()


# Extended L2 entries


def extended() -> Iterator[Mutation]:
    def words(cluster: int, entry: int | str | None, bitmap: int | None) -> Edit:
        """None: as it was; a word names a table."""

        def edit(base: Base) -> Writes:
            at = base.at["l2.0"] + 16 * cluster
            old = base.number(at, 8), base.number(at + 8, 8)
            new = base.at[entry] | COPIED if isinstance(entry, str) else entry
            return [(at, u64(old[0] if new is None else new, old[1] if bitmap is None else bitmap))]

        return edit

    every = tuple(c for c in range(CLUSTERS) if c not in (10, 11))
    for name, entry, bitmap in (
        ("there and zero", None, 1 << 32 | U32),
        ("all bits", None, U64),
        ("there and zero, the last", None, 1 << 63 | 1 << 31),
        ("there, and nowhere", 0, U32),
        ("one piece, and nowhere", COPIED, 1 << 7),
        ("not at a cluster", COPIED | 512, U32),
        ("past the end", COPIED | 1 << 40, U32),
        ("at the end of numbers", 0x00FFFFFFFFFFFE00 | COPIED, U32),
        ("one piece past the end", COPIED | 1 << 40, 1),
        ("in L1", "l1", U32),
        ("in the refcount table", "refcounts", U32),
        ("in the refcount block", "block", 1),
        ("in its own table", "l2.0", 1 << 31),
    ):
        yield Mutation(
            f"qcow2 extended: {name}", "qcow2-extended", words(5, entry, bitmap), eio=(5,)
        )
    yield Mutation(
        "qcow2 extended: every bit of a table",
        "qcow2-extended",
        lambda base: [(base.at["l2.0"] + 16 * c + 8, u64(U64)) for c in range(CLUSTERS)],
        eio=every,
    )
    for name, cluster, entry, bitmap in (
        ("zeros past the end", 5, COPIED | 1 << 40, U32 << 32),
        ("nothing of it", 5, None, 0),
        ("zeros in L1", 5, "l1", U32 << 32),
        ("two owners", 5, None, None),
    ):
        edit = words(cluster, entry, bitmap)
        if name == "two owners":

            def edit(base: Base) -> Writes:
                at = base.at["l2.0"]
                return [(at + 16 * 5, u64(base.number(at, 8), U32))]

        yield Mutation(f"qcow2 extended: {name}", "qcow2-extended", edit, guest=False, loose=True)
    for name, cluster, bitmap in (("no bits", 11, 0), ("a compressed one with bits", 10, 5)):
        yield Mutation(f"qcow2 extended: {name}", "qcow2-extended", words(cluster, None, bitmap))
    yield Mutation(
        "qcow2 extended: with the zero flag of plain entries",
        "qcow2-extended",
        lambda base: [(base.at["l2.0"] + 16 * 5 + 7, b"\1")],
    )
    yield Mutation(
        "qcow2 extended: read as plain entries",
        "qcow2-extended",
        lambda base: [(72, u64(0))],
        guest=False,
        loose=True,
    )
    yield Mutation(
        "qcow2 extended: a disk that needs a second table",
        "qcow2-extended",
        lambda base: [(24, u64(EXTENDED * 1024 + 1))],
        r"header\+36",
    )


# Names of data files


def instead(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Data files, and something with another name."""

    def act(path: Path) -> None:
        beside(path)
        make(path)

    return act


def named(
    name: str,
    text: bytes,
    read: str,
    make: Callable[[Path], None] = beside,
    length: int | None = None,
) -> Mutation:
    def edit(base: Base) -> Writes:
        size = len(text) if length is None else length
        return [(112, bytes(512)), (112, struct.pack(">II", 0x44415441, size) + text)]

    return Mutation(f"qcow2 data file: {name}", "qcow2-data", edit, read, beside=make)


def names() -> Iterator[Mutation]:
    yield named("no name", b"", r"header\+72")
    yield named("a name past the header", b"data", r"header\+116", length=U32)
    yield named("a name of all that is left", b"data", "name of 3976 bytes", length=3976)
    yield named("a name of 1024 bytes", b"x" * 1024, "name of 1024 bytes")
    yield named("a name of 1023 bytes", b"x" * 1023, "not found")
    yield named("256 bytes", b"x" * 256, "not found")
    yield named("nothing", b"nothing", "not found")
    yield named("a name with a zero byte", b"data\0x", "no possible file name")
    yield named("itself", b"image", "itself")
    yield named("itself by detours", b"./././image", "itself")
    yield named("the folder", b".", "not a regular file")
    yield named("the root", b"/", OUTSIDE)
    yield named("the folder above", b"..", OUTSIDE)
    yield named("absolute", b"/etc/passwd", OUTSIDE)
    yield named("upward", b"../" * 20 + b"etc/passwd", OUTSIDE)
    yield named("a device", b"/dev/zero", OUTSIDE)
    yield named("memory", b"/proc/self/mem", OUTSIDE)
    yield named("a descriptor", b"/proc/self/fd/0", "outside|not found|regular")
    yield named("a protocol", b"nbd:localhost:10809", "not a local file")
    yield named("a URL", b"https://example.org/x", "not a local file")
    yield named("JSON", b'json:{"driver":"raw"}', "not a local file")
    yield named("letters that are none", b"\xff\xfe\xfd", "not found")
    yield named("control characters", b"\x1b[2J\x07", "not found")
    for name, target, read in (
        ("a link inside", "data", OPENS),
        ("a link outside", "/etc/passwd", OUTSIDE),
        ("a link to nothing", "nowhere", "not found"),
        ("a link to itself", "other", "not found"),
        ("a link to the image", "image", "itself"),
        ("a link to a device", "/dev/null", OUTSIDE),
    ):

        def link(path: Path, target: str = target) -> None:
            os.symlink(target, path.parent / "other")

        yield named(name, b"other", read, instead(link))
    yield named(
        "a pipe", b"other", "not a regular file", instead(lambda p: os.mkfifo(p.parent / "other"))
    )
    yield named(
        "a second name of the image",
        b"other",
        "itself",
        instead(lambda path: os.link(path, path.parent / "other")),
    )
    yield named("in a folder", b"a/data", "not found")
    yield named("through a file", b"data/data", "not found")


def data_files() -> Iterator[Mutation]:
    def entry(cluster: int, value: int) -> Edit:
        return lambda base: [(base.at["l2.0"] + 8 * cluster, u64(value))]

    place = 5 * SMALL
    for name, value in (
        ("another's place", 3 * SMALL | COPIED),
        ("the beginning", COPIED),
        ("past its end", 1 << 40 | COPIED),
        ("half a cluster on", place + 512 | COPIED),
        ("the end of numbers", 0x00FFFFFFFFFFFE00 | COPIED),
        ("compressed data", COMPRESSED | place),
        ("compressed and COPIED", COPIED | COMPRESSED | place),
    ):
        yield Mutation(
            f"qcow2 data file: an entry leads to {name}", "qcow2-data", entry(5, value), eio=(5,)
        )
        # In a raw data file every cluster lies where it has to.
        yield Mutation(
            f"qcow2 raw data file: an entry leads to {name}", "qcow2-raw", entry(5, value)
        )
    yield Mutation("qcow2 data file: not COPIED", "qcow2-data", entry(5, place))
    yield Mutation("qcow2 raw data file: nothing mapped", "qcow2-raw", entry(5, 0))
    yield Mutation(
        "qcow2 raw data file: no table", "qcow2-raw", lambda base: [(base.at["l1"], u64(0))]
    )
    yield Mutation(
        "qcow2 data file: a cluster that nobody mapped",
        "qcow2-data",
        entry(5, 0),
        guest=False,
    )
    yield Mutation(
        "qcow2 data file: its bit is not set",
        "qcow2-data",
        lambda base: [(72, u64(0))],
        guest=False,
        loose=True,
    )
    yield Mutation(
        "qcow2 data file: snapshots",
        "qcow2-data",
        lambda base: [(60, struct.pack(">IQ", 1, SMALL))],
        r"header\+60",
    )
    yield Mutation(
        "qcow2 data file: called something else",
        "qcow2-data",
        lambda base: [(112, b"DATB")],
        r"header\+72.*without its name",
    )
    for name, size in (("empty", 0), ("one byte", 1), ("half", 49 * KIB + 7), ("8 TiB", 8 << 40)):

        def short(path: Path, size: int = size) -> None:
            beside(path)
            for each in ("data", "raw"):
                os.truncate(path.parent / each, size)

        for base in ("data", "raw"):
            yield Mutation(
                f"qcow2 {base} file: {name}",
                f"qcow2-{base}",
                lambda base: (),
                guest=size > 96 * KIB,
                beside=short,
            )


# Bitmaps


def bitmaps() -> Iterator[Mutation]:
    def extension(**fields: int) -> Edit:
        def edit(base: Base) -> Writes:
            at = base.content.index(struct.pack(">I", 0x23852875)) + 8
            old = struct.unpack_from(">IIQQ", base.content, at)
            new = dict(zip(("number", "reserved", "length", "offset"), old, strict=True)) | fields
            return [(at, struct.pack(">IIQQ", *new.values()))]

        return edit

    def of_first(at: int, code: str, value: int) -> Edit:
        def edit(base: Base) -> Writes:
            extension_at = base.content.index(struct.pack(">I", 0x23852875)) + 8
            directory = base.number(extension_at + 16, 8)
            return [(directory + at, struct.pack(code, value))]

        return edit

    def mutation(name: str, edit: Edit, write: str = OPENS) -> Mutation:
        return Mutation(f"qcow2 bitmaps: {name}", "qcow2-bitmaps", edit, OPENS, write)

    for number in (0, 1, 3, 65535, 65536, U32):
        yield mutation(f"{number} of them", extension(number=number))
    for length in (0, 1, 8, 1 << 31, 1 << 63, U64):
        yield mutation(f"a directory of {length} bytes", extension(length=length))
    for offset in (0, 1, 512, 1 << 40, 1 << 63, U64, U64 - SMALL + 1):
        yield mutation(f"a directory at {offset}", extension(offset=offset))
    for place in ("l1", "refcounts", "l2.0"):

        def there(base: Base, place: str = place) -> Writes:
            return extension(offset=base.at[place])(base)

        yield mutation(f"a directory in {place}", there, OVERLAP)
    for name, at, code, value in (
        ("a table past the end", 0, ">Q", 1 << 40),
        ("a table in the header", 0, ">Q", 0),
        ("a table without end", 8, ">I", U32),
        ("all flags", 12, ">I", U32),
        ("unknown flag", 12, ">I", 1 << 9),
        ("in use", 12, ">I", 3),
        ("another type", 16, ">B", 9),
        ("granularity 2^255", 17, ">B", 255),
        ("granularity 1", 17, ">B", 0),
        ("a name without end", 18, ">H", 0xFFFF),
        ("no name", 18, ">H", 0),
        ("extra data without end", 20, ">I", U32),
        ("extra data", 20, ">I", 8),
    ):
        yield mutation(name, of_first(at, code, value))


# Snapshots


def snapshots() -> Iterator[Mutation]:
    def first(at: int, code: str, value: int | str) -> Edit:
        def edit(base: Base) -> Writes:
            number = base.at[value] if isinstance(value, str) else value
            return [(base.at["snapshots"] + at, struct.pack(code, number))]

        return edit

    def l1(value: int | str) -> Edit:
        """The first entry of the first snapshot's L1 table."""

        def edit(base: Base) -> Writes:
            number = base.at[value] | COPIED if isinstance(value, str) else value
            return [(base.number(base.at["snapshots"], 8), u64(number))]

        return edit

    for name, edit, write in (
        ("L1 at 0", first(0, ">Q", 0), "byte 8704: snapshot's L1 table at 0"),
        ("L1 at 513", first(0, ">Q", 513), "byte 8704: snapshot's L1 table at 513"),
        ("L1 past the end", first(0, ">Q", 1 << 40), "byte 8704.*the file ends"),
        ("L1 at the end of numbers", first(0, ">Q", U64 - 511), "byte 8704"),
        ("L1 in the active one", first(0, ">Q", "l1"), OVERLAP),
        ("L1 in the refcount table", first(0, ">Q", "refcounts"), OVERLAP),
        ("L1 in the snapshot table", first(0, ">Q", "snapshots"), OVERLAP),
        ("L1 of no entries", first(8, ">I", 0), "byte 8712: snapshot's L1 table of 0 entries"),
        ("L1 of 2^32 entries", first(8, ">I", U32), "more than 524288 entries"),
        ("L1 of 4 Mi + 1 entries", first(8, ">I", (1 << 22) + 1), "more than 524288 entries"),
        ("L1 of 4 Mi entries", first(8, ">I", 1 << 22), "more than 524288 entries"),
        ("L1 longer than the file", first(8, ">I", 1 << 16), "the file ends"),
        ("a table past the end", l1(1 << 40 | COPIED), "a table, not a cluster"),
        ("a table at the end of numbers", l1(U64), "a table, not a cluster"),
        ("a table in the refcount block", l1("block"), OVERLAP),
        ("a table in L1", l1("l1"), OVERLAP),
        ("no table", l1(0), OPENS),
    ):
        yield Mutation(
            f"qcow2 snapshot: {name}", "qcow2-snapshots", edit, OPENS, write, loose=not write
        )
    yield Mutation(
        "qcow2 snapshot: a disk of 2^63 bytes",
        "qcow2-snapshots",
        lambda base: [(base.at["snapshots"] + 48, u64(1 << 63))],
        OPENS,
        "byte 8712",
    )
