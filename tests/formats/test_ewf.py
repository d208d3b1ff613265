"""EWF: what libewf's ewfacquire writes, and what ewfexport reads."""

from __future__ import annotations

import hashlib
import random
import subprocess
import zlib
from pathlib import Path

import pytest

import virtmount
from tests.formats import make_ewf
from tests.formats.test_dmg import disk
from tests.reference import Reference
from virtmount.errors import Corrupt, Denied, NotAnImage, Unsupported
from virtmount.formats.ewf import EWF, segment_name
from virtmount.hostfile import HostFile

KIB, MIB = 1 << 10, 1 << 20
FORMATS = (
    *("ewf", "smart", "ftk", "encase2", "encase3", "encase4", "encase5", "encase6"),
    *("encase7", "linen5", "linen6", "linen7", "ewfx"),
)


def acquire(path: Path, content: bytes, format: str, *options: str) -> Path:
    """What ewfacquire makes of a disk; the first segment."""
    source = path.with_suffix(".raw")
    source.write_bytes(content)
    command = ["ewfacquire", "-q", "-u", "-t", path, "-f", format, *options, source]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    (found,) = path.parent.glob(f"{path.name}.[EesL]01")
    return found


def export(path: Path, out: Path) -> bytes:
    command = ["ewfexport", "-q", "-u", "-f", "raw", "-t", out, path]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return out.with_name(f"{out.name}.raw").read_bytes()


def read(path: Path) -> bytes:
    with virtmount.open(path) as opened:
        return opened.pread(0, opened.size)


@pytest.mark.parametrize("format", FORMATS)
def test_what_ewfacquire_writes(format: str, tmp_path: Path) -> None:
    """What is not packed in four segments; the last chunk cut short."""
    content = bytes(disk(3, 6661))
    for options in (("-c", "none"), ("-c", "fast", "-b", "128")):
        folder = tmp_path / options[1]
        folder.mkdir()
        path = acquire(folder / "disk", content, format, *options, "-S", str(MIB))
        assert read(path) == content
        details = virtmount.inspect(path).details
        assert details["segments"] > 1 or "none" not in options
        assert details["md5"] == hashlib.md5(content).hexdigest()


def test_version_2_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.Ex01"
    path.write_bytes(b"EVF2\x0d\x0a\x81\x00".ljust(4096, b"\0"))
    with pytest.raises(Unsupported, match=r"EWF \(Ex01\)"):
        virtmount.open(path)


@pytest.mark.parametrize("sector", [512, 4096])
def test_sectors(sector: int, tmp_path: Path) -> None:
    content = bytes(disk(4, 4096))
    path = acquire(tmp_path / "disk", content, "encase6", "-P", str(sector))
    with virtmount.open(path) as opened:
        assert opened.pread(0, opened.size) == content
    assert virtmount.inspect(path).sector_size == sector


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize(("chunk_sectors", "segments"), [(8, 1), (64, 3), (100, 2), (1, 2)])
def test_what_we_write_for_tests_is_right(
    chunk_sectors: int, segments: int, base: bool, tmp_path: Path
) -> None:
    content = bytes(disk(5, 1003))
    path = tmp_path / "disk.E01"
    make_ewf.write(
        path,
        make_ewf.make_segments(
            content, chunk_sectors=chunk_sectors, segments=segments, tables=2, base=base
        ),
    )
    if chunk_sectors >= 8:
        assert export(path, tmp_path / "out") == content
    assert read(path) == content
    with HostFile(path) as file:
        image = EWF(file)
        with Reference([image]) as reference:
            assert reference.pread(0, reference.size) == content
        for further in image.files:
            further.close()
    assert virtmount.inspect(path).identity


def test_reads_here_and_there(tmp_path: Path) -> None:
    content = bytes(disk(6, 20011))
    path = tmp_path / "disk.E01"
    make_ewf.write(path, make_ewf.make_segments(content, chunk_sectors=64, segments=5, tables=3))
    random_ = random.Random(6)
    with virtmount.open(path) as opened:
        for _ in range(200):
            at, length = random_.randrange(len(content)), random_.randrange(1, 200 * KIB)
            wanted = content[at : at + length]
            assert opened.pread(at, len(wanted)) == wanted


def test_names_of_segments() -> None:
    names = {2: "E02", 99: "E99", 100: "EAA", 125: "EAZ", 126: "EBA", 775: "EZZ", 776: "FAA"}
    assert {n: segment_name("my.disk.E01", n) for n in names} == {
        n: f"my.disk.{suffix}" for n, suffix in names.items()
    }
    assert segment_name("disk.s01", 101) == "disk.sab"
    assert segment_name("disk", 3) == "disk.E03"


