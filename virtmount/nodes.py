"""Device nodes: the kernel's partitions of a disk, our names for them in /dev, and who uses them.

What exists is read from sysfs, which is right in every mount namespace and whether or not
devtmpfs or udev are there.  What changes is announced by the kernel's uevents; they only wake us
up to look again, so one that is lost costs a fraction of a second and nothing else.

Ours are: links /dev/NAME and /dev/NAMEpN, which point at the kernel's nodes; where nobody else
made them (no devtmpfs, a container), the kernel's nodes themselves; and, under a kernel that was
built without a reader for the disk's partition table, the partitions.  Anything else in /dev is
never replaced and never removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import re
import select
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from virtmount.errors import Busy
from virtmount.partition import Read, Table, read_table

DEV = Path("/dev")
SYS = Path("/sys/block")
PROC = Path("/proc")

_KOBJECT_UEVENT = 15  # NETLINK_KOBJECT_UEVENT (linux/netlink.h); group 1 is the kernel's
_LOOK_AGAIN = 0.1  # seconds, should a uevent have been lost
_LOOK_AGAIN_BLIND = 0.005  # where there are no uevents for us at all
_SCAN_TIMEOUT = 5.0
_BLKPG, _BLKPG_ADD_PARTITION = 0x1269, 1  # linux/blkpg.h
_OUR_TARGET = re.compile(r"(?:ublkb|loop)\d+(?:p\d+)?")

log = logging.getLogger("virtmount")


@dataclass(frozen=True, slots=True)
class Node:
    """A disk (number 0) or a partition as the kernel has it; `start` and `size` are bytes."""

    kernel_name: str
    number: int
    major: int
    minor: int
    start: int
    size: int

    @property
    def path(self) -> str:
        return str(DEV / self.kernel_name)

    @property
    def rdev(self) -> int:
        return os.makedev(self.major, self.minor)


def disk_node(kernel_name: str) -> Node | None:
    """The disk itself, or None if the kernel has none of that name."""
    return _node(SYS / kernel_name, 0)


def partitions(kernel_name: str) -> list[Node]:
    """The partitions that the kernel has of a disk now, by number."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(SYS / kernel_name):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # not one, or gone
                number = int((Path(entry.path) / "partition").read_text())
                node = _node(Path(entry.path), number)
                if node is not None:
                    found.append(node)
    return sorted(found, key=lambda node: node.number)


def _node(folder: Path, number: int) -> Node | None:
    try:
        major, minor = map(int, (folder / "dev").read_text().split(":"))
        size = int((folder / "size").read_text()) * 512  # sysfs counts in 512s, always
        start = int((folder / "start").read_text()) * 512 if number else 0
    except FileNotFoundError:
        return None
    return Node(folder.name, number, major, minor, start, size)


# Waiting


class Uevents:
    """The kernel's announcements of devices that come, change and go.

    Open it before the first look: what happens after that wakes wait().  Without the right to
    listen (a container's network namespace) wait() is a short pause.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        with contextlib.suppress(OSError):
            self._socket = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                _KOBJECT_UEVENT,
            )
            self._socket.bind((0, 1))

    def __enter__(self) -> Uevents:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def wait(self, seconds: float) -> None:
        """Return after an announcement or soon after, at the latest after `seconds`."""
        if self._socket is None:
            time.sleep(min(seconds, _LOOK_AGAIN_BLIND))
            return
        select.select([self._socket], [], [], max(0.0, min(seconds, _LOOK_AGAIN)))
        # One look is enough for all that has been announced.  ENOBUFS means that some were lost.
        while True:
            try:
                if not self._socket.recv(1 << 16):
                    return
            except BlockingIOError:
                return
            except OSError:
                continue


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Look until `condition` holds; False after `timeout` seconds."""
    end = time.monotonic() + timeout
    with Uevents() as uevents:
        while not condition():
            left = end - time.monotonic()
            if left <= 0:
                return False
            uevents.wait(left)
    return True


