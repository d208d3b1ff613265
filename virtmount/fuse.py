"""A disk as one file of a FUSE file system, with a loop device on top: for kernels without ublk.

Source: libfuse's fuse.h and fuse_lowlevel.h, through mfusepy; drivers/block/loop.c for what the
loop driver makes of the file.

    loop device            the file                     the disk
    read, write            read, write (direct)         pread, pwrite
    flush, FUA             fsync                        flush
    discard, zero + unmap  fallocate PUNCH_HOLE         write_zeroes, where whole clusters can be
                                                        given back, else EOPNOTSUPP
    zero, keep the space   fallocate ZERO_RANGE         write_zeroes, keeping the space
    discard granularity    statfs f_bsize               cluster size

1. A punched hole must read as zeros, because the loop driver asks for discards and for zeros in
   the same words.  So a discard is never merely ignored here.
2. The file system is mounted for as long as it takes to open the file, then detached: it lives
   until the loop device lets go of the file, is in nobody's way, and leaves no mount behind,
   however this process ends.
3. This process never has the loop device open while it serves.  A process that dies closes its
   files; closing a block device writes out what is cached for it, to a server that is gone: it
   would never end.  For the same reason nothing here keeps the served file open.
4. A device that is taken away while it is in use: the connection is aborted, in the kernel.  The
   users see EIO; the requests that are being served end before stop() returns.
5. If this process is killed, the kernel fails all requests, present and future (ENOTCONN, EIO for
   the users of the loop device).  Nothing hangs; the loop device stays until clear_orphan().
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, Protocol, TypeVar

from virtmount import loop, nodes, state
from virtmount.engine import NO_IO_FLAGS, Engine, IoFlag, Op
from virtmount.errors import Denied, NoTransport
from virtmount.transport import Transport

# By name, not by a search with ldconfig or a compiler: Debian 12, Debian 13 and later.
LIBRARIES = ("libfuse3.so.3", "libfuse3.so.4")
DEVICE = "/dev/fuse"
_DEVICE_MINOR = 229  # devices.txt
THREADS = 16  # requests that are under way at once: each waits on a thread with 1 MiB of buffer
BACKGROUND = 64  # requests of direct I/O that the kernel sends without waiting for answers
START_TIMEOUT = 30.0
END_TIMEOUT = 60.0
IN_USE_TIMEOUT = 2.0  # udev opens a device for a moment whenever somebody closed it
UNUSED_TIMEOUT = 5.0

PUNCH_HOLE, ZERO_RANGE, KEEP_SIZE = 2, 16, 1  # FALLOC_FL_*
_MNT_DETACH = 2

log = logging.getLogger("virtmount")

P = ParamSpec("P")
R = TypeVar("R")


class Served(Protocol):
    """What is served; called from many threads at once.  Offsets are multiples of 512."""

    @property
    def size(self) -> int: ...
    def pread(self, offset: int, length: int, /) -> bytes: ...
    def pwrite(self, offset: int, data: bytes, /) -> object: ...
    def flush(self) -> object: ...
    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> object: ...


class EngineDisk:
    """The engine as what is served."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.size = engine.config.size
        self.pread = engine.read
        self.pwrite = engine.write

    def flush(self) -> None:
        self._engine.io(Op.FLUSH)

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        flags = NO_IO_FLAGS if unmap else IoFlag.NOUNMAP
        self._engine.io(Op.WRITE_ZEROES, offset, length, flags)


