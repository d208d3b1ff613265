"""cloop: blocks of any length, read by qemu-img as well."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

import pytest

import virtmount
from tests.formats.make_packed import make_cloop
from tests.formats.test_dmg import disk
from tests.reference import Reference
from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats.cloop import Cloop
from virtmount.hostfile import HostFile

KIB = 1 << 10


@pytest.mark.parametrize("block", [512, 1024, 4096, 65536, 131072, 512 * 100, 512 * 999, 1 << 21])
def test_blocks_of_every_length(block: int, tmp_path: Path) -> None:
    content = bytes(disk(block, 3001))
    path = tmp_path / "disk.cloop"
    make_cloop(path, content, block)
    content = content.ljust(-(-len(content) // block) * block, b"\0")
    out = tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-f", "cloop", "-O", "raw", path, out], check=True)
    assert out.read_bytes() == content
    with virtmount.open(path) as opened:
        assert opened.size == len(content)
        assert opened.pread(0, opened.size) == content
        random_ = random.Random(block)
        for _ in range(30):
            at, length = random_.randrange(len(content)), random_.randrange(1, 100 * KIB)
            wanted = content[at : at + length]
            assert opened.pread(at, len(wanted)) == wanted
    with HostFile(path) as file, Reference([Cloop(file)]) as reference:
        assert reference.pread(0, reference.size) == content


def test_a_block_of_a_power_of_two_is_a_cluster(tmp_path: Path) -> None:
    path = tmp_path / "disk.cloop"
    for block, cluster in ((131072, 131072), (51200, 65536), (512, 65536)):
        make_cloop(path, bytes(1 << 20), block)
        info = virtmount.inspect(path)
        assert (info.format, info.cluster_size) == ("cloop", cluster)
        assert info.details["block_size"] == block


@pytest.mark.parametrize(
    ("offset", "value", "error", "complaint"),
    [
        (128, 0, Corrupt, r"header\+128: block size 0"),
        (128, 513, Corrupt, r"header\+128: block size 513, not a multiple of 512"),
        (128, 16 << 20, Unsupported, r"header\+128: block size 16777216, the most is"),
        (132, 0, Corrupt, r"header\+132: 0 blocks"),
        (132, 1 << 30, Corrupt, r"header\+132: 1073741824 blocks: offsets end at"),
    ],
)
def test_refuses(
    offset: int, value: int, error: type[Exception], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "disk.cloop"
    make_cloop(path, bytes(1 << 20), 65536)
    raw = bytearray(path.read_bytes())
    raw[offset : offset + 4] = struct.pack(">I", value)
    path.write_bytes(raw)
    with pytest.raises(error, match=complaint):
        virtmount.open(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.cloop"
    path.write_bytes(b"#!/bin/sh\n#V4.0 Format".ljust(8192, b"\0"))
    with pytest.raises(NotAnImage, match=r"header\+0: no script of cloop version 2\.0"):
        virtmount.open(path, "cloop")


def test_not_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "disk.cloop"
    make_cloop(path, bytes(1 << 20), 65536)
    with pytest.raises(Unsupported, match="only read"):
        virtmount.open(path, writable=True)


def test_a_damaged_block_is_an_error_of_its_own(tmp_path: Path) -> None:
    content = bytes(disk(1, 1024))
    path = tmp_path / "disk.cloop"
    make_cloop(path, content, 65536)
    raw = bytearray(path.read_bytes())
    second = int.from_bytes(raw[136 + 8 : 136 + 16], "big")
    raw[second + 100] ^= 1
    path.write_bytes(raw)
    with HostFile(path) as file:
        image = Cloop(file)
        with pytest.raises(Corrupt, match=f"block 1 at {second}"):
            image.inflate(1)
        assert image.inflate(0) == content[:65536]
        assert image.inflate(2) == content[131072 : 131072 + 65536]
