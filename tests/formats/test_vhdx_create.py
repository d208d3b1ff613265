"""VHDX, made by us: what qemu, 7-Zip and we ourselves read from it, and write to it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.formats import make_vhdx as mk
from tests.formats.make_vhdx import MIB, make
from tests.formats.vhdx_chains import contents_by_7zip
from tests.reference import Reference
from virtmount import hostfile
from virtmount.chain import open_chain
from virtmount.errors import Unsupported
from virtmount.formats.vhdx import VHDX
from virtmount.hostfile import HostFile
from virtmount.image import Image, Kind, extents
from virtmount.upkeep import New

TIB = 1 << 40


def create(
    path: Path,
    size: int,
    sector_size: int = 512,
    parent: Image | None = None,
    name: str = "",
    **options: str,
) -> Path:
    settings = {key: choice.default for key, choice in VHDX.choices.items()} | options

    def add(name: str) -> int:
        raise AssertionError(name)

    path.touch()
    with HostFile(path, writable=True) as file:
        new = New([file], path.name, size, settings, add, sector_size, parent, name)
        plan = VHDX.create(new)
        assert file.size == 0
        hostfile.execute(plan, [file])
    return path


def below(path: Path, parent: Path, size: int | None = None, **options: Any) -> Path:
    """A child, with the parent's path as it is from the child's folder."""
    chain = open_chain(parent)
    try:
        top = chain.top
        name = str(parent.relative_to(path.parent))
        return create(path, size or top.size, top.sector_size, top, name, **options)
    finally:
        chain.close()


def qemu_img(*args: object) -> str:
    done = subprocess.run(
        ["qemu-img", *map(str, args)], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": "1M"},
        {"block_size": "256m", "log_size": "3M"},
        {"physical_sector_size": "512"},
        {"subformat": "fixed", "block_size": "1M"},
        {"subformat": "fixed", "block_size": "4M"},
    ],
)
def test_qemu_reads_it_and_writes_on(tmp_path: Path, options: Mapping[str, str]) -> None:
    size = 37 * MIB + 512
    path = create(tmp_path / "disk.vhdx", size, **options)
    info = json.loads(qemu_img("info", "--output=json", path))
    assert info["format"] == "vhdx"
    assert info["virtual-size"] == size
    assert qemu_img("check", path) == "No errors were found on the image.\n"
    with HostFile(path, writable=True) as file, Reference([VHDX(file)]) as disk:
        assert disk.pread(0, size) == bytes(size)
        disk.pwrite(3 * MIB - 512, b"ours" * 256)
    command = ["qemu-io", "-f", "vhdx", "-c", "write -P 7 30M 64k", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    with HostFile(path) as file:
        found = Reference([VHDX(file)]).pread(0, size)
    assert found[3 * MIB - 512 : 3 * MIB + 512] == b"ours" * 256
    assert found[30 * MIB : 30 * MIB + 65536] == b"\7" * 65536
    raw = tmp_path / "raw"
    qemu_img("convert", "-O", "raw", path, raw)
    assert raw.read_bytes() == found


def test_what_is_in_it(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.vhdx", 100 * MIB)
    raw = path.read_bytes()
    assert len(raw) == 4 * MIB
    assert raw[8:].decode("utf-16-le", "ignore").startswith("virtmount\0")
    for at in (192 << 10, 256 << 10):
        table = raw[at : at + 65536]
        assert table == mk.sealed(table)
        for i in range(2):
            assert table[16 + 32 * i + 28 : 16 + 32 * i + 32] == b"\1\0\0\0", "required"
    assert raw[65536 : 65536 + 4096] == mk.sealed(raw[65536 : 65536 + 4096])
    with HostFile(path) as file:
        image = VHDX(file)
        assert image.cluster_size == 32 * MIB
        assert (image.sector_size, image.physical_sector_size) == (512, 4096)
        details = image.details()
        assert details["log_size"] == MIB
        guids = {details[key] for key in ("disk_id", "file_write_guid", "data_write_guid")}
        assert len(guids) == 3
        assert image.identity != str(UUID(int=0))


def test_4096_byte_sectors(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.vhdx", 40 * MIB, 4096, block_size="1M")
    with HostFile(path, writable=True) as file, Reference([VHDX(file)]) as disk:
        assert disk.top.sector_size == 4096
        disk.pwrite(5 * MIB, b"x" * 4096)
    found = contents_by_7zip(path)
    assert len(found) == 40 * MIB
    assert found[5 * MIB : 5 * MIB + 4097] == b"x" * 4096 + b"\0"


def test_a_fixed_disk_lies_in_order(tmp_path: Path) -> None:
    """Across the entry of a bitmap, which blocks of a MiB have after 4096."""
    path = create(tmp_path / "disk.vhdx", 5000 * MIB - 512, subformat="fixed", block_size="1M")
    with HostFile(path) as file:
        image = VHDX(file)
        assert image.variant == "fixed"
        assert image.flat == 4 * MIB
        assert file.size == 5004 * MIB
        kinds = {extent.kind for extent in extents(image, 0, image.size)}
        assert kinds == {Kind.DATA}


@pytest.mark.parametrize("size", [512, 64 * TIB])
def test_the_smallest_and_the_largest(tmp_path: Path, size: int) -> None:
    for block in ("1M", "256M"):
        path = create(tmp_path / f"{block}.vhdx", size, block_size=block)
        assert path.stat().st_blocks * 512 < 2 * MIB
        with HostFile(path) as file:
            assert VHDX(file).size == size
    assert json.loads(qemu_img("info", "--output=json", path))["virtual-size"] == size


def test_a_child_of_an_image_of_ours(tmp_path: Path) -> None:
    size = 20 * MIB
    parent = create(tmp_path / "base.vhdx", size, block_size="1M")
    with HostFile(parent, writable=True) as file, Reference([VHDX(file)]) as disk:
        disk.pwrite(3 * MIB, b"p" * 2 * MIB)
    child = below(tmp_path / "child.vhdx", parent)
    grandchild = below(tmp_path / "grandchild.avhdx", child, block_size="4M")
    chain = open_chain(grandchild, writable=True)
    top, middle, base = chain.images
    assert [image.cluster_size for image in chain.images] == [4 * MIB, 2 * MIB, MIB]
    assert isinstance(top, VHDX)
    assert isinstance(middle, VHDX)
    assert top.details()["disk_id"] == middle.details()["disk_id"] == base.details()["disk_id"]
    assert top.parent is not None
    assert top.parent.names == ("child.vhdx",)
    details = top.details()
    assert details["parent_linkage"] == f"{{{middle.identity}}}"
    assert details["relative_path"] == ".\\child.vhdx"
    expected = bytearray(3 * MIB) + b"p" * 2 * MIB
    expected = expected.ljust(size, b"\0")
    with Reference(chain.images) as disk:
        assert disk.pread(0, size) == expected
        disk.pwrite(4 * MIB + 512, b"g" * 512)
        disk.pwrite(16 * MIB, b"h" * 512)
        expected[4 * MIB + 512 : 4 * MIB + 1024] = b"g" * 512
        expected[16 * MIB : 16 * MIB + 512] = b"h" * 512
        assert disk.pread(0, size) == expected
    chain.close()
    assert contents_by_7zip(grandchild) == expected


def test_a_child_that_is_longer_than_its_parent(tmp_path: Path) -> None:
    parent = create(tmp_path / "base.vhdx", 3 * MIB - 512, block_size="1M")
    with HostFile(parent, writable=True) as file, Reference([VHDX(file)]) as disk:
        disk.pwrite(0, b"p" * (3 * MIB - 512))
    child = below(tmp_path / "child.vhdx", parent, 5 * MIB)
    chain = open_chain(child)
    assert Reference(chain.images).pread(0, 5 * MIB) == (b"p" * (3 * MIB - 512)).ljust(
        5 * MIB, b"\0"
    )
    chain.close()


@pytest.mark.parametrize("name", ["base.vhdx", "./base.vhdx", "sub/../base.vhdx"])
def test_the_parents_name_is_found_again(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    parent = create(tmp_path / "base.vhdx", MIB)
    with HostFile(parent) as file:
        child = create(tmp_path / "child.vhdx", MIB, parent=VHDX(file), name=name)
    chain = open_chain(child)
    assert len(chain.images) == 2
    chain.close()


def test_an_absolute_name(tmp_path: Path) -> None:
    parent = create(tmp_path / "base.vhdx", MIB)
    with HostFile(parent) as file:
        child = create(tmp_path / "child.vhdx", MIB, parent=VHDX(file), name=str(parent))
    with HostFile(child) as file:
        ref = VHDX(file).parent
    assert ref is not None
    assert ref.names == ("base.vhdx", str(parent))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"subformat": "sparse"}, "subformat: 'sparse'"),
        ({"block_size": "512K"}, "block_size: '512K'"),
        ({"block_size": "3M"}, "block_size: '3M'"),
        ({"block_size": "512M"}, "block_size: '512M'"),
        ({"block_size": "big"}, "block_size: 'big'"),
        ({"block_size": ""}, "block_size: ''"),
        ({"log_size": "512K"}, "log_size: '512K'"),
        ({"log_size": "65M"}, "log_size: '65M'"),
        ({"log_size": "0"}, "log_size: '0'"),
        ({"physical_sector_size": "520"}, "physical_sector_size: 520"),
        ({"sector_size": 1024}, "sector_size: sectors of 1024 bytes"),
        ({"size": 64 * TIB + 512}, "size: 70368744178176 bytes"),
        ({"size": 0}, "size: 0 bytes"),
        ({"size": 64 * TIB, "subformat": "fixed", "block_size": "1M"}, "block_size: 67108864"),
    ],
)
def test_refuses(tmp_path: Path, options: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "disk.vhdx"
    with pytest.raises(Unsupported, match=complaint):
        create(path, **{"size": MIB, **options})
    assert path.stat().st_size == 0


def test_refuses_a_parent(tmp_path: Path) -> None:
    path = tmp_path / "child.vhdx"
    parent = create(tmp_path / "base.vhdx", MIB)
    raw = tmp_path / "raw.img"
    raw.write_bytes(bytes(MIB))
    other = make(tmp_path / "4096.vhdx", MIB, sector_size=4096)
    for base, name, options, complaint in (
        (parent, "base.vhdx", {"subformat": "fixed"}, "over a parent cannot be fixed"),
        (parent, "a\\b.vhdx", {}, "a backslash in the name"),
        (parent, "\udcff.vhdx", {}, "is not text"),
        (parent, "x" * 40_000, {}, "more than 65535 bytes"),
        (other.path, "x", {}, "512 bytes over a parent with 4096"),
        (raw, "raw.img", {}, "raw.img is raw, it must be vhdx"),
    ):
        chain = open_chain(base)
        with pytest.raises(Unsupported, match=complaint):
            create(path, MIB, parent=chain.top, name=name, **options)
        chain.close()


def test_libvhdi_knows_the_parent(tmp_path: Path) -> None:
    parent = create(tmp_path / "base.vhdx", 20 * MIB)
    child = below(tmp_path / "child.vhdx", parent)
    with HostFile(parent) as file, HostFile(child) as other:
        identities = VHDX(file).identity, VHDX(other).identity
    done = subprocess.run(["vhdiinfo", child], capture_output=True, text=True, timeout=60)
    told = dict(
        (part.strip() for part in line.split(":", 1))
        for line in done.stdout.splitlines()
        if ":" in line
    )
    assert told["Disk type"] == "Differential", done.stderr
    assert told["Parent identifier"] == identities[0]
    assert told["Identifier"] == identities[1]
    assert "(20971520 bytes)" in told["Media size"]