def show_partitions(
    kernel_name: str,
    read: Read,
    size: int,
    sector_size: int,
    *,
    scanned: bool,
    timeout: float = _SCAN_TIMEOUT,
) -> list[Node]:
    """See to it that the partitions of a new disk are there, and their nodes in /dev.

    `read` reads the disk, not through the device.  `scanned`: the kernel has ended its scan
    (LOOP_CONFIGURE, BLKRRPART), else it is waited for.  Returns the kernel's partitions; what
    it reads otherwise than we do is its business and no error.
    """
    table = read_table(read, size, sector_size)
    expected = table.kernel_numbers(size) if table else frozenset()

    def complete() -> bool:
        return expected <= {node.number for node in partitions(kernel_name)}

    if not scanned:
        wait_until(complete, timeout)
    if table is not None and expected and not partitions(kernel_name):
        _add_partitions(kernel_name, table, expected)
    return wait_partitions(kernel_name, timeout)


def wait_partitions(kernel_name: str, timeout: float = _SCAN_TIMEOUT) -> list[Node]:
    """Wait until every node that the kernel has is in /dev, and udev has done its part.

    Nodes that nobody makes within the time are made here.  Returns the partitions.
    """
    if _is_managed():
        wait_until(lambda: not missing_nodes(kernel_name), timeout)
    for node in missing_nodes(kernel_name):
        make_node(node)
    _settle(timeout)
    return partitions(kernel_name)


class _BlkpgPartition(ctypes.Structure):  # linux/blkpg.h
    _fields_ = (
        ("start", ctypes.c_longlong),  # bytes
        ("length", ctypes.c_longlong),
        ("number", ctypes.c_int),
        ("unused", ctypes.c_char * 128),
    )


class _BlkpgArgument(ctypes.Structure):
    _fields_ = (
        ("operation", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("length", ctypes.c_int),
        ("data", ctypes.c_void_p),
    )


def _add_partitions(kernel_name: str, table: Table, numbers: Collection[int]) -> None:
    """Tell the kernel what its own scan would have found, had it been built to read this table.

    Not for a kernel that found something: it has then read the table, and knows better.
    """
    disk = disk_node(kernel_name)
    assert disk is not None
    make_node(disk)
    fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for partition in table.partitions:
            if partition.number not in numbers:
                continue
            length = min(partition.size, disk.size - partition.start)
            if partition.is_extended:
                # As the kernel shows it: without the logical partitions in it, which it would
                # overlap, and too short for a file system.
                length = min(length, max(table.sector_size, 1024))
            added = _BlkpgPartition(partition.start, length, partition.number)
            argument = _BlkpgArgument(
                _BLKPG_ADD_PARTITION,
                0,
                ctypes.sizeof(added),
                ctypes.cast(ctypes.pointer(added), ctypes.c_void_p),
            )
            try:
                fcntl.ioctl(fd, _BLKPG, bytes(argument))
            except OSError as error:  # overlapping ones, as a scan would leave out
                log.warning("%s: partition %d: %s", disk.path, partition.number, error.strerror)
    finally:
        os.close(fd)


def _is_managed() -> bool:
    """Whether somebody else makes nodes in /dev: the kernel (devtmpfs) or a udev of old."""
    return _mount_type(DEV) == "devtmpfs" or (Path("/run/udev/control")).exists()


def _mount_type(folder: Path) -> str:
    """The file system type of the mount that is topmost at `folder`, or an empty string."""
    kind = ""
    for mount in _mounts("self"):
        if mount.point == str(folder):
            kind = mount.type
    return kind


def _settle(timeout: float) -> None:
    """Let udev finish what it has in hand: permissions, and the links in /dev/disk."""
    udevadm = shutil.which("udevadm")
    if udevadm is None or not Path("/run/udev/control").exists():
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            [udevadm, "settle", f"--timeout={max(1, int(timeout))}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=timeout + 1,
            check=False,
        )


# Nodes and links


def provide_driver(path: str, module: str, minor: int) -> None:
    """See to it that a driver's control node (of the misc class) is there, if it can be.

    The module is loaded first; the node is made where nobody else does that.
    """
    if os.path.exists(path):
        return
    modprobe = shutil.which("modprobe")
    if modprobe:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                [modprobe, "-q", module],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=30,
                check=False,
            )
    known = Path("/sys/class/misc") / os.path.basename(path) / "dev"
    with contextlib.suppress(OSError):
        if known.read_text().strip() == f"10:{minor}":
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(10, minor))


def missing_nodes(kernel_name: str) -> list[Node]:
    """What the kernel has and /dev has not, or has with another number."""
    disk = disk_node(kernel_name)
    nodes = ([disk] if disk else []) + partitions(kernel_name)
    return [node for node in nodes if _rdev(node.path) != node.rdev]


