"""FUSE under loop on this machine's kernel, with a disk in memory in place of the engine."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.device.direct import Direct
from tests.device.memory import MemoryDisk
from virtmount import loop, nodes
from virtmount.fuse import Fuse, clear_orphan

pytestmark = pytest.mark.device

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
Serve = Callable[..., Fuse]

_libc = ctypes.CDLL(None, use_errno=True)


def run(*command: str | Path, ok: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, **options
    )
    assert (done.returncode == 0) is ok, f"{command}: {done.stdout}{done.stderr}"
    return done


def attribute(device: Fuse, name: str) -> str:
    return (nodes.SYS / device.kernel_name / name).read_text().strip()


def mount_points() -> str:
    return Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a transport; afterwards nothing of it may be left."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("VIRTMOUNT_RUN", str(folder))
    started: list[Fuse] = []

    def start(disk: MemoryDisk, **options: Any) -> Fuse:
        device = Fuse(disk, f"test{os.getpid()}-{len(started)}", **options)
        started.append(device)
        device.start()
        return device

    yield start
    for device in started:
        device.stop()
        assert is_gone(device)
    assert list(folder.iterdir()) == []
    assert str(folder) not in mount_points()
    assert not [thread for thread in threading.enumerate() if thread.name == "virtmount-fuse"]


def is_gone(device: Fuse) -> bool:
    """The number may belong to somebody else's file by now."""
    return loop.backing_file(device.kernel_name) != f"/virtmount:{device.disk_name}"


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.mark.parametrize("size", [512, 3 * 512, MIB + 512, 17 * MIB + 3 * 512])
def test_reads_and_writes_every_byte_of_disks_of_odd_sizes(serve: Serve, size: int) -> None:
    disk = MemoryDisk(size)
    disk.fill(pattern(size))
    device = serve(disk)
    assert int(run("blockdev", "--getsize64", device.device).stdout) == size
    with Direct(device.device) as opened:
        for at in range(0, size, MIB):
            length = min(MIB, size - at)
            assert opened.read(at, length) == disk.contents()[at : at + length]
        last = pattern(512, seed=99)
        opened.write(size - 512, last)
        with pytest.raises(OSError, match="No space"):
            opened.write(size, last)
    assert disk.contents() == pattern(size)[:-512] + last


def test_a_file_system_is_made_mounted_written_and_whole(serve: Serve, tmp_path: Path) -> None:
    disk = MemoryDisk(64 * MIB)
    device = serve(disk)
    run("mkfs.ext4", "-q", device.device)
    where = tmp_path / "mnt"
    where.mkdir()
    data = os.urandom(3 * MIB)
    run("mount", device.device, where)
    try:
        before = disk.count("flush")
        with (where / "file").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # The barrier of the file system's journal came through.
        assert disk.count("flush") > before
        users = nodes.users(device.kernel_name)
        assert [(user.kind, user.what) for user in users] == [("mount", str(where))]
        assert str(users[0]) == f"{device.kernel_name} is mounted at {where}"

        os.unlink(where / "file")
        os.sync()
        disk.asked.clear()
        run("fstrim", where)
        trimmed = sum(asked.length for asked in disk.asked if asked.what == "unmap")
        assert trimmed > 40 * MIB
        (where / "second").write_bytes(data)
    finally:
        run("umount", where)
    device.stop()
    image = tmp_path / "image"
    image.write_bytes(disk.contents())
    run("e2fsck", "-fn", image)
    found = run("debugfs", "-R", f"dump /second {tmp_path / 'out'}", image)
    assert (tmp_path / "out").read_bytes() == data, found.stderr


def test_discard_and_zeroes_arrive_and_read_as_zeros(serve: Serve) -> None:
    size = 4 * MIB
    disk = MemoryDisk(size)
    disk.fill(pattern(size))
    device = serve(disk, cluster_size=65536)
    assert attribute(device, "queue/discard_granularity") == "65536"
    run("blkdiscard", "-o", "65536", "-l", "131072", device.device)
    assert disk.count("unmap") == 1
    run("blkdiscard", "-z", "-o", str(MIB), "-l", "4096", device.device)
    expected = bytearray(pattern(size))
    expected[65536 : 3 * 65536] = bytes(131072)
    expected[MIB : MIB + 4096] = bytes(4096)
    assert disk.contents() == expected
    run("blkdiscard", "-f", device.device)
    assert disk.contents() == bytes(size)


def test_a_disk_that_cannot_give_space_back_loses_nothing(serve: Serve) -> None:
    disk = MemoryDisk(MIB)
    disk.fill(pattern(MIB))
    device = serve(disk, can_discard=False)
    run("blkdiscard", "-f", device.device)  # a hint, so the kernel reports no error
    assert disk.count("unmap") == 0
    assert disk.contents() == pattern(MIB)
    # Zeros were asked for, so zeros are written, whoever does it.
    run("blkdiscard", "-f", "-z", device.device)
    assert disk.contents() == bytes(MIB)


