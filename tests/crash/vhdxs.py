"""VHDX images that qemu-img does not make: children, some of whose blocks are there in part."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from uuid import UUID

from tests.crash.workload import SECTOR, patterns
from tests.formats import make_vhdx
from tests.formats.make_vhdx import MIB

WRITES = 1_600_000  # numbers of the writes that a child holds before the workload
JUNK = b"\xee"  # in sectors of a block that are the parent's: nobody may see it


def child(content: bytearray) -> bytes:
    """A differencing image with some sectors of its own, over a parent with `content`."""
    rng = random.Random(2)
    count = len(content) // MIB
    blocks: dict[int, bytes] = {}
    partial: dict[int, bytes] = {}
    for number, block in enumerate(rng.sample(range(count), count // 2), WRITES):
        data = bytearray(JUNK * MIB)
        first = rng.randrange(0, MIB // SECTOR - 1)
        present = range(first, rng.randrange(first + 1, MIB // SECTOR))
        if rng.random() < 0.3:
            present = range(MIB // SECTOR)
        else:
            bits = sum(1 << sector for sector in present)
            partial[block] = bits.to_bytes(MIB // SECTOR // 8, "little")
        start, length = present.start * SECTOR, len(present) * SECTOR
        at = block * MIB + start
        data[start : start + length] = patterns(number, at, length)
        content[at : at + length] = data[start : start + length]
        blocks[block] = bytes(data)
    assert partial
    locator = make_vhdx.below(UUID(int=1), "parent.vhdx")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "child"
        make_vhdx.make(path, len(content), blocks, parent=locator, partial=partial)
        return path.read_bytes()
