"""A FUSE file system over a folder that records or fails what reaches one file of it.

    with Mounted(folder, "image.qcow2", mountpoint) as fs:
        fs.reset()                                  # the log begins with the file as it is now
        fs.fail(3, errno.ENOSPC, forever=False)     # the third change from now on
        … use fs.path …
        log = fs.log()

Counted are the changes: write, truncate, fallocate and fsync; reads are counted apart.  `cut()`
makes every write of more than a byte stop short, as a full disk can.  (Not reads: the kernel loses
count where a FUSE server answers one with less than there is.)

The server is a process of its own, so the one that is tested may wait for it anywhere.  All caching
is off: each request of the tested program arrives as it was made (split where it is larger than
FUSE's largest).  A failed sync covers nothing, and no later one covers what that one should have:
the kernel may have dropped those pages.

Not seen here: a sync that is asked for while a write that it should cover still runs.  The kernel
makes FUSE requests that change one file wait for each other.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.crash.simulate import (
    SECTOR,
    Change,
    Log,
    Mark,
    Punched,
    Resized,
    Store,
    Synced,
    Wrote,
)
from virtmount.fuse import load_library
from virtmount.hostfile import fallocate

mfusepy = load_library()  # libfuse 2 would cut writes into pieces that are no whole sectors

CONTROL = "control"
FUSE_CAP_ASYNC_DIO = 1 << 15
_KEEP_SIZE, _PUNCH, _ZERO_RANGE = 0x01, 0x02, 0x10


class FaultFS(mfusepy.Operations):  # type: ignore[misc]
    """Names of the folder, and `control`: JSON commands written to it, counters read from it."""

    use_ns = True

    def __init__(self, folder: Path, name: str, ready: Callable[[], None]) -> None:
        self._folder = folder
        self._path = f"/{name}"
        self._ready = ready
        self._lock = threading.Lock()
        self._image = os.open(folder / name, os.O_RDWR)
        self._reset({})

    # Control

    def _reset(self, _: dict[str, Any]) -> None:
        self._log = Log(Store.load(self._folder / self._path[1:]))
        self._dropped: set[int] = set()  # changes that a failed sync may have lost
        self._count = self._reads = 0
        self._cut = False
        self._fail: dict[str, Any] | None = None
        self._failed: list[str] = []

    def _command(self, command: dict[str, Any]) -> None:
        what = command.pop("do")
        if what == "reset":
            self._reset(command)
        elif what == "fail":
            count = self._reads if "read" in command["only"] else self._count
            self._fail = {**command, "at": count + command["at"]}
            self._errno = command["errno"]
        elif what == "cut":
            self._cut = True
        elif what == "heal":
            self._fail = None
        elif what == "mark":
            self._log.events.append(Mark(command["text"], command["flushed"]))
        elif what == "dump":
            with open(command["path"], "wb") as file:
                pickle.dump(self._log, file)
        else:
            raise mfusepy.FuseOSError(errno.EINVAL)

    def _status(self) -> bytes:
        status = {"count": self._count, "reads": self._reads, "failed": self._failed}
        return json.dumps(status).encode()

    # Changes

    @contextlib.contextmanager
    def _change(self, name: str, change: Change | None) -> Iterator[None]:
        """Count, perhaps fail, and record one change; None is a sync."""
        with self._lock:
            self._count += 1
            if self._must_fail(name, self._count):
                self._fail_now(name, change)
            yield
            if change is not None:
                self._log.events.append(change)
            else:
                self._log.events.append(Synced(frozenset(self._dropped)))

    def _must_fail(self, name: str, count: int) -> bool:
        fail = self._fail
        if fail is None or count < fail["at"] or name not in fail["only"]:
            return False
        if not fail["forever"]:
            self._fail = None
        return True

    def _fail_now(self, name: str, change: Change | None) -> None:
        self._failed.append(name)
        events = self._log.events
        if isinstance(change, Wrote) and len(change.data) >= 2 * SECTOR:
            # A write that fails may have written its first half.
            part = change.data[: len(change.data) // 2 // SECTOR * SECTOR]
            os.pwrite(self._image, part, change.offset)
            events.append(Wrote(change.offset, part))
        elif change is None:
            self._dropped |= {i for i, event in enumerate(events) if isinstance(event, Change)}
        raise mfusepy.FuseOSError(self._errno)

    # FUSE

    def init_with_config(self, connection: Any, config: Any) -> None:
        # With it the kernel makes EIO of every write that stops short.
        connection.want &= ~FUSE_CAP_ASYNC_DIO
        self._ready()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        if path == f"/{CONTROL}":
            return {"st_mode": stat.S_IFREG | 0o600, "st_size": 0, "st_nlink": 1}
        found = os.lstat(self._folder / path[1:])
        names = ("st_mode", "st_size", "st_nlink", "st_uid", "st_gid", "st_blocks")
        answer = {name: getattr(found, name) for name in names}
        answer |= {"st_mtime": found.st_mtime_ns, "st_ctime": found.st_ctime_ns}
        return answer

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", CONTROL, *os.listdir(self._folder)]

    def open(self, path: str, flags: int) -> int:
        if path in (f"/{CONTROL}", self._path):
            return 0
        return os.open(self._folder / path[1:], os.O_RDONLY)

    def release(self, path: str, fh: int) -> int:
        if fh:
            os.close(fh)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        if path == f"/{CONTROL}":
            return self._status()[offset : offset + size]
        if fh:
            return os.pread(fh, size, offset)
        with self._lock:
            self._reads += 1
            if self._must_fail("read", self._reads):
                self._failed.append("read")
                raise mfusepy.FuseOSError(self._errno)
        return os.pread(self._image, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        if path == f"/{CONTROL}":
            with self._lock:
                self._command(json.loads(data))
            return len(data)
        self._refuse_others(path)
        if self._cut:
            data = data[: max(1, len(data) * 3 // 5)]
        with self._change("write", Wrote(offset, bytes(data))):
            done = os.pwrite(self._image, data, offset)
            assert done == len(data)
        return done

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        if path == f"/{CONTROL}":
            return 0
        self._refuse_others(path)
        before = os.fstat(self._image).st_size
        with self._change("truncate", Resized(length, before)):
            os.ftruncate(self._image, length)
        return 0

    def fallocate(self, path: str, mode: int, offset: int, length: int, fh: int) -> int:
        self._refuse_others(path)
        before = os.fstat(self._image).st_size
        if mode == _PUNCH | _KEEP_SIZE or mode == _ZERO_RANGE | _KEEP_SIZE:
            change: Change = Punched(offset, length)
        elif mode == 0 and offset + length > before:
            change = Resized(offset + length, before)
        else:
            raise mfusepy.FuseOSError(errno.EOPNOTSUPP)
        with self._change("fallocate", change):
            fallocate(self._image, mode, offset, length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        with self._change("fsync", None):
            pass  # the folder is in memory, or its content does not matter after a crash
        return 0

    def flush(self, path: str, fh: int) -> int:
        return 0

    def _refuse_others(self, path: str) -> None:
        if path != self._path:
            raise mfusepy.FuseOSError(errno.EROFS)


class Mounted:
    """The file system over `folder`, at `mountpoint`, from outside of its process."""

    KINDS = ("write", "truncate", "fallocate", "fsync")

    def __init__(self, folder: Path, name: str, mountpoint: Path) -> None:
        mountpoint.mkdir(exist_ok=True)
        self.source = folder / name
        self.path = mountpoint / name
        self._folder = folder
        self._mountpoint = mountpoint
        ours, theirs = os.pipe()
        command = [sys.executable, "-m", "tests.crash.faultfs"]
        command += [str(folder), name, str(mountpoint), str(theirs)]
        root = Path(__file__).parents[2]
        self._server = subprocess.Popen(command, pass_fds=[theirs], cwd=root)
        os.close(theirs)
        said = os.read(ours, 1)  # nothing if it ended
        os.close(ours)
        if not said:
            raise RuntimeError(f"faultfs ended with {self._server.wait()}")
        self._control = os.open(mountpoint / CONTROL, os.O_RDWR)

    def __enter__(self) -> Mounted:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._control)
        # Lazily: after a failed test the image may still be open.
        subprocess.run(["umount", "--lazy", str(self._mountpoint)], check=True)
        try:
            self._server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def _do(self, what: str, **arguments: Any) -> None:
        os.pwrite(self._control, json.dumps({"do": what, **arguments}).encode(), 0)

    def reset(self) -> None:
        self._do("reset")

    def fail(
        self, at: int, code: int, *, forever: bool = False, only: tuple[str, ...] = KINDS
    ) -> None:
        """Fail the `at`th change from now on, or all from there; of the kinds `only`."""
        self._do("fail", at=at, errno=code, forever=forever, only=only)

    def heal(self) -> None:
        self._do("heal")

    def cut(self) -> None:
        """From now on, until the next reset, no write is carried out wholly."""
        self._do("cut")

    def mark(self, text: str, flushed: bool = False) -> None:
        self._do("mark", text=text, flushed=flushed)

    @property
    def count(self) -> int:
        """Changes since the last reset."""
        return int(self._status()["count"])

    @property
    def reads(self) -> int:
        """Reads since the last reset."""
        return int(self._status()["reads"])

    @property
    def failed(self) -> list[str]:
        """The kinds of those that failed."""
        return list(self._status()["failed"])

    def _status(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(os.pread(self._control, 65536, 0))
        return answer

    def log(self) -> Log:
        path = self._folder / "log.pickle"
        self._do("dump", path=str(path))
        with path.open("rb") as file:
            log: Log = pickle.load(file)
        path.unlink()
        return log


def main(folder: str, name: str, mountpoint: str, ready: str) -> None:
    def say_ready() -> None:
        os.write(int(ready), b"+")
        os.close(int(ready))

    mfusepy.FUSE(
        FaultFS(Path(folder), name, say_ready),
        mountpoint,
        foreground=True,
        direct_io=True,
        attr_timeout=0,
        entry_timeout=0,
        negative_timeout=0,
        fsname="faultfs",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
