"""The kernel's loop driver: under a FUSE file, and alone for flat images.

Source: linux/loop.h and drivers/block/loop.c.  LOOP_CONFIGURE (5.8) sets everything in one step,
scan of the partition table included.

A flat image on a loop device has no process of ours.  What that means:

- The lock.  Our lock is held by the *open file*, and LOOP_CONFIGURE takes a reference to that very
  open file: the lock outlives us and goes when the loop device lets go of the file.
- The metadata.  A loop device writes guest data and nothing else, so what a format asks of every
  writer (new identifiers in a VHDX header, say) is written before the device exists, and the image
  is closed as if it had been written and finished.  Attaching such an image for writing therefore
  counts as writing to it.  After a crash there is nothing to replay and nothing to clean.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from virtmount import hostfile, nodes, state
from virtmount.disk import Disk
from virtmount.errors import Busy, Denied, NoTransport, Unsupported
from virtmount.image import Image
from virtmount.transport import Transport

CONTROL = "/dev/loop-control"
_CONTROL_MINOR = 237  # devices.txt

_CLR_FD, _SET_STATUS64, _GET_STATUS64, _CONFIGURE = 0x4C01, 0x4C04, 0x4C05, 0x4C0A
_CTL_GET_FREE = 0x4C82
READ_ONLY, AUTOCLEAR, PARTSCAN, DIRECT_IO = 1, 4, 8, 16  # LO_FLAGS_*

# struct loop_info64: device, inode, rdevice, offset, size limit, number, three of encryption's
# remains with the flags behind them, name of the file, name and key of a cipher, two spare.
_INFO = struct.Struct("=5Q4I64s64s32s2Q")
# struct loop_config: file descriptor, block size, the info, eight spare.
_CONFIG = struct.Struct(f"=II{_INFO.size}s8Q")
assert _INFO.size == 232
assert _CONFIG.size == 304

_ABSENT = (errno.ENOENT, errno.ENODEV, errno.ENXIO)
TRIES = 64  # between GET_FREE and CONFIGURE somebody else may take the device
GONE_TIMEOUT = 2.0  # how long a program may have the device open after it was cleared


class Status(NamedTuple):
    """A loop device in use; `device`, `inode` and `rdevice` as os.stat has them for the file."""

    device: int
    inode: int
    rdevice: int
    offset: int
    size_limit: int
    flags: int

    @property
    def file_id(self) -> str:
        """As state.file_id gives it for the same file."""
        return f"block:{self.rdevice}" if self.rdevice else f"{self.device}:{self.inode}"


def configure(
    fd: int,
    *,
    offset: int = 0,
    size: int = 0,
    block_size: int = 512,
    read_only: bool = False,
    direct_io: bool = False,
    label: str = "",
) -> str:
    """Put an open file on a free loop device and scan its partitions; returns /dev/loopN.

    `size` 0: to the end of the file.  The lock on the open file stays as long as the device.
    The driver turns direct_io off by itself where the file cannot.  Other threads run meanwhile:
    the file may be served by this process.
    """
    flags = PARTSCAN | (READ_ONLY if read_only else 0) | (DIRECT_IO if direct_io else 0)
    name = os.fsencode(label)[:63]
    info = _INFO.pack(0, 0, 0, offset, size, 0, 0, 0, flags, name, b"", b"", 0, 0)
    config = _CONFIG.pack(fd, block_size, info, *[0] * 8)
    with _descriptor(_open_control()) as control:
        for _ in range(TRIES):
            number = fcntl.ioctl(control, _CTL_GET_FREE)
            try:
                with _opened(f"loop{number}", writable=not read_only) as device:
                    # bytes, not a bytearray: the interpreter then lets go of its lock.
                    fcntl.ioctl(device, _CONFIGURE, config)
                    return f"/dev/loop{number}"
            except OSError as error:
                if error.errno not in _ABSENT and error.errno != errno.EBUSY:
                    raise
    raise Busy(CONTROL, "", f"another program took each of {TRIES} free loop devices")


def status(device: str) -> Status | None:
    """What is on a loop device; None if nothing.  Asks the file's own file system for it."""
    try:
        with _opened(os.path.basename(device)) as loop:
            return _status(loop)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise


def _status(loop: int) -> Status:
    fields = _INFO.unpack(fcntl.ioctl(loop, _GET_STATUS64, bytes(_INFO.size)))
    device, inode, rdevice, offset, size_limit = fields[:5]
    return Status(device, inode, rdevice, offset, size_limit, fields[8])


def backing_file(kernel_name: str) -> str | None:
    """The path of the file behind a loop device, as the kernel shows it; None if there is none."""
    try:
        return (nodes.SYS / kernel_name / "loop" / "backing_file").read_text().rstrip("\n")
    except OSError:
        return None


def device_of(device: int, inode: int) -> str | None:
    """The loop device, anybody's, on the file with this st_dev and st_ino; None if there is none.

    Found by the path that the kernel shows, so not if the file was renamed or its file system
    unmounted meanwhile.
    """
    for folder in sorted(nodes.SYS.glob("loop*/loop")):
        name = folder.parent.name
        with contextlib.suppress(OSError):
            found = os.stat(backing_file(name) or "")
            if (found.st_dev, found.st_ino) == (device, inode):
                return f"/dev/{name}"
    return None


