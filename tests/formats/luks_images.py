"""Encrypted QCOW2 images, made by qemu's tools."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

SECRET = "geheim"
OBJECT = ("--object", f"secret,id=s,data={SECRET}")
FLAKY = "accurate CPU usage"  # qemu measures its key derivation, and may be too fast for its clock


def create(path: Path, size: int, *options: str, method: str = "luks") -> Path:
    """An empty image; a LUKS one takes qemu seconds, so each kind is made once."""
    path.write_bytes(_created(size, options, method))
    return path


@functools.cache
def _created(size: int, options: tuple[str, ...], method: str) -> bytes:
    words = [f"encrypt.format={method}", "encrypt.key-secret=s", *options]
    if method == "luks":
        words.append("encrypt.iter-time=50")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        _patiently(
            "create", "-q", *OBJECT, "-f", "qcow2", "-o", ",".join(words), str(path), str(size)
        )
        return path.read_bytes()


def _patiently(*words: str) -> None:
    for _ in range(20):
        done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, timeout=60)
        if FLAKY not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


def create_with(path: Path, size: int, header: bytes) -> Path:
    """The same with another header: qemu's is as long as ours where its options are its own."""
    raw = _created(size, (), "luks")
    at = raw[:4096].index((0x0537BE77).to_bytes(4, "big")) + 8
    offset, length = (int.from_bytes(raw[i : i + 8], "big") for i in (at, at + 8))
    assert length == len(header)
    path.write_bytes(raw[:offset] + header + raw[offset + length :])
    return path


def spec(path: Path, driver: str = "qcow2") -> str:
    """For --image-opts."""
    return f"driver={driver},encrypt.key-secret=s,file.filename={path}"


def qemu_io(path: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", *OBJECT, "--image-opts", *words, spec(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "failed" not in said, said


def raw_of(path: Path, driver: str = "qcow2") -> bytes:
    """The guest's bytes as qemu-img sees them."""
    raw = path.with_name(path.name + ".oracle")
    subprocess.run(
        ["qemu-img", "convert", *OBJECT, "--image-opts", "-O", "raw", spec(path, driver), str(raw)],
        check=True,
        timeout=60,
    )
    content = raw.read_bytes()
    raw.unlink()
    return content


def check(path: Path) -> None:
    """No corruption and no leaks, says qemu."""
    command = ["qemu-img", "check", *OBJECT, "--image-opts", spec(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def add_slot(path: Path, secret: str) -> None:
    """Another passphrase for the same data."""
    more = "encrypt.state=active,encrypt.new-secret=t,encrypt.iter-time=50"
    new = ("--object", f"secret,id=t,data={secret}")
    _patiently("amend", *OBJECT, *new, "--image-opts", spec(path), "-o", more)


def volume(path: Path) -> bytes:
    """What a LUKS volume holds that is not inside of any image."""
    raw = path.with_name(path.name + ".oracle")
    opts = f"driver=luks,key-secret=s,file.filename={path}"
    subprocess.run(
        ["qemu-img", "convert", *OBJECT, "--image-opts", "-O", "raw", opts, str(raw)],
        check=True,
        timeout=60,
    )
    return raw.read_bytes()
