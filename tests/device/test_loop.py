"""The loop driver alone, under flat images."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from virtmount import loop, nodes, state
from virtmount.chain import open_chain
from virtmount.disk import Disk
from virtmount.errors import Busy
from virtmount.loop import Loop

pytestmark = pytest.mark.device

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
Serve = Callable[..., Loop]


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return str(done.stdout)


def create(path: Path, format: str, size: int, *options: str) -> Path:
    run("qemu-img", "create", "-q", "-f", format, *options, path, str(size))
    return path


def identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Puts an image on a loop device and closes it; afterwards the device is free."""
    started: list[Loop] = []

    def start(path: Path, *, writable: bool = True, cache: str = "writeback") -> Loop:
        disk = Disk(open_chain(path, writable=writable), cache=cache)
        try:
            device = Loop(disk)
            device.start()
            started.append(device)
        finally:
            disk.close()
        return device

    yield start
    for device in started:
        device.stop()


FLAT: list[tuple[str, tuple[str, ...]]] = [
    ("raw", ()),
    ("vdi", ("-o", "static=on")),
    # Else qemu-img calls it fixed, and marks every block as not to be read.
    ("vhdx", ("-o", "subformat=fixed,block_state_zero=off")),
]


@pytest.mark.parametrize(("format", "options"), FLAT, ids=[name for name, _ in FLAT])
def test_flat_images(serve: Serve, tmp_path: Path, format: str, options: tuple[str, ...]) -> None:
    size = 24 * MIB
    image = create(tmp_path / "image", format, size, *options)
    device = serve(image)
    assert int(run("blockdev", "--getsize64", device.device)) == size
    status = loop.status(device.device)
    assert status is not None
    assert (status.device, status.inode) == identity(image)
    assert status.file_id == state.file_id(image)
    data = random.Random(3).randbytes(3 * MIB)
    run("mkfs.ext4", "-q", device.device)
    where = tmp_path / "mnt"
    where.mkdir()
    run("mount", device.device, where)
    (where / "file").write_bytes(data)
    with pytest.raises(Busy, match=f"mounted at {where}"):
        loop.detach(device.device, state.file_id(image))
    # Nothing was done to it: it does not go away behind the user's back when it is unmounted.
    run("umount", where)
    assert loop.device_of(*identity(image)) == device.device
    device.stop()
    assert loop.device_of(*identity(image)) is None

    raw = tmp_path / "raw"
    if format != "raw":
        run("qemu-img", "check", "-q", "-f", format, image)
    run("qemu-img", "convert", "-f", format, "-O", "raw", image, raw)
    assert raw.stat().st_size == size
    run("e2fsck", "-fn", raw)
    run("debugfs", "-R", f"dump /file {tmp_path / 'out'}", raw)
    assert (tmp_path / "out").read_bytes() == data


def test_the_lock_stays_with_the_device_when_the_process_ends(tmp_path: Path) -> None:
    image = create(tmp_path / "a.img", "raw", MIB)
    code = (
        "import sys; from virtmount.chain import open_chain; from virtmount.disk import Disk; "
        "from virtmount.loop import Loop; "
        "print(Loop(Disk(open_chain(sys.argv[1], 'raw', writable=True))).start())"
    )
    device = run(sys.executable, "-c", code, image, cwd=ROOT).strip()
    try:
        with pytest.raises(Busy, match="in use by another program"):
            open_chain(image, "raw", writable=True)
        with pytest.raises(Busy, match="being written"):
            open_chain(image, "raw")
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 512", image], capture_output=True, text=True
        )
        assert done.returncode != 0
        assert "lock" in done.stderr
    finally:
        loop.detach(device, state.file_id(image))
    open_chain(image, "raw", writable=True).close()
    run("qemu-io", "-f", "raw", "-c", "write 0 512", image)


def test_a_read_only_device_shares_the_image_with_readers(serve: Serve, tmp_path: Path) -> None:
    image = create(tmp_path / "a.img", "raw", MIB)
    device = serve(image, writable=False)
    assert run("blockdev", "--getro", device.device).strip() == "1"
    open_chain(image, "raw").close()
    with pytest.raises(Busy):
        open_chain(image, "raw", writable=True)


def test_somebody_elses_loop_device_is_found(serve: Serve, tmp_path: Path) -> None:
    image = create(tmp_path / "a.img", "raw", MIB)
    device = run("losetup", "--find", "--show", image).strip()
    try:
        with pytest.raises(Busy, match=f"already attached as {device}"):
            serve(image)
    finally:
        run("losetup", "--detach", device)
    serve(image)


def test_partitions_and_4096_byte_sectors(serve: Serve, tmp_path: Path) -> None:
    image = create(tmp_path / "a.img", "raw", 16 * MIB)
    run("sfdisk", "-q", image, input="label: dos\nsize=4M\nsize=8M, type=5\nsize=2M\nsize=1M\n")
    device = serve(image)
    assert [node.number for node in nodes.partitions(device.kernel_name)] == [1, 2, 3, 4]
    device.stop()
    assert nodes.partitions(device.kernel_name) == []