def clear(device: str, file: str, timeout: float = GONE_TIMEOUT) -> bool:
    """Write out what is cached, take the file off the device, and wait until it is off.

    `file` is the file's path as backing_file() shows it, or its state.file_id: the number may
    long belong to another program's file, which is left alone.  False if somebody still had the
    device open after `timeout` seconds: the kernel takes the file off when the last one closes
    it.  OSError if what was cached could not be written; the file is taken off all the same.
    """
    kernel_name = os.path.basename(device)
    failed: OSError | None = None
    try:
        # The file cannot change while we have the device open.
        with _opened(kernel_name) as loop:
            shown = backing_file(kernel_name)
            if file != (shown if file.startswith("/") else _status(loop).file_id):
                return True
            try:
                os.fsync(loop)
            except OSError as error:
                failed = error
            fcntl.ioctl(loop, _CLR_FD)
    except OSError as error:
        if error.errno in _ABSENT:
            return True
        raise
    # Another program may take the device again at once, for another file.
    gone = nodes.wait_until(
        lambda: (now := backing_file(kernel_name)) is None or now != shown, timeout
    )
    if failed:
        raise failed
    return gone


@contextlib.contextmanager
def _descriptor(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened(kernel_name: str, *, writable: bool = False) -> Iterator[int]:
    """A descriptor of a loop device, by the kernel's name; its node is made if it is missing."""
    node = nodes.disk_node(kernel_name)
    if node is None:
        raise FileNotFoundError(errno.ENOENT, "no such loop device", f"/dev/{kernel_name}")
    nodes.make_node(node)
    mode = os.O_RDWR if writable else os.O_RDONLY
    with _descriptor(os.open(node.path, mode | os.O_CLOEXEC)) as fd:
        yield fd


def _open_control() -> int:
    nodes.provide_driver(CONTROL, "loop", _CONTROL_MINOR)
    try:
        return os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        raise Denied(
            CONTROL, "", "only root may create loop devices", hint="sudo virtmount …"
        ) from None
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        raise NoTransport(
            CONTROL,
            "",
            "this kernel has no loop driver",
            hint="modprobe loop, or boot a kernel that has it",
        ) from None


# The transport


def unsuitable(disk: Disk) -> str | None:
    """Why the loop driver alone cannot serve this disk, or None if it can."""
    image = disk.image
    if image.flat is None:
        return f"{image.variant or image.name} images need a translation of every offset"
    if len(disk.layers) > 1:
        return "the disk consists of several files"
    if image.files[0].writable and not disk.writable:
        return "the image cannot be written"
    if disk.cache == "writethrough":
        return "the loop driver cannot write through"
    if image.flat + disk.size > image.files[image.flat_file].size:
        return "the file ends before the disk does"
    return None


class Loop(Transport):
    """A flat image on a loop device.  The image may be closed once start() has returned."""

    name: ClassVar[str] = "loop"
    daemon: ClassVar[bool] = False

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._file_id = ""
        self.features = {}

    def start(self) -> str:
        disk = self._disk
        image = disk.image
        file = image.files[image.flat_file]
        reason = unsuitable(disk)
        if reason or image.flat is None:
            raise Unsupported(image.files[0], "", f"{reason}: not for --transport loop")
        _refuse_second(image)
        if disk.writable:
            finish_metadata(image)
        direct = disk.cache == "none"
        self._file_id = state.file_id(f"/proc/self/fd/{file.fd}")
        self.device = configure(
            file.fd,
            offset=image.flat,
            size=disk.size,
            block_size=disk.sector_size,
            read_only=not disk.writable,
            direct_io=direct,
            label=file.path.name,
        )
        try:
            base = image.flat
            nodes.show_partitions(
                self.kernel_name,
                lambda offset, length: file.pread_padded(base + offset, length),
                disk.size,
                disk.sector_size,
                scanned=True,
            )
            self.features = {"direct_io": _shows(self.kernel_name, "dio")}
        except BaseException:
            self.stop()
            raise
        return self.device

    def stop(self) -> None:
        """As detach().  The kernel cannot take a loop device away from its users."""
        if self.device:
            detach(self.device, self._file_id)

    def wait_gone(self, timeout: float | None = None) -> bool:
        shown = backing_file(self.kernel_name)
        return nodes.wait_until(
            lambda: (now := backing_file(self.kernel_name)) is None or now != shown,
            float("inf") if timeout is None else timeout,
        )


def detach(device: str, file_id: str) -> None:
    """Take a flat image off its loop device, from any process; harmless when it is off already.

    `file_id` is the image's (state.file_id), so that nobody else's device is taken down.

    Busy, and nothing is done, while it is mounted or part of another device.  Busy too if a
    program keeps it open: the kernel then takes the image off with the last close, and the image
    stays locked until then.
    """
    kernel_name = os.path.basename(device)
    found = status(device)
    if found is None or found.file_id != file_id:
        return
    users = [user for user in nodes.users(kernel_name) if user.kind != "open"]
    if users:
        raise Busy(device, "", "; ".join(map(str, users)))
    if not clear(device, file_id):
        who = "; ".join(map(str, nodes.users(kernel_name))) or "still open"
        raise Busy(device, "", who, hint="it is detached when the last user closes it")


def finish_metadata(image: Image) -> None:
    """Write what a session of writing leaves in the image's metadata, and make it durable."""
    plan = image.begin()
    if plan:
        hostfile.execute(plan, image.files)
    plan = image.end()
    if plan:
        hostfile.execute(plan, image.files)
    hostfile.sync_all(image.files)


def _refuse_second(image: Image) -> None:
    """Busy if somebody's loop device is on the file already: losetup takes no lock."""
    file = image.files[image.flat_file]
    found = os.fstat(file.fd)
    if other := device_of(found.st_dev, found.st_ino):
        raise Busy(file, "", f"already attached as {other}", hint=f"losetup --detach {other}")


def _shows(kernel_name: str, attribute: str) -> bool:
    with contextlib.suppress(OSError):
        return (nodes.SYS / kernel_name / "loop" / attribute).read_text().strip() == "1"
    return False
