"""Encrypted QCOW2 images, made by qemu's tools."""

from __future__ import annotations

import subprocess
from pathlib import Path

SECRET = "geheim"
OBJECT = ("--object", f"secret,id=s,data={SECRET}")
FLAKY = "accurate CPU usage"  # qemu measures its key derivation, and may be too fast for its clock


def create(path: Path, size: int, *options: str, method: str = "luks") -> Path:
    words = [f"encrypt.format={method}", "encrypt.key-secret=s", *options]
    if method == "luks":
        words.append("encrypt.iter-time=20")
    command = ["qemu-img", "create", "-q", *OBJECT, "-f", "qcow2", "-o", ",".join(words)]
    for _ in range(20):
        done = subprocess.run(
            [*command, str(path), str(size)], capture_output=True, text=True, timeout=60
        )
        if FLAKY not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
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
