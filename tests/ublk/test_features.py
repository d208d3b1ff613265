"""The choice of flags, for the masks of real kernels."""

import errno
import subprocess

import pytest

from virtmount.engine import UblkMode
from virtmount.errors import Denied, NoTransport
from virtmount.ublk import features
from virtmount.ublk.features import Flag

LINUX_6_12 = 0x1FF
LINUX_6_19 = 0x7FFF
LINUX_7_2 = 0xFFFFF


@pytest.mark.parametrize(
    ("known", "asked"),
    [
        (LINUX_6_12, Flag.USER_COPY | Flag.CMD_IOCTL_ENCODE),
        (LINUX_6_19, features.ZERO_COPY | Flag.CMD_IOCTL_ENCODE),
        (LINUX_7_2, features.ZERO_COPY | Flag.CMD_IOCTL_ENCODE | Flag.NO_AUTO_PART_SCAN),
    ],
)
def test_flags_to_ask_for(known, asked):
    assert features.wanted(known) == asked


def test_data_that_has_to_be_decrypted_goes_through_memory():
    asked = features.wanted(LINUX_7_2, zero_copy=False)
    assert not asked & (Flag.AUTO_BUF_REG | Flag.SUPPORT_ZERO_COPY)
    assert features.mode(asked) is UblkMode.USER_COPY


@pytest.mark.parametrize(
    ("granted", "mode"),
    [
        (0xC2, UblkMode.USER_COPY),  # what 6.12 left of 0x40881
        (0x8C3, UblkMode.AUTO_BUF),
        (0x882, UblkMode.USER_COPY),  # zero copy refused
        (0x42, None),
    ],
)
def test_mode_follows_from_what_was_granted(granted, mode):
    assert features.mode(granted) is mode


def test_names_are_in_the_order_of_the_bits():
    assert features.names(0xC2) == ["uring_cmd_comp_in_task", "cmd_ioctl_encode", "user_copy"]


class Answering:
    def __init__(self, answer):
        self.answer = answer

    def features(self):
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


def test_known_flags():
    assert features.known(Answering(LINUX_7_2)) == LINUX_7_2


@pytest.mark.parametrize("answer", [OSError(errno.EOPNOTSUPP, ""), OSError(errno.EINVAL, ""), 0x7F])
def test_a_ublk_without_user_copy_is_no_transport(answer):
    with pytest.raises(NoTransport, match="no user copy"):
        features.known(Answering(answer))


def test_another_error_of_the_kernel_is_not_taken_for_an_old_kernel():
    with pytest.raises(OSError, match="Cannot allocate") as caught:
        features.known(Answering(OSError(errno.ENOMEM, "Cannot allocate memory")))
    assert caught.value.errno == errno.ENOMEM


def test_io_uring_switched_off_says_how_to_switch_it_on(tmp_path, monkeypatch):
    switch = tmp_path / "io_uring_disabled"
    switch.write_text("2\n")
    monkeypatch.setattr(features, "IO_URING_DISABLED", switch)
    with pytest.raises(NoTransport) as caught:
        features.refuse_without_io_uring()
    assert "kernel.io_uring_disabled=0" in caught.value.hint


@pytest.mark.parametrize("text", ["0\n", "1\n", None])
def test_io_uring_for_root_is_enough(tmp_path, monkeypatch, text):
    switch = tmp_path / "io_uring_disabled"
    if text:
        switch.write_text(text)
    monkeypatch.setattr(features, "IO_URING_DISABLED", switch)
    features.refuse_without_io_uring()


def test_kernel_without_the_module_names_the_way_out(monkeypatch):
    def modprobe(command, **_):
        assert command == ["modprobe", "ublk_drv"]
        text = "modprobe: FATAL: Module ublk_drv not found in directory /lib/modules/6.1\n"
        return subprocess.CompletedProcess(command, 1, stderr=text)

    monkeypatch.setattr(subprocess, "run", modprobe)
    with pytest.raises(NoTransport, match="Module ublk_drv not found") as caught:
        features.load_module()
    assert "--transport fuse" in caught.value.hint


def test_machine_without_modprobe(monkeypatch):
    def modprobe(command, **_):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", modprobe)
    with pytest.raises(NoTransport, match="no modprobe"):
        features.load_module()


def test_needs_root(monkeypatch):
    monkeypatch.setattr(features.os, "geteuid", lambda: 1000)
    with pytest.raises(Denied, match="needs root"):
        features.open_control()
