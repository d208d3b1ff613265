"""QCOW2 images for the tests: made by qemu's tools, with clusters in shuffled order."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.reference import Reference
from virtmount.formats.qcow2 import QCOW2
from virtmount.formats.raw import Raw
from virtmount.hostfile import HostFile
from virtmount.image import Image


def run(*command: str | Path, allowed: Sequence[int] = (0,)) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode in allowed, (command, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def create(path: Path, size: int, *options: str, parent: Path | None = None) -> Path:
    command: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2"]
    for option in options:
        command += ["-o", option]
    if parent:
        command += ["-F", "raw", "-b", parent.name]
    run(*command, path, str(size))
    return path


def qemu_io(path: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", "qcow2", *words, path)
    assert "failed" not in said, said


def scatter(path: Path, size: int, cluster: int, seed: int = 0) -> None:
    """Pieces in shuffled order, most of them inside of a cluster, some across several."""
    rng = random.Random(seed)
    grains = size // 512
    commands = []
    for i in range(40):
        length = min(rng.choice((1, 1, 3, 8, cluster // 512, 2 * cluster // 512 + 1)), grains)
        offset = rng.randrange(grains - length + 1)
        commands.append(f"write -q -P {i % 255 + 1} {offset * 512} {length * 512}")
    qemu_io(path, *commands)


def raw_of(path: Path) -> bytes:
    """The guest's bytes as qemu-img sees them."""
    raw = path.with_name(path.name + ".oracle")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    content = raw.read_bytes()
    raw.unlink()
    return content


@contextmanager
def opened(
    path: Path, *, writable: bool = False, parent: Path | None = None
) -> Iterator[Reference]:
    """The image through the driver and the reference engine, closed in order at the end."""
    with HostFile(path, writable=writable) as file, ExitStack() as stack:
        images: list[Image] = [QCOW2(file)]
        for other in images[0].files[1:]:
            stack.enter_context(other)
        if parent:
            images.append(Raw(stack.enter_context(HostFile(parent))))
        with Reference(images) as disk:
            yield disk


def content_of(path: Path, parent: Path | None = None) -> bytes:
    with opened(path, parent=parent) as disk:
        return disk.pread(0, disk.size)


def check(path: Path) -> None:
    """No corruption and no leaks, says qemu."""
    run("qemu-img", "check", "-f", "qcow2", path)


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def number(path: Path, offset: int, length: int = 8) -> int:
    with open(path, "rb") as file:
        file.seek(offset)
        return int.from_bytes(file.read(length), "big")


def l1_offset(path: Path) -> int:
    return number(path, 40)


def l2_offset(path: Path, index: int = 0) -> int:
    return number(path, l1_offset(path) + 8 * index) & 0x00FFFFFFFFFFFE00


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)
