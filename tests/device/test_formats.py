"""One disk of each kind that test_attach.py has not: attached, formatted, mounted, found again.

What a driver does with its tables, tests/conformance and tests/crash know better; this is about the
whole: a device over a differencing chain, over an encrypted image, over several files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import virtmount
from tests.device.test_attach import MIB, TRANSPORT, pattern, run
from virtmount.attachment import Attachment, attach
from virtmount.image import DEFAULTS, Options

pytestmark = pytest.mark.device

SIZE = 48 * MIB
SECRET = b"in the open"
Made = tuple[Path, Options]


def new(folder: Path, name: str, format: str, **settings: str) -> Made:
    path = folder / name
    virtmount.create(path, SIZE, format, settings=settings)
    return path, DEFAULTS


def child(folder: Path, name: str, format: str, **settings: str) -> Made:
    """Over a parent with something in it."""
    parent, options = new(folder, f"parent.{format}", format, **settings)
    with virtmount.open(parent, format, writable=True) as disk:
        disk.pwrite(SIZE - MIB, pattern(MIB, 9))
    path = folder / name
    virtmount.create(path, None, format, parent=parent, parent_format=format)
    return path, options


def encrypted(folder: Path) -> Made:
    path = folder / "disk.qcow2"
    secret = f"secret,id=s,data={SECRET.decode()}"
    options = ("-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100")
    run("qemu-img", "create", "-q", "--object", secret, "-f", "qcow2", *options, path, str(SIZE))
    return path, Options(passphrase=lambda: SECRET)


def qemu(folder: Path, name: str, format: str, *options: str) -> Made:
    path = folder / name
    run("qemu-img", "create", "-q", "-f", format, *options, name, str(SIZE), cwd=folder)
    return path, DEFAULTS


def snapshotted(folder: Path) -> Made:
    made = qemu(folder, "disk.qcow2", "qcow2")
    run("qemu-io", "-c", f"write -P 7 0 {MIB}", made[0])
    run("qemu-img", "snapshot", "-c", "before", made[0])
    return made


KINDS: dict[str, Callable[[Path], Made]] = {
    "vhd": lambda folder: new(folder, "disk.vhd", "vhd"),
    "vhd-fixed": lambda folder: new(folder, "disk.vhd", "vhd", subformat="fixed"),
    "vmdk": lambda folder: new(folder, "disk.vmdk", "vmdk"),
    "vmdk-split": lambda folder: qemu(
        folder, "disk.vmdk", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"
    ),
    "vmdk-flat": lambda folder: qemu(folder, "disk.vmdk", "vmdk", "-o", "subformat=monolithicFlat"),
    "parallels": lambda folder: qemu(folder, "disk.hds", "parallels"),
    "qed": lambda folder: qemu(folder, "disk.qed", "qed"),
    "qcow": lambda folder: qemu(folder, "disk.qcow", "qcow"),
    "vhd-child": lambda folder: child(folder, "disk.vhd", "vhd"),
    "vhdx-child": lambda folder: child(folder, "disk.vhdx", "vhdx"),
    "vdi-child": lambda folder: child(folder, "disk.vdi", "vdi"),
    "vmdk-child": lambda folder: child(folder, "disk.vmdk", "vmdk"),
    "qcow2-encrypted": encrypted,
    "qcow2-extended": lambda folder: qemu(folder, "disk.qcow2", "qcow2", "-o", "extended_l2=on"),
    "qcow2-data-file": lambda folder: qemu(
        folder, "disk.qcow2", "qcow2", "-o", "data_file=data.bin"
    ),
    "qcow2-snapshot": snapshotted,
}


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[Callable[..., Attachment]]:
    started: list[Attachment] = []

    def start(path: Path, options: Options, **more: object) -> Attachment:
        started.append(attach(path, options=options, **more))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for disk in started:
        disk.detach(force=True)


@pytest.mark.parametrize("kind", list(KINDS))
def test_file_system_is_made_and_found_again(
    attached: Callable[..., Attachment], tmp_path: Path, kind: str
) -> None:
    path, options = KINDS[kind](tmp_path)
    with virtmount.open(path, options=options) as disk:
        tail = disk.pread(SIZE - MIB, MIB)
    data = pattern(3 * MIB, 1)
    where = tmp_path / "mnt"
    where.mkdir()
    transport = "auto" if kind in ("vhd-fixed", "vmdk-flat") else TRANSPORT
    disk = attached(path, options, transport=transport)
    assert disk.size == SIZE
    run("mkfs.ext4", "-q", "-F", disk.path, "32M")
    run("mount", disk.path, where)
    try:
        (where / "file").write_bytes(data)
    finally:
        run("umount", where)
    disk.detach()
    disk = attached(path, options, transport=transport, read_only=True)
    run("mount", "-o", "ro", disk.path, where)
    try:
        assert (where / "file").read_bytes() == data
    finally:
        run("umount", where)
    disk.detach()
    with virtmount.open(path, options=options) as opened:
        assert opened.pread(SIZE - MIB, MIB) == tail
    if kind == "qcow2-snapshot":
        before = Options(snapshot="before")
        with virtmount.open(path, options=before) as opened:
            assert opened.pread(0, MIB) == bytes([7]) * MIB
    if path.suffix == ".qcow2":
        options_of = f"driver=qcow2,file.filename={path}"
        if kind == "qcow2-encrypted":
            options_of += ",encrypt.key-secret=s"
        secret = f"secret,id=s,data={SECRET.decode()}"
        run("qemu-img", "check", "-q", "--object", secret, "--image-opts", options_of, cwd=tmp_path)