class Fuse(Transport):
    """`name` is the disk's name in /dev; `can_discard`: whole clusters can be given back."""

    name: ClassVar[str] = "fuse"

    def __init__(
        self,
        served: Served,
        name: str,
        *,
        sector_size: int = 512,
        cluster_size: int = 4096,
        read_only: bool = False,
        can_discard: bool = True,
    ) -> None:
        self._served = served
        self._sector_size = sector_size
        self._read_only = read_only
        self.disk_name = name
        self._label = _label(name)
        self._mount_point = state.folder() / f"{name}.fuse"
        self._file = File(
            served,
            self._label,
            cluster_size=cluster_size,
            read_only=read_only,
            can_discard=can_discard,
        )
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._connection = -1
        self.features = {}

    def start(self) -> str:
        library = load_library()
        nodes.provide_driver(DEVICE, "fuse", _DEVICE_MINOR)
        major, minor = library.fuse_version_major, library.fuse_version_minor
        try:
            self.device = self._start(library)
            nodes.show_partitions(
                self.kernel_name,
                self._served.pread,
                self._served.size,
                self._sector_size,
                scanned=True,
            )
        except BaseException:
            with contextlib.suppress(OSError):
                self.stop()
            raise
        self.features = {"libfuse": f"{major}.{minor}", "loop": self.kernel_name}
        return self.device

    def _start(self, library: Any) -> str:
        with _folder(self._mount_point) as folder:
            self._thread = threading.Thread(
                target=self._run, args=(library, folder), name="virtmount-fuse", daemon=True
            )
            self._thread.start()
            try:
                self._file.answered.wait(START_TIMEOUT)
                if not self._file.mounted:
                    raise NoTransport(
                        "fuse",
                        "",
                        f"the file system could not be mounted ({self._failure or 'no answer'})",
                        hint=f"modprobe fuse, and see that {DEVICE} is there",
                    )
                mode = os.O_RDONLY if self._read_only else os.O_RDWR
                fd = os.open(folder / self._label, mode | os.O_CLOEXEC)
            finally:
                _unmount(folder)  # ends the server, but for what was opened above
        try:
            self._connection = os.minor(os.fstat(fd).st_dev)
            return loop.configure(
                fd,
                block_size=self._sector_size,
                read_only=self._read_only,
                direct_io=True,
                label=self._label,
            )
        finally:
            os.close(fd)

    def _run(self, library: Any, folder: Path) -> None:
        options: dict[str, Any] = {"ro": self._read_only}
        if (library.fuse_version_major, library.fuse_version_minor) >= (3, 12):
            # As many idle ones: creating a thread for every burst costs more than keeping it.
            options["max_threads"] = options["max_idle_threads"] = THREADS
        try:
            library.FUSE(
                self._file,
                str(folder),
                raw_fi=True,
                foreground=True,
                fsname="virtmount",
                subtype="virtmount",
                default_permissions=True,
                **options,
            )
        except BaseException as error:
            self._failure = error
            if self._file.mounted:
                log.exception("fuse: the server ended")
        finally:
            self._file.answered.set()
            self._file.released.set()

    def stop(self) -> None:
        """The loop device's cache is written out first; OSError if that failed."""
        thread = self._thread
        if thread is None:
            return
        failed: OSError | None = None
        in_use = False
        if self.device:
            try:
                in_use = not loop.clear(self.device, f"/{self._label}", IN_USE_TIMEOUT)
            except OSError as error:
                failed = error
        if in_use:
            log.warning("%s: taken away while it is in use", self.device)
        else:
            thread.join(UNUSED_TIMEOUT)  # the file system ends with its last user
        if thread.is_alive() and self._connection >= 0:
            self._abort()
        # Requests that are being served end before this.
        thread.join(END_TIMEOUT)
        if thread.is_alive():
            raise TimeoutError(errno.ETIMEDOUT, "requests are still under way", self._label)
        self._thread = None
        if failed:
            raise failed

    def _abort(self) -> None:
        """Have the kernel fail every request, and the server's next one with ENODEV."""
        with _folder(self._mount_point) as folder:
            _mount("fusectl", folder)
            try:
                (folder / str(self._connection) / "abort").write_text("1")
            except FileNotFoundError:
                pass  # it ended just now
            finally:
                _unmount(folder)

    def wait_gone(self, timeout: float | None = None) -> bool:
        return self._file.released.wait(timeout)