def make_node(node: Node) -> bool:
    """Make the kernel's node in /dev if it is not there; whether it was made.

    A node of that name with another number is a leftover of a device that is gone: the kernel
    gives a name to one device only.
    """
    found = _rdev(node.path)
    if found == node.rdev:
        return False
    if found is not None:
        os.unlink(node.path)
    try:
        os.mknod(node.path, stat.S_IFBLK | 0o660, node.rdev)
    except FileExistsError:
        return False
    return True


def make_links(name: str, kernel_name: str) -> list[str]:
    """Make /dev/NAME and /dev/NAMEpN for what the kernel has now, and its own nodes if need be.

    May be repeated, after a new scan for instance: links to partitions that are gone are removed.
    Returns the links, the disk's first.  Busy if a name is taken by something else; then what was
    made is removed again.
    """
    for node in missing_nodes(kernel_name):
        make_node(node)
    wanted = {name: kernel_name}
    for node in partitions(kernel_name):
        wanted[f"{name}p{node.number}"] = node.kernel_name
    for link in _links(name, kernel_name):
        if link.name not in wanted:
            _unlink(link)
    try:
        for link_name, target in wanted.items():
            _make_link(DEV / link_name, target)
    except BaseException:
        remove_links(name, kernel_name)
        raise
    return [str(DEV / link_name) for link_name in wanted]


def remove_links(name: str, kernel_name: str) -> None:
    """Remove the links to a device, and the nodes of partitions and disk that outlived it.

    Harmless when repeated, and when the device is gone.  Called with the device's last name,
    however it ended: nothing needs to be remembered but the two names.
    """
    if not kernel_name:
        return
    for link in _links(name, kernel_name):
        _unlink(link)
    if disk_node(kernel_name) is not None and not _is_empty_loop(kernel_name):
        return
    # devtmpfs and udev remove theirs; those made by make_node stay behind, and so does the
    # loop device's own, which was there before.
    present = {node.kernel_name for node in partitions(kernel_name)}
    for path in DEV.glob(f"{kernel_name}p*"):
        number = path.name.removeprefix(f"{kernel_name}p")
        if number.isdecimal() and path.name not in present and _rdev(str(path)) is not None:
            _unlink(path)
    if disk_node(kernel_name) is None and _rdev(str(DEV / kernel_name)) is not None:
        _unlink(DEV / kernel_name)


def _is_empty_loop(kernel_name: str) -> bool:
    """A loop device stays when its file is taken away."""
    return kernel_name.startswith("loop") and not (SYS / kernel_name / "loop").exists()


def _links(name: str, kernel_name: str) -> Iterator[Path]:
    """Our links of that name: symbolic, to a node of that device and nothing else."""
    part = re.compile(re.escape(name) + r"(p\d+)?")
    for path in sorted(DEV.glob(f"{name}*")):
        match = part.fullmatch(path.name)
        if match and _target(path) == kernel_name + (match[1] or ""):
            yield path


def _make_link(path: Path, target: str) -> None:
    found = _target(path)
    if found == target:
        return
    # Left behind by a process that was killed, before the kernel gave its device to nobody.
    if found is not None and _OUR_TARGET.fullmatch(found) and not (DEV / found).exists():
        _unlink(path)
    try:
        os.symlink(target, path)
    except FileExistsError:
        raise Busy(path, "", "that name is taken", hint="choose another with --name") from None


