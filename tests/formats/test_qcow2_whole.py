"""QCOW2 images made, compressed, resized, given other parents; qemu-img reads and checks them."""

from __future__ import annotations

import itertools
import json
import os
import random
from array import array
from pathlib import Path
from typing import Any

import pytest

import virtmount
from tests.formats import luks_images
from tests.formats.qcow2_images import (
    check,
    content_of,
    l2_offset,
    number,
    opened,
    patch,
    qemu_io,
    raw_of,
    run,
    u32,
    u64,
)
from tests.reference import Reference
from virtmount.errors import Unsupported, VirtmountError
from virtmount.formats.qcow2 import QCOW2
from virtmount.formats.qcow2_create import packed_counts
from virtmount.formats.raw import Raw
from virtmount.hostfile import HostFile, execute
from virtmount.image import Kind, Options, extents
from virtmount.plan import Barrier, Plan, Write

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
COPIED = 1 << 63


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """qemu takes the name of a data file from where it stands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(path: Path, size: int = SIZE, parent: Path | None = None, **options: str) -> Path:
    virtmount.create(
        path,
        size,
        "qcow2",
        settings=options,
        parent=parent,
        parent_format="raw" if parent else None,
    )
    return path


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", path))
    return found


# Making


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "0.10"},
        {"cluster_size": "512"},
        {"cluster_size": "2M"},
        {"cluster_size": "4k", "refcount_bits": "1"},
        {"refcount_bits": "64", "lazy_refcounts": "on"},
        {"compression_type": "zstd"},
        {"extended_l2": "on", "cluster_size": "16K"},
        {"preallocation": "metadata"},
        {"preallocation": "metadata", "extended_l2": "on"},
        {"preallocation": "metadata", "cluster_size": "512", "refcount_bits": "2"},
        {"data_file": "data"},
        {"data_file": "data", "data_file_raw": "on"},
        {"data_file": "data", "extended_l2": "on", "preallocation": "metadata"},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
def test_an_empty_image(folder: Path, options: dict[str, str]) -> None:
    path = make(folder / "a.qcow2", SIZE + 512, **options)
    check(path)
    found = info(path)
    assert found["virtual-size"] == SIZE + 512
    assert found["cluster-size"] == {"512": 512, "4k": 4096, "16K": 16384, "2M": 2 * MIB}.get(
        options.get("cluster_size", ""), 65536
    )
    data = found["format-specific"]["data"]
    assert data["compat"] == options.get("compat", "1.1")
    assert data["refcount-bits"] == int(options.get("refcount_bits", "16"))
    if data["compat"] == "1.1":
        assert data["compression-type"] == options.get("compression_type", "zlib")
        assert data["lazy-refcounts"] == (options.get("lazy_refcounts") == "on")
        assert data["extended-l2"] == (options.get("extended_l2") == "on")
        assert data.get("data-file") == options.get("data_file")
        assert data.get("data-file-raw", False) == ("data_file_raw" in options)
    assert raw_of(path) == bytes(SIZE + 512) == content_of(path)
    # Both write to it, and find what the other wrote.
    qemu_io(path, "write -q -P 1 100k 70k")
    with opened(path, writable=True) as disk:
        assert disk.pread(100 * KIB, 70 * KIB) == b"\1" * (70 * KIB)
        disk.pwrite(SIZE, b"x" * 512)
        disk.pwrite(MIB, b"y" * 100)
    check(path)
    raw = raw_of(path)
    assert raw[SIZE:] == b"x" * 512
    assert raw[MIB : MIB + 101] == b"y" * 100 + b"\0"
    if "data_file_raw" in options:
        assert (folder / "data").read_bytes() == raw


@pytest.mark.parametrize("options", [{}, {"extended_l2": "on"}, {"data_file": "d"}], ids=str)
def test_what_is_preallocated_is_written_in_place(folder: Path, options: dict[str, str]) -> None:
    path = make(folder / "a.qcow2", preallocation="metadata", **options)
    with HostFile(path) as file:
        image = QCOW2(file)
        assert {extent.kind for extent in extents(image, 0, SIZE)} == {Kind.DATA}
        for other in image.files[1:]:
            other.close()


def test_a_child(folder: Path) -> None:
    base = folder / "base.raw"
    base.write_bytes(random.Random(1).randbytes(SIZE))
    path = make(folder / "a.qcow2", SIZE, base)
    found = info(path)
    assert (found["backing-filename"], found["backing-filename-format"]) == ("base.raw", "raw")
    assert raw_of(path) == base.read_bytes()
    small = make(folder / "b.qcow2", SIZE, base, cluster_size="512")
    assert raw_of(small) == base.read_bytes()
    old = make(folder / "c.qcow2", SIZE, base, compat="0.10")
    assert raw_of(old) == base.read_bytes()
    check(old)
    grandchild = folder / "d.qcow2"
    virtmount.create(grandchild, parent=path)
    assert info(grandchild)["backing-filename-format"] == "qcow2"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"cluster_size": "3K"}, "cluster_size: '3K': know powers of two from 512 to 2M"),
        ({"cluster_size": "4M"}, "cluster_size"),
        ({"cluster_size": "x"}, "cluster_size"),
        ({"compat": "2"}, "compat: '2': know 1.1 and 0.10"),
        ({"refcount_bits": "3"}, "refcount_bits"),
        ({"refcount_bits": "8", "compat": "0.10"}, "refcount_bits: '8': version 2"),
        ({"lazy_refcounts": "maybe"}, "lazy_refcounts: 'maybe': know on and off"),
        ({"lazy_refcounts": "on", "compat": "0.10"}, "lazy_refcounts"),
        ({"extended_l2": "on", "cluster_size": "8K"}, "extended_l2: 'on': clusters of 8192"),
        ({"extended_l2": "on", "compat": "0.10"}, "extended_l2"),
        ({"compression_type": "lz4"}, "compression_type: 'lz4': know zlib and zstd"),
        ({"preallocation": "full"}, "preallocation: 'full': know off and metadata"),
        ({"data_file_raw": "on"}, "data_file_raw: 'on': there is no data_file"),
        ({"data_file": "../x"}, "no name in this folder"),
        ({"unknown": "1"}, "no such option"),
    ],
)
def test_refuses_to_make(folder: Path, options: dict[str, str], complaint: str) -> None:
    with pytest.raises(VirtmountError, match=complaint):
        make(folder / "a.qcow2", **options)
    assert not list(folder.iterdir())


def test_refuses_to_make_what_is_too_large(folder: Path) -> None:
    with pytest.raises(Unsupported, match=r"size: .* larger ones are needed"):
        make(folder / "a.qcow2", 1 << 50, cluster_size="512")
    with pytest.raises(Unsupported, match=r"preallocation: .* larger clusters help"):
        make(folder / "a.qcow2", 4 << 40, preallocation="metadata")
    base = folder / "base.raw"
    base.write_bytes(bytes(512))
    with pytest.raises(Unsupported, match=r"preallocation: .* hides the parent"):
        make(folder / "a.qcow2", SIZE, base, preallocation="metadata")
    with pytest.raises(Unsupported, match=r"data_file_raw: .* no parent"):
        make(folder / "a.qcow2", SIZE, base, data_file="d", data_file_raw="on")
    make(folder / "a.qcow2", 64 << 40)
    check(folder / "a.qcow2")


@pytest.mark.parametrize("order", range(7))
def test_counts_are_packed(order: int) -> None:
    most = (1 << (1 << order)) - 1
    counts = [min(n, most) for n in (1, 0, 3, 1, 200, 0, 0, 1, 70000, 1, 2)]
    raw = packed_counts(array("Q", counts), order)
    width = 1 << order
    if width < 8:
        found = [raw[i * width // 8] >> i * width % 8 & most for i in range(len(counts))]
    else:
        step = width // 8
        found = [int.from_bytes(raw[i * step : (i + 1) * step], "big") for i in range(len(counts))]
    assert found == counts


# Compressed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression_type": "zstd"},
        {"cluster_size": "512"},
        {"cluster_size": "4k", "refcount_bits": "1"},
        {"cluster_size": "4k", "refcount_bits": "2"},
        {"cluster_size": "2M", "compression_type": "zstd"},
        {"extended_l2": "on"},
        {"compat": "0.10"},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
def test_a_compressed_image(folder: Path, options: dict[str, str]) -> None:
    rng = random.Random(2)
    content = bytearray(6 * MIB + 512)
    for _ in range(60):
        at = rng.randrange(len(content) // 512) * 512
        length = rng.choice((512, 4096, 100 * KIB, 65536))
        data = rng.choice((rng.randbytes(length), bytes([rng.randrange(256)]) * length))
        content[at : at + length] = data[: len(content) - at]
    content[-512:] = b"z" * 512
    (folder / "source.raw").write_bytes(content)
    path = folder / "a.qcow2"
    virtmount.convert(
        folder / "source.raw", path, source_format="raw", settings=options, compress=True
    )
    check(path)
    assert raw_of(path) == content == content_of(path)
    with HostFile(path) as file:
        kinds = {extent.kind for extent in extents(QCOW2(file), 0, len(content))}
    assert Kind.COMPRESSED in kinds
    assert Kind.DATA in kinds or options.get("cluster_size") == "2M", (
        "random bytes stay as they are"
    )
    assert path.stat().st_blocks * 512 < len(content)
    # Rewriting gives clusters back that several share.
    with opened(path, writable=True) as disk:
        for at in range(0, len(content) - 512, 300 * KIB):
            disk.pwrite(at, b"w" * 512)
            content[at : at + 512] = b"w" * 512
        disk.discard(MIB, MIB * 2)
        first = -(-MIB // disk.top.cluster_size) * disk.top.cluster_size
        last = 3 * MIB // disk.top.cluster_size * disk.top.cluster_size
        content[first:last] = bytes(max(0, last - first))
    check(path)
    assert raw_of(path) == content


def test_refuses_to_compress(folder: Path) -> None:
    (folder / "source.raw").write_bytes(b"x" * MIB)
    for options in ({"data_file": "d"}, {"preallocation": "metadata"}):
        with pytest.raises(Unsupported, match=next(iter(options))):
            virtmount.convert(
                "source.raw", "a.qcow2", source_format="raw", settings=options, compress=True
            )


# Size


def read_snapshot(path: Path, name: str) -> bytes:
    with HostFile(path) as file, Reference([QCOW2(file, Options(snapshot=name))]) as disk:
        return disk.pread(0, disk.size)


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=4k,compat=0.10",
        "extended_l2=on,cluster_size=16k",
        "data_file=data",
        "data_file=data,data_file_raw=on",
        "cluster_size=4k,refcount_bits=64",
    ],
)
def test_grow_and_shrink(folder: Path, options: str) -> None:
    """Small clusters: L1 moves, more than once."""
    size = MIB + 512
    path = folder / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    qemu_io(path, "write -q -P 1 0 1M", f"write -q -P 2 {MIB} 512")
    content = b"\1" * MIB + b"\2" * 512
    for new in (size + 512, 3 * MIB, 20 * MIB, 70 * MIB + 1024):
        virtmount.resize(path, new, "qcow2")
        content = content.ljust(new, b"\0")
        check(path)
        assert info(path)["virtual-size"] == new
        assert raw_of(path) == content
        with opened(path, writable=True) as disk:
            disk.pwrite(new - 512, b"e" * 512)
        content = content[:-512] + b"e" * 512
    for new in (20 * MIB, 512 * 1025, 512):
        virtmount.resize(path, new, "qcow2", shrink=True)
        content = content[:new]
        check(path)
        assert raw_of(path) == content == content_of(path)
    virtmount.resize(path, 2 * MIB, "qcow2")
    check(path)
    assert raw_of(path) == content.ljust(2 * MIB, b"\0")
    if "raw=on" in options:
        assert (folder / "data").read_bytes() == content.ljust(2 * MIB, b"\0")


@pytest.mark.parametrize("kind", ["data", "shared", "compressed", "zero", "absent", "extended"])
def test_the_rest_of_the_last_cluster_reads_as_zeros(folder: Path, kind: str) -> None:
    """Whatever a writer left behind the end of the disk."""
    path = folder / "a.qcow2"
    options = "extended_l2=on" if kind == "extended" else "cluster_size=64k"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(MIB))
    if kind == "compressed":
        qemu_io(path, "write -q -c -P 7 960k 64k")
    elif kind == "zero":
        qemu_io(path, "write -q -P 7 960k 64k", "write -q -z 960k 64k")
    elif kind != "absent":
        qemu_io(path, "write -q -P 7 960k 64k")
    patch(path, 24, u64(MIB - 512))  # the end of the disk
    if kind == "shared":
        run("qemu-img", "snapshot", "-c", "one", path)
    before = raw_of(path)
    virtmount.resize(path, 2 * MIB, "qcow2")
    check(path)
    assert raw_of(path) == before.ljust(2 * MIB, b"\0") == content_of(path)


def test_what_lies_behind_the_end_does_not_show(folder: Path) -> None:
    path = folder / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(2 * MIB))
    qemu_io(path, "write -q -P 7 0 2M")
    patch(path, 24, u64(MIB))
    virtmount.resize(path, 3 * MIB, "qcow2")
    check(path)
    assert raw_of(path) == b"\7" * MIB + bytes(2 * MIB)


def test_growing_with_snapshots_and_bitmaps(folder: Path) -> None:
    path = folder / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, str(MIB))
    qemu_io(path, "write -q -P 7 0 1M")
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-img", "bitmap", "--add", path, "on")
    run("qemu-img", "bitmap", "--add", "--disable", path, "off")
    virtmount.resize(path, 8 * MIB, "qcow2")
    check(path)
    with HostFile(path) as file:
        (snapshot,) = QCOW2(file).snapshots()
        assert snapshot.size == MIB
    assert read_snapshot(path, "one") == b"\7" * MIB
    flags = [b["flags"] for b in info(path)["format-specific"]["data"]["bitmaps"]]
    assert flags == [["in-use", "auto"], ["in-use"]]
    virtmount.resize(path, 512, "qcow2", shrink=True)
    check(path)
    assert read_snapshot(path, "one") == b"\7" * MIB
    # qemu shows a snapshot in the present size of the disk.
    for name in ("on", "off"):
        run("qemu-img", "bitmap", "--remove", path, name)
    run("qemu-img", "snapshot", "-a", "one", path)
    check(path)
    assert raw_of(path) == b"\7" * MIB


PASSPHRASE = Options(passphrase=lambda: luks_images.SECRET.encode())


def test_growing_an_encrypted_image(folder: Path) -> None:
    path = luks_images.create(folder / "a.qcow2", MIB)
    luks_images.qemu_io(path, "write -q -P 7 0 1M")
    virtmount.resize(path, 2 * MIB, "qcow2", options=PASSPHRASE)
    luks_images.check(path)
    luks_images.qemu_io(path, "read -q -P 7 0 1M", "read -q -P 0 1M 1M")
    patch(path, 24, u64(MIB - 512))
    with pytest.raises(Unsupported, match="inside of an encrypted cluster"):
        virtmount.resize(path, 2 * MIB, "qcow2", options=PASSPHRASE)


def test_an_encrypted_data_file(folder: Path) -> None:
    """It is no raw image, whatever the header says: its zeros are not the guest's."""
    path = folder / "a.qcow2"
    (folder / "d").write_bytes(bytes(MIB))
    # Made somewhere else, where the data file stays.
    luks_images.create(path, MIB, "data_file=d,data_file_raw=on,preallocation=metadata")
    luks_images.qemu_io(path, "write -q -P 7 0 1M")
    with virtmount.open(path, "qcow2", writable=True, options=PASSPHRASE) as disk:
        assert disk.pread(0, MIB) == b"\7" * MIB
        disk.discard(256 * KIB, 256 * KIB)
        disk.write_zeroes(600 * KIB, 100 * KIB)
        disk.pwrite(300 * KIB, b"\1" * 512)
        expected = bytearray(b"\7" * MIB)
        expected[256 * KIB : 512 * KIB] = bytes(256 * KIB)
        expected[600 * KIB : 700 * KIB] = bytes(100 * KIB)
        expected[300 * KIB : 300 * KIB + 512] = b"\1" * 512
        assert disk.pread(0, MIB) == expected
    virtmount.resize(path, 2 * MIB, "qcow2", options=PASSPHRASE)
    with virtmount.open(path, "qcow2", options=PASSPHRASE) as disk:
        assert disk.pread(0, 2 * MIB) == expected + bytes(MIB)
    luks_images.check(path)
    luks_images.qemu_io(
        path,
        "read -q -P 7 0 256k",
        f"read -q -P 1 {300 * KIB} 512",
        "read -q -P 0 320k 192k",
        "read -q -P 0 600k 100k",
        "read -q -P 0 1M 1M",
    )


