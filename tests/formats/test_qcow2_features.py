"""QCOW2: internal snapshots, extended L2 entries, external data files, bitmaps.

All images are made by qemu-img 7.2; what it and qemu-io say about ours is the other half.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

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
    scatter,
    u32,
    u64,
)
from tests.reference import Reference
from virtmount.errors import Corrupt, Denied, NotAnImage, Unsupported
from virtmount.formats.qcow2 import QCOW2
from virtmount.formats.qcow2_entries import Entries
from virtmount.hostfile import HostFile
from virtmount.image import Kind, Options, extents

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
COPIED = 1 << 63


def create(path: Path, size: int = SIZE, *options: str, parent: Path | None = None) -> Path:
    """In the image's folder: qemu takes the name of a data file from where it stands."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2"]
    for option in options:
        command += ["-o", option]
    if parent:
        command += ["-F", "raw", "-b", parent.name]
    subprocess.run([*command, path.name, str(size)], check=True, cwd=path.parent)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(path: Path, name: str) -> None:
    run("qemu-img", "snapshot", "-c", name, path)


def of_snapshot(path: Path, name: str) -> bytes:
    """As qemu reads it."""
    raw = path.with_name("snapshot.oracle")
    run("qemu-img", "convert", "-l", f"snapshot.name={name}", "-O", "raw", path, raw)
    content = raw.read_bytes()
    raw.unlink()
    return content


def read_snapshot(path: Path, name: str) -> bytes:
    with HostFile(path) as file:
        image = QCOW2(file, Options(snapshot=name))
        with Reference([image]) as disk:
            return disk.pread(0, disk.size)


