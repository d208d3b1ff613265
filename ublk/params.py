"""What the kernel is told about a disk: struct ublk_params.  Pure.

Source: linux/ublk_cmd.h, and what ublk_validate_params() of 6.12 to 7.3 refuses.  A kernel
ignores the types that it does not know (DMA_ALIGN before 6.15), so one answer serves all.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

MAX_IO = 1 << 20  # bytes in one request
SECTOR = 512  # all counts below, whatever the logical sector
IO_OPT_MAX = 1 << 20  # the kernel reads ahead twice this
PHYSICAL_MAX = 4096
GRANULARITY_MAX = 1 << 31  # a u32 of bytes
# Discards are carried out beside the traffic, so one may be large; cut into whole clusters by the
# block layer, which knows the granularity.
DISCARD_MAX = 1 << 30  # bytes
DMA_ALIGNMENT = 511  # a mask: what O_DIRECT on the image's file asks for, at most

_HEAD = struct.Struct("=II")
_BASIC = struct.Struct("=IBBBBIIQQ")
_DISCARD = struct.Struct("=IIIIHH")
_DEVT = struct.Struct("=IIII")
_ZONED = struct.Struct("=III20x")
_DMA = struct.Struct("=I4x")
assert (_HEAD.size, _BASIC.size, _DISCARD.size, _DEVT.size) == (8, 32, 20, 16)
assert (_ZONED.size, _DMA.size) == (32, 8)
SIZE = _HEAD.size + _BASIC.size + _DISCARD.size + _DEVT.size + _ZONED.size + _DMA.size


class Type(enum.IntFlag):
    BASIC = 1
    DISCARD = 2
    DEVT = 4
    ZONED = 8
    DMA_ALIGN = 16


class Attribute(enum.IntFlag):
    READ_ONLY = 1
    ROTATIONAL = 2
    VOLATILE_CACHE = 4
    FUA = 8


@dataclass(frozen=True, slots=True)
class Params:
    """A disk as the block layer sees it.  Bytes."""

    size: int
    sector_size: int = 512
    physical_sector_size: int = 4096
    cluster_size: int = 4096
    read_only: bool = False
    volatile_cache: bool = True  # what was acknowledged needs a flush to last
    rotational: bool = False
    discard: bool = False
    max_io: int = MAX_IO
    zero_copy: bool = True  # data may go between host files and the kernel's buffers as it is

    def pack(self) -> bytes:
        """The struct for SET_PARAMS."""
        sector = self.sector_size
        if sector not in (512, 1024, 2048, 4096):
            raise ValueError(f"sector size {sector}")
        if self.size <= 0 or self.size % sector:
            raise ValueError(f"size {self.size} is not a multiple of the sector size {sector}")
        if not self.cluster_size or self.cluster_size & (self.cluster_size - 1):
            raise ValueError(f"cluster size {self.cluster_size}")
        physical = max(sector, min(self.physical_sector_size, PHYSICAL_MAX))
        # Smaller than a physical sector would invite read-modify-write in the host's file system.
        io_opt = max(physical, min(self.cluster_size, IO_OPT_MAX))
        attributes = Attribute(0)
        if self.read_only:
            attributes |= Attribute.READ_ONLY
        elif self.volatile_cache:
            attributes |= Attribute.VOLATILE_CACHE | Attribute.FUA
        if self.rotational:
            attributes |= Attribute.ROTATIONAL
        types = Type.BASIC | Type.DMA_ALIGN
        basic = _BASIC.pack(
            attributes,
            _shift(sector),
            _shift(physical),
            _shift(io_opt),
            _shift(physical),
            self.max_io // SECTOR,
            0,
            self.size // SECTOR,
            0,
        )
        discard = bytes(_DISCARD.size)
        if not self.read_only:
            # Zeroes are always taken: whole clusters become holes where the format has them, and
            # the rest is written from here, without the data crossing the kernel's boundary.
            types |= Type.DISCARD
            granularity = max(sector, min(self.cluster_size, GRANULARITY_MAX))
            discard = _DISCARD.pack(
                0,
                granularity,
                DISCARD_MAX // SECTOR if self.discard else 0,
                DISCARD_MAX // SECTOR,
                1,
                0,
            )
        return b"".join(
            (
                _HEAD.pack(SIZE, types),
                basic,
                discard,
                bytes(_DEVT.size),
                bytes(_ZONED.size),
                _DMA.pack(DMA_ALIGNMENT),
            )
        )


def _shift(value: int) -> int:
    return value.bit_length() - 1
