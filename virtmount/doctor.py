"""What this machine has and lacks for attaching disks, and the command that mends it.

Nothing is changed: no module is loaded, no device made.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from virtmount.errors import NoTransport, VirtmountError

_SYS_IO_URING_SETUP = 425  # the same on every architecture
_UDEV_KNOWS_UBLK = 257

DEV, SYS, RUN_UDEV = Path("/dev"), Path("/sys"), Path("/run/udev/control")


@dataclass(frozen=True, slots=True)
class Check:
    """`ok` None: not needed, or not to be known without root."""

    name: str
    ok: bool | None
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    checks: list[Check]
    transports: dict[str, bool]

    @property
    def usable(self) -> bool:
        """Whether an image of any format can be attached."""
        return self.transports["ublk"] or self.transports["fuse"]

    def to_dict(self) -> dict[str, Any]:
        return {"checks": [asdict(check) for check in self.checks], "transports": self.transports}


def examine() -> Report:
    """Run all checks.  Root sees more."""
    root, engine, io_uring = check_root(), check_engine(), check_io_uring()
    ublk, fuse, loop = check_ublk(), check_fuse(), check_loop()
    able = bool(root.ok and engine.ok and io_uring.ok)
    return Report(
        [root, engine, io_uring, ublk, fuse, loop, check_udev(), check_run()],
        {
            "ublk": able and bool(ublk.ok),
            "fuse": able and bool(fuse.ok and loop.ok),
            "loop": bool(root.ok and loop.ok),
        },
    )


def check_root() -> Check:
    if os.geteuid() == 0:
        return Check("root", True, "yes")
    return Check("root", False, "block devices need root; info, map and list do not", "sudo …")


def check_engine() -> Check:
    from virtmount.engine import native

    try:
        native()
    except NoTransport as error:
        return Check("C engine", False, error.text, error.hint or "")
    return Check("C engine", True, "built")


def check_io_uring() -> Check:
    from virtmount.ublk.features import io_uring_disabled

    code = _io_uring_error()
    if code == 0:
        return Check("io_uring", True, "works")
    if code == errno.ENOSYS:
        return Check("io_uring", False, "this kernel has none", "boot Linux 6.1 or later")
    switch = io_uring_disabled()
    if switch:
        text = f"switched off (kernel.io_uring_disabled={switch})"
        return Check("io_uring", False, text, "sysctl kernel.io_uring_disabled=0")
    text = f"refused: {os.strerror(code)}"
    return Check("io_uring", False, text, "in a container: allow io_uring in its seccomp profile")


def _io_uring_error() -> int:
    """The errno of making a ring, or 0.

    By the system call: the engine may not be built, and the PyPI wrapper (liburing 2026.3.30) is
    compiled for processors with AVX-512 and is killed by SIGILL on all others.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(120)  # struct io_uring_params
    fd = libc.syscall(_SYS_IO_URING_SETUP, 1, params)
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


def check_ublk() -> Check:
    from virtmount.ublk import features

    release = os.uname().release
    if not (DEV / "ublk-control").exists():
        if _has_module(features.MODULE):
            text = f"{features.MODULE} is not loaded; attach loads it"
            return Check("ublk", True, text)
        return Check(
            "ublk",
            False,
            f"kernel {release} has no {features.MODULE}",
            "boot Linux 6.12 or later with ublk, or use --transport fuse",
        )
    if os.geteuid():
        return Check("ublk", None, "there; root can tell what it can do")
    try:
        with features.open_control() as control:
            known = features.known(control)
    except (VirtmountError, OSError) as error:
        return Check("ublk", False, str(error), getattr(error, "hint", None) or "")
    mode = features.mode(features.wanted(known))
    text = mode.name.lower().replace("_", " ") if mode else "no way to move data"
    return Check("ublk", mode is not None, text)


def check_fuse() -> Check:
    from virtmount.fuse import load_library

    try:
        load_library()
    except NoTransport as error:
        return Check("fuse", False, error.text, error.hint or "")
    if not (DEV / "fuse").exists() and not _has_module("fuse"):
        return Check(
            "fuse", False, "no /dev/fuse", "modprobe fuse; in a container: --device /dev/fuse"
        )
    return Check("fuse", True, "/dev/fuse and libfuse3")


def check_loop() -> Check:
    if (DEV / "loop-control").exists():
        return Check("loop", True, "/dev/loop-control")
    if (SYS / "class/misc/loop-control").exists() or _has_module("loop"):
        return Check("loop", True, "not loaded; attach loads it")
    return Check("loop", False, "this kernel has no loop driver", "modprobe loop")


def check_udev() -> Check:
    if not RUN_UDEV.exists():
        return Check("udev", None, "not running; device nodes and links are made without it")
    version = _udev_version()
    if version and version < _UDEV_KNOWS_UBLK:
        text = f"version {version} makes no /dev/disk links for ublk disks; /dev/NAME is there"
        return Check("udev", None, text)
    return Check("udev", True, f"version {version}" if version else "running")


def _udev_version() -> int:
    udevadm = shutil.which("udevadm", path=os.environ.get("PATH", "") + ":/usr/bin:/bin:/sbin")
    if not udevadm:
        return 0
    done = subprocess.run([udevadm, "--version"], capture_output=True, text=True, check=False)
    digits = done.stdout.strip().split()[:1]
    return int(digits[0]) if digits and digits[0].isdecimal() else 0


def check_run() -> Check:
    from virtmount import state

    folder = state.folder()
    parent = folder if folder.exists() else folder.parent
    if os.access(parent, os.W_OK) or os.geteuid():
        return Check("records", True, str(folder))
    return Check("records", False, f"{folder} cannot be written", f"mount a tmpfs at {parent}")


def _has_module(name: str) -> bool:
    """Built in, loaded, or on the disk for this kernel."""
    if (SYS / "module" / name).exists():
        return True
    modprobe = shutil.which("modprobe", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not modprobe:
        return False
    command = [modprobe, "--dry-run", "--quiet", name]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