def test_refuses_to_resize(folder: Path) -> None:
    path = folder / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, str(MIB))
    run("qemu-img", "snapshot", "-c", "one", path)
    with pytest.raises(Unsupported, match="larger L1 table than any"):
        virtmount.resize(path, 1 << 50, "qcow2")
    patch(path, number(path, 64) + 36, u32(8))  # extra data without the disk's size
    before = path.read_bytes()
    with (
        HostFile(path, writable=True) as file,
        pytest.raises(Unsupported, match="does not say how"),
    ):
        QCOW2(file).resize(2 * MIB)
    assert path.read_bytes() == before


def cuts(plan: Plan, rng: random.Random) -> list[list[Any]]:
    """Prefixes of the plan by barriers, each with some of the steps that follow."""
    epochs: list[list[Any]] = [[]]
    for step in plan:
        if step is Barrier:
            epochs.append([])
        else:
            epochs[-1].append(step)
    found = []
    for i, epoch in enumerate(epochs):
        before = list(itertools.chain(*epochs[:i]))
        for _ in range(2):
            found.append(before + [step for step in epoch if rng.random() < 0.5])
        found.append(before)
    return found


@pytest.mark.parametrize("new", [16 * MIB, 512 * 1000])
@pytest.mark.parametrize(
    "options", ["cluster_size=512", "cluster_size=4k", "cluster_size=512,refcount_bits=64"]
)
def test_a_cut_resize_leaves_the_old_disk_or_the_new_one(
    folder: Path, options: str, new: int
) -> None:
    path = folder / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(MIB))
    qemu_io(path, "write -q -P 7 0 100k", "write -q -P 9 900k 124k")
    before, content = path.read_bytes(), raw_of(path)
    with HostFile(path, writable=True) as file:
        plan = QCOW2(file).resize(new)
    for steps in cuts(plan, random.Random(5)):
        path.write_bytes(before)
        with HostFile(path, writable=True) as file:
            execute(Plan(*steps), [file])
        run("qemu-img", "check", "-q", path, allowed=(0, 3))
        size = info(path)["virtual-size"]
        assert size in (MIB, new)
        found = raw_of(path)
        kept = min(size, new, MIB)
        assert found[:kept] == content[:kept]
        assert not found[MIB:].strip(b"\0")
        # Going on does no harm.
        with opened(path, writable=True) as disk:
            disk.pwrite(0, b"x" * 4096)
        run("qemu-img", "check", "-q", path, allowed=(0, 3))


