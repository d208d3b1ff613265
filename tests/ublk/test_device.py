"""The life cycle against a driver made of a folder: every step may fail, nothing may be left."""

import dataclasses
import errno
import os
import threading

import pytest

from virtmount.engine import UblkMode
from virtmount.errors import NoTransport
from virtmount.ublk import device
from virtmount.ublk.control import DeviceState
from virtmount.ublk.device import TAG, UblkDevice
from virtmount.ublk.features import Flag
from virtmount.ublk.params import Params

LINUX_6_12 = 0x1FF
LINUX_7_2 = 0xFFFFF
FOREIGN = 0x1234


class Driver:
    """ublk_drv with one device, number 3; obeys the rules that the real one hangs on."""

    def __init__(self, folder, known=LINUX_7_2):
        self.dev, self.sys = folder / "dev", folder / "sys"
        self.dev.mkdir()
        self.sys.mkdir()
        self.known = known
        self.cleared = 0  # flags that it takes away in silence
        self.fail = {}  # command -> errno
        self.log = []
        self.info_ = None
        self.gone = threading.Event()
        self.partitions = []  # that START_DEV finds
        self.cdev_open = False
        self.closed = False

    def _command(self, name):
        self.log.append(name)
        if name in self.fail:
            raise OSError(self.fail[name], os.strerror(self.fail[name]))

    def features(self):
        return self.known

    def add(self, wanted):
        self._command("add")
        flags = wanted.flags & self.known & ~self.cleared
        self.info_ = dataclasses.replace(wanted, device_id=3, flags=flags)
        (self.dev / "ublkc3").touch()
        return self.info_

    def set_params(self, device_id, params):
        self._command("params")

    def serve(self, fd, depth, max_io, mode):
        self._command("serve")
        os.close(fd)
        self.cdev_open = True
        self.mode = mode

    def start(self, device_id, pid):
        self._command("start")
        assert self.cdev_open, "START_DEV before anybody serves would hang"
        assert pid == os.getpid()
        (self.dev / "ublkb3").touch()
        for name in ("queue", *self.partitions):
            (self.sys / "ublkb3" / name).mkdir(parents=True)

    def stop(self, device_id):
        self._command("stop")
        (self.dev / "ublkb3").unlink(missing_ok=True)
        self.engine_lets_go()

    def engine_lets_go(self):
        self.cdev_open = False
        self.gone.set()

    def try_stop(self, device_id):
        self._command("try_stop")

    def delete(self, device_id):
        assert not self.cdev_open, "DEL_DEV would hang"
        self._command("delete")
        (self.dev / "ublkc3").unlink()

    def info(self, device_id):
        if self.info_ is None:
            raise OSError(errno.ENODEV, "no such device")
        return self.info_

    def close(self):
        self.closed = True

    def device(self):
        return UblkDevice(
            Params(1 << 20),
            self.serve,
            self.gone,
            open_control=lambda: self,
            dev=str(self.dev),
            sys=str(self.sys),
        )

    def left(self):
        return sorted(path.name for path in self.dev.iterdir())


@pytest.fixture
def driver(tmp_path, monkeypatch):
    driver = Driver(tmp_path)

    def ioctl(fd, request):
        assert request == 0x125F
        driver._command("rescan")

    monkeypatch.setattr(device.fcntl, "ioctl", ioctl)
    monkeypatch.setattr(device, "POLL", 0)
    monkeypatch.setattr(device, "GONE_TIMEOUT", 0.01)
    return driver


def test_from_nothing_to_live_and_back(driver):
    ublk = driver.device()
    assert ublk.start() == str(driver.dev / "ublkb3")
    assert ublk.kernel_name == "ublkb3"
    assert driver.log == ["add", "params", "serve", "start", "rescan"]
    assert driver.mode is UblkMode.AUTO_BUF
    assert ublk.features["mode"] == "auto_buf"
    assert ublk.features["device_id"] == 3
    assert not ublk.wait_gone(0)
    ublk.stop()
    assert driver.log[5:] == ["stop", "delete"]
    assert driver.closed
    assert driver.left() == []
    ublk.stop()
    assert driver.log[7:] == []


def test_scheduler_is_switched_off(driver):
    scheduler = driver.sys / "ublkb3" / "queue" / "scheduler"
    ublk = driver.device()
    ublk.start()
    assert scheduler.read_text() == "none"


