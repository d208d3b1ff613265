"""Hostile OVAs: tar headers that lie, disks that are none."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tests.corpus.bases import DATA, KIB, MIB, Base, Maker
from tests.corpus.mutations import ANY, OPENS, Edit, Mutation, Writes, nothing
from tests.formats import make_vmdk
from tests.formats.make_vmdk import descriptor, guest, pattern

CLUSTER = 64 * KIB
SECTORS = 8 * 128
BLOCK = 512
OVF, DISK = 0, 2 * BLOCK  # where the headers of the two files lie
ONLY = "only read"

HELD: dict[int, bytes | int] = {c: pattern(c, CLUSTER) for c in DATA}


def disk() -> bytes:
    text = descriptor(f'RW {SECTORS} SPARSE "disk.vmdk"', create_type="streamOptimized")
    return make_vmdk.stream(SECTORS, HELD, text, footer=True)


def tar(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as made:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _make(path: Path) -> bytes:
    path.write_bytes(tar(("machine.ovf", b"<Envelope/>"), ("disk.vmdk", disk())))
    return guest(SECTORS, HELD, 128)


def _locate(base: Base) -> None:
    base.metadata = [(OVF, BLOCK), (DISK, BLOCK), (DISK + BLOCK, 79), (DISK + 2 * BLOCK, 300)]


def sealed(header: bytearray) -> bytes:
    """With the checksum that it should have."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _seal(image: dict[int, bytearray]) -> None:
    first = image.get(0, bytearray())
    for at in (OVF, DISK):
        if len(first) >= at + BLOCK:
            first[at : at + BLOCK] = sealed(first[at : at + BLOCK])


MAKERS = {"ova": Maker("ova", _make, CLUSTER, _locate, seal=_seal)}


def field(at: int, offset: int, raw: bytes, *, seal: bool = True) -> Edit:
    """Other bytes in the header at `at`."""

    def edit(base: Base) -> Writes:
        header = bytearray(base.content[at : at + BLOCK])
        header[offset : offset + len(raw)] = raw
        return [(at, sealed(header) if seal else bytes(header))]

    return edit


def whole(made: bytes) -> Edit:
    return lambda base: [(0, made.ljust(base.size, b"\0"))]


def mutations() -> Iterator[Mutation]:
    def one(name: str, edit: Edit, read: str = OPENS, **more: object) -> Mutation:
        return Mutation(f"ova: {name}", "ova", edit, read, ONLY, **more)  # type: ignore[arg-type]

    yield one("as it is", nothing)
    yield one("by content", nothing, format=None)
    for name, at in (("first", OVF), ("second", DISK)):
        for value, read in (
            (b"7" * 12, r"tar header|no VMDK|not a VMDK|footer"),
            (b"\x80" + b"\xff" * 11, f"tar header at {at}: size"),
            (b"\xff" * 12, f"tar header at {at}: size"),
            (b"-0000000001\0", f"tar header at {at}: size"),
            (b"9" * 12, f"tar header at {at}: size"),
            (b"\0" * 12, ANY),
            (b"zzzzzzzzzzz\0", f"tar header at {at}: size"),
        ):
            yield one(f"{name} size {value!r}", field(at, 124, value), read, guest=False)
        yield one(f"{name} checksum", field(at, 148, b"000000\0 ", seal=False), "checksum")
        yield one(f"{name} checksum no number", field(at, 148, b"x" * 8, seal=False), "checksum")
    for kind in b"123456S":
        yield one(f"type {kind:c}", field(DISK, 156, bytes([kind])), "not a regular file")
    for kind in b"xgLK":
        yield one(f"the disk is a header of type {kind:c}", field(DISK, 156, bytes([kind])), ANY)
    yield one("no ustar", field(OVF, 257, b"xxxxx"), "no tar")
    yield one("no name", field(DISK, 0, bytes(100)), "no VMDK")
    yield one("name with dots", field(DISK, 0, b"../../etc/passwd.vmdk\0"))
    yield one("name without an end", field(DISK, 0, b"x" * 95 + b".vmdk"))
    yield one("name that harms terminals", field(DISK, 0, b"\x1b[2J\r\n.vmdk\0"))
    yield one("prefix", field(DISK, 345, b"p" * 155))
    for size in (0, 1, 256, 262, 511, 512, 1024, DISK + 1, DISK + BLOCK, DISK + 40 * BLOCK):
        yield one(f"cut to {size} bytes", nothing, ANY, size=size, guest=False)
    yield one("two disks", whole(tar(("a.vmdk", b"KDMV"), ("b.vmdk", b"KDMV"))), "2 disks: a.vmdk")
    yield one("packed", whole(tar(("a.ovf", b""), ("b.vmdk.gz", b"x"))), "packed")
    yield one("many files", whole(tar(*((f"{n}", b"") for n in range(4097)))), "more than 4096")
    yield one("many disks", whole(tar(*((f"{n}.vmdk", b"") for n in range(900)))), "900 disks")
    yield one("an empty disk", whole(tar(("a.vmdk", b""))), "not a VMDK of a single file")
    text = descriptor('RW 8 FLAT "../secret" 0', 'RW 8 FLAT "/etc/passwd" 0')
    yield one("a descriptor", whole(tar(("a.vmdk", text))), "not a VMDK of a single file")
    child = descriptor(f'RW {SECTORS} SPARSE "a"', parent="1", more=['parentFileNameHint="image"'])
    made = make_vmdk.sparse(SECTORS, HELD, child)
    yield one("a child", whole(tar(("a.vmdk", made))), "a.vmdk has a parent")
    yield from disks()


def disks() -> Iterator[Mutation]:
    """The VMDK inside: it must not see what lies around it."""

    def inside(
        name: str, offset: int, raw: bytes, read: str = OPENS, eio: tuple[int, ...] = ()
    ) -> Mutation:
        def edit(base: Base) -> Writes:
            return [(DISK + BLOCK + offset, raw)]

        return Mutation(f"ova disk: {name}", "ova", edit, read, ONLY, eio)

    yield inside("no magic", 0, b"X", "not a VMDK of a single file")
    yield inside("version", 4, b"\x09", r"header\+4: version 9")
    yield inside("directory at 0", 56, bytes(8), r"header\+56")
    yield inside("directory past the end", 56, struct.pack("<Q", 1 << 20), r"header\+56")
    plain = make_vmdk.sparse(
        SECTORS, {0: pattern(0, CLUSTER)}, descriptor(f'RW {SECTORS} SPARSE "a"'), flags=1
    )

    def sparse(name: str, entry: int, read: str = OPENS, eio: tuple[int, ...] = ()) -> Mutation:
        raw = bytearray(plain)
        raw[22 * BLOCK + 4 : 22 * BLOCK + 8] = struct.pack("<I", entry)
        after = ("secret", b"s" * 4 * CLUSTER)
        made = tar(("a.vmdk", bytes(raw)), after)
        return Mutation(
            f"ova disk: {name}", "ova", whole(made), read, ONLY, eio, guest=False, size=len(made)
        )

    yield sparse("not compressed", 0)
    yield sparse("a grain behind the disk, in the tar", len(plain) // 512, eio=(1,))
    yield sparse("a grain behind the tar", MIB, eio=(1,))
    yield sparse("a grain in its header", 0xFFFFFFFF, eio=(1,))