# What is wrong with a set


@pytest.fixture
def parts() -> list[bytes]:
    return make_ewf.make_segments(bytes(disk(7, 1000)), segments=3)


def test_a_missing_segment(parts: list[bytes], tmp_path: Path) -> None:
    make_ewf.write(tmp_path / "disk.E01", parts[:2])
    with pytest.raises(NotAnImage, match=r"segment 3: not found: 'disk\.E03'"):
        virtmount.open(tmp_path / "disk.E01")


def test_a_later_segment_by_itself(parts: list[bytes], tmp_path: Path) -> None:
    make_ewf.write(tmp_path / "disk.E01", parts)
    with pytest.raises(NotAnImage, match=r"header\+9: segment 2, expected 1") as raised:
        virtmount.open(tmp_path / "disk.E02")
    assert raised.value.hint == "name the first one, .E01"


def test_segments_in_the_wrong_order(parts: list[bytes], tmp_path: Path) -> None:
    make_ewf.write(tmp_path / "disk.E01", [parts[0], parts[2], parts[1]])
    with pytest.raises(NotAnImage, match=r"disk\.E02: header\+9: segment 3, expected 2"):
        virtmount.open(tmp_path / "disk.E01")


def test_a_segment_of_another_set(parts: list[bytes], tmp_path: Path) -> None:
    made = [*parts[:1], parts[1].replace(make_ewf.GUID, b"x" * 16), *parts[2:]]
    make_ewf.write(tmp_path / "disk.E01", made)
    with pytest.raises(Corrupt, match=r"disk\.E02: data section at .*: set 7878.* first segment"):
        virtmount.open(tmp_path / "disk.E01")


def test_a_segment_that_lies_elsewhere(parts: list[bytes], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    make_ewf.write(folder / "disk.E01", parts)
    (folder / "disk.E02").rename(tmp_path / "secret")
    (folder / "disk.E02").symlink_to(tmp_path / "secret")
    with pytest.raises(Denied, match="outside of the image's folder"):
        virtmount.open(folder / "disk.E01")


def test_all_files_are_closed_where_one_is_wrong(parts: list[bytes], tmp_path: Path) -> None:
    make_ewf.write(tmp_path / "disk.E01", [*parts[:2], b"no image".ljust(1000, b"\0")])
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(NotAnImage, match=r"disk\.E03: header\+0: no EWF signature"):
        virtmount.open(tmp_path / "disk.E01")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_not_for_writing(parts: list[bytes], tmp_path: Path) -> None:
    make_ewf.write(tmp_path / "disk.E01", parts)
    with pytest.raises(Unsupported, match="only read"):
        virtmount.open(tmp_path / "disk.E01", writable=True)


@pytest.mark.parametrize("packed", [True, False])
def test_a_chunk_whose_checksum_is_wrong_is_not_served(packed: bool, tmp_path: Path) -> None:
    content = bytes(disk(8, 64))
    (raw,) = make_ewf.make_segments(content, packed=lambda number: packed)
    first = raw.index(zlib.compress(content[:4096]) if packed else content[:4096])
    path = tmp_path / "disk.E01"
    path.write_bytes(raw[: first + 99] + bytes([raw[first + 99] ^ 1]) + raw[first + 100 :])
    with HostFile(path) as file:
        image = EWF(file)
        with pytest.raises(Corrupt, match=f"chunk 0 at {first}"):
            image.inflate(0)
        assert image.inflate(1) == content[4096:8192]


@pytest.mark.parametrize("where", ["header", "offsets"])
def test_a_damaged_table_has_a_copy(where: str, tmp_path: Path) -> None:
    content = bytes(disk(9, 640))
    (raw,) = make_ewf.make_segments(content)
    tables = [at for at in range(len(raw)) if raw[at : at + 7] == b"table\0\0"]
    path = tmp_path / "disk.E01"
    changed = bytearray(raw)
    for at in tables:
        changed[at + 76 + (0 if where == "header" else 24)] ^= 1
    path.write_bytes(changed)
    assert read(path) == content
    copies = [at for at in range(len(raw)) if raw[at : at + 7] == b"table2\0"]
    for at in copies:
        changed[at + 76 + (0 if where == "header" else 24)] ^= 1
    path.write_bytes(changed)
    if where == "header":
        with pytest.raises(Corrupt, match=r"table section at .* checksum"):
            read(path)
    else:
        with HostFile(path) as file, pytest.raises(Corrupt, match="here and in its copy"):
            EWF(file).inflate(0)
