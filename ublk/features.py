"""What this kernel's ublk can do, asked of it and never guessed from a version.

Enterprise kernels carry features of later ones, so only GET_FEATURES counts; and because ADD_DEV
clears unknown flags in silence, the mode is chosen from the flags that came back from it.

Recovery is not asked for yet.  It will be USER_RECOVERY | USER_RECOVERY_REISSUE (and QUIESCE
where there is one) in `wanted`: the device then outlives its daemon in the state QUIESCED, and a
new daemon takes DeviceInfo.tag and the record in /run/virtmount as its orders.  REISSUE sends
every unanswered request again, which the engine's writes already allow: data goes to the same
place twice, an allocation that no table names is merely repeated.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import subprocess
from pathlib import Path

from virtmount.engine import UblkMode
from virtmount.errors import Denied, NoTransport
from virtmount.ublk.control import CONTROL, Control

MODULE = "ublk_drv"
IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")


class Flag(enum.IntFlag):
    """UBLK_F_*, as far as they are asked for or reported."""

    SUPPORT_ZERO_COPY = 1 << 0  # cleared by kernels before 6.15
    URING_CMD_COMP_IN_TASK = 1 << 1
    NEED_GET_DATA = 1 << 2
    USER_RECOVERY = 1 << 3
    USER_RECOVERY_REISSUE = 1 << 4
    UNPRIVILEGED_DEV = 1 << 5
    CMD_IOCTL_ENCODE = 1 << 6
    USER_COPY = 1 << 7  # 6.5
    ZONED = 1 << 8
    USER_RECOVERY_FAIL_IO = 1 << 9
    UPDATE_SIZE = 1 << 10
    AUTO_BUF_REG = 1 << 11  # 6.16
    QUIESCE = 1 << 12
    PER_IO_DAEMON = 1 << 13
    BUF_REG_OFF_DAEMON = 1 << 14
    BATCH_IO = 1 << 15
    INTEGRITY = 1 << 16
    SAFE_STOP_DEV = 1 << 17  # 7.0
    NO_AUTO_PART_SCAN = 1 << 18  # 7.0
    SHMEM_ZC = 1 << 19
    IO_DESC_SIZE = 1 << 20


ZERO_COPY = Flag.AUTO_BUF_REG | Flag.SUPPORT_ZERO_COPY | Flag.USER_COPY


def wanted(known: int, *, zero_copy: bool = True) -> Flag:
    """The flags to ask ADD_DEV for, of those that the kernel knows."""
    flags = Flag.USER_COPY | Flag.CMD_IOCTL_ENCODE
    if zero_copy and known & ZERO_COPY == ZERO_COPY:
        flags |= ZERO_COPY
    # Without the bit the kernel scans by itself; with it we do, at a time that we know the end of.
    return flags | (Flag(known) & Flag.NO_AUTO_PART_SCAN)


def mode(granted: int) -> UblkMode | None:
    """How to move data with the flags that came back; None where there is no way for us."""
    if granted & ZERO_COPY == ZERO_COPY:
        return UblkMode.AUTO_BUF
    return UblkMode.USER_COPY if granted & Flag.USER_COPY else None


def known(control: Control) -> int:
    """The flags of this kernel; NoTransport where it lacks what serving needs."""
    try:
        mask = control.features()
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
            raise
        mask = 0
    if not mask & Flag.USER_COPY:
        raise NoTransport(
            "ublk",
            f"kernel {os.uname().release}",
            "no user copy in its ublk, which came with 6.5",
            hint="boot a newer kernel, or use --transport fuse",
        )
    return mask


def names(flags: int) -> list[str]:
    """For people and --json, lower bits first."""
    return [flag.name.lower() for flag in Flag if flag & flags and flag.name]


def open_control() -> Control:
    """/dev/ublk-control, with its module loaded if that is all that was missing."""
    if os.geteuid():
        raise Denied("ublk", "", "a block device needs root", hint="sudo virtmount attach …")
    refuse_without_io_uring()
    if not os.path.exists(CONTROL):
        load_module()
    try:
        return Control()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise NoTransport(
                CONTROL, "", "not there, though ublk is", hint="udevadm trigger"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise Denied(
                CONTROL, "", "may not be opened", hint="in a container: give it the device"
            ) from None
        raise


def refuse_without_io_uring() -> None:
    """ublk is io_uring; a machine may have that switched off."""
    value = io_uring_disabled()
    if value == 2:
        raise NoTransport(
            "io_uring",
            "kernel.io_uring_disabled=2",
            "switched off on this machine",
            hint="sysctl kernel.io_uring_disabled=0",
        )


def io_uring_disabled() -> int:
    """kernel.io_uring_disabled: 0 on, 1 for root only, 2 off; 0 where there is no such switch."""
    with contextlib.suppress(OSError, ValueError):
        return int(IO_URING_DISABLED.read_text())
    return 0


def load_module() -> None:
    """modprobe ublk_drv: nothing loads it by itself.  NoTransport where that does not help."""
    release = os.uname().release
    try:
        done = subprocess.run(
            ["modprobe", MODULE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
        )
    except FileNotFoundError:
        raise NoTransport(
            "ublk", "", f"{MODULE} is not loaded and there is no modprobe", hint="apt install kmod"
        ) from None
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or ["modprobe failed"])[-1]
        raise NoTransport(
            "ublk",
            f"kernel {release}",
            f"no module {MODULE}: {complaint}",
            hint="boot a kernel with ublk (6.12 or later; on Debian 12: "
            "apt install -t bookworm-backports linux-image-amd64), or use --transport fuse",
        )