def test_what_was_granted_decides_the_mode(driver):
    driver.cleared = int(Flag.SUPPORT_ZERO_COPY)
    driver.device().start()
    assert driver.mode is UblkMode.USER_COPY


def test_no_mode_granted_is_undone_and_said(driver):
    driver.cleared = int(Flag.USER_COPY)
    with pytest.raises(NoTransport, match="no way to move data"):
        driver.device().start()
    assert driver.log == ["add", "delete"]
    assert driver.closed


@pytest.mark.parametrize(
    ("failing", "undone"),
    [
        ("add", []),
        ("params", ["delete"]),
        ("serve", ["delete"]),
        ("start", ["stop", "delete"]),
    ],
)
def test_failure_of_a_step_undoes_those_before(driver, failing, undone):
    driver.fail[failing] = errno.ENOMEM
    with pytest.raises(OSError, match="Cannot allocate memory"):
        driver.device().start()
    assert driver.log[driver.log.index(failing) + 1 :] == undone
    assert driver.left() == []
    assert driver.closed


def test_node_that_udev_holds_is_waited_for(driver, monkeypatch):
    real, refusals = os.open, [errno.ENOENT, errno.EBUSY]

    def held(path, flags, *rest):
        if path == f"{driver.dev}/ublkc3" and refusals:
            raise OSError(refusals.pop(0), "")
        return real(path, flags, *rest)

    monkeypatch.setattr(device.os, "open", held)
    driver.device().start()
    assert refusals == []


def test_devices_used_up_before_6_15(driver):
    driver.fail["add"] = errno.EACCES
    with pytest.raises(NoTransport) as caught:
        driver.device().start()
    assert "ublks_max" in caught.value.hint


def test_kernel_that_scans_by_itself_is_left_alone(driver):
    driver.known = LINUX_6_12
    driver.partitions = ["ublkb3p1"]
    driver.device().start()
    assert driver.log == ["add", "params", "serve", "start"]


def test_kernel_that_found_nothing_by_itself_is_asked_again(driver):
    driver.known = LINUX_6_12
    driver.device().start()
    assert driver.log == ["add", "params", "serve", "start", "rescan"]


def test_busy_partition_is_waited_for(driver, monkeypatch):
    answers = [errno.EBUSY, errno.EBUSY]

    def ioctl(fd, request):
        driver.log.append("rescan")
        if answers:
            raise OSError(answers.pop(), "")

    monkeypatch.setattr(device.fcntl, "ioctl", ioctl)
    driver.device().start()
    assert driver.log[-3:] == ["rescan"] * 3


def test_unreadable_table_is_no_reason_to_refuse_the_disk(driver, caplog):
    driver.fail["rescan"] = errno.EIO
    driver.device().start()
    assert "reading the partition table: [Errno 5]" in caplog.text
    assert driver.left() == ["ublkb3", "ublkc3"]


def test_device_that_somebody_else_removed(driver):
    ublk = driver.device()
    ublk.start()
    driver.engine_lets_go()
    assert ublk.wait_gone(0)
    driver.fail = {"stop": errno.ENODEV, "delete": errno.ENODEV}
    ublk.stop()
    assert driver.closed


def test_no_delete_while_the_engine_holds_the_device(driver):
    ublk = driver.device()
    ublk.start()
    driver.engine_lets_go = lambda: None
    with pytest.raises(TimeoutError, match="still serves"):
        ublk.stop()
    assert "delete" not in driver.log
    assert driver.closed


def test_safe_stop_where_the_kernel_has_it(driver):
    assert device.try_stop(driver, 3)
    assert driver.log == ["try_stop"]
    driver.fail["try_stop"] = errno.EBUSY
    with pytest.raises(OSError, match="busy"):
        device.try_stop(driver, 3)
    driver.known = LINUX_6_12
    assert not device.try_stop(driver, 3)


@pytest.mark.parametrize(
    ("tag", "state", "deleted"),
    [
        (TAG, DeviceState.DEAD, True),
        (TAG, DeviceState.LIVE, False),
        (FOREIGN, DeviceState.DEAD, False),
    ],
)
def test_only_a_dead_device_of_ours_is_cleared_away(driver, tag, state, deleted):
    driver.device().start()
    driver.engine_lets_go()
    driver.info_ = dataclasses.replace(driver.info_, tag=tag, state=state)
    assert device.delete_dead(driver, 3) is deleted
    assert ("delete" in driver.log) is deleted


def test_device_that_is_not_there_needs_no_clearing(driver):
    assert not device.delete_dead(driver, 3)
