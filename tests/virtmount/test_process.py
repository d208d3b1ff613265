"""Measures for the whole process, each tried in a process of its own.  Needs root."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def in_process(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from virtmount import process\n" + program],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def mountinfo() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


@pytest.mark.alone
def test_mounts_of_a_namespace_that_is_not_ours_are_left_alone() -> None:
    before = mountinfo()
    out = in_process(
        "try:\n    process.leave_mounts()\nexcept OSError as error:\n    print(error.strerror)"
    )
    assert out == "not in a mount namespace of our own\n"
    assert mountinfo() == before


@pytest.mark.alone
def test_own_namespace_keeps_what_is_needed_and_nothing_else(tmp_path: Path) -> None:
    kept, other = tmp_path / "ke pt", tmp_path / "other"
    for folder in (kept, other):
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    before = mountinfo()
    try:
        out = in_process(
            f"process.own_mounts(); process.leave_mounts(({str(kept)!r},))\n"
            "print(open('/proc/self/mountinfo').read())"
        )
        points = {line.split(" ")[4] for line in out.splitlines() if line}
        assert str(kept).replace(" ", "\\040") in points
        assert "/" in points
        allowed = {"/", "/proc", "/sys", "/dev", "/run"}
        assert points - allowed == {str(kept).replace(" ", "\\040")}
        assert mountinfo() == before
    finally:
        for folder in (kept, other):
            subprocess.run(["umount", folder], check=True)


def test_what_is_mounted_outside_later_is_not_seen_inside(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from virtmount import process\nprocess.own_mounts()\n"
            "print('ready', flush=True)\ninput()\n"
            "print(open('/proc/self/mountinfo').read())",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    try:
        seen, _ = process.communicate("\n", timeout=30)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert str(tmp_path) not in seen


def test_memory_is_locked_now_and_later() -> None:
    out = in_process(
        "process.lock_memory()\n"
        "later = bytearray(8 << 20)\n"
        "later[:] = b'x' * len(later)\n"
        "print(open('/proc/self/status').read())"
    )
    values = dict(line.split(":", 1) for line in out.splitlines() if line)
    locked = int(values["VmLck"].split()[0])
    assert locked > 12 << 10


def test_measure_that_is_refused_is_logged_and_not_fatal() -> None:
    out = in_process(
        "import errno, logging, sys\n"
        "logging.basicConfig(stream=sys.stdout)\n"
        "def refused():\n    raise OSError(errno.EPERM, 'Operation not permitted')\n"
        "process._try(refused)"
    )
    assert out == "WARNING:virtmount:refused: Operation not permitted\n"


@pytest.mark.parametrize("name", ["virtmount", "a name that is too long"])
def test_name(name: str) -> None:
    out = in_process(f"process.set_name({name!r}); print(open('/proc/self/comm').read(), end='')")
    assert out == name[:15] + "\n"
