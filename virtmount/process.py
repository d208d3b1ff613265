"""What keeps the serving process from ever waiting on the disk that it serves.

Memory that it needs must not be found by writing out pages of that disk, its code must not have
to be read from a file system on it, and no file system on it may be mounted in a mount namespace
that ends with the process, which would then wait for the unmounting, that is for itself.

Order: protect(), import everything and open the image, isolate(), create threads, start the device,
settle(), serve.  Task flags and the mount namespace are inherited by threads, so they come before;
programs and kernel modules are looked up while the device starts, so the mounts are left after.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("virtmount")

PR_SET_NAME = 15
PR_SET_IO_FLUSHER = 57
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
CLONE_NEWNS = 0x00020000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
MNT_DETACH = 2
OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")
STACK = 256 << 10
# What the process still looks up by path: its own name space for devices, records and /proc.
KEPT_MOUNTS = ("/", "/proc", "/sys", "/dev", "/run")

_libc = ctypes.CDLL(None, use_errno=True)
_own: set[str] = set()  # mount namespaces


# What this machine refuses (a container) is logged, no more.


def protect() -> None:
    """What comes first: the kernel makes threads of its own for the first io_uring request."""
    _try(set_io_flusher)
    _try(spare_from_oom)


def isolate() -> None:
    """Before there are threads, when everything is imported and the image is open."""
    _try(lock_memory)
    _try(own_mounts)


def settle(kept: tuple[str, ...] = ()) -> None:
    """What comes last, once the device is there."""
    _try(leave_mounts, kept)


def _try(measure: Callable[..., None], *arguments: object) -> None:
    try:
        measure(*arguments)
    except OSError as error:
        log.warning("%s: %s", measure.__name__, error.strerror)


def set_io_flusher() -> None:
    """Memory for this thread and those that it makes is found without starting I/O."""
    _check(_libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0))


def lock_memory() -> None:
    """Keep in memory what is there now, all of it, and later memory once it was touched.

    Locking later memory at once would make every thread's stack and every sparse array resident.
    """
    gc.collect()
    gc.freeze()
    _check(_libc.mlockall(MCL_CURRENT))
    _check(_libc.mlockall(MCL_FUTURE | MCL_ONFAULT))


def spare_from_oom() -> None:
    OOM_SCORE_ADJ.write_text("-1000")


def own_mounts() -> None:
    """Take a mount namespace of our own: what is mounted outside from now on stays out of it."""
    before = _namespace()
    _check(_libc.unshare(CLONE_NEWNS))
    _check(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    # Only a namespace that is known to be ours may be emptied.
    _own.update({_namespace()} - {before})


def leave_mounts(kept: tuple[str, ...] = ()) -> None:
    """Keep nothing mounted in our namespace but what is needed.

    Else our copy of a mount would keep its device busy after it was unmounted outside.  Open
    files stay open.
    """
    if _namespace() not in _own:
        raise OSError(errno.EPERM, "not in a mount namespace of our own")
    keep = {*KEPT_MOUNTS, *kept}
    points = [line.split(" ")[4] for line in _mountinfo()]
    for point in reversed(points):
        path = _unescape(point)
        if path in keep or any(k.startswith(path + "/") for k in keep):
            continue
        # Gone already, with the mount it was on.
        with contextlib.suppress(OSError):
            _check(_libc.umount2(os.fsencode(path), MNT_DETACH))


def _namespace() -> str:
    return os.readlink("/proc/self/ns/mnt")


def _mountinfo() -> list[str]:
    text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    return text.splitlines()


def _unescape(text: str) -> str:
    """The kernel writes blanks and the like as a backslash and three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def set_name(name: str) -> None:
    """What ps and top show."""
    buffer = ctypes.create_string_buffer(os.fsencode(name)[:15])
    _libc.prctl(PR_SET_NAME, buffer, 0, 0, 0)


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno() or errno.EIO
        raise OSError(code, os.strerror(code))
