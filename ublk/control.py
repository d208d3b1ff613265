"""The control commands of /dev/ublk-control, and the structs that they carry.

Source: linux/ublk_cmd.h of 7.2 (GPL-2.0 WITH Linux-syscall-note) and drivers/block/ublk_drv.c.
Only the ioctl-encoded commands (6.4 and later) are used.  A command is an io_uring request of 128
bytes, which Python cannot send: the engine does (vm_ublk_control), and blocks meanwhile.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

CONTROL = "/dev/ublk-control"
NEW_ID = 0xFFFFFFFF  # ADD_DEV: the kernel chooses
NO_QUEUE = 0xFFFF

# dev_id, queue_id, len, addr, data, dev_path_len, pad, reserved
_COMMAND = struct.Struct("=IHHQQHHI")
assert _COMMAND.size == 32
_INFO = struct.Struct("=HHHHIIiIQQIIQQ")
assert _INFO.size == 64
_FEATURES = struct.Struct("=Q")


def _encoded(direction: int, number: int) -> int:
    """_IOR or _IOWR('u', number, struct ublksrv_ctrl_cmd) of asm-generic/ioctl.h."""
    return direction << 30 | _COMMAND.size << 16 | ord("u") << 8 | number


_READ, _READ_WRITE = 2, 3


class Command(enum.IntEnum):
    GET_DEV_INFO = _encoded(_READ, 0x02)
    ADD_DEV = _encoded(_READ_WRITE, 0x04)
    DEL_DEV = _encoded(_READ_WRITE, 0x05)
    START_DEV = _encoded(_READ_WRITE, 0x06)
    STOP_DEV = _encoded(_READ_WRITE, 0x07)
    SET_PARAMS = _encoded(_READ_WRITE, 0x08)
    GET_PARAMS = _encoded(_READ, 0x09)
    GET_FEATURES = _encoded(_READ, 0x13)  # 6.5
    TRY_STOP_DEV = _encoded(_READ_WRITE, 0x17)  # 7.0, Flag.SAFE_STOP_DEV


class DeviceState(enum.IntEnum):
    DEAD = 0  # added and not started, or stopped
    LIVE = 1
    QUIESCED = 2  # the daemon died, requests wait for the next one
    FAIL_IO = 3


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """struct ublksrv_ctrl_dev_info."""

    depth: int
    max_io: int  # bytes
    flags: int
    tag: int = 0  # ublksrv_flags: kept by the kernel, meaningless to it
    queues: int = 1
    state: int = 0
    descriptor_size: int = 0  # 7.3 with IO_DESC_SIZE; padding before
    device_id: int = NEW_ID
    pid: int = 0
    owner_uid: int = 0
    owner_gid: int = 0

    def pack(self) -> bytes:
        return _INFO.pack(
            self.queues,
            self.depth,
            self.state,
            self.descriptor_size,
            self.max_io,
            self.device_id,
            self.pid,
            0,
            self.flags,
            self.tag,
            self.owner_uid,
            self.owner_gid,
            0,
            0,
        )

    @classmethod
    def unpack(cls, raw: bytes) -> DeviceInfo:
        (queues, depth, state, descriptor_size, max_io, device_id, pid, _, flags, tag) = (
            _INFO.unpack(raw)[:10]
        )
        uid, gid = _INFO.unpack(raw)[10:12]
        return cls(
            depth,
            max_io,
            flags,
            tag,
            queues,
            state,
            descriptor_size,
            device_id,
            pid,
            uid,
            gid,
        )


# (control fd, command, payload of 32 bytes) -> result; OSError for a negative one
Send = Callable[[int, int, bytes], int]


class Control:
    """An open /dev/ublk-control.  Every method is one command, and blocks; OSError names it."""

    def __init__(self, send: Send | None = None, path: str = CONTROL) -> None:
        if send is None:
            from virtmount.engine import ublk_control

            send = ublk_control
        self._send = send
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def features(self) -> int:
        """The mask of flags that this kernel knows; EOPNOTSUPP or EINVAL before 6.5."""
        raw = self._command(Command.GET_FEATURES, 0, bytes(_FEATURES.size))
        return int(_FEATURES.unpack(raw)[0])

    def add(self, wanted: DeviceInfo) -> DeviceInfo:
        """Create /dev/ublkcN.  What comes back counts: unknown flags are cleared in silence."""
        return DeviceInfo.unpack(self._command(Command.ADD_DEV, wanted.device_id, wanted.pack()))

    def info(self, device_id: int) -> DeviceInfo:
        """ENODEV where there is no such device."""
        return DeviceInfo.unpack(self._command(Command.GET_DEV_INFO, device_id, bytes(_INFO.size)))

    def set_params(self, device_id: int, params: bytes) -> None:
        """Only before START_DEV."""
        self._command(Command.SET_PARAMS, device_id, params)

    def get_params(self, device_id: int, like: bytes) -> bytes:
        """The parameters, in a buffer that begins with the length and types of `like`."""
        return self._command(Command.GET_PARAMS, device_id, like)

    def start(self, device_id: int, pid: int) -> None:
        """Create /dev/ublkbN; returns once every request slot was fetched.

        6.12 reads the partition table before it returns, so the server must be serving already.
        """
        self._command(Command.START_DEV, device_id, data=pid)

    def stop(self, device_id: int) -> None:
        """Remove /dev/ublkbN, in use or not.  Its openers get EIO."""
        self._command(Command.STOP_DEV, device_id)

    def try_stop(self, device_id: int) -> None:
        """Remove /dev/ublkbN unless somebody has it open: EBUSY.  Kernels with SAFE_STOP_DEV."""
        self._command(Command.TRY_STOP_DEV, device_id)

    def delete(self, device_id: int) -> None:
        """Remove /dev/ublkcN, and wait until the number is free.

        Hangs for ever while this process has ublkcN open, mapped, or in a ring.
        """
        self._command(Command.DEL_DEV, device_id)

    def _command(
        self, command: Command, device_id: int, buffer: bytes | None = None, data: int = 0
    ) -> bytes:
        """Send one command; returns what the kernel left in the buffer."""
        space = ctypes.create_string_buffer(buffer, len(buffer)) if buffer is not None else None
        payload = _COMMAND.pack(
            device_id,
            NO_QUEUE,
            0 if buffer is None else len(buffer),
            0 if space is None else ctypes.addressof(space),
            data,
            0,
            0,
            0,
        )
        try:
            self._send(self._fd, command, payload)
        except OSError as error:
            code = error.errno or errno.EIO
            raise OSError(code, f"ublk {command.name}: {os.strerror(code)}") from None
        return space.raw if space is not None else b""
