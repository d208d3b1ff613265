"""The headers and the log of a VHDX file while it is written.

Source: [MS-VHDX] 20240423, sections 2.2.2.1 and 2.3.  The driver, resize, rebase and repair change
tables only through this.

1. FileWriteGuid and DataWriteGuid change in both headers before anything else is written, then a
   log that was found is applied.
2. The header names our log only once its first entry is durable, and no longer names it before
   the file is cut at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

from virtmount.errors import Corrupt, Unsupported
from virtmount.formats import vhdx_header as headers
from virtmount.formats.vhdx_header import MIB, NIL, Header
from virtmount.formats.vhdx_log import ENTRY_CHANGES, LogWriter, Replay, find_replay
from virtmount.hostfile import HostFile
from virtmount.plan import Barrier, Extend, Punch, Step, Write


class Journal:
    """Makes the steps; `header` and `slot` are what they will have made of the headers."""

    def __init__(self, file: HostFile, header: Header, slot: int) -> None:
        place = f"header {slot + 1}"
        if header.log_length == 0:
            raise Unsupported(file, place, "writing without a log (log length 0)")
        if header.sequence > headers.MAX_SEQUENCE:
            text = f"sequence number {header.sequence}, at most {headers.MAX_SEQUENCE} for writing"
            raise Corrupt(file, place, text)
        self.header = header
        self.slot = slot
        self.durable_size = file.size  # at most, once the plans are carried out
        self.writer = LogWriter(header.log_offset, header.log_length)
        self._file = file
        # Sectors that the last batch changed: in place, but not known to be durable there.
        self._unsettled: dict[int, bytes] = {}

    @property
    def identity(self) -> UUID:
        return self.header.data_write_guid

    def begin(self, replay: Replay | None, *, same_data: bool = False) -> list[Step]:
        """Before anything else.  With `same_data` the disk will read as before, so that images
        based on it need not refuse it."""
        file_write = uuid4()
        data_write = self.header.data_write_guid if same_data else uuid4()
        steps: list[Step] = []
        if replay:
            # 2.2.2: the file's GUID changes before the replay; its log stays until all is applied.
            steps += [self.write_header(file_write_guid=file_write), Barrier]
            steps += replay_steps(replay)
            steps.append(Barrier)
        return [
            *steps,
            self.write_header(
                file_write_guid=file_write, data_write_guid=data_write, log_guid=NIL, log_version=0
            ),
            Barrier,
            self.write_header(),
            Barrier,
        ]

    def write_header(self, **changes: Any) -> Write:
        """Make the other header the current one, with the next sequence number."""
        self.header = replace(self.header, sequence=self.header.sequence + 1, **changes)
        self.slot = 1 - self.slot
        return Write(headers.HEADER_OFFSETS[self.slot], self.header.pack())

    def barrier(self) -> Step:
        """All that was changed up to here is durable in place."""
        self._unsettled.clear()
        return Barrier

    def change(self, sectors: Mapping[int, bytes]) -> list[Step]:
        """Write sectors (file offset -> 4096 bytes) through the log, then in place.

        What the batch before changed is in place, but perhaps not durably: it goes into this one
        as well, or is made durable first.  The new changes are safe at the last Barrier.  Up to
        ENTRY_CHANGES sectors are there together or not at all.
        """
        steps: list[Step] = []
        offsets = sorted(sectors)
        room = self.writer.capacity
        for start in range(0, len(offsets), room):
            part = {at: sectors[at] for at in offsets[start : start + room]}
            if self._unsettled and len(self._unsettled.keys() | part.keys()) > ENTRY_CHANGES:
                steps.append(self.barrier())
            length = min(self.durable_size, self._file.size)
            writes, lap = self.writer.append(
                self._unsettled | part,
                flushed_size=length // MIB * MIB,
                last_size=-(-length // MIB) * MIB,
            )
            steps += [*writes, Barrier]
            if lap:
                steps += [self.write_header(log_guid=lap), Barrier, self.write_header()]
            steps += (Write(at, sector) for at, sector in part.items())
            self._unsettled = part
        return steps

    def end(self) -> list[Step]:
        """Everything is in place: no header names a log any more."""
        self._unsettled.clear()
        if self.header.log_guid == NIL:
            return []
        return [
            Barrier,
            self.write_header(log_guid=NIL),
            Barrier,
            self.write_header(),
            Barrier,
        ]


def replay_steps(found: Replay) -> list[Step]:
    steps: list[Step] = [Extend(found.size)]
    for change in found.changes:
        if change.data is None:
            steps.append(Punch(change.offset, change.length))
        else:
            steps.append(Write(change.offset, change.data))
    return steps


def apply_in_memory(file: HostFile, found: Replay) -> None:
    """Let `file` be read as it will be once the log is replayed; nothing is written."""
    size = file.size
    if found.size > size:
        file.patch_zeros(size, found.size - size)
    for change in found.changes:
        if change.data is None:
            file.patch_zeros(change.offset, change.length)
        else:
            file.patch(change.offset, change.data)


def find_log(file: HostFile, header: Header) -> Replay | None:
    """What must be replayed before anything but the headers is read."""
    if header.log_guid == NIL:
        return None
    return find_replay(file, header.log_offset, header.log_length, header.log_guid)
