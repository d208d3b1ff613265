"""The virtual machine itself: what a test that runs in one may rely on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from . import kernels, machine
from .archive import ArchiveError, machine_source
from .machine import DIED, TIMED_OUT, Disk, Result, run
from .programs import MissingProgram

CHECKOUT = Path(__file__).parents[2]
PROGRAMS = {"qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static"}
MISSING = [package for name, package in PROGRAMS.items() if not shutil.which(name)]

needs_machine = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {' '.join(MISSING)}")


@pytest.fixture(scope="session")
def fetched() -> None:
    """Have both kernels, or skip saying why not."""
    try:
        for name in kernels.NAMES:
            kernels.find(name)
    except (kernels.KernelError, MissingProgram) as error:
        pytest.skip(str(error))


def shell(script: str, **options: Any) -> Result:
    result = run(["sh", "-c", script], timeout=60, **options)
    print(result.problem, result.log[-4000:])  # shown if the test fails
    return result


@needs_machine
@pytest.mark.vm
@pytest.mark.usefixtures("fetched")
class TestMachine:
    @pytest.mark.parametrize(("name", "major"), [("oldest", "6.12."), ("newest", "7.")])
    def test_kernel_has_ublk_and_nbd_without_udev(self, name: str, major: str) -> None:
        result = shell(
            "uname -r; modprobe ublk_drv && test -c /dev/ublk-control && echo ublk;"
            "modprobe nbd && test -b /dev/nbd0 && echo nbd; test -e /run/udev || echo no udev",
            kernel=name,
        )
        version, *rest = result.output.splitlines()
        assert version == kernels.find(name).version
        assert version.startswith(major)
        assert rest == ["ublk", "nbd", "no udev"]

    def test_status_output_and_environment_pass_through(self) -> None:
        os.environ["VM_TEST_NOT_PASSED"] = "1"
        command = (
            "import os, sys; [print(i, file=[sys.stdout, sys.stderr][i % 2]) for i in range(6)]"
        )
        script = (
            f"{sys.executable} -c {command!r}".replace("'", '"')
            + '; pwd; env | grep -c VM_TEST_NOT_PASSED; printf \'%s|\' "$SAID" "$HOME"; exit 7'
        )
        heard: list[bytes] = []
        result = shell(script, env={"SAID": "it's $5"}, cwd=CHECKOUT, echo=heard.append)
        assert result.output == f"0\n1\n2\n3\n4\n5\n{CHECKOUT}\n0\nit's $5|/root|"
        assert b"".join(heard).decode() == result.output
        assert (result.status, result.problem) == (7, "")

    def test_large_output_is_whole_and_a_daemon_does_not_hold_the_machine(self) -> None:
        result = shell("sleep 1000 & seq 300000; exit 0")
        assert result.output.splitlines() == [str(n) for n in range(1, 300001)]
        assert result.status == 0

    def test_only_shared_folders_reach_the_host(self, tmp_path: Path) -> None:
        shared, private = tmp_path / "shared", tmp_path / "private"
        shared.mkdir()
        private.mkdir()
        (private / "seen").write_text("from the host")
        script = (
            "set -e; cat seen; echo changed >seen; echo new >/usr/new; rm /etc/hostname;"
            f"echo result >{shared}/result"
        )
        result = shell(script, cwd=private, shares=[shared])
        assert (result.status, result.output) == (0, "from the host")
        assert (private / "seen").read_text() == "from the host"
        assert not Path("/usr/new").exists()
        assert Path("/etc/hostname").exists()
        assert (shared / "result").read_text() == "result\n"

    def test_scratch_disks_can_be_formatted_and_mounted(self) -> None:
        result = shell(
            "set -e; mkfs.ext4 -q /dev/scratch/data; mount /dev/scratch/data /mnt;"
            "echo kept >/mnt/file; umount /mnt; mount /dev/scratch/data /mnt; cat /mnt/file;"
            "blockdev --getsize64 /dev/scratch/data /dev/scratch/disk1",
            disks=[Disk("data", 256 << 20), "64M:disk1:fast"],
        )
        assert (result.status, result.output) == (0, f"kept\n{256 << 20}\n{64 << 20}\n")

    def test_timeout_ends_the_machine(self) -> None:
        started = time.monotonic()
        result = run(["sh", "-c", "echo waiting; sleep 1000"], timeout=8)
        assert result.status == TIMED_OUT
        assert result.output in ("waiting\n", "")  # a busy host may not have come so far
        assert time.monotonic() - started < 12
        assert not children()

    def test_panic_is_told_from_a_failing_command(self) -> None:
        result = shell("echo c >/proc/sysrq-trigger")
        assert result.status == DIED
        assert result.problem.startswith("Kernel panic")
        assert "sysrq" in result.log

    def test_machine_that_hangs_is_told_from_a_slow_command(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(machine, "SILENCE", 15.0)
        assert shell("sleep 25; echo done").output == "done\n"
        result = shell("kill -STOP -1; sleep 1000")
        assert result.status == DIED
        assert result.problem == "the machine hangs: silent for 15 s"

    def test_counting_instructions(self) -> None:
        result = shell("nproc", icount=True)
        assert (result.status, result.output) == (0, "1\n")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_signal_leaves_nothing_behind(self, number: signal.Signals) -> None:
        command = [sys.executable, "-m", "tests.vm", "--", "sh", "-c", "echo up; sleep 1000"]
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process:
            assert process.stdout.readline() == b"up\n"
            machines = children(process.pid)
            process.send_signal(number)
            process.wait(10)
        assert len(machines) == 1
        deadline = time.monotonic() + 5
        while Path(f"/proc/{machines[0]}/exe").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{machines[0]}/exe").exists()


def children(parent: int | None = None) -> list[int]:
    """Return the processes that a process has started and that still run."""
    listing = Path(f"/proc/{parent or os.getpid()}/task").glob("*/children")
    return [int(pid) for path in listing for pid in path.read_text().split()]


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("512", Disk("disk2", 512)),
        ("64M", Disk("disk2", 64 << 20)),
        ("1G:data", Disk("data", 1 << 30)),
        ("1G:fast", Disk("disk2", 1 << 30, fast=True)),
        ("2T:data:fast", Disk("data", 2 << 40, fast=True)),
    ],
)
def test_disk_on_the_command_line(text: str, disk: Disk) -> None:
    assert Disk.parse(text, 2) == disk


@pytest.mark.parametrize("text", ["", "big", "1G:a:b", "1G:a name", "1G:" + "x" * 21, "1G,a"])
def test_refuses_disk(text: str) -> None:
    with pytest.raises(ValueError, match="is not SIZE"):
        Disk.parse(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "sources.list",
            "# deb http://wrong.example/debian CODENAME main\n"
            "deb http://security.example/debian CODENAME-security main\n"
            "deb [arch=amd64 signed-by=/key.gpg] http://right.example/debian CODENAME main\n",
        ),
        (
            "sources.list.d/debian.sources",
            "Types: deb\nURIs: http://security.example/debian\nSuites: CODENAME-security\n\n"
            "Types: deb deb-src\n# a comment\nURIs: http://right.example/debian\n"
            "Suites: CODENAME CODENAME-updates\nComponents: main\nSigned-By:\n /key.gpg\n",
        ),
    ],
)
def test_reads_the_machines_own_archive(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "sources.list.d").mkdir()
    with pytest.raises(ArchiveError, match="no source"):
        machine_source(tmp_path)
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if line
    )
    codename = release["VERSION_CODENAME"].strip('"')
    (tmp_path / name).write_text(text.replace("CODENAME", codename))
    source = machine_source(tmp_path)
    assert (source.uri, source.keyring) == ("http://right.example/debian", "/key.gpg")


class Unreachable:
    """An archive while the network is away."""

    def __init__(self, folder: Path) -> None: ...

    def update(self) -> None:
        raise ArchiveError("no network")


def test_without_the_archive_the_cache_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRTMOUNT_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "Archive", Unreachable)
    with pytest.raises(kernels.KernelError, match="no network"):
        kernels.find("newest")
    for version in ("6.12.9+deb13-amd64", "6.12.117+deb13-amd64"):
        (tmp_path / "kernels" / version).mkdir(parents=True)
        (tmp_path / "kernels" / version / "vmlinuz").touch()
    (tmp_path / "kernels/newest").symlink_to("6.12.117+deb13-amd64")
    assert kernels.fetch(["newest"])[0].version == "6.12.117+deb13-amd64"
    assert kernels.find("6.12").version == "6.12.117+deb13-amd64"
    assert kernels.find("6.12.9").version == "6.12.9+deb13-amd64"
    with pytest.raises(kernels.KernelError):
        kernels.find("6.1")
