"""QCOW2, reading and refusing: only what is peculiar to it; the rest is in tests/conformance."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest

from tests.formats.qcow2_images import (
    content_of,
    create,
    l1_offset,
    l2_offset,
    number,
    opened,
    patch,
    qemu_io,
    raw_of,
    run,
    scatter,
    u32,
    u64,
)
from virtmount.errors import Corrupt, Denied, NeedsRecovery, NotAnImage, Unsupported, VirtmountError
from virtmount.formats.qcow2 import QCOW2
from virtmount.hostfile import HostFile
from virtmount.image import Kind, Match, ParentRef, extents

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
COPIED = 1 << 63


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create(tmp_path / "disk.qcow2", SIZE)


def refuse(path: Path, error: type[VirtmountError], *, writable: bool = False) -> str:
    before = path.read_bytes()
    with HostFile(path, writable=writable) as file, pytest.raises(error) as caught:
        QCOW2(file)
    assert path.read_bytes() == before
    assert type(caught.value) is error
    return str(caught.value)


# Refusals


def test_probe() -> None:
    assert QCOW2.probe(b"QFI\xfb\0\0\0\3", b"", 8) is Match.SURE
    assert QCOW2.probe(b"QFI\xfb\0\0\0\2", b"", 8) is Match.SURE
    assert QCOW2.probe(b"QFI\xfb\0\0\0\1", b"", 8) is Match.NO, "that is QCOW"
    assert QCOW2.probe(b"QFI", b"", 3) is Match.NO
    assert QCOW2.probe(b"", b"", 0) is Match.NO


@pytest.mark.parametrize(
    ("offset", "value", "error", "complaint"),
    [
        (0, b"QFI\xfc", NotAnImage, "header+0: no QCOW2 signature"),
        (4, u32(4), Unsupported, "header+4: version 4, know 2 and 3"),
        (4, u32(1), Unsupported, "version 1, know 2 and 3"),
        (8, u64(100), Corrupt, "header+8: parent's name at 100, expected 112 to 65536"),
        (8, u64(1 << 63), Corrupt, "expected 112 to 65536"),
        (20, u32(8), Corrupt, "header+20: 8 cluster bits, expected 9 to 21"),
        (20, u32(22), Corrupt, "22 cluster bits"),
        (20, u32(0xFFFFFFFF), Corrupt, "4294967295 cluster bits"),
        (24, u64(1 << 40), Corrupt, "L1 table of 1 entries, 1099511627776 bytes need 2048"),
        (24, u64((1 << 64) - 1), Corrupt, "header+36: L1 table of 1 entries"),
        (32, u32(1), Denied, "header+32: encrypted: no passphrase"),
        (32, u32(2), Corrupt, "LUKS encryption, but no place of the LUKS header"),
        (32, u32(7), Unsupported, "encryption method 7"),
        (36, u32(0), Corrupt, "header+36: L1 table of 0 entries"),
        (36, u32((4 << 20) + 1), Corrupt, "L1 table of 4194305 entries, the most is 4 Mi"),
        (36, u32(0xFFFFFFFF), Corrupt, "L1 table of 4294967295 entries"),
        (36, u32(1 << 20), Corrupt, "header+40: L1 table at 196608: 8388608 bytes, the file ends"),
        (40, u64(0), Corrupt, "header+40: L1 table at 0, not at a cluster of its own"),
        (40, u64(0x30200), Corrupt, "L1 table at 197120, not at a cluster of its own"),
        (40, u64(0x40000), Corrupt, "L1 table at 262144: 8 bytes, the file ends"),
        (40, u64(1 << 63), Corrupt, "header+40"),
        (40, u64(0x10000), Corrupt, "L1 table at 65536 overlaps the refcount table"),
        (48, u64(0), Corrupt, "header+48: refcount table at 0, not at a cluster of its own"),
        (48, u64((1 << 64) - 65536), Corrupt, "header+48: refcount table at 18446744073709486080"),
        (56, u32(0), Corrupt, "header+56: refcount table of 0 clusters, expected 1 to 128"),
        (56, u32(129), Corrupt, "refcount table of 129 clusters, expected 1 to 128"),
        (56, u32(0xFFFFFFFF), Corrupt, "refcount table of 4294967295 clusters"),
        (60, u32(65537), Corrupt, "header+60: 65537 snapshots, the most is 65536"),
        (60, u32(1), Corrupt, "header+64: snapshot table at 0, not at a cluster of its own"),
        (72, u64(1 << 2), Corrupt, "header+72: an external data file, without its name"),
        (72, u64(1 << 5), Unsupported, "incompatible feature bit 5: unknown"),
        (72, u64(1 << 63), Unsupported, "incompatible feature bit 63: unknown"),
        (72, u64(1 << 3), Corrupt, "compression type 0 against incompatible feature bit 3"),
        (96, u32(7), Corrupt, "header+96: refcount order 7, the most is 6"),
        (96, u32(0xFFFFFFFF), Corrupt, "header+96"),
        (100, u32(103), Corrupt, "header+100: header length 103, expected 104 to 65536"),
        (100, u32(65537), Corrupt, "header length 65537"),
        (104, b"\1", Corrupt, "header+104: compression type 1 against incompatible feature bit 3"),
        (112, u32(1) + u32(1 << 31), Corrupt, "header+116: extension 0x00000001 of 2147483648"),
    ],
)
def test_refuses(
    image: Path, offset: int, value: bytes, error: type[VirtmountError], complaint: str
) -> None:
    if offset == 112 or offset == 72:
        patch(image, 112, bytes(1024))  # without qemu's table of feature names
    patch(image, offset, value)
    assert complaint in refuse(image, error)


@pytest.mark.parametrize("length", [0, 4, 71, 72, 111, 512, 65535])
def test_refuses_a_file_that_is_cut_short(image: Path, length: int) -> None:
    os.truncate(image, length)
    refuse(image, NotAnImage if length < 4 else Unsupported if length == 4 else Corrupt)


def test_refuses_a_snapshot_table_past_the_end(image: Path) -> None:
    patch(image, 60, u32(3) + u64(1 << 40))
    assert "snapshot 0 begins past the file's end" in refuse(image, Corrupt)


def test_an_unknown_feature_is_refused_by_the_name_that_the_image_gives_it(image: Path) -> None:
    name = b"\0\x17" + b"tape\x1b[31m robot".ljust(46, b"\0")
    patch(image, 112, u32(0x6803F857) + u32(48) + name + bytes(1024))
    patch(image, 72, u64(1 << 0x17))
    complaint = refuse(image, Unsupported)
    assert "incompatible feature bit 23: the image calls it 'tape\\x1b[31m robot'" in complaint


def test_unknown_compatible_and_autoclear_bits_are_no_obstacle(image: Path) -> None:
    patch(image, 80, u64(1 << 40) + u64(1 << 41))
    with opened(image) as disk:
        assert disk.top.details()["compatible_features"] == 1 << 40
    with HostFile(image, writable=True) as file:
        assert QCOW2(file).caps.write


@pytest.mark.parametrize(
    ("bit", "complaint"), [(0, "its reference counts must be rebuilt"), (1, "marked as corrupt")]
)
def test_a_marked_image_is_read_but_not_written(image: Path, bit: int, complaint: str) -> None:
    scatter(image, SIZE, 64 * KIB)
    content = raw_of(image)
    patch(image, 72, u64(1 << bit))
    assert content_of(image) == content
    assert complaint in refuse(image, NeedsRecovery, writable=True)
    with HostFile(image) as file:
        details = QCOW2(file).details()
    assert (details["dirty"], details["corrupt"]) == (bit == 0, bit == 1)


def test_a_table_that_nothing_counts_must_be_repaired_before_writing(image: Path) -> None:
    qemu_io(image, "write -q 0 64k")
    block = number(image, number(image, 48))
    patch(image, block + 2 * (l2_offset(image) >> 16), b"\0\0")
    complaint = refuse(image, NeedsRecovery, writable=True)
    assert f"byte {l2_offset(image)}: in use, but its reference count is 0" in complaint
    content_of(image)


@pytest.mark.parametrize("victim", [0x10000, 0x20000, 0x30000], ids=hex)
def test_tables_that_overlap_are_not_written(image: Path, victim: int) -> None:
    qemu_io(image, "write -q 0 64k")
    patch(image, l1_offset(image), u64(COPIED | victim))
    assert f"byte {victim}: two tables overlap" in refuse(image, Corrupt, writable=True)
    with HostFile(image) as file:
        QCOW2(file)


def test_a_table_past_the_end_is_not_written(image: Path) -> None:
    patch(image, l1_offset(image), u64(COPIED | 1 << 40))
    assert "not a cluster of a file with" in refuse(image, Corrupt, writable=True)


# Parents


@pytest.mark.parametrize(
    "name", ["json:{}", "nbd:localhost:10809", "http://host/disk", "ssh://a/b", "rbd:pool/image"]
)
def test_a_parent_that_is_no_local_file_is_refused(image: Path, name: str) -> None:
    run("qemu-img", "rebase", "-f", "qcow2", "-u", "-F", "raw", "-b", name, image)
    assert f"parent {name!r} is not a local file" in refuse(image, Unsupported)


@pytest.mark.parametrize(
    "name", ["base.raw", "../base.raw", "/etc/./base.raw", "a b\nc", "b\xe4se"]
)
def test_the_parent_is_named_as_recorded(image: Path, name: str) -> None:
    run("qemu-img", "rebase", "-f", "qcow2", "-u", "-F", "raw", "-b", name, image)
    with HostFile(image) as file:
        assert QCOW2(file).parent == ParentRef((name,), "raw")


def test_a_parent_without_recorded_format(tmp_path: Path, image: Path) -> None:
    run("qemu-img", "rebase", "-f", "qcow2", "-u", "-F", "raw", "-b", "base", image)
    patch(image, image.read_bytes().index(u32(0xE2792ACA)), u32(0x11111111))
    with HostFile(image) as file:
        assert QCOW2(file).parent == ParentRef(("base",), None)


def test_a_parent_name_outside_of_the_first_cluster_is_refused(image: Path) -> None:
    patch(image, 8, u64(65000) + u32(1000))
    assert "parent's name of 1000 bytes at 65000, the most is 536" in refuse(image, Corrupt)
    patch(image, 8, u64(2000) + u32(1024))
    assert "the most is 1023" in refuse(image, Corrupt)


# Reading


@pytest.mark.parametrize(
    ("cluster", "options"),
    [
        (512, "cluster_size=512"),
        (512, "cluster_size=512,refcount_bits=1"),
        (1024, "cluster_size=1k,compat=0.10"),
        (4 * KIB, "cluster_size=4k,refcount_bits=64"),
        (64 * KIB, "compat=0.10"),
        (64 * KIB, "lazy_refcounts=on"),
        (64 * KIB, "preallocation=metadata"),
        (2 * MIB, "cluster_size=2M"),
    ],
)
def test_reads_what_qemu_wrote_in_shuffled_order(
    tmp_path: Path, cluster: int, options: str
) -> None:
    size = max(SIZE, 6 * cluster) + 3 * 512  # ends inside a cluster
    path = create(tmp_path / "disk.qcow2", size, options)
    scatter(path, size, cluster)
    assert content_of(path) == raw_of(path)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 100 * KIB])
def test_a_disk_of_any_size(tmp_path: Path, length: int) -> None:
    path = create(tmp_path / "disk.qcow2", 0)
    if length:
        path = create(path, length)
        patch(path, 24, u64(length))  # qemu rounds up
    with HostFile(path) as file:
        image = QCOW2(file)
        assert image.size == length
        assert all(extent.kind is Kind.ABSENT for extent in extents(image, 0, length))


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_reads_through_to_the_parent(tmp_path: Path, compat: str) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(SIZE - 5 * 512))  # shorter than the child
    path = create(tmp_path / "disk.qcow2", SIZE, f"compat={compat}", parent=base)
    scatter(path, SIZE, 64 * KIB)
    assert content_of(path, base) == raw_of(path)


def test_zero_clusters_hide_the_parent_with_and_without_an_offset(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(SIZE))
    path = create(tmp_path / "disk.qcow2", SIZE, parent=base)
    qemu_io(
        path,
        *("write -q -P 1 1M 512k", "write -q -z 1M 128k", "write -q -z -u 1152k 64k"),
        "write -q -z 2M 192k",
    )
    with HostFile(path) as file:
        kinds = [extent.kind for extent in extents(QCOW2(file), 0, SIZE)]
    assert kinds.count(Kind.ZERO) == 6
    assert kinds.count(Kind.DATA) == 5
    assert content_of(path, base) == raw_of(path)


def compressible(size: int, seed: int = 3) -> bytes:
    """Clusters of several compressed lengths, some of them as long as before."""
    rng = random.Random(seed)
    parts = []
    while sum(map(len, parts)) < size:
        parts.append(rng.randbytes(rng.randrange(1, 3000)))
        parts.append(bytes([rng.randrange(256)]) * rng.randrange(1, 20000))
    return b"".join(parts)[:size]


@pytest.mark.parametrize("cluster", [512, 4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("kind", ["compat=0.10", "compat=1.1", "compression_type=zstd"])
def test_reads_compressed_clusters(tmp_path: Path, cluster: int, kind: str) -> None:
    size = max(SIZE // 4, 3 * cluster) + 512
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(compressible(size))
    options = f"cluster_size={cluster},{kind}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    with opened(path) as disk:
        assert any(extent.kind is Kind.COMPRESSED for _, extent in disk.extents(0, size))
        assert disk.pread(0, size) == raw.read_bytes()


def compressed_image(tmp_path: Path, kind: str = "zlib") -> tuple[Path, int]:
    """An image whose first cluster is compressed, and where its L2 entry lies."""
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(b"A" * (64 * KIB))
    options = f"compression_type={kind}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    assert content_of(path) == raw.read_bytes()
    return path, l2_offset(path)


def deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -12)
    return stream.compress(data) + stream.flush()


def test_a_compressed_cluster_inflates_to_one_cluster_and_no_more(tmp_path: Path) -> None:
    path, entry = compressed_image(tmp_path)
    at = number(path, entry) & (1 << 54) - 1
    sectors = 100 << 54
    patch(path, entry, u64(1 << 62 | sectors | at))
    patch(path, at, deflate(b"B" * (64 * KIB)))
    assert content_of(path) == b"B" * (64 * KIB)
    bomb = deflate(bytes(48 << 20))
    assert 40 * KIB < len(bomb) < 50 * KIB
    patch(path, at, bomb)
    tracemalloc.start()
    try:
        assert content_of(path) == bytes(64 * KIB)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
    for damaged, complaint in (
        (deflate(b"B" * 65535), "inflates to 65535 bytes, expected 65536"),
        (b"\xff" * 512, "guest cluster 0 does not inflate"),
    ):
        os.truncate(path, at)
        patch(path, at, damaged)
        with HostFile(path) as file, pytest.raises(Corrupt, match=complaint):
            QCOW2(file).inflate(0)


def frame(size: int, content: int) -> bytes:
    """Of zstd: magic, no window but a content size of 4 bytes, one block that repeats a byte."""
    header = u32(0x28B52FFD) + b"\xa0" + size.to_bytes(4, "little")
    return header + ((content << 3) | 2 | 1).to_bytes(3, "little") + b"B"


def test_a_zstd_cluster_decompresses_to_one_cluster_and_no_more(tmp_path: Path) -> None:
    path, entry = compressed_image(tmp_path, "zstd")
    at = number(path, entry) & (1 << 54) - 1
    patch(path, at, frame(64 * KIB, 64 * KIB))
    assert content_of(path) == b"B" * (64 * KIB)
    for damaged, complaint in (
        (frame(64 * KIB - 1, 64 * KIB - 1), "unknown|Unknown|frame|inflates to 65535 bytes"),
        (frame(128 * KIB, 128 * KIB), "the frame does not end after 65536 bytes"),
        (b"\xff" * 512, "Unknown frame descriptor"),
        (u32(0x28B52FFD) + b"\x00\xff", "Frame requires too much memory"),
    ):
        patch(path, at, damaged.ljust(512, b"\0"))
        with HostFile(path) as file, pytest.raises(Corrupt, match=complaint):
            QCOW2(file).inflate(0)


def test_zstd_without_its_library_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = compressed_image(tmp_path, "zstd")
    monkeypatch.setattr("virtmount.formats.zstd.LIBRARY", "libnone.so.1")
    assert "header+104: zstd compression: libnone.so.1" in refuse(path, Unsupported)


def test_a_compressed_cluster_must_begin_inside_the_file(tmp_path: Path) -> None:
    path, entry = compressed_image(tmp_path)
    for offset in (path.stat().st_size, (1 << 54) - 1):
        patch(path, entry, u64(1 << 62 | offset))
        with (
            HostFile(path) as file,
            pytest.raises(Corrupt, match=f"compressed cluster at {offset}"),
        ):
            QCOW2(file).inflate(0)
    patch(path, entry, u64(0))
    with HostFile(path) as file, pytest.raises(Corrupt, match="guest cluster 0 is not compressed"):
        QCOW2(file).inflate(0)


def test_snapshots_do_not_hinder_reading_the_active_disk(image: Path) -> None:
    qemu_io(image, "write -q -P 1 0 1M")
    run("qemu-img", "snapshot", "-c", "one with a longer name", image)
    qemu_io(image, "write -q -P 2 512k 64k", "write -q -P 3 2M 64k")
    run("qemu-img", "snapshot", "-c", "two", image)
    qemu_io(image, "write -q -P 4 0 64k")
    assert content_of(image) == raw_of(image)
    with HostFile(image) as file:
        driver = QCOW2(file)
        kinds = {extent.kind for extent in extents(driver, 0, SIZE)}
        assert kinds == {Kind.ABSENT, Kind.DATA, Kind.SHARED}
        assert driver.details()["snapshots"] == 2
        table = number(image, 64)
        assert any(at <= table < at + length for at, length, _ in driver.metadata())


def test_an_l2_table_cut_short_by_the_end_of_the_file_is_completed_with_zeros(image: Path) -> None:
    patch(image, 0x50000 - 1, b"\0")
    patch(image, 0x60000, u64(COPIED | 0x40000) + b"\0")  # data at 4, then the table
    patch(image, 0x40000, b"Z" * 65536)
    patch(image, l1_offset(image), u64(COPIED | 0x60000))
    assert content_of(image) == b"Z" * 65536 + bytes(SIZE - 65536)
    assert "the file ends inside an L2 table" in refuse(image, Corrupt, writable=True)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (COPIED | 0x60200, "L1 entry 1: L2 table at 393728"),
        (COPIED | 1 << 54, "L1 entry 1: L2 table at 18014398509481984"),
    ],
)
def test_a_bad_l2_table_costs_only_its_own_clusters(
    tmp_path: Path, entry: int, complaint: str
) -> None:
    path = create(tmp_path / "disk.qcow2", 1 << 30)
    qemu_io(path, "write -q -P 7 0 64k")
    patch(path, l1_offset(path) + 8, u64(entry))
    with HostFile(path) as file:
        image = QCOW2(file)
        assert next(iter(extents(image, 0, 512))).kind is Kind.DATA
        with pytest.raises(Corrupt, match=complaint):
            image.leaf(2)


@pytest.mark.parametrize(
    ("version", "entry", "kind"),
    [
        (3, 0, Kind.ABSENT),
        (3, COPIED, Kind.ABSENT),
        (3, 1, Kind.ZERO),
        (3, COPIED | 0x50001, Kind.ZERO),
        (2, COPIED | 0x50001, Kind.INVALID),
        (3, COPIED | 0x50000, Kind.DATA),
        (3, 0x50000, Kind.SHARED),
        (3, 1 << 62 | 0x50001, Kind.COMPRESSED),
        (3, COPIED | 1 << 50, Kind.INVALID),
        (3, COPIED | 0x200, Kind.INVALID),
        (3, COPIED | 0x60000, Kind.INVALID),
    ],
)
def test_what_an_entry_says(tmp_path: Path, version: int, entry: int, kind: Kind) -> None:
    compat = "0.10" if version == 2 else "1.1"
    path = create(tmp_path / "disk.qcow2", SIZE, f"compat={compat}")
    qemu_io(path, "write -q -P 7 0 64k")
    assert path.stat().st_size == 0x60000
    patch(path, l2_offset(path), u64(entry))
    with HostFile(path) as file:
        assert next(iter(extents(QCOW2(file), 0, 512))).kind is kind


# In the header; at the refcount table, its block, L1 and the L2 table; into the last from below.
@pytest.mark.parametrize("victim", [0x200, 0x10000, 0x20000, 0x30000, 0x40000, 0x3FE00], ids=hex)
def test_a_guest_cluster_in_metadata_is_an_io_error(image: Path, victim: int) -> None:
    qemu_io(image, "write -q -P 7 0 64k")
    patch(image, l2_offset(image) + 8, u64(COPIED | victim))
    before = image.read_bytes()
    with opened(image, writable=True) as disk:
        assert disk.pread(0, 512) == b"\7" * 512
        with pytest.raises(OSError, match="no valid host offset"):
            disk.pread(64 * KIB, 512)
        with pytest.raises(OSError, match="no valid host offset"):
            disk.pwrite(64 * KIB, b"x" * 512)
    assert image.read_bytes() == before


def test_a_refcount_table_of_nonsense_is_no_obstacle_to_reading(image: Path) -> None:
    scatter(image, SIZE, 64 * KIB)
    content = raw_of(image)
    patch(image, 0x10000, random.Random(5).randbytes(65536))
    assert content_of(image) == content


def test_details(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(SIZE))
    options = "cluster_size=4k,refcount_bits=32,lazy_refcounts=on"
    path = create(tmp_path / "disk.qcow2", SIZE, options, parent=base)
    with HostFile(path) as file:
        image = QCOW2(file)
        assert image.details() == {
            "version": 3,
            "cluster_size": 4096,
            "refcount_bits": 32,
            "compression": "zlib",
            "compatible_features": 1,
            "autoclear_features": 0,
            "lazy_refcounts": True,
            "dirty": False,
            "corrupt": False,
            "snapshots": 0,
            "bitmaps": [],
            "extended_l2": False,
            "data_file": None,
            "data_file_raw": False,
            "encryption": None,
            "backing_file": "base.raw",
            "backing_format": "raw",
        }
        assert image.variant == "version 3"


def full_64_tib(path: Path) -> None:
    """64 TiB with an L2 table for each of its 131072 L1 entries, not in order."""
    create(path, 64 << 40)
    entries = list(range(131072))
    random.Random(7).shuffle(entries)
    start = 64 * MIB
    patch(path, l1_offset(path), b"".join(u64(COPIED | start + (i << 16)) for i in entries))
    os.truncate(path, start + (131072 << 16))
    table = start + (entries[131071] << 16)
    patch(path, table + 65528, u64(COPIED | 32 * MIB))
    patch(path, 32 * MIB, b"end")


def test_a_full_64_tib_image_opens_at_once_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    full_64_tib(path)
    with HostFile(path) as file:
        started = time.process_time()
        image = QCOW2(file)
        list(image.metadata())
        assert time.process_time() - started < 1
    tracemalloc.start()
    try:
        with HostFile(path) as file:
            image = QCOW2(file)
            assert tracemalloc.get_traced_memory()[1] < 4 * MIB
            assert sum(span.length for span in image.metadata()) == (131072 << 16) + 19 * 65536
            assert tracemalloc.get_traced_memory()[1] < 12 * MIB
            last = list(extents(image, (64 << 40) - 65536, 512))
            assert [(e.kind, e.host_offset) for e in last] == [(Kind.DATA, 32 * MIB)]
    finally:
        tracemalloc.stop()


OPEN_UNDER_LIMITS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from virtmount.errors import VirtmountError
from virtmount.formats.qcow2 import QCOW2
from virtmount.hostfile import HostFile
for writable in (False, True):
    with HostFile(sys.argv[1], writable=writable) as file:
        try:
            image = QCOW2(file)
            for _ in image.metadata():
                pass
            image.reserve(100)
        except (VirtmountError, OSError) as error:
            print(type(error).__name__, end=" ")
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
usage = resource.getrusage(resource.RUSAGE_SELF)
print(int(peak.split()[1]) >> 10, usage.ru_utime + usage.ru_stime)
"""