def test_read_only(serve: Serve, tmp_path: Path) -> None:
    disk = MemoryDisk(16 * MIB)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(disk.size)
    run("mkfs.ext4", "-q", image)
    disk.fill(image.read_bytes())
    device = serve(disk, read_only=True)
    assert run("blockdev", "--getro", device.device).stdout.strip() == "1"
    with Direct(device.device, os.O_RDONLY) as opened:
        assert opened.read(1024, 1024) == disk.contents()[1024:2048]
    with pytest.raises(OSError, match=r"."), Direct(device.device) as opened:
        opened.write(0, bytes(4096))
    where = tmp_path / "mnt"
    where.mkdir()
    run("mount", "-o", "ro", device.device, where)
    run("umount", where)
    device.stop()
    assert {asked.what for asked in disk.asked} <= {"read", "flush"}


GPT = "label: gpt\nsize=4M, name=first\nsize=2M\nstart=12M, size=1M\n"
MBR = "label: dos\nsize=4M, type=83\nsize=8M, type=5\nsize=1M, type=83\nsize=2M\nsize=1M\n"


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize(
    ("script", "numbers"), [(GPT, [1, 2, 3]), (MBR, [1, 2, 3, 4, 5])], ids=["gpt", "mbr"]
)
def test_partitions_are_there_when_start_returns(
    serve: Serve, sector_size: int, script: str, numbers: list[int]
) -> None:
    disk = MemoryDisk(32 * MIB)
    blank = serve(disk, sector_size=sector_size)
    assert run("blockdev", "--getss", blank.device).stdout.strip() == str(sector_size)
    assert nodes.partitions(blank.kernel_name) == []
    # sfdisk asks the device for its sector size.
    run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", blank.device, input=script)
    blank.stop()

    disk.asked.clear()
    device = serve(disk, sector_size=sector_size)
    found = nodes.partitions(device.kernel_name)
    assert [node.number for node in found] == numbers
    assert found[0].size == 4 * MIB
    for node in found:
        assert os.stat(node.path).st_rdev == node.rdev
    links = nodes.make_links(f"vmtest{os.getpid()}-", device.kernel_name)
    try:
        assert [Path(link).name.rpartition("-p")[2] for link in links[1:]] == list(
            map(str, numbers)
        )
        part = found[0]
        with Direct(links[1]) as opened:
            opened.write(0, pattern(4096))
        assert disk.contents()[part.start : part.start + 4096] == pattern(4096)
    finally:
        nodes.remove_links(f"vmtest{os.getpid()}-", device.kernel_name)
    assert not any(os.path.lexists(link) for link in links)
    assert os.path.exists(device.device)


def test_two_at_once(serve: Serve) -> None:
    disks = [MemoryDisk(8 * MIB) for _ in range(2)]
    devices = [serve(disk) for disk in disks]
    assert devices[0].device != devices[1].device
    writers = [
        subprocess.Popen(
            ["dd", "if=/dev/urandom", f"of={device.device}", "bs=64k", "count=128", "conv=fsync"],
            stderr=subprocess.DEVNULL,
        )
        for device in devices
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert disks[0].contents() != disks[1].contents()
    devices[0].stop()
    with Direct(devices[1].device) as opened:
        assert opened.read(0, MIB) == disks[1].contents()[:MIB]


def test_the_served_file_is_in_nobodys_way(serve: Serve) -> None:
    device = serve(MemoryDisk(MIB))
    assert f"{device.disk_name}.fuse" not in mount_points()
    assert (loop.backing_file(device.kernel_name) or "").startswith("/virtmount:test")
    assert device.device not in {os.readlink(f"/proc/self/fd/{fd}") for fd in open_files()}


def open_files() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def test_errors_of_the_disk_reach_the_users(serve: Serve) -> None:
    disk = MemoryDisk(MIB)
    device = serve(disk)
    disk.fail = {"write": OSError(errno.EIO, "broken"), "flush": ValueError("a bug")}
    with Direct(device.device) as opened:
        with pytest.raises(OSError, match=r".") as caught:
            opened.write(0, bytes(4096))
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match=r".") as caught:
            os.fsync(opened.fd)
        assert caught.value.errno == errno.EIO
        disk.fail = {}
        opened.write(0, pattern(4096))
        os.fsync(opened.fd)
    assert disk.contents()[:4096] == pattern(4096)


