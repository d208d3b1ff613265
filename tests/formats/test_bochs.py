"""Bochs growing images, read by qemu-img as well."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

import pytest

import virtmount
from tests.formats.make_packed import make_bochs
from tests.formats.test_dmg import disk
from tests.reference import Reference
from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats.bochs import Bochs
from virtmount.hostfile import HostFile
from virtmount.image import Kind, extents

SECTOR = 512


def shuffled(sectors: int, seed: int = 1) -> list[int]:
    """Half of the sectors, in no order: some in runs, some alone."""
    random_ = random.Random(seed)
    chosen = {at for at in range(sectors) if random_.random() < 0.2 or at // 30 % 3 == 0}
    return random_.sample(sorted(chosen), len(chosen))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("extent", "bitmap"), [(512, 1), (4096, 1), (65536, 16), (1 << 20, 256), (4 << 20, 5000)]
)
def test_extents_of_every_size(version: int, extent: int, bitmap: int, tmp_path: Path) -> None:
    content = bytes(disk(extent, 3001))
    path = tmp_path / "disk.bochs"
    guest = make_bochs(path, content, extent, shuffled(3001), version=version, bitmap=bitmap)
    out = tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-f", "bochs", "-O", "raw", path, out], check=True)
    assert out.read_bytes() == guest
    assert guest.count(0) < len(guest)
    with virtmount.open(path) as opened:
        assert opened.size == len(guest)
        assert opened.pread(0, opened.size) == guest
        random_ = random.Random(extent)
        for _ in range(30):
            at, length = random_.randrange(len(guest)), random_.randrange(1, 100_000)
            wanted = guest[at : at + length]
            assert opened.pread(at, len(wanted)) == wanted
    with HostFile(path) as file, Reference([Bochs(file)]) as reference:
        assert reference.pread(0, reference.size) == guest
    assert virtmount.inspect(path).variant == f"growing {version}"


def test_extents_that_are_whole_or_absent_are_one_piece(tmp_path: Path) -> None:
    path = tmp_path / "disk.bochs"
    make_bochs(path, bytes(disk(1, 64)), 8192, [*range(16, 32), 40])
    with HostFile(path) as file:
        found = list(extents(Bochs(file), 0, 64 * SECTOR))
    assert [(e.guest_offset // SECTOR, e.length // SECTOR, e.kind) for e in found] == [
        (0, 16, Kind.ABSENT),
        (16, 16, Kind.DATA),
        (32, 8, Kind.ABSENT),
        (40, 1, Kind.DATA),
        (41, 7, Kind.ABSENT),
        (48, 16, Kind.ABSENT),
    ]


@pytest.mark.parametrize(
    ("offset", "data", "error", "complaint"),
    [
        (0, b"Bochs Virtual HD Imagine", NotAnImage, r"header\+0"),
        (32, b"Flat\0\0\0\0", Unsupported, r"header\+32: 'Flat', know b'Redolog'"),
        (48, b"Undoable", Unsupported, r"header\+48: 'Undoable'"),
        (48, b"Volatile", Unsupported, r"header\+48: 'Volatile'"),
        (64, struct.pack("<I", 0x30000), Unsupported, r"header\+64: version 0x30000"),
        (68, struct.pack("<I", 0), Corrupt, r"header\+68: header of 0 bytes"),
        (72, struct.pack("<I", 0), Unsupported, r"header\+72: 0 catalog entries"),
        (72, struct.pack("<I", 1 << 16), Corrupt, r"header\+72: catalog ends at"),
        (76, struct.pack("<I", 0), Corrupt, r"header\+76: bitmaps of 0 bytes"),
        (80, struct.pack("<I", 5000), Unsupported, r"header\+80: extents of 5000 bytes"),
        (88, struct.pack("<Q", 0), Corrupt, r"header\+88: disk size 0"),
        (88, struct.pack("<Q", 1 << 40), Corrupt, r"header\+88: .* the catalog has room"),
    ],
)
def test_refuses(
    offset: int, data: bytes, error: type[Exception], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "disk.bochs"
    make_bochs(path, bytes(1 << 20), 65536, range(100))
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)
    with pytest.raises(error, match=complaint):
        virtmount.open(path, "bochs")


def test_not_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "disk.bochs"
    make_bochs(path, bytes(1 << 20), 65536, range(100))
    with pytest.raises(Unsupported, match="only read"):
        virtmount.open(path, writable=True)


def test_what_the_file_ends_before_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "disk.bochs"
    content = bytes(disk(1, 256))
    make_bochs(path, content, 65536, range(256))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 10 * SECTOR)
    with virtmount.open(path) as opened:
        assert opened.pread(0, 246 * SECTOR) == content[: 246 * SECTOR]
        with pytest.raises(OSError, match="Input/output error"):
            opened.pread(246 * SECTOR, SECTOR)
