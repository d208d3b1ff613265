"""The snapshot table of a QCOW2 image: states of the disk that lie in the image itself.

Source: qemu's docs/interop/qcow2.rst, "Snapshots".  Used by qcow2.py and qcow2_header.py only.
A snapshot has an L1 table of its own; what it shares with other states is counted once for each
of them, so that counts alone say what may be written in place.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from virtmount.errors import Corrupt
from virtmount.hostfile import HostFile
from virtmount.upkeep import Snapshot

MAX_SNAPSHOTS = 65536
MAX_EXTRA = 1024
MAX_TABLE = 64 << 20  # bytes

# L1 offset, L1 entries, lengths of id and name, seconds, nanoseconds, the guest's clock, bytes of
# machine state (32 bits), length of the extra data; those, id and name follow, padded to 8.
ENTRY = struct.Struct(">QIHHIIQII")
assert ENTRY.size == 40
EXTRA = struct.Struct(">QQ")  # bytes of machine state, of the guest disk; may be missing


class Record(NamedTuple):
    """One entry.  `size` is None where the writer did not say how large the disk was."""

    at: int  # byte offset of the entry
    length: int
    id: str
    name: str
    l1_offset: int
    l1_size: int  # entries
    size: int | None
    date: float
    vm_state: int

    def shown(self, size: int) -> Snapshot:
        return Snapshot(
            id=self.id,
            name=self.name,
            size=size if self.size is None else self.size,
            date=self.date,
            vm_state=self.vm_state,
        )


def records(file: HostFile, offset: int, count: int) -> Iterator[Record]:
    """The entries of the table at `offset`, each checked only for itself."""
    at = offset
    for number in range(count):
        if at >= file.size:
            raise Corrupt(
                file, f"byte {at}", f"snapshot {number} begins past the file's end at {file.size}"
            )
        fields = ENTRY.unpack(file.pread_padded(at, ENTRY.size))
        l1_offset, l1_size, id_length, name_length, seconds, nanoseconds, _, state, extra = fields
        if extra > MAX_EXTRA:
            raise Corrupt(file, f"byte {at + 36}", f"snapshot {number}: {extra} extra bytes")
        raw = file.pread_padded(at + ENTRY.size, extra + id_length + name_length)
        size = None
        if extra >= 8:
            state = int.from_bytes(raw[:8], "big")
        if extra >= EXTRA.size:
            size = EXTRA.unpack_from(raw)[1]
        length = -(-(ENTRY.size + len(raw)) // 8) * 8
        yield Record(
            at=at,
            length=length,
            id=raw[extra : extra + id_length].decode("utf-8", "replace"),
            name=raw[extra + id_length :].decode("utf-8", "replace"),
            l1_offset=l1_offset,
            l1_size=l1_size,
            size=size,
            date=seconds + min(nanoseconds, 999_999_999) / 1e9,
            vm_state=state,
        )
        at += length
        if at - offset > MAX_TABLE:
            text = f"{number + 1} snapshots of {at - offset} bytes, the most is {MAX_TABLE}"
            raise Corrupt(file, "header+60", text)
