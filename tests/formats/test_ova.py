"""OVA: the disk in a tar."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

import virtmount
from tests.formats import make_vmdk as make
from tests.formats.make_vmdk import descriptor, guest
from tests.formats.test_vmdk import SECTORS, SPARSE, read_as
from virtmount.errors import Corrupt, NotAnImage, Unsupported, VirtmountError
from virtmount.formats import probe
from virtmount.formats.ova import OVA
from virtmount.hostfile import HostFile


def tar(path: Path, *members: tuple[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as made:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return path


def stream() -> bytes:
    text = descriptor(f'RW {SECTORS} SPARSE "disk.vmdk"', create_type="streamOptimized")
    return make.stream(SECTORS, SPARSE, text, footer=True)


def sparse(unclean: int = 0) -> bytes:
    text = descriptor(f'RW {SECTORS} SPARSE "disk.vmdk"', create_type="monolithicSparse")
    return make.sparse(SECTORS, SPARSE, text, unclean=unclean)


OVF = ("machine.ovf", b"<Envelope/>" * 100)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["disk1.vmdk", "a" * 90 + "/" + "b" * 120 + ".VMDK"])
def test_the_disk_is_read(tmp_path: Path, format: str, name: str) -> None:
    if format == "ustar" and len(name) > 100:
        name = "a" * 90 + "/" + "b" * 90 + ".vmdk"
    members = (OVF, ("machine.mf", b"x"), (name, stream()), ("after.txt", b"y" * 1000))
    path = tar(tmp_path / "machine.ova", *members, format=FORMATS[format])
    with HostFile(path) as file:
        assert probe(file) is OVA
    assert read_as(path, "ova") == guest(SECTORS, SPARSE, 128)
    assert virtmount.inspect(path).details["disk"] == name


@pytest.mark.parametrize("unclean", [0, 1])
def test_a_disk_that_is_not_compressed(tmp_path: Path, unclean: int) -> None:
    raw = bytearray(sparse(unclean))
    if unclean:
        raw[27 * 512 + 5 * 4 : 27 * 512 + 6 * 4] = bytes(4)  # the other copy has it
    path = tar(tmp_path / "machine.ova", OVF, ("disk.vmdk", bytes(raw)))
    assert read_as(path, "ova") == guest(SECTORS, SPARSE, 128)


def refused(path: Path, error: type[VirtmountError], words: str, *, writable: bool = False) -> None:
    with pytest.raises(error, match=words), HostFile(path, writable=writable) as file:
        OVA(file)


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.ova"
    refused(
        tar(path, OVF, ("a.vmdk", stream()), ("b.vmdk", b"")),
        Unsupported,
        "2 disks: a.vmdk, b.vmdk",
    )
    refused(tar(path, OVF), NotAnImage, "no VMDK among the 1 files")
    refused(tar(path, OVF, ("a.vmdk.gz", b"")), Unsupported, "a.vmdk.gz is packed")
    refused(tar(path, OVF, ("a.vmdk", stream())), Unsupported, "only read", writable=True)
    text = descriptor('RW 8 FLAT "machine.ova" 0')
    refused(tar(path, OVF, ("a.vmdk", text)), Unsupported, "not a VMDK of a single file")
    child = descriptor(f'RW {SECTORS} SPARSE "a"', parent="1234", more=['parentFileNameHint="p"'])
    made = make.sparse(SECTORS, SPARSE, child)
    refused(tar(path, OVF, ("a.vmdk", made)), Unsupported, "a.vmdk has a parent")


def test_a_tar_that_is_cut_short(tmp_path: Path) -> None:
    path = tar(tmp_path / "machine.ova", OVF, ("a.vmdk", stream()))
    path.write_bytes(path.read_bytes()[: 2 * 512 + 1024 + 5000])
    refused(path, Corrupt, "footer")


def test_headers_that_cannot_be_right(tmp_path: Path) -> None:
    path = tar(tmp_path / "machine.ova", OVF, ("a.vmdk", stream()))
    raw = bytearray(path.read_bytes())
    raw[1536 + 512 + 3] ^= 1
    path.write_bytes(raw)
    refused(path, Corrupt, "tar header at 2048: checksum")


def test_a_tar_of_other_things_is_not_an_ova(tmp_path: Path) -> None:
    path = tar(tmp_path / "machine.ova", ("readme.txt", b"x" * 5000))
    with HostFile(path) as file, pytest.raises(Unsupported, match="tar or OVA"):
        probe(file)