def _answer(method: Callable[P, R]) -> Callable[P, R]:
    """Make every failure an errno: what the library does with other exceptions is its business."""

    def answer(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except OSError as error:
            if error.errno is not None and 0 < error.errno < 4096:
                raise
            log.exception("fuse: %s", method.__name__)
        except Exception:
            log.exception("fuse: %s", method.__name__)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    answer.__name__ = method.__name__
    return answer


class File:
    """The operations of a file system with one file in it, as mfusepy wants them.

    Called on the library's threads.  A path is None where it goes with an open file.
    """

    use_ns = True
    flag_nopath = True
    flag_nullpath_ok = True

    def __init__(
        self, served: Served, name: str, *, cluster_size: int, read_only: bool, can_discard: bool
    ) -> None:
        self._served = served
        self._path = f"/{name}"
        self._cluster_size = cluster_size
        self._read_only = read_only
        self._can_discard = can_discard
        self._opened = 0
        self._lock = threading.Lock()
        self.answered = threading.Event()  # mounted, or it failed
        self.mounted = False
        self.released = threading.Event()  # nobody has the file open any more

    def init_with_config(self, connection: Any, config: Any) -> None:
        connection.max_background = BACKGROUND
        connection.congestion_threshold = BACKGROUND * 3 // 4
        self.mounted = True
        self.answered.set()

    @_answer
    def getattr(self, path: str | None, handle: Any = None) -> dict[str, int]:
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
        if path not in (self._path, None):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        mode = 0o400 if self._read_only else 0o600
        size = self._served.size
        return {
            "st_mode": stat.S_IFREG | mode,
            "st_nlink": 1,
            "st_size": size,
            "st_blocks": -(-size // 512),
        }

    @_answer
    def open(self, path: str, info: Any) -> int:
        if path != self._path:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if self._read_only and info.flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        # Nothing is cached here: the users of the loop device have their cache above it.
        info.direct_io = 1
        with self._lock:
            self._opened += 1
        return 0

    @_answer
    def release(self, path: str | None, info: Any) -> int:
        with self._lock:
            self._opened -= 1
            if not self._opened:
                self.released.set()
        return 0

    @_answer
    def read(self, path: str | None, length: int, offset: int, info: Any) -> bytes:
        length = min(length, self._served.size - offset)
        return self._served.pread(offset, length) if length > 0 else b""

    @_answer
    def write(self, path: str | None, data: bytes, offset: int, info: Any) -> int:
        if offset + len(data) > self._served.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._served.pwrite(offset, data)
        return len(data)

    @_answer
    def fsync(self, path: str | None, datasync: int, info: Any) -> int:
        self._served.flush()
        return 0

    @_answer
    def fallocate(self, path: str | None, mode: int, offset: int, length: int, info: Any) -> int:
        if offset < 0 or length <= 0 or offset + length > self._served.size:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        punch = mode == PUNCH_HOLE | KEEP_SIZE
        if not (punch and self._can_discard) and mode != ZERO_RANGE | KEEP_SIZE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self._served.write_zeroes(offset, length, unmap=punch)
        return 0

    @_answer
    def statfs(self, path: str) -> dict[str, int]:
        size = self._cluster_size
        return {"f_bsize": size, "f_frsize": size, "f_blocks": -(-self._served.size // size)}


# What is left of a server that was killed


def clear_orphan(device: str, name: str) -> None:
    """Take a loop device down whose server is gone; not one that belongs to somebody else by now.

    While it is still in use it stays, failing every request, and goes with the last close.
    """
    if device:
        with contextlib.suppress(OSError):
            loop.clear(device, f"/{_label(name)}", IN_USE_TIMEOUT)


def _label(name: str) -> str:
    # What losetup shows as the backing file; it is in no folder that anybody could look into.
    return f"virtmount:{name}"


# The library


def load_library() -> Any:
    """mfusepy on libfuse3; NoTransport says what is missing."""
    # It would look for the library by running ldconfig or a compiler, and prefer libfuse 2, which
    # knows neither large requests nor the parallel ones.
    asked = os.environ.get("FUSE_LIBRARY_PATH")
    found = asked or next(filter(_loads, LIBRARIES), None)
    if found is None:
        raise NoTransport(
            "fuse", "", "libfuse3 is not installed", hint="apt install libfuse3-3 (or libfuse3-4)"
        )
    os.environ["FUSE_LIBRARY_PATH"] = found
    try:
        return importlib.import_module("mfusepy")
    except ImportError as error:
        raise NoTransport(
            "fuse", "", f"mfusepy is not installed ({error})", hint="pip install mfusepy"
        ) from error
    except (OSError, AttributeError) as error:  # as it says that the library is not for it
        raise NoTransport("fuse", found, str(error)) from error
    finally:
        if asked is None:
            del os.environ["FUSE_LIBRARY_PATH"]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


# Mounting


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """A private folder to mount on; gone afterwards."""
    try:
        # Of a process that was killed while it had something mounted here.
        _unmount(path)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(path)
        os.mkdir(path, 0o700)
    except PermissionError:
        raise Denied(path, "", "only root may mount", hint="sudo virtmount …") from None
    try:
        yield path
    finally:
        os.rmdir(path)


def _mount(kind: str, path: Path) -> None:
    _call("mount", b"none", os.fsencode(path), kind.encode(), 0, None, file=path)


def _unmount(path: Path) -> None:
    """Detach what is mounted there; nothing may be."""
    try:
        _call("umount2", os.fsencode(path), _MNT_DETACH, file=path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # not mounted, not there
            raise


def _call(name: str, *arguments: Any, file: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(file))
