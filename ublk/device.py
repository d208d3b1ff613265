"""The life of a ublk device, as a table of steps.

    step      does                                   undone by
    control   open /dev/ublk-control                 closing it
    add       ADD_DEV: /dev/ublkcN                   DEL_DEV: the number is free again
    params    SET_PARAMS
    serve     the engine fetches every request slot  STOP_DEV, then the engine lets go of ublkcN
    start     START_DEV: /dev/ublkbN                 (by the same STOP_DEV)
    scan      the kernel reads the partition table

start() walks down, stop() and a failure walk up from where they are.

1. Flags are read back from ADD_DEV; nothing is assumed to have been granted.
2. The engine serves before START_DEV is sent: 6.12 reads the partition table inside it.
3. DEL_DEV is sent only after the engine has closed ublkcN, because it waits for that in the
   kernel, unkillably.  Where the engine does not let go, the device is left to the end of the
   process instead.
4. ublkcN is opened once, never to look whether it is there: closing it looks to the driver like
   the death of a server.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from virtmount.engine import UblkMode
from virtmount.errors import NoTransport
from virtmount.transport import Transport
from virtmount.ublk import features
from virtmount.ublk.control import Control, DeviceInfo, DeviceState
from virtmount.ublk.features import Flag
from virtmount.ublk.params import Params

log = logging.getLogger("virtmount")

# Kept by the kernel with the device: how a device of ours is known whose record is lost.
TAG = int.from_bytes(b"virtmnt\1", "big")
DEPTH = 128
OPEN_TIMEOUT = 5.0  # udev may hold a new ublkcN for a moment
SCAN_TIMEOUT = 10.0
GONE_TIMEOUT = 60.0
POLL = 0.01
BLKRRPART = 0x125F  # linux/fs.h

# (fd of ublkcN, depth, largest request, mode): the engine's ublk_serve
Serve = Callable[[int, int, int, UblkMode], None]


class UblkDevice(Transport):
    """A disk as /dev/ublkbN.

    `serve` hands ublkcN to the engine, which owns the descriptor unless that fails.  When the
    device is stopped and every request has been answered, the engine closes it and `gone` is set.
    `show` is called with the kernel's name once its scan has ended: nodes, and what it missed.
    """

    name: ClassVar[str] = "ublk"

    def __init__(
        self,
        params: Params,
        serve: Serve,
        gone: threading.Event,
        *,
        show: Callable[[str], object] = lambda kernel_name: None,
        open_control: Callable[[], Control] = features.open_control,
        dev: str = "/dev",
        sys: str = "/sys/block",
    ) -> None:
        self._params = params
        self._serve_with = serve
        self._gone = gone
        self._show = show
        self._open_control = open_control
        self._dev, self._sys = dev, sys
        self._done: list[Step] = []
        self._control: Control | None = None
        self._info: DeviceInfo | None = None
        self.features = {}

    def start(self) -> str:
        try:
            for step in STEPS:
                step.do(self)
                self._done.append(step)
        except BaseException:
            self._undo(suppress=True)
            raise
        return self.device

    def stop(self) -> None:
        self._undo(suppress=False)

    def wait_gone(self, timeout: float | None = None) -> bool:
        return self._gone.wait(timeout)

    def _undo(self, *, suppress: bool) -> None:
        """Walk up; the first error is raised at the end, unless another one is on its way."""
        first: OSError | None = None
        while self._done:
            step = self._done.pop()
            try:
                step.undo(self)
            except OSError as error:
                log.warning("ublk: undoing %s: %s", step.name, error)
                first = first or error
        if first and not suppress:
            raise first

    # The steps

    @property
    def control(self) -> Control:
        assert self._control
        return self._control

    @property
    def info(self) -> DeviceInfo:
        assert self._info
        return self._info

    @property
    def mode(self) -> UblkMode:
        """How request data moves, by the flags that were granted."""
        mode = features.mode(self.info.flags)
        if mode is None:
            raise NoTransport(
                "ublk",
                f"flags {self.info.flags:#x}",
                "no way to move data was granted",
                hint="--transport fuse",
            )
        return mode

    def _do_control(self) -> None:
        self._control = self._open_control()

    def _undo_control(self) -> None:
        self.control.close()

    def _do_add(self) -> None:
        asked = DeviceInfo(
            depth=DEPTH,
            max_io=self._params.max_io,
            flags=features.wanted(features.known(self.control), zero_copy=self._params.zero_copy),
            tag=TAG,
        )
        try:
            self._info = self.control.add(asked)
        except OSError as error:
            if error.errno == errno.EACCES:
                # 6.3 to 6.14 count all devices, not only those of unprivileged users.
                raise NoTransport(
                    "ublk",
                    "",
                    "this kernel takes no more ublk devices",
                    hint="raise the parameter ublks_max of ublk_drv",
                ) from None
            raise
        try:
            mode = self.mode
        except NoTransport:
            self._undo_add()
            raise
        self.device = f"{self._dev}/ublkb{self.info.device_id}"
        self.features = {
            "mode": mode.name.lower(),
            "device_id": self.info.device_id,
            "queues": self.info.queues,
            "depth": self.info.depth,
            "max_io": self.info.max_io,
            "flags": features.names(self.info.flags),
        }

    def _undo_add(self) -> None:
        if self._gone_or_never_served:
            with _already_gone():
                self.control.delete(self.info.device_id)
        else:
            log.error("ublk: %s is still in use by the engine; not deleted", self._cdev)

    def _do_params(self) -> None:
        self.control.set_params(self.info.device_id, self._params.pack())

    def _do_serve(self) -> None:
        fd = _open_when_free(self._cdev, OPEN_TIMEOUT)
        try:
            self._serve_with(fd, self.info.depth, self.info.max_io, self.mode)
        except BaseException:
            os.close(fd)
            raise
        self._served = True

    def _undo_serve(self) -> None:
        with _already_gone():
            self.control.stop(self.info.device_id)
        if not self._gone.wait(GONE_TIMEOUT):
            raise TimeoutError(errno.ETIMEDOUT, f"the engine still serves {self.device}")

    def _do_start(self) -> None:
        self.control.start(self.info.device_id, os.getpid())

    def _do_scan(self) -> None:
        _wait_for(self.device, OPEN_TIMEOUT)
        # One queue of a user process gains nothing from a second scheduler before it.
        with contextlib.suppress(OSError):
            (self._sysfs / "queue" / "scheduler").write_text("none")
        try:
            self._scan()
        except OSError as error:
            # A table that cannot be read is the disk's trouble; the device is there.
            log.warning("%s: reading the partition table: %s", self.device, error)
        self._show(self.kernel_name)

    def _scan(self) -> None:
        """Have the partition table read, and know that it was.

        With NO_AUTO_PART_SCAN nobody else does it.  Without, the kernel has done it in START_DEV
        (6.12), or is doing it (some later ones): opening the device waits for that, and reading
        the table again would only make partitions flicker that are there.
        """
        fd = os.open(self.device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not self.info.flags & Flag.NO_AUTO_PART_SCAN and self._partitions():
                return
            deadline = time.monotonic() + SCAN_TIMEOUT
            while True:
                try:
                    fcntl.ioctl(fd, BLKRRPART)
                    return
                except OSError as error:
                    # A partition that the kernel found by itself is open, in udev.
                    if error.errno != errno.EBUSY or time.monotonic() > deadline:
                        raise
                time.sleep(POLL)
        finally:
            os.close(fd)

    def _partitions(self) -> bool:
        return any(self._sysfs.glob(f"{self.kernel_name}p*"))

    @property
    def _cdev(self) -> str:
        return f"{self._dev}/ublkc{self.info.device_id}"

    @property
    def _sysfs(self) -> Path:
        return Path(self._sys) / self.kernel_name

    _served = False

    @property
    def _gone_or_never_served(self) -> bool:
        return not self._served or self._gone.is_set()


def _nothing(device: UblkDevice) -> None:
    pass


class Step(NamedTuple):
    name: str
    do: Callable[[UblkDevice], None]
    undo: Callable[[UblkDevice], None] = _nothing


STEPS = (
    Step("control", UblkDevice._do_control, UblkDevice._undo_control),
    Step("add", UblkDevice._do_add, UblkDevice._undo_add),
    Step("params", UblkDevice._do_params),
    Step("serve", UblkDevice._do_serve, UblkDevice._undo_serve),
    Step("start", UblkDevice._do_start),
    Step("scan", UblkDevice._do_scan),
)


def _already_gone() -> contextlib.AbstractContextManager[None]:
    """Somebody else stopped or deleted the device: what was wanted is done."""

    @contextlib.contextmanager
    def quiet() -> Any:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.ENOENT):
                raise

    return quiet()


def _open_when_free(path: str, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EBUSY) or time.monotonic() > deadline:
                raise
        time.sleep(POLL)


def _wait_for(path: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise FileNotFoundError(errno.ENOENT, "the kernel made no node", path)
        time.sleep(POLL)


def try_stop(control: Control, device_id: int) -> bool:
    """Stop a device unless it is open, in one step; False where this kernel has no such step.

    OSError EBUSY: somebody has it open.
    """
    if not features.known(control) & Flag.SAFE_STOP_DEV:
        return False
    control.try_stop(device_id)
    return True


def delete_dead(control: Control, device_id: int) -> bool:
    """Delete what a daemon that was killed left: a device of ours without a server.

    False, and nothing is done, where the device is another one's or is being served.
    """
    try:
        info = control.info(device_id)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return False
    if info.tag != TAG or info.state != DeviceState.DEAD:
        return False
    control.delete(device_id)
    return True
