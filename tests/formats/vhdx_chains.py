"""Differencing VHDX disks for tests, and what 7-Zip reads from one: qemu knows none of them."""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from tests.formats import make_vhdx as mk
from tests.formats.make_vhdx import Made, make

PARENT, CHILD = UUID(int=0x7001), UUID(int=0x7002)


@dataclass
class Pair:
    """A child, its parent, and the bytes of the disk."""

    child: Made
    parent: Made
    content: bytearray


def contents_by_7zip(path: Path) -> bytes:
    """The disk, the parents included."""
    done = subprocess.run(
        ["7zz", "x", "-so", "-tvhdx", path.name], cwd=path.parent, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_pair(
    folder: Path,
    size: int,
    block_size: int = mk.MIB,
    *,
    sector_size: int = 512,
    seed: int = 1,
    bits: tuple[bytes, ...] = (),
    name: str = "child.vhdx",
) -> Pair:
    """Blocks of the parent, the child, both and neither; some of the child's are in part.

    `bits` are patterns for these, repeated; else random ones.
    """
    rng = random.Random(seed)
    count = -(-size // block_size)
    sectors = block_size // sector_size
    above: dict[int, bytes] = {}
    below: dict[int, bytes] = {}
    partial: dict[int, bytes] = {}
    zero: dict[int, int] = {}
    content = bytearray()
    order = list(range(count))
    rng.shuffle(order)
    for number, block in enumerate(order):
        kind = ("neither", "below", "whole", "part", "zero", "part over nothing")[number % 6]
        if kind in ("below", "part", "zero") or (kind == "whole" and rng.random() < 0.5):
            below[block] = rng.randbytes(block_size)
        if kind in ("whole", "part", "part over nothing"):
            above[block] = rng.randbytes(block_size)
        if kind.startswith("part"):
            pattern = bits[len(partial) % len(bits)] if bits else rng.randbytes(sectors // 8)
            partial[block] = (pattern * sectors)[: sectors // 8]
        if kind == "zero":
            zero[block] = mk.ZERO
    for block in range(count):
        old = below.get(block, bytes(block_size))
        if block in zero:
            old = bytes(block_size)
        elif block in partial:
            new = above[block]
            old = b"".join(
                (new if partial[block][i // 8] >> i % 8 & 1 else old)[at : at + sector_size]
                for i, at in enumerate(range(0, block_size, sector_size))
            )
        elif block in above:
            old = above[block]
        content += old
    parent = make(
        folder / "parent.vhdx",
        size,
        below,
        block_size=block_size,
        sector_size=sector_size,
        data_write=PARENT,
        file_write=UUID(int=0x8001),
    )
    child = make(
        folder / name,
        size,
        above,
        block_size=block_size,
        sector_size=sector_size,
        parent=mk.below(PARENT, ".\\parent.vhdx"),
        partial=partial,
        entries=zero,
        data_write=CHILD,
        file_write=UUID(int=0x8002),
    )
    return Pair(child, parent, content[:size])
