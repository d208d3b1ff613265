"""VHD images that qemu-img does not make: partly present blocks, and children."""

from __future__ import annotations

import random
from pathlib import Path

from tests.crash.workload import SECTOR, patterns
from tests.formats.make_vhd import KIB, Block, Spec, child_of

BLOCK = 64 * KIB
WRITES = 1_500_000  # numbers of the writes that a child holds before the workload


def exact(content: bytearray) -> bytes:
    """A dynamic image with bits only for sectors that hold something, blocks in no order."""
    blocks: list[tuple[int, Block]] = []
    for index in range(len(content) // BLOCK):
        data = bytes(content[index * BLOCK : (index + 1) * BLOCK])
        present = _held(data)
        if present:
            blocks.append((index, Block(data, present)))
    random.Random(1).shuffle(blocks)
    return Spec(len(content), dict(blocks), block=BLOCK).build()


def child(content: bytearray) -> bytes:
    """A differencing image with some sectors of its own, over a parent with `content`."""
    rng = random.Random(2)
    count = len(content) // BLOCK
    blocks: dict[int, Block] = {}
    for number, index in enumerate(rng.sample(range(count), count // 3), WRITES):
        first = rng.randrange(0, BLOCK // SECTOR - 1)
        present = range(first, rng.randrange(first + 1, BLOCK // SECTOR))
        if rng.random() < 0.3:
            present = range(BLOCK // SECTOR)
        at = index * BLOCK + present.start * SECTOR
        data = patterns(number, at, len(present) * SECTOR)
        content[at : at + len(data)] = data
        blocks[index] = Block(bytes(present.start * SECTOR) + data, [present])
    return child_of(Path("parent.vhd"), len(content), blocks, block=BLOCK).build()


def _held(data: bytes) -> list[range]:
    sectors = [i for i in range(len(data) // SECTOR) if any(data[i * SECTOR : (i + 1) * SECTOR])]
    runs: list[range] = []
    for sector in sectors:
        if runs and runs[-1].stop == sector:
            runs[-1] = range(runs[-1].start, sector + 1)
        else:
            runs.append(range(sector, sector + 1))
    return runs
