"""Hostile parents, files that are no images, and two formats in one file.

The image lies in a folder "images" of the case's: what lies beside that folder is outside.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.corpus.bases import PARENT, Base, below
from tests.corpus.mutations import (
    ANY,
    OPENS,
    Edit,
    Mutation,
    Writes,
    link,
    nothing,
)

BACKING_FORMAT = 0xE2792ACA
SECRET = b"secret" * 16384


def child(name: bytes, format: bytes = b"raw") -> Edit:
    """A QCOW2 image with this parent."""

    def edit(base: Base) -> Writes:
        extension = b""
        if format:
            padded = format.ljust(-(-len(format) // 8) * 8, b"\0")
            extension = struct.pack(">II", BACKING_FORMAT, len(format)) + padded
        at = 112 + len(extension) + 8
        return [
            (8, struct.pack(">QI", at, len(name))),
            (112, (extension + bytes(8) + name)[:400].ljust(400, b"\0")),
        ]

    return edit


def outside(path: Path) -> None:
    """What must not be read: beside the image's folder."""
    (path.parent.parent / "secret").write_bytes(SECRET)


def both(*acts: Callable[[Path], None]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        for each in acts:
            each(path)

    return act


def qcow2(name: str, parent: bytes, format: bytes = b"qcow2") -> Callable[[Path], None]:
    """Another QCOW2 image beside, of the least that is one."""

    def act(path: Path) -> None:
        (path.parent / name).write_bytes(smallest(parent, format))

    return act


def smallest(parent: bytes = b"", format: bytes = b"qcow2") -> bytes:
    extension = b""
    if format and parent:
        padded = format.ljust(-(-len(format) // 8) * 8, b"\0")
        extension = struct.pack(">II", BACKING_FORMAT, len(format)) + padded
    at = 104 + len(extension) + 8
    head = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, at if parent else 0, len(parent), 9, 98304, 0, 3, 1024, 512, 1, 0, 0),
        *(0, 0, 0, 4, 104),
    )
    first = (head + extension + bytes(8) + parent).ljust(512, b"\0")
    return first + struct.pack(">Q", 1536).ljust(512, b"\0") + bytes(512) + b"\0\1" * 4 + bytes(504)


def chain_of(count: int) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        for i in range(count):
            (path.parent / f"{i}").write_bytes(smallest(b"%d" % (i + 1), b"qcow2"))
        (path.parent / f"{count}").write_bytes(smallest())

    return act


def named(
    name: str,
    parent: bytes,
    read: str = OPENS,
    *beside: Callable[[Path], None],
    format: bytes = b"raw",
    guest: bool = False,
) -> Mutation:
    return Mutation(
        f"parent: {name}",
        "qcow2-child",
        child(parent, format),
        read,
        guest=guest,
        beside=both(below, outside, *beside),
        file_name="images/image",
    )


def mutations() -> Iterator[Mutation]:
    yield named("as it was", PARENT.encode(), guest=True)
    yield named("named file:", b"file:" + PARENT.encode(), guest=True)
    yield named("through a link inside", b"link", OPENS, link("link", PARENT), guest=True)
    yield from outsiders()
    yield from strangers()
    yield from cycles()
    yield from memory()
    yield from formats_of_parents()
    yield from no_images()


def outsiders() -> Iterator[Mutation]:
    out = "outside of the image's folder"
    yield named("above", b"../secret", out)
    yield named("above, said at length", b"./x/../.././secret", ANY)
    yield named("above, with file:", b"file:../secret", out)
    yield named("absolute", b"/etc/passwd", out)
    yield named("absolute, with many slashes", b"////etc//passwd", out)
    yield named("link to above", b"link", out, link("link", "../secret"))
    yield named("link to /etc/passwd", b"link", out, link("link", "/etc/passwd"))
    yield named("link to a link to above", b"a", out, link("a", "b"), link("b", "../secret"))
    yield named("through a linked folder", b"up/secret", out, link("up", ".."))
    yield named("through its own descriptor", b"/proc/self/fd/0", ANY)
    yield named("through another root", b"/proc/self/root/etc/passwd", out)
    yield named("/dev/zero", b"/dev/zero", out)
    yield named("/dev/stdin", b"/dev/stdin", ANY)
    yield named("/dev/mem", b"/dev/mem", ANY)
    yield named("link to /dev/zero", b"link", out, link("link", "/dev/zero"))
    yield named("/", b"/", out)
    yield named("..", b"..", out)


def strangers() -> Iterator[Mutation]:
    def fifo(path: Path) -> None:
        os.mkfifo(path.parent / "fifo")

    def listening(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket must be short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind("socket")
        finally:
            os.chdir(here)

    def folder(path: Path) -> None:
        (path.parent / "folder").mkdir()

    def evil_name(path: Path) -> None:
        os.mkfifo(path.parent / "\x1b[2J\r\nevil")

    regular = "not a regular file"
    yield named("a FIFO", b"fifo", regular, fifo)
    yield named("a socket", b"socket", regular, listening)
    yield named("a folder", b"folder", regular, folder)
    yield named("its own folder", b".", regular)
    yield named("a file as a folder", PARENT.encode() + b"/x", "not found")
    yield named("a missing file", b"missing", "parent: not found: 'missing'")
    yield named("a name with a NUL", b"parent.raw\0", "no possible file name")
    yield named("only a NUL", b"\0", "no possible file name")
    yield named("a name that is no UTF-8", b"\xff\xfe\xfd", "not found")
    yield named("a name with line ends", b"a\nb\r\x1b[2J", r"not found: 'a\\nb\\r\\x1b\[2J'")
    yield named("a FIFO with a name that harms terminals", b"\x1b[2J\r\nevil", regular, evil_name)
    yield named("a name of 300 letters", b"x" * 300, "parent")
    yield named("links in a circle", b"a", "parent", link("a", "b"), link("b", "a"))
    yield named("a link to itself", b"a", "parent", link("a", "a"))
    for name in (
        b'json:{"driver":"file","filename":"/etc/passwd"}',
        b"nbd:localhost:10809",
        b"nbd+unix:///x?socket=/tmp/x",
        b"http://localhost/x",
        b"ssh://localhost/x",
        b"fd:3",
        b"blkdebug::parent.raw",
        b"FILE:parent.raw",
    ):
        word = name.split(b":")[0].decode()
        yield named(f"{word}:", name, "not a local file")


def cycles() -> Iterator[Mutation]:
    back = "the chain comes back"
    yield named("itself", b"image", back, format=b"qcow2")
    yield named("itself, as raw", b"image", back)
    yield named("itself, through a link", b"me", back, link("me", "image"), format=b"qcow2")
    yield named("itself, by another name", b"./../images/image", back, format=b"qcow2")

    def hard_link(path: Path) -> None:
        os.link(path, path.parent / "twin")

    yield named("itself, by a hard link", b"twin", back, hard_link, format=b"qcow2")
    yield named("a circle of two", b"b", back, qcow2("b", b"image"), format=b"qcow2")
    yield named(
        "a circle of three", b"b", back, qcow2("b", b"c"), qcow2("c", b"image"), format=b"qcow2"
    )
    yield named("a circle below", b"b", back, qcow2("b", b"c"), qcow2("c", b"b"), format=b"qcow2")
    yield named("63 more images", b"0", OPENS, chain_of(62), format=b"qcow2")
    yield named("64 more images", b"0", "more than 64 images", chain_of(63), format=b"qcow2")
    yield named("1000 more images", b"0", "more than 64 images", chain_of(999), format=b"qcow2")
    yield named(
        "a parent whose parent is above",
        b"b",
        "outside of the image's folder",
        qcow2("b", b"../secret", b"raw"),
        format=b"qcow2",
    )


def memory() -> Iterator[Mutation]:
    """Every parent has tables that are as long as they may be, and the file is sparse."""

    def long_tables(count: int) -> Callable[[Path], None]:
        def act(path: Path) -> None:
            for i in range(count):
                head = bytearray(smallest(b"%d" % (i + 1) if i + 1 < count else b""))
                struct.pack_into(">IQ", head, 36, 4 << 20, 1 << 20)
                with open(path.parent / f"{i}", "wb") as file:
                    file.write(head)
                    file.truncate(33 << 20)

        return act

    most = "images/1: tables of 67108888 bytes in the chain"
    for count, read in ((1, OPENS), (2, most), (60, most)):
        yield named(
            f"{count} with long tables",
            b"0",
            read,
            long_tables(count),
            format=b"qcow2",
        )


def formats_of_parents() -> Iterator[Mutation]:
    def beside(data: bytes) -> Callable[[Path], None]:
        def act(path: Path) -> None:
            (path.parent / "p").write_bytes(data)

        return act

    further = "names further files"
    yield named("no format, raw by content", PARENT.encode(), OPENS, format=b"", guest=True)
    yield named("no format, looks like QCOW2", b"p", OPENS, beside(smallest()), format=b"")
    yield named(
        "no format, looks like QCOW2 with a parent",
        b"p",
        further,
        beside(smallest(b"../secret", b"raw")),
        format=b"",
    )
    yield named(
        "called raw, looks like QCOW2 with a parent",
        b"p",
        OPENS,
        beside(smallest(b"../secret", b"raw")),
    )
    yield named("called qcow2, is raw", PARENT.encode(), r"header\+0", format=b"qcow2")
    yield named("called vhdx, is raw", PARENT.encode(), "byte 0: signature", format=b"vhdx")
    yield named("called vmdk", PARENT.encode(), "neither a VMDK extent", format=b"vmdk")
    yield named("called nbd", PARENT.encode(), "parent format: 'nbd'", format=b"nbd")
    yield named(
        "called nothing on earth", PARENT.encode(), "parent format", format=b"\xff\x1b\0\r\n"
    )
    yield named("a format of 16 bytes", PARENT.encode(), "header extension", format=b"x" * 16)
    yield named("an empty parent", b"p", "empty", beside(b""))
    yield named("a parent of one byte", b"p", OPENS, beside(b"x"))
    yield named("a parent of 513 bytes", b"p", OPENS, beside(b"x" * 513))
    yield named("a parent of 8 TiB", b"p", OPENS, lambda path: os.truncate(_touch(path), 1 << 43))


def _touch(path: Path) -> Path:
    path = path.parent / "p"
    path.touch()
    return path


def no_images() -> Iterator[Mutation]:
    """Files by content."""

    def whole(data: bytes) -> Edit:
        return lambda base: [(0, data)]

    def file(name: str, data: bytes, read: str, size: int | None = None) -> Mutation:
        return Mutation(
            f"file: {name}",
            "vdi",
            whole(data),
            read,
            guest=False,
            format=None,
            size=len(data) if size is None else size,
        )

    def instead(make: Callable[[Path], None]) -> Callable[[Path], None]:
        def act(path: Path) -> None:
            path.unlink()
            make(path)

        return act

    for name, make in (("a FIFO", os.mkfifo), ("a link to /dev/zero", link("image", "/dev/zero"))):
        yield Mutation(
            f"file: {name}",
            "vdi",
            nothing,
            "neither a regular file nor a block device",
            guest=False,
            format=None,
            beside=instead(make),
        )
    two = b"QFI\xfb\0\0\0\3".ljust(64, b"\0") + struct.pack("<I", 0xBEDA107F)
    yield file("empty", b"", "empty")
    yield file("one byte", b"x", OPENS)
    yield file("513 bytes", b"x" * 513, OPENS)
    yield file("8 TiB", b"", OPENS, 1 << 43)
    yield file("QCOW2 and VDI", two.ljust(4096, b"\0"), "looks like qcow2 and vdi")
    yield file("VHDX and VDI", b"vhdxfile" + two[8:].ljust(4096, b"\0"), "looks like vhdx and vdi")
    yield file("VMDK and VDI", b"KDMV" + two[4:].ljust(4096, b"\0"), "looks like vdi and vmdk")
    yield file(
        "QCOW version 1", b"QFI\xfb\0\0\0\1".ljust(4096, b"\0"), r"header\+32: cluster_bits 0"
    )
    yield file("VMDK", b"KDMV".ljust(4096, b"\0"), r"header\+4: version 0")
    yield file(
        "VHD at the end", bytes(4096) + b"conectix".ljust(512, b"\0"), "footer: no whole copy"
    )
    yield file("gzip", b"\x1f\x8b\x08".ljust(4096, b"\0"), "gzip")
    yield file("QCOW2 of 8 bytes", b"QFI\xfb\0\0\0\3", r"header\+20")
    yield file("VHDX of 8 bytes", b"vhdxfile", "header 1")
    yield file("VDI of 68 bytes", two[:0] + bytes(64) + two[64:], "byte 0|header")