def test_partitions_are_added_where_the_kernel_reads_no_tables(tmp_path: Path) -> None:
    image = create(tmp_path / "a.img", "raw", 32 * MIB)
    script = "label: dos\nsize=4M\nsize=20M, type=5\nsize=1M\nsize=1M\nsize=2M\nsize=3M\n"
    run("sfdisk", "-q", image, input=script)
    data = image.read_bytes()
    # Without --partscan the kernel does not look.
    device = run("losetup", "--find", "--show", image).strip()
    name = os.path.basename(device)
    try:
        assert nodes.partitions(name) == []
        found = nodes.show_partitions(
            name, lambda at, n: data[at : at + n], len(data), 512, scanned=True
        )
        sizes = [(node.number, node.size) for node in found]
        assert sizes == [
            (1, 4 * MIB),
            (2, 1024),  # the extended one: its logical partitions lie in it
            (3, MIB),
            (4, MIB),
            (5, 2 * MIB),
            (6, 3 * MIB),
        ]
        logical = found[4]
        with open(logical.path, "rb") as file:
            assert file.read(512) == data[logical.start : logical.start + 512]
        again = nodes.show_partitions(
            name, lambda at, n: data[at : at + n], len(data), 512, scanned=True
        )
        assert again == found
    finally:
        run("partx", "--delete", device)
        run("losetup", "--detach", device)


BARE = """
import json, os, sys
from virtmount import nodes
from virtmount.chain import open_chain
from virtmount.disk import Disk
from virtmount.loop import Loop

assert os.listdir("/dev") == []
device = Loop(Disk(open_chain(sys.argv[1], writable=True)))
device.start()
links = nodes.make_links("bare0", device.kernel_name)
with open(links[2], "rb") as file:
    assert len(file.read(512)) == 512
print(json.dumps(os.listdir("/dev")))
device.stop()
nodes.remove_links("bare0", device.kernel_name)
print(json.dumps(os.listdir("/dev")))
"""


def test_nodes_are_made_where_nobody_else_makes_them(tmp_path: Path) -> None:
    """A container: /dev is an empty tmpfs, and there is no udev."""
    image = create(tmp_path / "a.img", "raw", 16 * MIB)
    run("sfdisk", "-q", image, input="label: gpt\nsize=1M\nsize=2M\n")
    bare = 'mount -t tmpfs none /dev && mount -t tmpfs none /run && exec "$@"'
    command = ("unshare", "--mount", "sh", "-c", bare, "sh", sys.executable, "-c", BARE, image)
    shown, left = map(json.loads, run(*command, cwd=ROOT).splitlines())
    disk = next(name for name in shown if re.fullmatch(r"loop\d+", name))
    ours = {"bare0", "bare0p1", "bare0p2"}
    assert set(shown) == ours | {"loop-control", disk, f"{disk}p1", f"{disk}p2"}
    # The loop device itself is still there.
    assert set(left) == {"loop-control", disk}


def test_direct(serve: Serve, tmp_path: Path) -> None:
    image = create(tmp_path / "a.img", "raw", MIB)
    device = serve(image, cache="none")
    wanted = _can_direct(image)
    assert device.features == {"direct_io": wanted}


def _can_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_stop_while_open_says_who(serve: Serve, tmp_path: Path) -> None:
    image = create(tmp_path / "a.img", "raw", MIB)
    device = serve(image)
    # udev opens a device for a moment after every close; a user keeps it.
    user = subprocess.Popen(["sleep", "60"], stdin=open(device.device, "rb"))  # noqa: SIM115
    try:
        with pytest.raises(Busy, match=rf"is open in sleep \(process {user.pid}\)"):
            device.stop()
        with pytest.raises(Busy):
            open_chain(image, "raw", writable=True)
    finally:
        user.kill()
        user.wait()


def test_detach_is_harmless_when_repeated(serve: Serve, tmp_path: Path) -> None:
    device = serve(create(tmp_path / "a.img", "raw", MIB))
    device.stop()
    device.stop()
    loop.detach("/dev/loop99999", "1:2")


def test_another_programs_file_on_the_same_number_is_left_alone(
    serve: Serve, tmp_path: Path
) -> None:
    image, other = (create(tmp_path / name, "raw", MIB) for name in ("a.img", "b.img"))
    device = serve(image)
    device.stop()
    run("losetup", device.device, other)
    try:
        device.stop()
        loop.detach(device.device, state.file_id(image))
        assert loop.backing_file(device.kernel_name) == str(other)
    finally:
        run("losetup", "--detach", device.device)


def test_an_image_on_a_block_device(serve: Serve, tmp_path: Path) -> None:
    below = serve(create(tmp_path / "a.img", "raw", MIB))
    device = serve(Path(below.device))
    status = loop.status(device.device)
    assert status is not None
    assert status.file_id == state.file_id(below.device)
    with pytest.raises(Busy, match=f"is used by {device.kernel_name}"):
        below.stop()
    device.stop()


def test_devices_are_counted_on(tmp_path: Path) -> None:
    """More devices than there were nodes for; all at once, each with its own file."""
    devices = []
    try:
        for number in range(10):
            image = create(tmp_path / f"{number}.img", "raw", MIB)
            fd = os.open(image, os.O_RDWR)
            try:
                devices.append(loop.configure(fd, label=image.name))
            finally:
                os.close(fd)
        assert len(set(devices)) == 10
        for number, device in enumerate(devices):
            assert loop.device_of(*identity(tmp_path / f"{number}.img")) == device
    finally:
        for number, device in enumerate(devices):
            loop.detach(device, state.file_id(tmp_path / f"{number}.img"))


def test_a_file_that_cannot_be_attached_is_an_error(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(OSError, match=r".") as caught:
            loop.configure(read_end)
        assert caught.value.errno == errno.EINVAL
    finally:
        os.close(read_end)
        os.close(write_end)
