"""open, inspect and map_extents on images that qemu-img made; qemu-img is the judge."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import virtmount
from virtmount import api
from virtmount.errors import Busy, NotAnImage, Unsupported

KIB, MIB = 1 << 10, 1 << 20
FORMATS = ("raw", "qcow2", "vdi", "vhdx")


def qemu_img(*args: object) -> str:
    words = ["qemu-img", *map(str, args)]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def qemu_io(path: Path, form: str, *commands: str) -> None:
    words = ["qemu-io", "-f", form, *(part for c in commands for part in ("-c", c)), str(path)]
    subprocess.run(words, check=True, capture_output=True)


def make(path: Path, form: str, size: int, *options: object) -> Path:
    qemu_img("create", "-q", "-f", form, *options, path, size)
    return path


def content(path: Path, form: str) -> bytes:
    raw = path.with_suffix(".converted")
    qemu_img("convert", "-f", form, "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_any_offset_and_length(tmp_path: Path, form: str) -> None:
    size = 6 * MIB + 512
    path = make(tmp_path / f"disk.{form}", form, size)
    rng = random.Random(form)
    model = bytearray(size)
    with api.open(path, form, writable=True) as disk:
        assert disk.size == size
        for _ in range(300):
            start = rng.randrange(size)
            length = min(rng.choice([1, 100, 511, 512, 513, 4096, 70001]), size - start)
            match rng.choice("wwwrrzdf"):
                case "w":
                    data = rng.randbytes(length)
                    assert disk.pwrite(start, data) == length
                    model[start : start + length] = data
                case "r":
                    assert disk.pread(start, length) == model[start : start + length]
                case "z":
                    length = min(length * 20, size - start)
                    disk.write_zeroes(start, length)
                    model[start : start + length] = bytes(length)
                case "d":
                    length = min(length * 20, size - start)
                    disk.discard(start, length)
                    now = disk.pread(start, length)
                    kept = model[start : start + length]
                    assert all(new in (0, old) for new, old in zip(now, kept, strict=True))
                    model[start : start + length] = now
                case "f":
                    disk.flush()
        assert disk.pread(0, size) == model
    with api.open(path) as disk:
        assert disk.image.name == form
        assert disk.pread(0, size) == model
    assert content(path, form) == model


def test_what_qemu_wrote_is_read_and_what_we_wrote_qemu_reads(tmp_path: Path) -> None:
    """The guest of a child sees its parent through ours; the parent is not touched."""
    base = make(tmp_path / "base.vdi", "vdi", 4 * MIB)
    qemu_io(base, "vdi", "write -P 1 3M 64k", "write -P 2 1M 64k")
    child = make(tmp_path / "child.qcow2", "qcow2", 4 * MIB, "-b", "base.vdi", "-F", "vdi")
    qemu_io(child, "qcow2", "write -P 3 1M 512")
    before = base.read_bytes()
    with virtmount.open(child, writable=True) as disk:
        assert disk.pread(MIB, 1024) == b"\3" * 512 + b"\2" * 512
        assert disk.pread(3 * MIB, 1) == b"\1"
        disk.pwrite(3 * MIB + 5, b"ours")
    assert base.read_bytes() == before
    qemu_img("check", "-f", "qcow2", child)
    expected = content(child, "qcow2")
    assert expected[3 * MIB : 3 * MIB + 10] == b"\1" * 5 + b"ours" + b"\1"


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(range(256)) * 256)
    with api.open(path, "raw", writable=True) as opened:
        yield opened


def test_reads_end_at_the_disks_end(disk: api.OpenDisk) -> None:
    assert disk.size == 64 * KIB
    assert disk.pread(64 * KIB - 10, 100) == bytes(range(246, 256))
    assert disk.pread(64 * KIB, 100) == b""
    assert disk.pread(1 << 70, 100) == b""
    assert disk.pread(5, 0) == b""


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, -5)])
def test_negative_numbers_are_refused(disk: api.OpenDisk, offset: int, length: int) -> None:
    for call in (disk.pread, disk.discard, disk.write_zeroes):
        with pytest.raises(ValueError, match=str(offset)):
            call(offset, length)


def test_writes_past_the_end_write_nothing(disk: api.OpenDisk) -> None:
    for call in (
        lambda: disk.pwrite(64 * KIB - 1, b"xy"),
        lambda: disk.pwrite(1 << 70, b"x"),
        lambda: disk.discard(0, 1 << 20),
        lambda: disk.write_zeroes(64 * KIB, 1),
    ):
        with pytest.raises(OSError, match="the disk has 65536") as caught:
            call()
        assert caught.value.errno == errno.ENOSPC
    assert disk.pread(64 * KIB - 1, 1) == b"\xff"
    assert disk.pwrite(64 * KIB, b"") == 0


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 512), (0, 10), (500, 24), (100, 1), (0, 64 * KIB), (65000, 536)]
)
def test_reads_into_a_buffer(disk: api.OpenDisk, offset: int, length: int) -> None:
    buffer = bytearray(length + 4)
    assert disk.pread_into(offset, memoryview(buffer)[2:-2]) == length
    assert buffer == bytes(2) + disk.pread(offset, length) + bytes(2)
    assert disk.pread_into(64 * KIB - 1, bytearray(600)) == 1


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_writes_anything_with_bytes(disk: api.OpenDisk, kind: Callable[[bytes], Any]) -> None:
    for offset, length in ((0, 512), (3, 5), (510, 4), (1, 1024)):
        data = os.urandom(length)
        disk.pwrite(offset, kind(data))
        assert disk.pread(offset, length) == data


def test_small_writes_to_one_sector_do_not_undo_each_other(disk: api.OpenDisk) -> None:
    def write(number: int) -> None:
        for _ in range(4):
            for at in range(number, 2048, 8):
                disk.pwrite(at, bytes([number]))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert disk.pread(0, 2048) == bytes(range(8)) * 256


def test_a_closed_disk_refuses_calls_and_closing_again_does_nothing(disk: api.OpenDisk) -> None:
    disk.close()
    disk.close()
    for call in (disk.flush, disk.stats, lambda: disk.pread(0, 1), lambda: disk.pwrite(0, b"x")):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_close_waits_for_calls_under_way(disk: api.OpenDisk) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []

    def hammer() -> None:
        try:
            while not stop.is_set():
                disk.pread(0, 64 * KIB)
        except ValueError:
            pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    while disk.stats()["reads"] < 50:
        os.sched_yield()
    disk.close()
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []


def test_reading_is_the_default(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", "qcow2", MIB)
    before = path.read_bytes()
    with api.open(path) as disk:
        assert not disk.writable
        for call in (lambda: disk.pwrite(0, b"x"), lambda: disk.discard(0, MIB)):
            with pytest.raises(OSError, match="Read-only") as caught:
                call()
            assert caught.value.errno == errno.EROFS
        disk.flush()
    assert path.read_bytes() == before


def test_an_image_in_use_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", "qcow2", MIB)
    with api.open(path, writable=True):
        with pytest.raises(Busy):
            api.open(path)
        with pytest.raises(subprocess.CalledProcessError):
            qemu_io(path, "qcow2", "read 0 512")
    with api.open(path), api.open(path):
        pass


@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough"])
def test_cache_modes(tmp_path: Path, cache: str) -> None:
    path = make(tmp_path / "disk.qcow2", "qcow2", MIB)
    with api.open(path, writable=True, cache=cache) as disk:
        disk.pwrite(4096, b"x" * 4096)
        disk.pwrite(100, b"y")
        assert disk.pread(4095, 2) == b"\0x"
        assert disk.stats()["dirty"] == (0 if cache == "writethrough" else disk.stats()["dirty"])
    assert content(path, "qcow2")[100:101] == b"y"


def test_what_cannot_be_opened_stays_unlocked(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", "qcow2", MIB)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="cache mode 'fast'"):
        api.open(path, writable=True, cache="fast")
    with pytest.raises(Unsupported, match="'pdf'"):
        api.open(path, "pdf")
    (tmp_path / "empty").touch()
    with pytest.raises(NotAnImage):
        api.open(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        api.open(tmp_path / "missing")
    assert set(os.listdir("/proc/self/fd")) == before
    api.open(path, writable=True).close()


# map_extents


def from_qemu(path: Path, form: str) -> list[dict[str, Any]]:
    return json.loads(qemu_img("map", "--output=json", "-f", form, path))  # type: ignore[no-any-return]


def from_us(path: Path, form: str) -> list[dict[str, Any]]:
    extents = [extent.to_dict() for extent in api.map_extents(path, form)]
    for extent in extents:
        del extent["compressed"]  # qemu-img 7.2 does not say it
    return extents


def make_chain(folder: Path) -> Path:
    raw = make(folder / "b.raw", "raw", 4 * MIB)
    qemu_io(raw, "raw", "write -P 1 1M 128k", "write -P 1 0 4k")
    middle = make(folder / "m.qcow2", "qcow2", 3 * MIB, "-b", "b.raw", "-F", "raw")
    qemu_io(middle, "qcow2", "write -P 2 64k 64k", "write -z 1M 64k")
    top = make(folder / "t.qcow2", "qcow2", 5 * MIB, "-b", "m.qcow2", "-F", "qcow2")
    qemu_io(top, "qcow2", "write -P 3 192k 64k", "write -P 3 128k 64k", "write -z 2M 64k")
    return top


def test_map_says_what_qemu_img_says_of_a_chain(tmp_path: Path) -> None:
    top = make_chain(tmp_path)
    for name, form in (("b.raw", "raw"), ("m.qcow2", "qcow2"), ("t.qcow2", "qcow2")):
        ours = from_us(top.with_name(name), form)
        assert ours == from_qemu(top.with_name(name), form)
        assert len(ours) > 3


@pytest.mark.parametrize("options", [(), ("-o", "cluster_size=512"), ("-o", "cluster_size=2M")])
def test_map_says_what_qemu_img_says_of_shuffled_qcow2(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    path = make(tmp_path / "disk.qcow2", "qcow2", 40 * MIB, *options)
    rng = random.Random(5)
    starts = rng.sample(range(0, 40 * 1024, 64), 40)
    qemu_io(path, "qcow2", *(f"write -P 7 {start}k 64k" for start in starts))
    assert from_us(path, "qcow2") == from_qemu(path, "qcow2")


@pytest.mark.parametrize(("form", "expected"), [("vdi", 5 * MIB), ("vhdx", 24 * MIB)])
def test_map_of_formats_where_qemu_img_says_less(tmp_path: Path, form: str, expected: int) -> None:
    """What is data, and where it lies: the bytes there are those of the disk."""
    path = make(tmp_path / f"disk.{form}", form, 64 * MIB)
    qemu_io(path, form, "write -P 7 40M 64k", "write -P 8 1M 64k", "write -P 9 20M 3M")
    ours = from_us(path, form)
    assert sum(extent["length"] for extent in ours if extent["data"]) == expected
    disk, file = content(path, form), path.read_bytes()
    for extent in ours:
        start, length = extent["start"], extent["length"]
        if extent["data"]:
            host = extent["offset"]
            assert file[host : host + length] == disk[start : start + length]
        else:
            assert not any(disk[start : start + length])


def test_map_of_compressed_clusters(tmp_path: Path) -> None:
    raw = make(tmp_path / "b.raw", "raw", 4 * MIB)
    qemu_io(raw, "raw", "write -P 1 1M 128k")
    path = tmp_path / "c.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", raw, path)
    assert from_us(path, "qcow2") == from_qemu(path, "qcow2")
    extents = list(api.map_extents(path))
    assert [extent.compressed for extent in extents] == [False, True, False]


def test_a_map_that_is_left_early_unlocks_the_image(tmp_path: Path) -> None:
    top = make_chain(tmp_path)
    extents = api.map_extents(top)
    next(iter(extents))
    with pytest.raises(Busy):
        api.open(top, writable=True)
    extents.close()  # type: ignore[attr-defined]
    api.open(top, writable=True).close()


# inspect


def test_inspect_describes_a_chain(tmp_path: Path) -> None:
    top = make_chain(tmp_path)
    found = api.inspect(top)
    assert (found.format, found.size, found.cluster_size) == ("qcow2", 5 * MIB, 64 * KIB)
    assert [(parent.format, parent.size) for parent in found.parents] == [
        ("qcow2", 3 * MIB),
        ("raw", 4 * MIB),
    ]
    assert found.file_size == top.stat().st_size
    assert found.allocated == top.stat().st_blocks * 512
    assert found.state == "idle"
    again = json.loads(json.dumps(found.to_dict()))
    assert again["parents"][0]["path"] == str(tmp_path / "m.qcow2")
    assert again["format"] == "qcow2"


@pytest.mark.parametrize("form", FORMATS)
def test_inspect_gives_plain_values(tmp_path: Path, form: str) -> None:
    path = make(tmp_path / f"disk.{form}", form, 5 * MIB)
    values = api.inspect(path, form).to_dict()
    assert json.loads(json.dumps(values))["size"] == 5 * MIB


def test_inspect_goes_on_without_the_parents(tmp_path: Path) -> None:
    top = make_chain(tmp_path)
    (tmp_path / "b.raw").unlink()
    parents = api.inspect(top).parents
    assert [parent.path for parent in parents] == [str(tmp_path / "m.qcow2"), "b.raw"]
    assert parents[0].problem is None
    assert "not found" in str(parents[1].problem)
    assert parents[1].format == "raw"


def test_inspect_neither_minds_nor_disturbs_a_writer(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", "qcow2", MIB)
    with api.open(path, writable=True):
        assert api.inspect(path).state == "in use"
    with api.open(path):
        assert api.inspect(path).state == "idle"


def test_the_package_offers_it_by_name() -> None:
    assert virtmount.open is api.open
    assert virtmount.inspect is api.inspect
    assert virtmount.map_extents is api.map_extents
    with pytest.raises(AttributeError):
        _ = virtmount.nothing