def _target(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _rdev(path: str) -> int | None:
    """The number of the block device at `path` itself (not behind a link), or None."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else None


# Users


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who keeps a device busy.  str() is for the message that refuses a detach."""

    kind: str  # mount, swap, holder, loop, open
    device: str  # the kernel's name of the disk or partition
    what: str  # mount point, name of the device above, or name of the program
    pid: int = 0  # open: the process; mount: one that sees the mount, where we do not

    def __str__(self) -> str:
        if self.kind == "mount":
            where = f" (in the mount namespace of process {self.pid})" if self.pid else ""
            return f"{self.device} is mounted at {self.what}{where}"
        if self.kind == "swap":
            return f"{self.device} is used as swap"
        if self.kind == "open":
            return f"{self.device} is open in {self.what} (process {self.pid})"
        return f"{self.device} is used by {self.what}"


def users(kernel_name: str) -> list[User]:
    """Who uses a disk or one of its partitions; complete for root only.

    An open descriptor is found if its path is in /dev.  This process does not count.
    """
    disk = disk_node(kernel_name)
    nodes = {node.rdev: node.kernel_name for node in partitions(kernel_name)}
    if disk is not None:
        nodes[disk.rdev] = disk.kernel_name
    found = [
        *_mounted(nodes),
        *_swaps(nodes),
        *_holders(kernel_name, nodes),
        *_stacked_loops(nodes),
        *_open_files(nodes),
    ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class _Mount:
    rdev: int
    point: str
    type: str
    source: str


def _mounts(process: str) -> Iterator[_Mount]:
    with contextlib.suppress(OSError):
        text = (PROC / process / "mountinfo").read_text(errors="surrogateescape")
        for line in text.splitlines():
            before, _, after = line.partition(" - ")
            left, right = before.split(" "), after.split(" ")
            major, minor = map(int, left[2].split(":"))
            yield _Mount(
                os.makedev(major, minor), _unescape(left[4]), right[0], _unescape(right[1])
            )


def _unescape(text: str) -> str:
    """The kernel writes blanks and the like as a backslash and three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _mounted(nodes: dict[int, str]) -> list[User]:
    """Mounts in every mount namespace; those that are copies of one that was seen are left out."""
    seen = {_namespace("self")}
    found = {(user.device, user.what): user for user in _mounted_in("self", nodes, 0)}
    for pid in _processes():
        namespace = _namespace(str(pid))
        if namespace and namespace not in seen:
            seen.add(namespace)
            for user in _mounted_in(str(pid), nodes, pid):
                found.setdefault((user.device, user.what), user)
    return list(found.values())


def _mounted_in(process: str, nodes: dict[int, str], pid: int) -> Iterator[User]:
    for mount in _mounts(process):
        # btrfs shows a device number of its own; its source still names a device.
        rdev: int | None = mount.rdev
        if rdev not in nodes and mount.source.startswith("/dev/"):
            rdev = _rdev(os.path.realpath(mount.source))
        if rdev in nodes:
            yield User("mount", nodes[rdev], mount.point, pid)


def _namespace(process: str) -> str:
    try:
        return os.readlink(PROC / process / "ns" / "mnt")
    except OSError:
        return ""


def _swaps(nodes: dict[int, str]) -> Iterator[User]:
    with contextlib.suppress(OSError):
        for line in (PROC / "swaps").read_text(errors="surrogateescape").splitlines()[1:]:
            rdev = _rdev(os.path.realpath(_unescape(line.split()[0])))
            if rdev in nodes:
                yield User("swap", nodes[rdev], "swap")


def _holders(kernel_name: str, nodes: dict[int, str]) -> Iterator[User]:
    """Devices that are made of this one: device mapper, md, bcache."""
    disk = SYS / kernel_name
    for name in nodes.values():
        folder = (disk if name == kernel_name else disk / name) / "holders"
        with contextlib.suppress(OSError):
            for holder in sorted(os.listdir(folder)):
                label = SYS / holder / "dm" / "name"
                shown = holder
                with contextlib.suppress(OSError):
                    shown = f"{holder} ({label.read_text().strip()})"
                yield User("holder", name, shown)


def _stacked_loops(nodes: dict[int, str]) -> Iterator[User]:
    for file in SYS.glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            rdev = _rdev(os.path.realpath(file.read_text().rstrip("\n")))
            if rdev in nodes:
                yield User("loop", nodes[rdev], file.parent.parent.name)


def _open_files(nodes: dict[int, str]) -> Iterator[User]:
    for pid in _processes():
        if pid == os.getpid():
            continue
        folder = PROC / str(pid) / "fd"
        descriptors: list[str] = []
        with contextlib.suppress(OSError):
            descriptors = os.listdir(folder)
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                # The link's text first: a stat of a file on a dead network or FUSE server waits.
                if not os.readlink(folder / descriptor).startswith("/dev/"):
                    continue
                found = os.stat(folder / descriptor)
                if stat.S_ISBLK(found.st_mode) and found.st_rdev in nodes:
                    yield User("open", nodes[found.st_rdev], _program(pid), pid)


def _program(pid: int) -> str:
    try:
        return (PROC / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return "a program"


def _processes() -> Iterator[int]:
    for name in os.listdir(PROC):
        if name.isdecimal():
            yield int(name)
