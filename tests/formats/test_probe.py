"""Which driver a file gets by its content, and what never becomes a raw disk by accident."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from virtmount.errors import NotAnImage, Unsupported, VirtmountError
from virtmount.formats import FOREIGN, PACKED, TABLE, load, probe
from virtmount.hostfile import HostFile
from virtmount.image import Image, Match

VDI_SIGNATURE = bytes.fromhex("7f10dabe")


def driver_of(path: Path) -> type[Image]:
    with HostFile(path) as file:
        return probe(file)


def write(path: Path, size: int, *pieces: tuple[int, bytes]) -> Path:
    """A file of random-looking bytes with `pieces` put in; negative offsets are from the end."""
    content = bytearray(b"\xa5\x5a" * (size // 2))
    for offset, data in pieces:
        offset = offset if offset >= 0 else size + offset
        content[offset : offset + len(data)] = data
    path.write_bytes(content[:size])
    return path


@pytest.mark.parametrize(
    "format", ["qcow2", "qcow", "vhdx", "vpc", "vdi", "vmdk", "qed", "parallels", "raw"]
)
def test_what_qemu_img_made(tmp_path: Path, format: str) -> None:
    path = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", format, path, "4M"], check=True)
    assert driver_of(path) is load(format)


@pytest.mark.parametrize("magic", [b"sprs", b"shdw", b"MSWIM\0\0\0"])
def test_a_format_that_we_know_by_name_only(tmp_path: Path, magic: bytes) -> None:
    path = tmp_path / "disk"
    path.write_bytes(magic.ljust(4096, b"\0"))
    with pytest.raises(Unsupported, match="not supported yet") as raised:
        driver_of(path)
    assert raised.value.hint


def test_a_vmdk_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", path, "1M"],
        check=True,
    )
    assert driver_of(path) is load("vmdk")


@pytest.mark.parametrize(("offset", "magic", "name"), FOREIGN)
def test_known_by_name_only(tmp_path: Path, offset: int, magic: bytes, name: str) -> None:
    for size in (8192, 1 << 20):
        path = write(tmp_path / "disk", size, (offset, magic))
        with pytest.raises(Unsupported) as raised:
            driver_of(path)
        assert str(raised.value) == f"{path}: {name} images are not supported yet"


@pytest.mark.parametrize(("offset", "magic", "name"), PACKED)
def test_packed(tmp_path: Path, offset: int, magic: bytes, name: str) -> None:
    path = write(tmp_path / "disk", 8192, (offset, magic))
    with pytest.raises(Unsupported, match=f"{name} files have to be unpacked first"):
        driver_of(path)


@pytest.mark.parametrize(
    ("pack", "name"), [(gzip.compress, "gzip"), (lzma.compress, "xz"), (bz2.compress, "bzip2")]
)
def test_really_packed(tmp_path: Path, pack: Callable[[bytes], bytes], name: str) -> None:
    (tmp_path / "disk").write_bytes(pack(bytes(4096)))
    with pytest.raises(Unsupported, match=f"{name} files have to be unpacked first"):
        driver_of(tmp_path / "disk")


@pytest.mark.parametrize("size", [2, 512, 513, 1024, 70000])
def test_anything_else_is_raw(tmp_path: Path, size: int) -> None:
    assert driver_of(write(tmp_path / "disk", size)) is load("raw")


def test_a_partition_table_is_raw(tmp_path: Path) -> None:
    path = write(tmp_path / "disk", 1 << 20, (510, b"\x55\xaa"), (512, b"EFI PART"))
    assert driver_of(path) is load("raw")


def test_an_empty_file_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    with pytest.raises(NotAnImage, match="empty"):
        driver_of(tmp_path / "disk")


@pytest.mark.parametrize("version", [0, 4, 0xFFFFFFFF])
def test_an_unknown_version_is_not_raw(tmp_path: Path, version: int) -> None:
    """Raw would let the guest write over a header that we only did not understand."""
    path = write(tmp_path / "disk", 1 << 20, (0, b"QFI\xfb" + struct.pack(">I", version)))
    with HostFile(path) as file:
        driver = probe(file)
        assert driver.name == "qcow2"
        with pytest.raises(VirtmountError, match="version"):
            driver(file)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("pieces", "names"),
    [
        (((0, b"vhdxfile"), (64, VDI_SIGNATURE)), "vhdx and vdi"),
        (((0, b"QFI\xfb\0\0\0\3"), (64, VDI_SIGNATURE)), "qcow2 and vdi"),
        (((0, b"KDMV"), (64, VDI_SIGNATURE)), "vdi and vmdk"),
        (((0, b"sprs"), (64, VDI_SIGNATURE)), "vdi and Apple sparse image"),
        (((0, b"QFI\xfb\0\0\0\1"), (64, VDI_SIGNATURE)), "qcow and vdi"),
    ],
)
def test_one_image_written_into_another_is_refused(
    tmp_path: Path, pieces: tuple[tuple[int, bytes], ...], names: str
) -> None:
    path = write(tmp_path / "disk", 1 << 20, *pieces)
    with pytest.raises(NotAnImage, match=f"looks like {names}") as raised:
        driver_of(path)
    assert raised.value.hint == "say which with --format"


@pytest.mark.parametrize("format", ["qcow2", "qcow", "vhdx", "vdi"])
def test_what_the_guest_wrote_at_the_end_does_not_matter(tmp_path: Path, format: str) -> None:
    """The last bytes of the file are often the guest's."""
    path = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", format, path, "4M"], check=True)
    with path.open("ab") as file:
        file.write(b"conectix".ljust(512, b"\0"))
    assert driver_of(path) is load(format)


def test_raw_is_never_sure_and_comes_last() -> None:
    assert list(TABLE)[-1] == "raw"
    assert load("raw").probe(bytes(512), bytes(512), 512) is Match.LIKELY


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("size", [0, 1, 3, 7, 8, 63, 64, 65, 67, 511, 512])
def test_a_probe_never_raises(name: str, size: int) -> None:
    for fill in (b"\0", b"\xff", b"QFI\xfb", b"vhdxfile", VDI_SIGNATURE):
        data = (fill * size)[:size]
        assert load(name).probe(data, data, size) in Match


def test_names() -> None:
    for name in TABLE:
        assert load(name).name == name
        assert load(name.upper()) is load(name)
    assert load("img") is load("raw")
    known = ", ".join(TABLE)
    with pytest.raises(Unsupported, match=f"unknown format 'nonsense', know {known}"):
        load("nonsense")


def test_whole_disk_encryption_is_content_not_a_format(tmp_path: Path) -> None:
    """A raw disk that dm-crypt will open: attaching it as it is is what its owner wants."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"LUKS\xba\xbe\0\2".ljust(1 << 20, b"\0"))
    with HostFile(path) as file:
        assert probe(file).name == "raw"
