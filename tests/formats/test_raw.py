"""Raw images: only what is peculiar to them; the rest is in tests/conformance."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.reference import Reference
from virtmount.errors import NotAnImage
from virtmount.formats.raw import CLUSTER, LEAF, Raw
from virtmount.hostfile import HostFile
from virtmount.image import Extent, Kind, Match, extents
from virtmount.plan import Plan, Punch


def make(path: Path, size: int) -> bytes:
    content = os.urandom(size)
    path.write_bytes(content)
    return content


def test_probe_is_never_sure() -> None:
    assert Raw.probe(b"\xff" * 512, b"\xff" * 512, 512) is Match.LIKELY
    assert Raw.probe(b"", b"", 0) is Match.NO


def test_refuses_an_empty_file(tmp_path: Path) -> None:
    make(tmp_path / "disk.img", 0)
    with HostFile(tmp_path / "disk.img") as file, pytest.raises(NotAnImage, match="empty"):
        Raw(file)


def test_every_byte_lies_where_the_guest_sees_it(tmp_path: Path) -> None:
    make(tmp_path / "disk.img", 3 * CLUSTER)
    with HostFile(tmp_path / "disk.img") as file:
        image = Raw(file)
        assert image.flat == 0
        assert list(extents(image, CLUSTER, 2 * CLUSTER)) == [
            Extent(CLUSTER, CLUSTER, Kind.DATA, CLUSTER),
            Extent(2 * CLUSTER, CLUSTER, Kind.DATA, 2 * CLUSTER),
        ]
        assert image.leaf(3).base == 3 * LEAF * CLUSTER


@pytest.mark.parametrize("size", [1, 511, 513, CLUSTER + 1])
def test_a_last_sector_that_is_cut_short_reads_as_zeros_after_the_end(
    tmp_path: Path, size: int
) -> None:
    content = make(tmp_path / "disk.img", size)
    with HostFile(tmp_path / "disk.img") as file:
        disk = Reference([Raw(file)])
        assert disk.size == -(-size // 512) * 512
        assert disk.pread(0, disk.size) == content.ljust(disk.size, b"\0")


def test_the_first_write_to_a_cut_sector_makes_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    content = make(path, 700)
    with HostFile(path, writable=True) as file, Reference([Raw(file)]) as disk:
        disk.pwrite(512, b"x" * 512)
    assert path.read_bytes() == content[:512] + b"x" * 512


def test_discard_gives_the_space_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    content = make(path, 4 * CLUSTER + 512)
    with HostFile(path, writable=True) as file:
        before = path.stat().st_blocks
        with Reference([Raw(file)]) as disk:
            disk.discard(CLUSTER - 512, 2 * CLUSTER)
            # Only the one whole cluster inside the range.
            expected = content[:CLUSTER] + bytes(CLUSTER) + content[2 * CLUSTER :]
            assert disk.pread(0, disk.size) == expected
        assert path.stat().st_blocks <= before - CLUSTER // 512
    assert path.read_bytes() == expected


def test_discard_of_the_last_cluster_keeps_the_length(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    content = make(path, CLUSTER + 1000)
    with HostFile(path, writable=True) as file:
        image = Raw(file)
        assert image.discard(1, 1).steps == Plan(Punch(CLUSTER, 1024)).steps
        with Reference([image]) as disk:
            disk.discard(CLUSTER, 1024)
    assert path.read_bytes() == content[:CLUSTER] + bytes(1000)


def test_opened_for_reading_offers_no_writing(tmp_path: Path) -> None:
    make(tmp_path / "disk.img", 512)
    with HostFile(tmp_path / "disk.img") as file:
        disk = Reference([Raw(file)])
        assert not disk.top.caps.write
        assert not disk.top.caps.discard
        with pytest.raises(OSError, match="Read-only"):
            disk.pwrite(0, b"x" * 512)


@pytest.mark.device
def test_a_block_device_is_a_raw_image(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    content = make(path, 256 << 10)
    loop = subprocess.run(
        ["losetup", "--find", "--show", path], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        with HostFile(loop, writable=True) as file:
            image = Raw(file)
            assert (image.size, image.variant) == (256 << 10, "device")
            with Reference([image]) as disk:
                assert disk.pread(1000, 5000) == content[1000:6000]
                disk.pwrite(513, b"y" * 700)
                disk.discard(2 * CLUSTER, CLUSTER)
                assert disk.pread(2 * CLUSTER, CLUSTER) == bytes(CLUSTER)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
    expected = bytearray(content)
    expected[513 : 513 + 700] = b"y" * 700
    expected[2 * CLUSTER : 3 * CLUSTER] = bytes(CLUSTER)
    assert path.read_bytes() == bytes(expected)