def test_what_is_cached_is_written_at_the_end(serve: Serve) -> None:
    disk = MemoryDisk(MIB)
    device = serve(disk)
    fd = os.open(device.device, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(fd, pattern(65536), 4096)
        assert disk.count("write") == 0
        device.stop()  # in use, so it is taken away
        assert disk.contents()[4096 : 4096 + 65536] == pattern(65536)
        with pytest.raises(OSError, match=r".") as caught:
            os.pread(fd, 4096, 512 * 1024)
        assert caught.value.errno == errno.EIO
    finally:
        os.close(fd)
    assert nodes.wait_until(lambda: is_gone(device), 10)


def test_an_error_while_writing_the_cache_is_told_at_the_end(serve: Serve) -> None:
    disk = MemoryDisk(MIB)
    device = serve(disk)
    fd = os.open(device.device, os.O_RDWR | os.O_CLOEXEC)
    os.pwrite(fd, pattern(4096), 0)
    disk.fail = {"write": OSError(errno.ENOSPC, "full")}
    threading.Timer(0.2, os.close, (fd,)).start()
    with pytest.raises(OSError, match=r"."):
        device.stop()


def test_stop_under_load_leaves_nothing(serve: Serve) -> None:
    disk = MemoryDisk(32 * MIB)
    device = serve(disk)
    load = subprocess.Popen(
        [
            "fio",
            "--name=load",
            f"--filename={device.device}",
            "--rw=randrw",
            "--bs=4k-64k",
            "--iodepth=16",
            "--ioengine=libaio",
            "--direct=1",
            "--time_based",
            "--runtime=30",
            "--thread",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert nodes.wait_until(lambda: disk.count("write") > 100, 20)
        device.stop()
        assert load.wait(20) != 0
    finally:
        load.kill()
        load.wait()
    asked = len(disk.asked)
    assert nodes.wait_until(lambda: is_gone(device), 10)
    assert len(disk.asked) == asked


def test_requests_under_way_end_with_data_before_stop_returns(serve: Serve) -> None:
    disk = MemoryDisk(MIB)
    disk.fill(pattern(MIB))
    device = serve(disk)
    disk.asked.clear()
    disk.go_on.clear()
    got: list[bytes] = []

    def read() -> None:
        with Direct(device.device) as opened:
            got.append(opened.read(0, 65536))

    reader = threading.Thread(target=read)
    reader.start()
    assert nodes.wait_until(lambda: disk.count("read") > 0, 10)
    threading.Timer(0.3, disk.go_on.set).start()
    device.stop()
    reader.join(10)
    assert got == [pattern(MIB)[:65536]]


def test_taken_away_by_somebody_else(serve: Serve) -> None:
    device = serve(MemoryDisk(MIB))
    assert not device.wait_gone(0)
    run("losetup", "--detach", device.device)
    assert device.wait_gone(10)
    device.stop()


def test_another_programs_file_on_the_same_number_is_left_alone(
    serve: Serve, tmp_path: Path
) -> None:
    device = serve(MemoryDisk(MIB))
    run("losetup", "--detach", device.device)
    assert device.wait_gone(10)
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    run("losetup", device.device, image)
    try:
        device.stop()
        clear_orphan(device.device, device.disk_name)
        assert loop.backing_file(device.kernel_name) == str(image)
    finally:
        run("losetup", "--detach", device.device)


SERVER = """
import sys, threading
from tests.device.memory import MemoryDisk
from virtmount.fuse import Fuse

device = Fuse(MemoryDisk(1 << 20), sys.argv[1])
print(device.start(), flush=True)
threading.Event().wait()
"""


def test_a_killed_server_leaves_errors_and_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRTMOUNT_RUN", str(tmp_path))
    name = f"killed{os.getpid()}"
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, name], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert server.stdout
    device = server.stdout.readline().strip()
    assert device.startswith("/dev/loop")
    # Dirty pages in the cache of the device: whoever closes it last has to write them.
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    os.pwrite(fd, pattern(65536), 0)
    server.send_signal(signal.SIGKILL)
    assert server.wait(20) == -signal.SIGKILL
    server.stdout.close()
    with pytest.raises(OSError, match=r".") as caught:
        os.fsync(fd)
    assert caught.value.errno == errno.EIO
    os.close(fd)
    with pytest.raises(OSError, match=r"."), Direct(device) as opened:
        opened.read(0, 4096)
    assert str(tmp_path) not in mount_points()
    clear_orphan(device, "another")
    assert loop.backing_file(os.path.basename(device)) == f"/virtmount:{name}"
    clear_orphan(device, name)
    assert loop.backing_file(os.path.basename(device)) != f"/virtmount:{name}"
    assert list(tmp_path.iterdir()) == []


def test_a_mount_that_a_killed_server_left_is_replaced(serve: Serve, tmp_path: Path) -> None:
    """Killed between mount and detach: only then is a mount left."""
    stale = tmp_path / "run" / f"test{os.getpid()}-0.fuse"
    stale.mkdir()
    run("mount", "-t", "tmpfs", "none", stale)
    device = serve(MemoryDisk(MIB))
    with Direct(device.device) as opened:
        assert opened.read(0, 512) == bytes(512)


WITHOUT_FUSE = """
import sys
from tests.device.memory import MemoryDisk
from virtmount.errors import NoTransport
from virtmount.fuse import Fuse

try:
    Fuse(MemoryDisk(1 << 20), sys.argv[1]).start()
except NoTransport as error:
    print(error.text, error.hint)
"""


def test_a_kernel_without_fuse_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRTMOUNT_RUN", str(tmp_path))
    hide = 'mount --bind /dev/null /dev/fuse && exec "$@"'
    done = run(
        *("unshare", "--mount", "sh", "-c", hide, "sh"),
        *(sys.executable, "-c", WITHOUT_FUSE, f"hidden{os.getpid()}"),
        cwd=ROOT,
    )
    assert "could not be mounted" in done.stdout
    assert "modprobe fuse" in done.stdout
    assert list(tmp_path.iterdir()) == []