# Parent


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512", "compat=0.10"])
def test_another_parent(folder: Path, options: str) -> None:
    first, second = folder / "first.raw", folder / ("a-much-longer-name" * 5 + ".qcow2")
    first.write_bytes(b"\1" * MIB)
    run("qemu-img", "create", "-q", "-f", "qcow2", second, str(MIB))
    qemu_io(second, "write -q -P 2 0 1M")
    path = folder / "a.qcow2"
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        options,
        "-F",
        "raw",
        "-b",
        "first.raw",
        path,
    )
    virtmount.rebase(path, second, new_format="qcow2", unsafe=True)
    found = info(path)
    assert (found["backing-filename"], found["backing-filename-format"]) == (second.name, "qcow2")
    assert raw_of(path) == b"\2" * MIB
    check(path)
    virtmount.rebase(path, first, new_format="raw")
    assert raw_of(path) == b"\2" * MIB, "what differs was copied"
    virtmount.rebase(path, None)
    assert "backing-filename" not in info(path)
    assert raw_of(path) == b"\2" * MIB
    check(path)
    virtmount.rebase(path, first, new_format="raw", unsafe=True)
    assert info(path)["backing-filename"] == "first.raw"
    check(path)


def test_a_cut_rebase_names_the_old_parent_or_the_new_one(folder: Path) -> None:
    names = [folder / ("x" * length + ".raw") for length in (3, 240)]
    for name in names:
        name.write_bytes(bytes(MIB))
    path = folder / "a.qcow2"
    for old, new in (names, names[::-1]):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", old.name, path)
        before = path.read_bytes()
        for target in (new, None):
            path.write_bytes(before)
            with HostFile(path, writable=True) as file, HostFile(new) as parent:
                image = QCOW2(file)
                plan = image.rebase(Raw(parent) if target else None, new.name if target else "")
            allowed = {old.name, target.name if target else None}
            for steps in cuts(plan, random.Random(3)):
                path.write_bytes(before)
                with HostFile(path, writable=True) as file:
                    execute(Plan(*steps), [file])
                found = info(path)
                assert found.get("backing-filename") in allowed
                assert found.get("backing-filename-format") in ("raw", None)


