"""Whole attaches, from the image that qemu-img made to the image that qemu-img checks.

Over ublk where this kernel has it, else over FUSE and loop; VIRTMOUNT_TEST_TRANSPORT says
otherwise.  In a machine with ublk:

    python3 -m tests.vm --kernel newest -- .venv/bin/pytest tests/device
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import virtmount
from tests.device.direct import Direct
from virtmount import nodes, state
from virtmount.attachment import Attachment
from virtmount.errors import Busy, NotAttached

pytestmark = pytest.mark.device

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("raw", "qcow2", "vhdx", "vdi")
DYNAMIC = ("qcow2", "vhdx", "vdi")
MARK = b"written before the flush"


def kernel_has_ublk() -> bool:
    command = ["modprobe", "--dry-run", "--quiet", "ublk_drv"]
    return Path("/dev/ublk-control").exists() or subprocess.run(command).returncode == 0


TRANSPORT = os.environ.get("VIRTMOUNT_TEST_TRANSPORT") or ("ublk" if kernel_has_ublk() else "fuse")
Attach = Callable[..., Attachment]


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return str(done.stdout)


def cli(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "virtmount", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def make(path: Path, format: str, size: int = 256 * MIB, *options: str) -> Path:
    run("qemu-img", "create", "-q", "-f", format, *options, path, str(size))
    return path


def check(path: Path, format: str) -> None:
    """The tool that made the image finds nothing to complain about, not even a leak."""
    if format != "raw":
        run("qemu-img", "check", "-q", "-f", format, path)


def contents(path: Path, format: str) -> str:
    """A hash of the disk, as qemu reads it."""
    raw = path.with_suffix(".contents")
    run("qemu-img", "convert", "-f", format, "-O", "raw", path, raw)
    return digest(raw)


def digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return digest_of(iter(lambda: file.read(MIB), b""))


def digest_of(pieces: bytes | bytearray | Iterable[bytes]) -> str:
    """A hash of the bytes that are not zeros, and of where they are.

    Disks are mostly empty, and an emulated machine is slow at hashing, not at comparing.
    """
    if isinstance(pieces, bytes | bytearray):
        whole = pieces
        pieces = (bytes(whole[at : at + MIB]) for at in range(0, len(whole), MIB))
    found = hashlib.blake2b()
    zeros = bytes(MIB)
    size = 0
    for piece in pieces:
        if piece != zeros[: len(piece)]:
            found.update(size.to_bytes(8, "big") + piece)
        size += len(piece)
    found.update(size.to_bytes(8, "big"))
    return found.hexdigest()


def pattern(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


def wait_for(path: str | Path) -> None:
    """Of a node or link that follows a new partition table."""
    assert nodes.wait_until(lambda: Path(path).exists(), 30), f"no {path}"


def wait_gone(pid: int) -> None:
    assert nodes.wait_until(lambda: state.start_time(pid) < 0, 60), f"process {pid} lives on"


@pytest.fixture
def attach() -> Iterator[Attach]:
    """Attach over the transport under test; afterwards nothing may be left of it."""
    disks: list[Attachment] = []

    def make(path: Path, **options: Any) -> Attachment:
        disks.append(virtmount.attach(path, **{"transport": TRANSPORT, **options}))
        return disks[-1]

    yield make
    for disk in disks:
        disk.detach()
    for disk in disks:
        assert not os.path.lexists(disk.path)
        assert not Path(f"/run/virtmount/{disk.name}.json").exists()
        if TRANSPORT == "ublk":
            assert not Path(disk.device).exists()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    mounted: list[Path] = []

    def mount(device: str, *options: str) -> Path:
        where = tmp_path / f"mnt{len(mounted)}"
        where.mkdir()
        run("mount", *options, device, where)
        mounted.append(where)
        return where

    yield mount
    for where in mounted:
        if os.path.ismount(where):
            run("umount", where)


MAKERS = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}


@pytest.mark.parametrize(
    ("format", "fs"), [("raw", "ext4"), ("qcow2", "xfs"), ("vhdx", "ext4"), ("vdi", "xfs")]
)
def test_disk_is_partitioned_formatted_mounted_and_found_again(
    attach: Attach, mount: Callable[..., Path], tmp_path: Path, format: str, fs: str
) -> None:
    image = make(tmp_path / f"disk.{format}", format, 384 * MIB)
    disk = attach(image)
    assert disk.partitions == []
    run("sfdisk", "--quiet", "--no-reread", disk.path, input="label: gpt\nsize=320M\nsize=16M\n")
    disk.detach()
    disk = attach(image)
    # No waiting: a partition that is there is there when attach returns.
    assert disk.partitions == [f"{disk.path}p1", f"{disk.path}p2"]
    run(*MAKERS[fs], disk.partitions[0])
    where = mount(disk.partitions[0])
    files = {f"file{n}": pattern(random.Random(n).randrange(1, MIB), n) for n in range(16)}
    for name, data in files.items():
        (where / name).write_bytes(data)
    os.sync()
    run("umount", where)
    seen = digest(disk.path)
    disk.detach()

    check(image, format)
    assert contents(image, format) == seen
    disk = attach(image, read_only=True)
    assert disk.partitions == [f"{disk.path}p1", f"{disk.path}p2"]
    where = mount(disk.partitions[0], "-o", "ro,norecovery" if fs == "xfs" else "ro")
    assert {name: (where / name).read_bytes() for name in files} == files
    run("umount", where)
    assert digest(disk.path) == seen
    disk.detach()
    assert contents(image, format) == seen


@pytest.mark.parametrize("format", FORMATS)
def test_requests_of_every_size_and_alignment(attach: Attach, tmp_path: Path, format: str) -> None:
    size = 24 * MIB
    image = make(tmp_path / "disk", format, size)
    shadow = bytearray(size)
    rng = random.Random(7)
    disk = attach(image, format=format)
    with Direct(disk.path) as device:
        lengths = [512, 4096, 65536, 65536 + 512, MIB, 4 * MIB]
        for turn in range(120):
            length = rng.choice([*lengths, rng.randrange(1, 2 * MIB // 512) * 512])
            offset = rng.randrange((size - length) // 512 + 1) * 512
            if turn % 3:
                data = rng.randbytes(length)
                device.write(offset, data)
                shadow[offset : offset + length] = data
            else:
                assert device.read(offset, length) == shadow[offset : offset + length]
        device.write(size - 512, bytes(512))
        shadow[size - 512 :] = bytes(512)
        with pytest.raises(OSError, match="No space left"):
            device.write(size, bytes(512))
    disk.detach()
    check(image, format)
    assert contents(image, format) == digest_of(shadow)


@pytest.mark.parametrize("format", DYNAMIC)
def test_fio_verifies_what_it_wrote_into_a_fresh_image(
    attach: Attach, tmp_path: Path, format: str
) -> None:
    image = make(tmp_path / "disk", format)
    disk = attach(image, format=format)
    run(
        *("fio", "--name=verify", f"--filename={disk.path}", "--rw=randwrite", "--direct=1"),
        *("--ioengine=libaio", "--iodepth=32", "--bsrange=512-128k", "--blockalign=512"),
        *("--size=64M", "--io_size=24M", "--verify=crc32c", "--verify_fatal=1", "--fsync=64"),
        *("--randseed=3", "--output-format=terse", "--verify_state_save=0"),
    )
    seen = digest(disk.path)
    disk.detach()
    check(image, format)
    assert contents(image, format) == seen


def test_parents_are_read_through_and_never_written(attach: Attach, tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(pattern(8 * MIB, 1))
    before = digest(base)
    middle = make(tmp_path / "middle.qcow2", "qcow2", 8 * MIB, "-b", "base.img", "-F", "raw")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x22 1M 64k", middle)
    top = make(tmp_path / "top.qcow2", "qcow2", 16 * MIB, "-b", "middle.qcow2", "-F", "qcow2")
    want = bytearray(pattern(8 * MIB, 1) + bytes(8 * MIB))
    want[MIB : MIB + 65536] = b"\x22" * 65536
    disk = attach(top)
    with Direct(disk.path) as device:
        assert device.read(0, 16 * MIB) == want
        for offset in (512, MIB + 4096, 3 * MIB - 512, 7 * MIB, 12 * MIB):
            device.write(offset, b"\x33" * 1536)
            want[offset : offset + 1536] = b"\x33" * 1536
        assert device.read(0, 16 * MIB) == want
    disk.detach()
    check(top, "qcow2")
    assert contents(top, "qcow2") == digest_of(want)
    assert digest(base) == before


@pytest.mark.parametrize("format", FORMATS)
def test_read_only_disk_takes_no_writes_and_leaves_the_file_alone(
    attach: Attach, tmp_path: Path, format: str
) -> None:
    image = make(tmp_path / "disk", format, 16 * MIB)
    before = digest(image)
    disk = attach(image, format=format, read_only=True)
    assert (nodes.SYS / os.path.basename(disk.device) / "ro").read_text() == "1\n"
    with pytest.raises(OSError) as caught, Direct(disk.path) as device:  # noqa: PT011
        device.write(0, bytes(512))
    assert caught.value.errno in (errno.EPERM, errno.EACCES, errno.EROFS)
    with Direct(disk.path, os.O_RDONLY) as device:
        assert device.read(0, MIB) == bytes(MIB)
    disk.detach()
    assert digest(image) == before


@pytest.mark.parametrize("format", DYNAMIC)
def test_discarded_space_reads_as_zeros_and_is_given_back(
    attach: Attach, tmp_path: Path, format: str
) -> None:
    image = make(tmp_path / "disk", format, 64 * MIB)
    disk = attach(image, format=format)
    queue = nodes.SYS / os.path.basename(disk.device) / "queue"
    can_discard = int((queue / "discard_max_bytes").read_text()) > 0
    with Direct(disk.path) as device:
        device.write(0, pattern(48 * MIB, 1))
        device.sync()
        full = image.stat().st_blocks
        run(
            "blkdiscard",
            "--zeroout",
            "--offset",
            str(MIB + 512),
            "--length",
            str(2 * MIB),
            disk.path,
        )
        if can_discard:
            run("blkdiscard", "--offset", str(8 * MIB), "--length", str(32 * MIB), disk.path)
        want = bytearray(pattern(48 * MIB, 1))
        want[MIB + 512 : 3 * MIB + 512] = bytes(2 * MIB)
        if can_discard:
            want[8 * MIB : 40 * MIB] = bytes(32 * MIB)
        assert device.read(0, 48 * MIB) == want
        device.sync()
    disk.detach()
    check(image, format)
    if can_discard:
        assert image.stat().st_blocks < full - 24 * MIB // 512
    assert contents(image, format) == digest_of(want + bytes(16 * MIB))


def test_two_disks_at_once(attach: Attach, tmp_path: Path) -> None:
    images = [make(tmp_path / f"disk{n}.vdi", "vdi", 32 * MIB) for n in range(2)]
    disks = [attach(image) for image in images]
    assert disks[0].name != disks[1].name
    assert disks[0].device != disks[1].device
    data = [pattern(16 * MIB, n) for n in range(2)]

    def write(n: int) -> None:
        with Direct(disks[n].path) as device:
            for at in range(0, 16 * MIB, MIB):
                device.write(at, data[n][at : at + MIB])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    disks[0].detach()
    with Direct(disks[1].path) as device:
        assert device.read(0, 16 * MIB) == data[1]
    disks[1].detach()
    for n in range(2):
        assert contents(images[n], "vdi") == digest_of(data[n] + bytes(16 * MIB))


def test_image_in_use_is_refused_both_ways(attach: Attach, tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", "qcow2")
    attach(image)
    with pytest.raises(Busy, match="in use by another program"):
        attach(image)
    with pytest.raises(Busy):
        attach(image, read_only=True)
    done = subprocess.run(
        ["qemu-io", "-c", "write 0 512", image], capture_output=True, text=True, timeout=60
    )
    assert done.returncode
    assert "lock" in done.stderr


def test_detach_of_a_disk_in_use_is_refused_and_names_the_use(
    attach: Attach, mount: Callable[..., Path], tmp_path: Path
) -> None:
    image = make(tmp_path / "disk.vhdx", "vhdx")
    disk = attach(image)
    run("mkfs.ext4", "-q", disk.path)
    where = mount(disk.path)
    done = cli("detach", disk.path)
    assert done.returncode == 5
    kernel_name = os.path.basename(disk.device)
    assert done.stderr == (
        f"virtmount: {disk.path}: {kernel_name} is mounted at {where}\nhint: umount {where}\n"
    )
    (where / "file").write_bytes(MARK)
    run("umount", where)
    with open(disk.path, "rb"):
        # This process does not count to itself, but another one sees it.
        done = cli("detach", str(image))
        assert done.returncode == 5
        assert f"{kernel_name} is open in " in done.stderr
        assert f"(process {os.getpid()})" in done.stderr
    done = cli("detach", str(image))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with pytest.raises(NotAttached):
        state.find(image)
    check(image, "vhdx")


def load(path: str) -> subprocess.Popen[bytes]:
    """A program that keeps writing all over the disk's second half, until it gets an error."""
    program = (
        "import os, random, sys, mmap\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)\n"
        "page = mmap.mmap(-1, 65536)\n"
        "print('writing', flush=True)\n"
        "while True:\n"
        "    os.pwritev(fd, [page], 128 << 20 | random.randrange(2000) << 16)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline() == b"writing\n"
    return process


@pytest.mark.parametrize("format", DYNAMIC)
def test_sigterm_under_load_ends_in_order(attach: Attach, tmp_path: Path, format: str) -> None:
    image = make(tmp_path / "disk", format, 384 * MIB)
    disk = attach(image, format=format)
    with Direct(disk.path) as device:
        device.write(MIB, MARK.ljust(512))
        device.sync()
    loads = [load(disk.path) for _ in range(2)]
    device_pid = disk.record.pid
    assert nodes.wait_until(lambda: image.stat().st_blocks > 4 * MIB // 512, 60)
    os.kill(device_pid, signal.SIGTERM)
    wait_gone(device_pid)
    for process in loads:
        _, complaint = process.communicate(timeout=60)
        assert b"OSError" in complaint
    assert not os.path.lexists(disk.path)
    with pytest.raises(NotAttached):
        state.find(disk.name)
    check(image, format)
    again = attach(image, format=format, read_only=True)
    with Direct(again.path, os.O_RDONLY) as device:
        assert device.read(MIB, 512) == MARK.ljust(512)


def test_forced_detach_under_load_leaves_a_whole_image(attach: Attach, tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", "qcow2", 384 * MIB)
    disk = attach(image)
    process = load(disk.path)
    with pytest.raises(Busy, match="is open in"):
        disk.detach()
    disk.detach(force=True)
    process.communicate(timeout=60)
    check(image, "qcow2")


def test_killed_daemon_is_noticed_and_cleared_away(attach: Attach, tmp_path: Path) -> None:
    image = make(tmp_path / "disk.vdi", "vdi")
    disk = attach(image)
    pid = disk.record.pid
    os.kill(pid, signal.SIGKILL)
    wait_gone(pid)
    listed = json.loads(cli("list", "--json").stdout)["disks"]
    assert [entry["state"] for entry in listed if entry["name"] == disk.name] == ["dead"]
    done = cli("detach", disk.path)
    assert done.returncode == 0
    assert "its process had been killed" in done.stderr
    assert not os.path.lexists(disk.path)
    again = attach(image)
    assert again.name == disk.name
    with Direct(again.path) as device:
        device.write(0, MARK.ljust(512))
        assert device.read(0, 512) == MARK.ljust(512)


def is_capable(capability: int) -> bool:
    text = re.search(r"CapEff:\s+(\w+)", Path("/proc/self/status").read_text())
    assert text
    return bool(int(text[1], 16) >> capability & 1)


def test_serving_process_cannot_wait_on_its_own_disk(attach: Attach, tmp_path: Path) -> None:
    disk = attach(make(tmp_path / "disk.qcow2", "qcow2"))
    proc = Path("/proc") / str(disk.record.pid)
    able = is_capable(24)  # CAP_SYS_RESOURCE, which root lacks in some containers
    for task in (proc / "task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        # PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE (linux/sched.h), of every thread.
        flags = int(fields[6]) & 0x180000
        assert flags == (0x180000 if able else 0), (task / "comm").read_text()
    assert (proc / "oom_score_adj").read_text() == ("-1000\n" if able else "0\n")
    locked = re.search(r"VmLck:\s+(\d+) kB", (proc / "status").read_text())
    assert locked
    assert int(locked[1]) > 4096
    assert os.readlink(proc / "ns/mnt") != os.readlink("/proc/self/ns/mnt")
    assert os.getsid(disk.record.pid) != os.getsid(0)
    assert {os.readlink(proc / f"fd/{fd}") for fd in range(3)} == {os.devnull}


def test_disk_mounted_before_can_be_taken_away_while_a_later_one_is_served(
    attach: Attach, mount: Callable[..., Path], tmp_path: Path
) -> None:
    """The second daemon's mount namespace must not keep the first disk's file system mounted."""
    first = attach(make(tmp_path / "first.vdi", "vdi"))
    run("mkfs.ext4", "-q", first.path)
    where = mount(first.path)
    attach(make(tmp_path / "second.vdi", "vdi"))
    run("umount", where)
    first.detach()


def test_foreground_serves_until_interrupted(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.vhdx", "vhdx")
    words = ["attach", "--foreground", "--transport", TRANSPORT, str(image)]
    command = [sys.executable, "-m", "virtmount", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    path = process.stdout.readline().strip()
    with Direct(path) as device:
        device.write(0, MARK.ljust(512))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert not os.path.lexists(path)
    check(image, "vhdx")
    want = MARK.ljust(512) + bytes(256 * MIB - 512)
    assert contents(image, "vhdx") == digest_of(want)


def test_command_line_prints_the_device_alone_and_lists_it(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.vdi", "vdi")
    done = cli("attach", "--transport", TRANSPORT, image)
    assert (done.returncode, done.stderr) == (0, "")
    path = done.stdout.strip()
    assert re.fullmatch(r"/dev/vdi\d+", path)
    try:
        listed = cli("list", "-n", "-o", "TRANSPORT,RO,SIZE,IMAGE").stdout
        assert f"{TRANSPORT} 0 256M {image}" in " ".join(listed.split())
        described = json.loads(cli("info", "--json", path).stdout)
        assert described["format"] == "vdi"
        assert described["state"] == "in use"
        assert [disk["path"] for disk in described["attached"]] == [path]
    finally:
        assert cli("detach", image).returncode == 0
    assert cli("list").stdout == ""


def test_full_host_file_system_is_an_error_of_the_write_and_no_more(
    attach: Attach, tmp_path: Path
) -> None:
    where = tmp_path / "small"
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=8M", "none", where)
    try:
        # A VDI's map is in the file from the beginning, so that only guest data lacks space.
        image = make(where / "disk.vdi", "vdi")
        disk = attach(image)
        with pytest.raises(OSError, match=r"No space left|Input/output"):
            write_all(disk, 32 * MIB)
        with Direct(disk.path) as device:
            assert device.read(2 * MIB, MIB) == pattern(MIB, 2 * MIB)
        disk.detach()
        check(image, "vdi")
        run("qemu-io", "-r", "-f", "vdi", "-c", f"read {MIB} {MIB}", image)
    finally:
        run("umount", where)


def write_all(disk: Attachment, length: int) -> None:
    with Direct(disk.path) as device:
        for at in range(0, length, MIB):
            device.write(at, pattern(MIB, at))


ONLY_UBLK = pytest.mark.skipif(TRANSPORT != "ublk", reason="about the ublk driver")


@ONLY_UBLK
@pytest.mark.parametrize("format", FORMATS)
def test_limits_that_the_kernel_was_told(attach: Attach, tmp_path: Path, format: str) -> None:
    disk = attach(make(tmp_path / "disk", format), format=format)
    queue = nodes.SYS / os.path.basename(disk.device) / "queue"
    told = {
        name: (queue / name).read_text().strip()
        for name in (
            *("logical_block_size", "physical_block_size", "minimum_io_size", "write_cache"),
            *("fua", "max_hw_sectors_kb", "scheduler", "rotational"),
        )
    }
    # qemu-img records physical sectors of 512 bytes in a VHDX; the others record none.
    physical = "512" if format == "vhdx" else "4096"
    assert told == {
        "logical_block_size": "512",
        "physical_block_size": physical,
        "minimum_io_size": physical,
        "write_cache": "write back",
        "fua": "1",
        "max_hw_sectors_kb": "1024",
        "scheduler": told["scheduler"],
        "rotational": "0",
    }
    assert "[none]" in told["scheduler"]


@ONLY_UBLK
def test_writethrough_has_no_cache_that_could_be_lost(attach: Attach, tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", "qcow2")
    disk = attach(image, cache="writethrough")
    queue = nodes.SYS / os.path.basename(disk.device) / "queue"
    assert (queue / "write_cache").read_text() == "write through\n"
    with Direct(disk.path) as device:
        device.write(MIB, MARK.ljust(512))
        # No flush: what a power cut now would leave.
        copy = tmp_path / "copy.qcow2"
        copy.write_bytes(image.read_bytes())
    run("qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {ord(' ')} {MIB + 256} 256", copy)


@ONLY_UBLK
def test_device_taken_away_by_somebody_else_ends_the_daemon(attach: Attach, tmp_path: Path) -> None:
    from virtmount.ublk import features

    image = make(tmp_path / "disk.vhdx", "vhdx")
    disk = attach(image)
    with Direct(disk.path) as device:
        device.write(0, MARK.ljust(512))
    with features.open_control() as control:
        control.stop(disk.record.features["device_id"])
    wait_gone(disk.record.pid)
    with pytest.raises(NotAttached):
        state.find(disk.name)
    check(image, "vhdx")
    want = MARK.ljust(512) + bytes(256 * MIB - 512)
    assert contents(image, "vhdx") == digest_of(want)


@ONLY_UBLK
def test_partitions_are_there_whenever_attach_returns(attach: Attach, tmp_path: Path) -> None:
    image = make(tmp_path / "disk.img", "raw", 16 * MIB)
    run("sfdisk", "--quiet", image, input="size=4M\nsize=4M\n")
    for _ in range(5):
        disk = attach(image, read_only=True)
        assert [Path(path).exists() for path in disk.partitions] == [True, True]
        with open(disk.partitions[1], "rb") as file:
            fcntl.ioctl(file, 0x1260, bytes(8))  # BLKGETSIZE: it is a block device
        disk.detach()


@ONLY_UBLK
def test_links_follow_a_new_partition_table(attach: Attach, tmp_path: Path) -> None:
    disk = attach(make(tmp_path / "disk.vdi", "vdi"))
    run("sfdisk", "--quiet", disk.path, input="size=4M\nsize=4M\n")
    for number in (1, 2):
        wait_for(f"{disk.path}p{number}")
    run("sfdisk", "--quiet", "--delete", disk.path, "2")
    assert nodes.wait_until(lambda: not os.path.lexists(f"{disk.path}p2"), 30)
    assert Path(f"{disk.path}p1").exists()


def test_time_of_an_attach(attach: Attach, tmp_path: Path) -> None:
    """Not a benchmark: a hang of seconds in a step that should not wait."""
    image = make(tmp_path / "disk.vdi", "vdi")
    attach(image).detach()
    before = time.monotonic()
    attach(image).detach()
    assert time.monotonic() - before < 30


def test_doctor_finds_this_transport_usable() -> None:
    done = cli("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["transports"][TRANSPORT] is True
