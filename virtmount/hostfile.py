"""Host files: the only place where Python reads, writes and locks them.

Drivers read through HostFile.pread; plans are executed here.  Guest data is moved by the engine,
on the same descriptors.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from virtmount.errors import Busy, Corrupt, NotAnImage
from virtmount.patches import Patches
from virtmount.plan import Extend, Plan, Punch, Truncate, Write

# qemu's image locking (its docs, "image locking"): a read lock on 100+i says "I use permission i",
# on 200+i "I do not share permission i".  0 consistent read, 1 write, 3 resize.
_USES = 100
_DENIES = 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_FLOCK = struct.Struct("@hhqqi")
_GETLK, _SETLK = 36, 37  # F_OFD_GETLK, F_OFD_SETLK (asm-generic/fcntl.h)
_PUNCH_KEEP = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_ZERO_CHUNK = bytes(1 << 20)
# Loaded here and not at first use: by then the process may serve the disk that libraries lie on.
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class HostFile:
    """One open file or block device.  str() is its path, for messages.

    Opened once and kept: a renamed or replaced path does not matter afterwards.
    """

    def __init__(self, path: str | os.PathLike[str], *, writable: bool = False, lock: bool = True):
        self.path = Path(path)
        self.writable = writable
        self.locked = lock
        self._patches = Patches()
        # O_NONBLOCK: opening a FIFO must fail below, not wait for a writer.
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        self.fd = os.open(path, flags)
        try:
            mode = os.fstat(self.fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise NotAnImage(self, "", "neither a regular file nor a block device")
            self.is_device = stat.S_ISBLK(mode)
            os.set_blocking(self.fd, True)
            if lock:
                self.lock()
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        return str(self.path)

    def close(self) -> None:
        """Close and unlock; harmless when repeated."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> HostFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes in the file now (in-memory patches included)."""
        if self.is_device:
            return os.lseek(self.fd, 0, os.SEEK_END)
        return max(os.fstat(self.fd).st_size, self._patches.end)

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; Corrupt if the file ends before."""
        data = self.pread_padded(offset, length)
        if offset < 0 or offset + length > self.size:
            raise Corrupt(
                self, f"byte {offset}", f"{length} bytes wanted, file ends at {self.size}"
            )
        return data

    def pread_padded(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`, with zeros for what lies past the end."""
        if offset < 0 or length < 0 or offset + length >= 1 << 63:
            raise Corrupt(self, f"byte {offset}", f"{length} bytes wanted, no file is that long")
        parts = []
        at, left = offset, length
        while left:
            part = os.pread(self.fd, min(left, 1 << 30), at)
            if not part:
                parts.append(bytes(left))
                break
            parts.append(part)
            at += len(part)
            left -= len(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return self._patches.applied(offset, data)

    def patch(self, offset: int, data: bytes) -> None:
        """Let later reads see `data` at `offset` without writing it: a log replayed in memory."""
        self._patches.put(offset, bytes(data))

    def patch_zeros(self, offset: int, length: int) -> None:
        """The same with `length` zeros, however many."""
        self._patches.put_zeros(offset, length)

    def unpatch(self) -> None:
        """Forget all patches: the file itself says it all now."""
        self._patches.clear()

    def lock(self) -> None:
        """Take the locks that qemu and virtmount respect; Busy if somebody holds against us."""
        uses = [_READ, _WRITE, _RESIZE] if self.writable else [_READ]
        denies = [_WRITE, _RESIZE]
        try:
            for byte in [_USES + p for p in uses] + [_DENIES + p for p in denies]:
                self._flock(_SETLK, fcntl.F_RDLCK, byte)
            conflict = [_DENIES + p for p in uses] + [_USES + p for p in denies]
            held = any(
                self._flock(_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK for byte in conflict
            )
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
                return  # a file system without locks
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            held = True
        if held:
            raise Busy(
                self,
                "",
                "in use by another program"
                if self.writable
                else "being written by another program",
                hint="see virtmount list, or stop the virtual machine that uses it",
            )

    def written_elsewhere(self) -> bool:
        """Whether somebody else has it open for writing; takes no lock, so disturbs nobody."""
        try:
            return self._flock(_GETLK, fcntl.F_WRLCK, _USES + _WRITE) != fcntl.F_UNLCK
        except OSError:
            return False  # a file system without locks

    def _flock(self, command: int, kind: int, byte: int) -> int:
        answer = fcntl.fcntl(self.fd, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        return int(_FLOCK.unpack(answer[: _FLOCK.size])[0])

    # Writing: only for execute() below and for creating images.

    def pwrite(self, offset: int, data: bytes) -> None:
        """Write all of `data`; OSError says that part of it may have been written."""
        view = memoryview(data)
        while view:
            done = os.pwrite(self.fd, view, offset)
            offset += done
            view = view[done:]

    def punch(self, offset: int, length: int) -> None:
        """Make a range read as zeros, with a hole where the file system can."""
        length = min(length, self.size - offset)
        if length <= 0:
            return
        with contextlib.suppress(OSError):
            fallocate(self.fd, _PUNCH_KEEP, offset, length)
            return
        while length:
            step = min(length, len(_ZERO_CHUNK))
            self.pwrite(offset, _ZERO_CHUNK[:step])
            offset += step
            length -= step

    def truncate(self, size: int) -> None:
        """Set the file's length; new bytes read as zeros."""
        os.ftruncate(self.fd, size)

    def sync(self) -> None:
        os.fdatasync(self.fd)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with a mode, which the os module does not offer."""
    if _fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def execute(
    plan: Plan, files: Sequence[HostFile], drain: Callable[[], None] = lambda: None
) -> None:
    """Carry out a plan.  `drain` is called before the first Punch or Truncate of a run of them.

    An OSError leaves the rest undone; what was done since the last Barrier may or may not last.
    """
    drained = False
    for step in plan:
        if isinstance(step, Write):
            files[step.file].pwrite(step.offset, step.data)
        elif isinstance(step, Extend):
            file = files[step.file]
            if file.size < step.size:
                file.truncate(step.size)
        elif isinstance(step, Punch | Truncate):
            if not drained:
                drain()
                drained = True
            file = files[step.file]
            if isinstance(step, Punch):
                file.punch(step.offset, step.length)
            elif file.size > step.size:
                file.truncate(step.size)
        else:
            # Guest data lies in the files too, so a barrier covers all of them.
            sync_all(files)
            drained = False


def sync_all(files: Iterable[HostFile]) -> None:
    """fdatasync every file; the first error is raised after all were tried."""
    first: OSError | None = None
    for file in files:
        if not file.writable:
            continue
        try:
            file.sync()
        except OSError as error:
            first = first or error
    if first:
        raise first