def test_refuses_what_cannot_be_switched_safely(folder: Path) -> None:
    """Both names do not fit into 1 KiB: one would be lost before the other is there."""
    path = folder / "a.qcow2"
    (folder / "b.raw").write_bytes(bytes(MIB))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=1k", path, "1M")
    with HostFile(path, writable=True) as file, HostFile(folder / "b.raw") as base:
        image = QCOW2(file)
        execute(image.rebase(Raw(base), "x" * 500), [file])
    with HostFile(path, writable=True) as file, HostFile(folder / "b.raw") as base:
        with pytest.raises(Unsupported, match="no room to write another parent's name"):
            QCOW2(file).rebase(Raw(base), "y" * 600)
    assert info(path)["backing-filename"] == "x" * 500


def test_unknown_extensions_are_kept(folder: Path) -> None:
    path = folder / "a.qcow2"
    (folder / "b.raw").write_bytes(bytes(MIB))
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    patch(path, 112, u32(0x12345678) + u32(5) + b"keep!\0\0\0" + bytes(400))
    virtmount.rebase(path, folder / "b.raw", new_format="raw", unsafe=True)
    with HostFile(path) as file:
        extensions = QCOW2(file)._header.extensions
    assert extensions == {0xE2792ACA: b"raw", 0x12345678: b"keep!"}


def test_nothing_but_the_header_is_written_for_another_parent(folder: Path) -> None:
    base = folder / "b.raw"
    base.write_bytes(bytes(MIB))
    path = folder / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    with HostFile(path, writable=True) as file, HostFile(base) as parent:
        plan = QCOW2(file).rebase(Raw(parent), base.name)
    assert all(step.offset + len(step.data) <= 65536 for step in plan if isinstance(step, Write))
    assert os.stat(path).st_size == 0x31000 or l2_offset(path) == 0