@pytest.mark.parametrize(
    ("case", "errors"),
    [
        ("l1", ["Unsupported", "Corrupt"]),
        ("refcounts", ["Unsupported", "Corrupt"]),
        ("snapshots", ["Unsupported", "NeedsRecovery"]),
        ("extensions", ["Unsupported"]),
    ],
)
def test_tables_at_their_caps_open_in_bounded_memory_and_time(
    tmp_path: Path, case: str, errors: list[str]
) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE, "cluster_size=512")
    if case == "l1":
        patch(path, 36, u32(4 << 20) + u64(16 * MIB))
        patch(path, 16 * MIB, b"".join(u64(COPIED | i * 512) for i in range(1 << 17)) * 32)
    elif case == "refcounts":
        patch(path, 48, u64(16 * MIB) + u32(16384))
        patch(path, 16 * MIB, b"".join(u64(i * 512) for i in range(1 << 17)) * 8)
    elif case == "snapshots":
        patch(path, 60, u32(65536) + u64(16 * MIB))
    else:
        path = create(path, SIZE, "cluster_size=2M")
        patch(path, 112, (u32(1) + u32(0)) * (262144 - 14))
    os.truncate(path, 64 * MIB)
    done = subprocess.run(
        [sys.executable, "-c", OPEN_UNDER_LIMITS, str(path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    *found, peak, seconds = done.stdout.split()
    assert found == errors
    assert int(peak) < 256 + 32  # MiB; the cap of an L1 table is 32
    assert float(seconds) < 10  # about 2, on a machine that does nothing else
