"""The examination of machines that lack this or that, without having them."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from virtmount import doctor, engine
from virtmount.doctor import Check
from virtmount.errors import NoTransport
from virtmount.ublk import features

Patch = pytest.MonkeyPatch


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: Patch) -> Path:
    """Empty /dev and /sys, and no module for this kernel."""
    monkeypatch.setattr(doctor, "DEV", tmp_path)
    monkeypatch.setattr(doctor, "SYS", tmp_path / "sys")
    monkeypatch.setattr(doctor, "RUN_UDEV", tmp_path / "udev")
    missing = subprocess.CompletedProcess([], 1, "", "")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: missing)
    return tmp_path


def test_every_check_that_fails_says_what_to_do(bare: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(doctor, "_io_uring_error", lambda: errno.EPERM)
    report = doctor.examine()
    failed = [check for check in report.checks if check.ok is False]
    assert {"root", "io_uring", "ublk", "fuse", "loop"} <= {check.name for check in failed}
    assert all(check.hint for check in failed)
    assert not report.usable
    assert report.to_dict()["transports"] == {"ublk": False, "fuse": False, "loop": False}


def test_engine_that_is_not_built(monkeypatch: Patch) -> None:
    def missing() -> Any:
        raise NoTransport("virtmount", "", "the C engine is not built", hint="make build")

    monkeypatch.setattr(engine, "native", missing)
    assert doctor.check_engine() == Check(
        "C engine", False, "the C engine is not built", "make build"
    )


@pytest.mark.parametrize(
    ("code", "switch", "text", "hint"),
    [
        (0, 0, "works", ""),
        (errno.ENOSYS, 0, "this kernel has none", "boot Linux 6.1 or later"),
        (errno.EPERM, 2, "kernel.io_uring_disabled=2", "sysctl kernel.io_uring_disabled=0"),
        (errno.EPERM, 0, "Operation not permitted", "seccomp"),
    ],
)
def test_io_uring(monkeypatch: Patch, code: int, switch: int, text: str, hint: str) -> None:
    monkeypatch.setattr(doctor, "_io_uring_error", lambda: code)
    monkeypatch.setattr(features, "io_uring_disabled", lambda: switch)
    check = doctor.check_io_uring()
    assert check.ok is (code == 0)
    assert text in check.text
    assert hint in check.hint


def test_this_machine_can_make_a_ring_as_the_engine_does() -> None:
    """The tests of the engine need it too."""
    assert doctor._io_uring_error() == 0


def test_module_that_is_not_loaded_yet_is_no_lack(bare: Path) -> None:
    (bare / "sys/module/ublk_drv").mkdir(parents=True)
    assert doctor.check_ublk().ok is True


@pytest.mark.parametrize(
    ("known", "ok", "text"),
    [(0x1FF, True, "user copy"), (0xFFFFF, True, "auto buf"), (0x7F, False, "no user copy")],
)
def test_what_ublk_can_do(bare: Path, monkeypatch: Patch, known: int, ok: bool, text: str) -> None:
    class Control:
        def features(self) -> int:
            return known

    @contextmanager
    def opened() -> Iterator[Control]:
        yield Control()

    (bare / "ublk-control").touch()
    monkeypatch.setattr(features, "open_control", opened)
    check = doctor.check_ublk()
    assert (check.ok, text in check.text) == (ok, True)


def test_without_root_ublk_is_left_open(bare: Path, monkeypatch: Patch) -> None:
    (bare / "ublk-control").touch()
    monkeypatch.setattr(doctor.os, "geteuid", lambda: 1000)
    assert doctor.check_ublk().ok is None


@pytest.mark.parametrize(("version", "ok"), [(252, None), (257, True), (0, True)])
def test_udev(bare: Path, monkeypatch: Patch, version: int, ok: bool | None) -> None:
    assert doctor.check_udev().ok is None
    (bare / "udev").touch()
    monkeypatch.setattr(doctor, "_udev_version", lambda: version)
    assert doctor.check_udev().ok is ok


@pytest.mark.parametrize(
    ("missing", "usable", "transports"),
    [
        ([], True, {"ublk": True, "fuse": True, "loop": True}),
        (["ublk"], True, {"ublk": False, "fuse": True, "loop": True}),
        (["fuse"], True, {"ublk": True, "fuse": False, "loop": True}),
        (["loop"], True, {"ublk": True, "fuse": False, "loop": False}),
        (["engine"], False, {"ublk": False, "fuse": False, "loop": True}),
        (["root"], False, {"ublk": False, "fuse": False, "loop": False}),
    ],
)
def test_transports_follow_from_the_checks(
    monkeypatch: Patch, missing: list[str], usable: bool, transports: dict[str, bool]
) -> None:
    for name in ("root", "engine", "io_uring", "ublk", "fuse", "loop", "udev", "run"):
        check = Check(name, name not in missing, "")
        monkeypatch.setattr(doctor, f"check_{name}", lambda check=check: check)
    report = doctor.examine()
    assert (report.usable, report.transports) == (usable, transports)
