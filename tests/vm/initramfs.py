"""The file system that the guest starts from: busybox, init.sh and a few modules.

An archive in the kernel's "newc" format (Documentation/driver-api/early-userspace/
buffer-format.rst), uncompressed: inflating is slow under emulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .kernels import Kernel
from .programs import MissingProgram, program

MODULES = ("9p", "9pnet_virtio", "overlay")
FOLDERS = ("dev", "proc", "sys", "host", "upper", "root", "modules")

FOLDER = 0o040755
PROGRAM = 0o100755
CONSOLE = 0o020600
LINK = 0o120777


def build(kernel: Kernel, disks: bool, files: Mapping[str, str]) -> bytes:
    """Return the initramfs for a kernel, with `files` under /run (name to text)."""
    modules = kernel.needed([*MODULES, *(["virtio_blk"] if disks else [])])
    for path in modules:
        if path.suffix != ".ko":
            raise ValueError(f"{path} is compressed; fetch the kernel again")
    busybox = Path(program("busybox", "busybox-static")).read_bytes()
    if b"/ld-linux" in busybox[:4096]:
        raise MissingProgram("busybox is not static: apt install busybox-static")

    archive = [_entry(name, FOLDER) for name in (*FOLDERS, "bin", "lib", "run")]
    archive += [
        _entry("dev/console", CONSOLE, device=(5, 1)),
        _entry("bin/busybox", PROGRAM, busybox),
        _entry("bin/sh", LINK, b"busybox"),
        _entry("init", PROGRAM, (Path(__file__).parent / "init.sh").read_bytes()),
        _entry("lib/order", PROGRAM, "".join(f"/lib/{p.name}\n" for p in modules).encode()),
    ]
    archive += [_entry(f"lib/{path.name}", PROGRAM, path.read_bytes()) for path in modules]
    archive += [_entry(f"run/{name}", PROGRAM, text.encode()) for name, text in files.items()]
    archive.append(_entry("TRAILER!!!", 0))
    return b"".join(archive)


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    path = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device, device of a node, name size, checksum
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _padded(header + path) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
