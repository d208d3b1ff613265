"""What the tests of the tools share: formats, qemu-img as the judge, the real command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from virtmount.creation import creating

ROOT = Path(__file__).resolve().parents[2]
KIB, MIB = 1 << 10, 1 << 20
FORMATS = tuple(driver.name for driver in creating())
QEMU = {"vhd": "vpc"}  # what qemu calls it


def qemu_img(*words: object, code: int = 0, cwd: Path | None = None) -> str:
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def qemu_info(path: Path, form: str) -> dict[str, Any]:
    words = ("info", "--output=json", "-f", QEMU.get(form, form), path)
    info: dict[str, Any] = json.loads(qemu_img(*words))
    return info


def qemu_same(path: Path, form: str, raw: Path) -> None:
    """qemu reads the image as the raw one; it looks for a data file from where it runs."""
    qemu_img("compare", "-f", QEMU.get(form, form), "-F", "raw", path, raw, cwd=path.parent)


def virtmount(*words: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command."""
    done = subprocess.run(
        [sys.executable, "-m", "virtmount", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        timeout=120,
        **options,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def sparse_content(size: int, seed: int = 1) -> bytes:
    """Data and zeros in pieces of many sizes, and both at odd places."""
    rng = random.Random(seed)
    parts: list[bytes] = []
    left = size
    while left:
        length = min(left, rng.choice([512, 4096, 10_000, 65536, 300_000, MIB]))
        parts.append(rng.randbytes(length) if rng.random() < 0.4 else bytes(length))
        left -= length
    return b"".join(parts)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