def patterns(path: Path, seed: int, count: int = 12, size: int = SIZE) -> None:
    rng = random.Random(seed)
    commands = []
    for _ in range(count):
        at = rng.randrange(size // 512) * 512
        length = min(rng.choice((512, 4096, 65536, 200 * KIB)), size - at)
        commands.append(f"write -q -P {rng.randrange(1, 256)} {at} {length}")
    qemu_io(path, *commands)


# Internal snapshots


@pytest.fixture(params=["cluster_size=64k", "cluster_size=4k", "cluster_size=512"])
def states(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, dict[str, bytes]]:
    """An image with three snapshots, and what each of them holds."""
    path = create(folder / "disk.qcow2", SIZE, request.param)
    held = {}
    for seed, name in enumerate(("one", "two", "3")):
        patterns(path, seed)
        held[name] = raw_of(path)
        snapshot(path, name)
    patterns(path, 9, 4)
    return path, held


def test_each_snapshot_is_read(states: tuple[Path, dict[str, bytes]]) -> None:
    path, held = states
    for name, content in held.items():
        assert of_snapshot(path, name) == content
        assert read_snapshot(path, name) == content
    # An id goes before a name: the third is called like no other, the id 2 is that of "two".
    assert read_snapshot(path, "2") == held["two"]
    assert read_snapshot(path, "3") == held["3"]
    with HostFile(path) as file:
        found = QCOW2(file).snapshots()
    assert [(entry.id, entry.name, entry.size) for entry in found] == [
        ("1", "one", SIZE),
        ("2", "two", SIZE),
        ("3", "3", SIZE),
    ]
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    assert [int(entry.date) for entry in found] == [s["date-sec"] for s in info["snapshots"]]


def test_writing_leaves_snapshots_alone(states: tuple[Path, dict[str, bytes]]) -> None:
    path, held = states
    content = bytearray(raw_of(path))
    rng = random.Random(4)
    with opened(path, writable=True) as disk:
        for i in range(40):
            at = rng.randrange(SIZE // 512) * 512
            length = min(rng.choice((512, 3000, 65536, 100 * KIB)), SIZE - at)
            data = rng.randbytes(length)
            if i % 7 == 5:
                disk.write_zeroes(at, length)
                data = bytes(length)
            else:
                disk.pwrite(at, data)
            content[at : at + length] = data
            if i % 9 == 0:
                disk.flush()
    check(path)
    assert raw_of(path) == content
    for name, old in held.items():
        assert of_snapshot(path, name) == old
        assert read_snapshot(path, name) == old
    # All that the snapshots alone hold is given back when they go.
    for name in held:
        run("qemu-img", "snapshot", "-d", name, path)
    check(path)
    assert raw_of(path) == content


def test_discarding_everything_leaves_snapshots_alone(
    states: tuple[Path, dict[str, bytes]],
) -> None:
    path, held = states
    with opened(path, writable=True) as disk:
        disk.discard(0, SIZE)
        assert disk.pread(0, SIZE) == bytes(SIZE)
    check(path)
    for name, old in held.items():
        assert of_snapshot(path, name) == old


def test_a_copied_flag_that_lies_is_not_believed(folder: Path) -> None:
    """qemu would write in place what two states hold; the count is 2."""
    path = create(folder / "disk.qcow2", SIZE, "cluster_size=4k")
    qemu_io(path, "write -q -P 1 0 64k")
    snapshot(path, "one")
    patch(path, number(path, 40), u64(number(path, number(path, 40)) | COPIED))
    table = l2_offset(path)
    patch(path, table, u64(number(path, table) | COPIED))
    with opened(path, writable=True) as disk:
        disk.pwrite(0, b"x" * 512)
        disk.pwrite(4096, b"y" * 512)
    assert read_snapshot(path, "one") == b"\1" * (64 * KIB) + bytes(SIZE - 64 * KIB)
    with opened(path) as disk:
        assert disk.pread(0, 8192) == (b"x" * 512 + b"\1" * 3584) + (b"y" * 512 + b"\1" * 3584)


def test_a_snapshot_of_another_size(folder: Path) -> None:
    path = create(folder / "disk.qcow2", MIB)
    qemu_io(path, "write -q -P 7 0 1M")
    snapshot(path, "small")
    run("qemu-img", "resize", "-q", path, "3M")
    qemu_io(path, "write -q -P 8 1M 2M")
    with HostFile(path) as file:
        image = QCOW2(file, Options(snapshot="small"))
        assert image.size == MIB
        assert image.variant == "version 3, snapshot small"
        assert image.snapshots()[0].size == MIB
    assert read_snapshot(path, "small") == b"\7" * MIB


def test_a_snapshot_over_a_parent(folder: Path) -> None:
    base = folder / "base.raw"
    base.write_bytes(b"\x55" * SIZE)
    path = create(folder / "disk.qcow2", SIZE, parent=base)
    qemu_io(path, "write -q -P 1 64k 64k")
    snapshot(path, "one")
    with opened(path, writable=True, parent=base) as disk:
        disk.pwrite(65 * KIB, b"x" * 512)
        disk.discard(SIZE // 2, SIZE // 2)
    check(path)
    assert of_snapshot(path, "one")[64 * KIB : 128 * KIB] == b"\1" * (64 * KIB)
    assert of_snapshot(path, "one")[SIZE // 2 :] == b"\x55" * (SIZE // 2)
    assert raw_of(path)[SIZE // 2 :] == bytes(SIZE // 2)


def test_compressed_clusters_in_a_snapshot(folder: Path) -> None:
    path = create(folder / "disk.qcow2", SIZE)
    qemu_io(path, *[f"write -q -c -P {i + 1} {i * 64}k 64k" for i in range(8)])
    snapshot(path, "one")
    old = raw_of(path)
    with opened(path, writable=True) as disk:
        disk.pwrite(3 * 65536 + 512, b"x" * 512)
        disk.discard(5 * 65536, 65536)
    check(path)
    assert of_snapshot(path, "one") == old == read_snapshot(path, "one")
    run("qemu-img", "snapshot", "-d", "one", path)
    check(path)


def test_refuses_what_is_no_snapshot(folder: Path) -> None:
    path = create(folder / "disk.qcow2")
    snapshot(path, "one")
    with HostFile(path) as file, pytest.raises(NotAnImage, match="no snapshot 'x', there are: 'o"):
        QCOW2(file, Options(snapshot="x"))
    with HostFile(path, writable=True) as file, pytest.raises(Unsupported, match="only read"):
        QCOW2(file, Options(snapshot="one"))
    table = number(path, 64)
    patch(path, table + 8, u32(0))
    with HostFile(path) as file, pytest.raises(Corrupt, match="L1 table of 0 entries"):
        QCOW2(file, Options(snapshot="one"))
    with HostFile(path) as file:
        QCOW2(file)


def test_hostile_tables_of_a_snapshot_do_no_harm(folder: Path) -> None:
    """Only what can be read is read; the rest is EIO, or the image is refused."""
    path = create(folder / "disk.qcow2", SIZE, "cluster_size=4k")
    qemu_io(path, "write -q -P 7 0 1M", "write -q -c -P 8 1M 4k")
    snapshot(path, "one")
    qemu_io(path, "write -q -P 9 0 2M")
    entry = number(path, 64)
    l1 = number(path, entry)
    l2 = number(path, l1) & 0x00FFFFFFFFFFFE00
    content = path.read_bytes()
    rng = random.Random(5)
    opened_well = 0
    for _ in range(150):
        place = rng.choice((entry, entry, l1, l2, l2 + 8 * 256)) + rng.randrange(40)
        data = rng.choice((rng.randbytes(8), bytes(8), b"\xff" * 8, b"\x80" + bytes(7)))
        path.write_bytes(content[:place] + data + content[place + 8 :])
        with HostFile(path) as file:
            try:
                image = QCOW2(file, Options(snapshot="one"))
                image.snapshots()
            except (Corrupt, NotAnImage):
                continue
            assert image.size <= 1 << 63
            found = Reference([image])
            for at in range(0, min(image.size, SIZE), 64 * KIB):
                try:
                    found.pread(at, min(4096, image.size - at))
                except (OSError, Corrupt):
                    continue
                opened_well += 1
    assert opened_well > 1000
    assert path.stat().st_size == len(content)


# Extended L2 entries

EXTENDED = "extended_l2=on,cluster_size=16k"


def test_subclusters_are_read_and_written(folder: Path) -> None:
    base = folder / "base.raw"
    base.write_bytes(random.Random(1).randbytes(SIZE))
    for parent in (None, base):
        path = create(folder / "disk.qcow2", SIZE, EXTENDED, parent=parent)
        scatter(path, SIZE, 16 * KIB)
        qemu_io(path, "write -q -z 1M 3k", "write -q -z 1030k 512", "discard -q 40k 1k")
        content = bytearray(raw_of(path))
        assert content_of(path, parent) == content
        rng = random.Random(3)
        with opened(path, writable=True, parent=parent) as disk:
            for i in range(60):
                at = rng.randrange(SIZE // 512) * 512
                length = min(rng.choice((512, 1024, 5000, 40 * KIB)), SIZE - at)
                data = rng.randbytes(length)
                if i % 6 == 5:
                    disk.write_zeroes(at, length)
                    data = bytes(length)
                else:
                    disk.pwrite(at, data)
                content[at : at + length] = data
        check(path)
        assert raw_of(path) == content
        assert content_of(path, parent) == content


def test_extended_entries_with_snapshots_and_compression(folder: Path) -> None:
    path = create(folder / "disk.qcow2", SIZE, EXTENDED, "compression_type=zstd")
    qemu_io(path, "write -q -c -P 3 0 16k", "write -q -P 4 33k 1k", "write -q -c -P 6 64k 16k")
    snapshot(path, "one")
    old = raw_of(path)
    assert content_of(path) == old
    with opened(path, writable=True) as disk:
        disk.pwrite(512, b"x" * 512)
        disk.pwrite(33 * KIB, b"y" * 512)
        disk.pwrite(32 * KIB, b"z" * 512)
    check(path)
    assert of_snapshot(path, "one") == old == read_snapshot(path, "one")
    assert raw_of(path) == content_of(path) != old


def test_extended_entries_say_where_the_pieces_are(folder: Path) -> None:
    path = create(folder / "disk.qcow2", SIZE, EXTENDED)
    qemu_io(path, "write -q -P 1 512 1k", "write -q -z 4k 1k")
    with HostFile(path) as file:
        image = QCOW2(file)
        assert image.grain == 512
        found = [(e.guest_offset, e.length, e.kind) for e in extents(image, 0, 16 * KIB)]
    assert found == [
        (0, 512, Kind.ABSENT),
        (512, 1024, Kind.DATA),
        (1536, 2560, Kind.ABSENT),
        (4096, 1024, Kind.ZERO),
        (5120, 11264, Kind.ABSENT),
    ]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ((COPIED | 1 << 20, 1 << 32 | 1), Kind.INVALID),  # both bits
        ((0, 1), Kind.INVALID),  # there, and nowhere
        ((COPIED | 1 << 20 | 512, 1), Kind.INVALID),  # not at a cluster
        ((COPIED | 1 << 40, 1), Kind.INVALID),  # past the end
        ((COPIED | 1 << 40, 0xFFFFFFFF << 32), Kind.ZERO),
        ((1, 0), Kind.ABSENT),  # the zero flag has no meaning here
        ((0, 0xFFFFFFFF << 32), Kind.ZERO),
        ((COPIED | 1 << 20, 0xFFFFFFFF), Kind.DATA),
        ((1 << 20, 0xFFFFFFFF), Kind.SHARED),
        ((1 << 62 | 1 << 20, 0), Kind.COMPRESSED),
    ],
)
def test_what_extended_entries_mean(words: tuple[int, int], kind: Kind) -> None:
    entries = Entries(3, 16 * KIB, extended=True)
    (extent,) = entries.pieces(3, words, alone=True, limit=1 << 30)
    assert extent.kind is kind
    assert extent.length == 16 * KIB


def test_extended_entries_need_clusters_of_16_kib(folder: Path) -> None:
    path = create(folder / "disk.qcow2", SIZE, "cluster_size=8k")
    patch(path, 72, u64(1 << 4))
    with HostFile(path) as file, pytest.raises(Corrupt, match=r"header\+20: 13 cluster bits, ext"):
        QCOW2(file)


# External data files

DATA = "data_file=disk.data"


@pytest.mark.parametrize("options", [DATA, f"{DATA},{EXTENDED}", f"{DATA},data_file_raw=on"])
def test_a_data_file_is_read_and_written(folder: Path, options: str) -> None:
    path = create(folder / "disk.qcow2", SIZE, options)
    scatter(path, SIZE, 64 * KIB)
    qemu_io(path, "write -q -z 1M 100k", "discard -q 2M 128k")
    content = bytearray(raw_of(path))
    assert content_of(path) == content
    rng = random.Random(3)
    with opened(path, writable=True) as disk:
        for i in range(60):
            at = rng.randrange(SIZE // 512) * 512
            length = min(rng.choice((512, 1024, 5000, 140 * KIB)), SIZE - at)
            data = rng.randbytes(length)
            if i % 6 == 5:
                disk.write_zeroes(at, length)
                data = bytes(length)
            else:
                disk.pwrite(at, data)
            content[at : at + length] = data
    check(path)
    assert raw_of(path) == content
    assert content_of(path) == content
    if "raw=on" in options:
        assert (folder / "disk.data").read_bytes() == content


def test_a_data_file_over_a_parent(folder: Path) -> None:
    base = folder / "base.raw"
    base.write_bytes(random.Random(1).randbytes(SIZE))
    path = create(folder / "disk.qcow2", SIZE, DATA, parent=base)
    content = bytearray(base.read_bytes())
    with opened(path, writable=True, parent=base) as disk:
        for at in (512, 70000 // 512 * 512, SIZE - 512):
            disk.pwrite(at, b"x" * 512)
            content[at : at + 512] = b"x" * 512
        disk.discard(MIB, 256 * KIB)
        content[MIB : MIB + 256 * KIB] = bytes(256 * KIB)
        disk.pwrite(MIB + 512, b"y" * 512)
        content[MIB + 512 : MIB + 1024] = b"y" * 512
    check(path)
    assert raw_of(path) == content


def test_stale_bytes_of_a_data_file_do_not_come_back(folder: Path) -> None:
    """What nobody mapped may hold anything; a new cluster lies just there."""
    path = create(folder / "disk.qcow2", SIZE, DATA)
    qemu_io(path, "write -q -P 1 0 64k")
    patch(folder / "disk.data", 64 * KIB, b"\xee" * (SIZE - 64 * KIB))
    assert content_of(path)[64 * KIB :] == bytes(SIZE - 64 * KIB)
    with opened(path, writable=True) as disk:
        disk.pwrite(MIB + 512, b"x" * 512)
    assert raw_of(path)[MIB : MIB + 64 * KIB] == bytes(512) + b"x" * 512 + bytes(63 * KIB)
    check(path)


def test_stale_subclusters_of_a_data_file_do_not_come_back(folder: Path) -> None:
    path = create(folder / "disk.qcow2", SIZE, f"{DATA},{EXTENDED}")
    qemu_io(path, "write -q -P 1 1k 512")
    patch(folder / "disk.data", 2 * KIB, b"\xee" * (100 * KIB))
    with opened(path, writable=True) as disk:
        disk.pwrite(8 * KIB, b"x" * 512)
    expected = bytes(KIB) + b"\1" * 512 + bytes(6 * KIB + 512) + b"x" * 512
    assert raw_of(path)[: 100 * KIB] == expected.ljust(100 * KIB, b"\0")


def test_a_raw_data_file_is_the_truth(folder: Path) -> None:
    """As qemu before 6.0 left it: there is data in the file, and no table says so."""
    path = create(folder / "disk.qcow2", SIZE, DATA)
    patch(path, 88, u64(2))
    content = random.Random(8).randbytes(SIZE)
    (folder / "disk.data").write_bytes(content)
    assert content_of(path) == content
    with HostFile(path) as file:
        image = QCOW2(file)
        assert (image.flat, image.flat_file) == (0, 1)
        image.files[1].close()
    with opened(path, writable=True) as disk:
        disk.pwrite(512, b"x" * 512)
    check(path)
    assert number(path, 88) == 2
    assert raw_of(path) == (folder / "disk.data").read_bytes()
    assert raw_of(path) == content[:512] + b"x" * 512 + content[1024:]


@pytest.mark.parametrize("options", [DATA, f"{DATA},data_file_raw=on"])
def test_a_data_file_that_is_too_short(folder: Path, options: str) -> None:
    path = create(folder / "disk.qcow2", SIZE, options)
    qemu_io(path, "write -q -P 1 0 1M")
    os.truncate(folder / "disk.data", 512 * KIB)
    expected = b"\1" * (512 * KIB) + bytes(SIZE - 512 * KIB)
    with opened(path) as disk:
        assert disk.top.flat is None
        assert disk.pread(0, SIZE) == expected
    with opened(path, writable=True) as disk:
        disk.pwrite(MIB - 512, b"x" * 512)
    assert (folder / "disk.data").stat().st_size == SIZE
    assert raw_of(path)[: 2 * MIB] == expected[: MIB - 512] + b"x" * 512 + bytes(MIB)


def test_an_entry_that_leads_elsewhere_in_the_data_file_is_no_data(folder: Path) -> None:
    path = create(folder / "disk.qcow2", SIZE, DATA)
    qemu_io(path, "write -q -P 1 0 256k")
    table = l2_offset(path)
    patch(path, table + 8, u64(COPIED | 3 << 16))
    patch(path, table + 16, u64(1 << 62 | 2 << 16))
    with HostFile(path, writable=True) as file:
        image = QCOW2(file)
        kinds = [extent.kind for extent in extents(image, 0, 320 * KIB)]
        with Reference([image]) as disk, pytest.raises(OSError, match="no valid host offset"):
            disk.pwrite(65536, b"x")
        image.files[1].close()
    assert kinds == [Kind.DATA, Kind.INVALID, Kind.INVALID, Kind.DATA, Kind.ABSENT]
    assert (folder / "disk.data").read_bytes()[: 256 * KIB] == b"\1" * (256 * KIB)


@pytest.mark.parametrize(
    ("name", "error", "complaint"),
    [
        (b"/etc/hostname", Denied, "lies outside of the image's folder"),
        (b"../outside.raw", Denied, "lies outside of the image's folder"),
        (b"link.raw", Denied, "lies outside of the image's folder"),
        (b"disk.qcow2", Corrupt, "itself"),
        (b"fifo", Denied, "not a regular file"),
        (b".", Denied, "not a regular file"),
        (b"nothing", NotAnImage, "not found: 'nothing'"),
        (b"nbd:localhost:1", Unsupported, "is not a local file"),
        (b"json:{}", Unsupported, "is not a local file"),
        (b"a\0b", Corrupt, "no possible file name"),
    ],
)
def test_refuses_data_files(
    folder: Path, name: bytes, error: type[Exception], complaint: str
) -> None:
    below = folder / "below"
    below.mkdir()
    (folder / "outside.raw").write_bytes(bytes(SIZE))
    os.mkfifo(below / "fifo")
    (below / "link.raw").symlink_to(folder / "outside.raw")
    path = below / "disk.qcow2"
    create(path, SIZE, "data_file=d")
    patch(path, 116, u32(len(name)) + name.ljust(256, b"\0"))
    for writable in (False, True):
        with (
            HostFile(path, writable=writable) as file,
            pytest.raises(error, match=complaint),
        ):
            QCOW2(file)


def test_a_data_file_outside_of_the_folder_on_request(folder: Path) -> None:
    (folder / "below").mkdir()
    path = create(folder / "below" / "disk.qcow2", SIZE, "data_file=../d")
    with HostFile(path) as file, pytest.raises(Denied):
        QCOW2(file)
    with HostFile(path) as file:
        image = QCOW2(file, Options(allow_outside=True))
        assert str(image.files[1]) == str(folder / "d")
        image.files[1].close()


# Bitmaps


def test_bitmaps_that_follow_all_changes_are_marked_before_the_first_write(folder: Path) -> None:
    path = create(folder / "disk.qcow2")
    run("qemu-img", "bitmap", "--add", "-g", "64k", path, "on")
    run("qemu-img", "bitmap", "--add", "--disable", path, "off")
    before = path.read_bytes()
    with HostFile(path) as file:
        assert QCOW2(file).details()["bitmaps"] == ["on", "off"]
    with opened(path, writable=True) as disk:
        disk.pread(0, SIZE)
    assert path.read_bytes() == before, "nothing was written"
    with opened(path, writable=True) as disk:
        disk.pwrite(0, b"x" * 512)
    check(path)  # their clusters are no leaks
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    flags = {b["name"]: b["flags"] for b in info["format-specific"]["data"]["bitmaps"]}
    assert flags == {"on": ["in-use", "auto"], "off": []}
    with opened(path, writable=True) as disk:
        disk.pwrite(0, b"y" * 512)
    run("qemu-img", "bitmap", "--remove", path, "on")
    check(path)


@pytest.mark.parametrize("damage", ["directory", "count", "flags", "unknown bit"])
def test_bitmaps_that_are_not_understood_are_inconsistent_after_a_write(
    folder: Path, damage: str
) -> None:
    path = create(folder / "disk.qcow2")
    run("qemu-img", "bitmap", "--add", path, "b0")
    extension = path.read_bytes().index(u32(0x23852875))
    directory = number(path, extension + 24)
    if damage == "directory":
        patch(path, extension + 24, u64(1 << 40))
    elif damage == "count":
        patch(path, extension + 8, u32(2))
    elif damage == "flags":
        patch(path, directory + 12, u32(1 << 5 | 2))
    else:
        patch(path, 88, u64(1 << 33 | 1))
    with opened(path, writable=True) as disk:
        disk.pwrite(0, b"x" * 512)
    assert number(path, 88) == (1 if damage == "unknown bit" else 0)
    assert content_of(path)[:512] == b"x" * 512
    if damage == "unknown bit":
        check(path)
