"""attach --overlay and encrypted images, with a real device, by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import virtmount
from virtmount.creation import create

pytestmark = pytest.mark.device

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., str]


def run(*words: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=60, **options
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """The command; what it attached is taken away in the end, and then no record is left."""
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("VIRTMOUNT_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def call(*words: object, **options: Any) -> str:
        done = run(sys.executable, "-m", "virtmount", *words, cwd=ROOT, **options)
        return done.stdout.strip() or done.stderr.strip()

    yield call
    call("detach", "--all")
    assert not list((tmp_path / "run").glob("*.json"))


def node(command: Command) -> str:
    disks = json.loads(command("list", "--json"))["disks"]
    return str(disks[0]["device"])


def test_writes_are_thrown_away(tmp_path: Path, command: Command) -> None:
    image, folder = tmp_path / "disk.vdi", tmp_path / "over"
    folder.mkdir()
    create(image, 64 * MIB)
    before = image.read_bytes()
    command("attach", "-t", "fuse", f"--overlay={folder}", image)
    (disk,) = json.loads(command("list", "--json"))["disks"]
    assert disk["overlay"] == str(folder)
    assert disk["format"] == "vdi"
    assert disk["read_only"] is False
    (tmp_path / "mount").mkdir()
    run("mkfs.ext4", "-q", disk["device"])
    run("mount", disk["device"], tmp_path / "mount")
    try:
        (tmp_path / "mount" / "file").write_bytes(b"x" * 20 * MIB)
        os.sync()
        assert list(folder.iterdir()) == []
    finally:
        run("umount", tmp_path / "mount")
    with virtmount.open(image) as plain:  # others may read it meanwhile
        assert plain.pread(0, MIB) == bytes(MIB)
    command("attach", "-t", "fuse", image, code=5)
    command("detach", image)
    assert image.read_bytes() == before


def test_overlay_without_a_folder_does_not_take_the_image_for_one(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    create(tmp_path / "disk.img", MIB)
    command("attach", "-t", "fuse", "--overlay", tmp_path / "disk.img")
    Path(node(command)).write_bytes(b"y" * MIB)
    assert command("list", "-n", "-o", "OVERLAY,FORMAT") == f"{tmp_path} raw"
    command("detach", "--all")
    assert (tmp_path / "disk.img").read_bytes() == bytes(MIB)


def test_overlay_in_a_folder_that_is_not_there(tmp_path: Path, command: Command) -> None:
    create(tmp_path / "disk.img", MIB)
    told = command("attach", f"--overlay={tmp_path}/none", tmp_path / "disk.img", code=1)
    assert "No such file" in told


def test_python(tmp_path: Path, command: Command) -> None:
    create(tmp_path / "disk.vdi", MIB)
    with virtmount.attach(tmp_path / "disk.vdi", transport="fuse", overlay=tmp_path) as disk:
        Path(disk.device).write_bytes(b"z" * MIB)
        assert disk.record.overlay == str(tmp_path)
    with virtmount.open(tmp_path / "disk.vdi") as plain:
        assert plain.pread(0, MIB) == bytes(MIB)


@pytest.fixture
def secret_image(tmp_path: Path) -> Path:
    image = tmp_path / "secret.qcow2"
    # The old encryption: LUKS makes every opening slow, which is its purpose.
    words = ["qemu-img", "create", "-q", "-f", "qcow2"]
    words += ["--object", "secret,id=s,data=open sesame"]
    run(*words, "-o", "encrypt.format=aes,encrypt.key-secret=s", image, "4M")
    return image


def test_passphrase_reaches_the_daemon_and_nobody_else(
    tmp_path: Path, command: Command, secret_image: Path
) -> None:
    (tmp_path / "right").write_text("open sesame\n")
    told = command("attach", "-t", "fuse", secret_image, code=4, stdin=subprocess.DEVNULL)
    assert "encrypted: no passphrase" in told
    command("attach", "-t", "fuse", "--passphrase-file", tmp_path / "right", secret_image)
    Path(node(command)).write_bytes(b"inside" * 1000)
    (disk,) = json.loads(command("list", "--json"))["disks"]
    for place in ("cmdline", "environ"):
        assert b"sesame" not in Path(f"/proc/{disk['pid']}/{place}").read_bytes()
    for file in (tmp_path / "run").iterdir():
        assert b"sesame" not in file.read_bytes()
    command("detach", "--all")
    reader, writer = os.pipe()
    os.write(writer, b"open sesame")
    os.close(writer)
    words = ("--passphrase-fd", reader, "-t", "fuse", "--read-only")
    command("attach", *words, secret_image, pass_fds=(reader,))
    os.close(reader)
    with open(node(command), "rb") as device:
        assert device.read(6000) == b"inside" * 1000


def test_snapshot_is_read_only(tmp_path: Path, command: Command) -> None:
    image, raw = tmp_path / "disk.qcow2", tmp_path / "disk.img"
    raw.write_bytes(b"then" * MIB)
    run("qemu-img", "convert", "-O", "qcow2", raw, image)
    run("qemu-img", "snapshot", "-c", "before", image)
    with virtmount.open(image, writable=True) as disk:
        disk.pwrite(0, b"now!" * 1000)
    command("attach", "-t", "fuse", "--snapshot", "before", image)
    assert command("list", "-n", "-o", "RO") == "1"
    with open(node(command), "rb") as device:
        assert device.read(4 * MIB) == b"then" * MIB
    command("detach", "--all")
    command("attach", "-t", "fuse", "--snapshot", "none of these", image, code=3)
