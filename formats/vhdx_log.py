"""The log of a VHDX file: find what must be replayed, write new entries.

Source: [MS-VHDX] 20240423, section 2.3.  The log is a ring of 4 KiB sectors.  An entry holds whole
4 KiB images of other sectors of the file, so replaying one twice, or one that is in place already,
changes nothing.

Reading follows 2.3.3: an entry may wrap around the end of the ring, a sequence may have several
entries, the last entry may be torn.

Writing is plainer than the specification allows, because of how qemu 7.2 reads: it ignores tails,
takes the run of entries whose *first* number is highest, accepts any valid entry behind the first
of a run as its second, and gives up on the whole image where a descriptor is torn.

1. What one append() writes is a batch.  The oldest changes that may not be in place yet are in the
   newest batch: its entries have its first entry as their tail.  A batch of several entries is
   begun only when all that came before is in place, so that a reader may take any part of it.
2. Header and descriptors of an entry lie in one 512-byte sector, and so are whole or not there.
3. No batch is longer than a third of the ring.  So the batch before is whole until the new one is
   durable, also where the new one begins a lap.
4. The batches of one log GUID lie one after the other from the start of the ring.  Where the next
   does not fit, a new lap begins under a new GUID, which makes all old entries invalid at once.
5. A GUID is put into the file's header only when its first batch is durable.  A header that names a
   log without entries makes the file corrupt by 2.3.3, and unwritable for ever by qemu.
6. The last two sectors of the ring stay unused.  qemu never ends its search where a run from the
   start of the ring ends one sector before its end, or is followed by a torn entry up to its end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from uuid import UUID, uuid4

from crc32c import crc32c

from virtmount.errors import Corrupt, Unsupported
from virtmount.hostfile import HostFile
from virtmount.plan import Write

MIB = 1 << 20
SECTOR = 4096
MAX_REPLAY = 64 * MIB  # the largest log that is read into memory; Hyper-V and qemu make 1 MiB
MAX_CHANGES = MAX_REPLAY // SECTOR  # of which each may cost some hundred bytes of memory
MAX_FILE = 1 << 47  # no entry may ask for a longer file: twice the largest disk
PROTECTED = 192 * 1024  # file identifier and headers: never changed through the log

_HEADER = struct.Struct("<4sIIIQII16sQQ")
_DESCRIPTOR = struct.Struct("<4s4s8sQQ")
assert (_HEADER.size, _DESCRIPTOR.size) == (64, 32)
ENTRY_CHANGES = (512 - _HEADER.size) // _DESCRIPTOR.size  # that an entry of ours has at most
_ENTRY, _DATA_DESCRIPTOR, _ZERO_DESCRIPTOR, _DATA = b"loge", b"desc", b"zero", b"data"


class Change(NamedTuple):
    """What an entry does to the file: `length` bytes at `offset` become `data`, or zeros."""

    offset: int
    length: int
    data: bytes | None


class Entry(NamedTuple):
    """A valid entry; offsets and lengths in the ring."""

    offset: int
    length: int
    tail: int
    sequence: int
    descriptors: int
    flushed_size: int  # the file was at least so long when the entry was written
    last_size: int  # and must be made so long


class Replay(NamedTuple):
    """The active sequence: what must be done to the file before anything else is read from it."""

    entries: int
    changes: tuple[Change, ...]
    size: int  # the file must be at least so long afterwards


def find_replay(file: HostFile, offset: int, length: int, guid: UUID) -> Replay | None:
    """What the log at `offset` asks for, or None if no valid entry carries `guid`.

    None differs from 2.3.3, where such a file is corrupt: qemu names a log in the header before
    its first entry is durable, and a crash in between leaves every structure as it was.
    """
    if length > MAX_REPLAY:
        text = f"a log of {length} bytes to replay, know up to {MAX_REPLAY}"
        raise Unsupported(file, f"log at {offset}", text)
    ring = file.pread(offset, length)
    entries = _entries(file, ring, offset, guid.bytes_le)
    if not entries:
        return None
    active = _active(entries, length)
    if not active:
        text = f"{len(entries)} valid entries, but no whole sequence (MS-VHDX 2.3.3)"
        raise Corrupt(file, f"log at {offset}", text)
    head = active[-1]
    place = f"log entry at {offset + head.offset}"
    if head.flushed_size > file.size:
        text = f"the file was {head.flushed_size} bytes long, now {file.size}: truncated"
        raise Corrupt(file, place, text)
    count = sum(entry.descriptors for entry in active)
    if count > MAX_CHANGES:
        raise Unsupported(file, place, f"{count} changes to replay, know up to {MAX_CHANGES}")
    changes = tuple(change for entry in active for change in _changes(ring, entry))
    size = max([file.size, head.last_size, *(change.offset + change.length for change in changes)])
    if size > MAX_FILE:
        raise Corrupt(file, place, f"makes the file {size} bytes long, the limit is {MAX_FILE}")
    for change in changes:
        end = change.offset + change.length
        if change.offset < PROTECTED or (change.offset < offset + length and end > offset):
            text = f"changes bytes {change.offset} to {end}, where the headers or the log lie"
            raise Corrupt(file, place, text)
    return Replay(len(active), changes, size)


def _entries(file: HostFile, ring: bytes, offset: int, guid: bytes) -> dict[int, Entry]:
    """All valid entries by their offset in the ring."""
    found: dict[int, Entry] = {}
    summed = 0
    for at in range(0, len(ring), SECTOR):
        entry = _header(ring, at, guid)
        if entry is None:
            continue
        # Entries do not overlap, so this ends a search that was made to be slow.
        summed += entry.length
        if summed > 8 * len(ring):
            raise Corrupt(file, f"log entry at {offset + at}", "entries overlap")
        if _is_whole(ring, entry):
            found[at] = entry
    return found


def _header(ring: bytes, at: int, guid: bytes) -> Entry | None:
    """The entry header at `at` if its fields are possible."""
    if ring[at : at + 4] != _ENTRY:
        return None
    fields = _HEADER.unpack_from(ring, at)
    _, _, length, tail, sequence, descriptors, _, log_guid, flushed_size, last_size = fields
    if (
        log_guid != guid
        or sequence == 0
        or length % SECTOR
        or not _table_length(descriptors) <= length <= len(ring)
        or tail % SECTOR
        or tail >= len(ring)
    ):
        return None
    return Entry(at, length, tail, sequence, descriptors, flushed_size, last_size)


def _is_whole(ring: bytes, entry: Entry) -> bool:
    """Whether checksum, descriptors and data sectors of an entry are in order."""
    raw = _unrolled(ring, entry)
    rest = memoryview(raw)[8:]
    if crc32c(rest, crc32c(bytes(4), crc32c(raw[:4]))) != int.from_bytes(raw[4:8], "little"):
        return False
    data = _table_length(entry.descriptors)
    for signature, _, leading, offset, sequence in _descriptors(raw, entry):
        if sequence != entry.sequence or offset % SECTOR:
            return False
        if signature == _ZERO_DESCRIPTOR:
            if int.from_bytes(leading, "little") % SECTOR:
                return False
        elif signature == _DATA_DESCRIPTOR and data + SECTOR <= entry.length:
            high, low = raw[data + 4 : data + 8], raw[data + SECTOR - 4 : data + SECTOR]
            if raw[data : data + 4] != _DATA or low + high != sequence.to_bytes(8, "little"):
                return False
            data += SECTOR
        else:
            return False
    return True


def _active(entries: dict[int, Entry], length: int) -> list[Entry]:
    """The newest valid sequence, from its tail to its head; empty if there is none.

    2.3.3 tries every place as the start.  Starts in one run of entries that follow each other
    have the same head, so it is enough to look at each run as a whole.
    """
    after: dict[int, Entry] = {}
    followers = set()
    for at, entry in entries.items():
        end = (at + entry.length) % length
        follower = entries.get(end)
        if follower and follower.sequence == entry.sequence + 1 and end not in followers:
            after[at] = follower
            followers.add(end)
    best: list[Entry] = []
    for start in entries.keys() - followers:
        run = [entries[start]]
        while run[-1].offset in after:
            run.append(after[run[-1].offset])
        head = run[-1]
        from_tail = [i for i, entry in enumerate(run) if entry.offset == head.tail]
        if from_tail and (not best or head.sequence > best[-1].sequence):
            best = run[from_tail[0] :]
    return best


def _changes(ring: bytes, entry: Entry) -> Iterator[Change]:
    raw = _unrolled(ring, entry)
    data = _table_length(entry.descriptors)
    for signature, trailing, leading, offset, _ in _descriptors(raw, entry):
        if signature == _ZERO_DESCRIPTOR:
            yield Change(offset, int.from_bytes(leading, "little"), None)
        else:
            yield Change(offset, SECTOR, leading + raw[data + 8 : data + SECTOR - 4] + trailing)
            data += SECTOR


def _descriptors(raw: bytes, entry: Entry) -> Iterator[tuple[bytes, bytes, bytes, int, int]]:
    table = raw[_HEADER.size : _HEADER.size + entry.descriptors * _DESCRIPTOR.size]
    return _DESCRIPTOR.iter_unpack(table)


def _unrolled(ring: bytes, entry: Entry) -> bytes:
    end = entry.offset + entry.length
    return ring[entry.offset : end] + ring[: max(0, end - len(ring))]


def _table_length(descriptors: int) -> int:
    """Bytes of the sectors that hold the header and the descriptors."""
    return -(-(_HEADER.size + descriptors * _DESCRIPTOR.size) // SECTOR) * SECTOR


class LogWriter:
    """Lays entries into the log at `offset` of the file, as the module's docstring says."""

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.length = min(length, MAX_REPLAY) - 2 * SECTOR  # that is used
        self.guid: UUID | None = None  # of the current lap
        self._next = 0  # in the ring
        self._sequence = 0
        # Sectors that one batch can change.
        self.capacity = self.length // 3 // SECTOR // (1 + ENTRY_CHANGES) * ENTRY_CHANGES

    def append(
        self, sectors: Mapping[int, bytes], *, flushed_size: int, last_size: int
    ) -> tuple[list[Write], UUID | None]:
        """The steps that write a batch, in any order, and the GUID of the lap if it begins one.

        `sectors` are file offset -> 4096 bytes, at most `capacity`: all that may not be durable in
        place; more than ENTRY_CHANGES only if nothing else is.  The caller puts a new GUID into
        the header once the steps are durable.
        """
        assert 0 < len(sectors) <= self.capacity
        entries = -(-len(sectors) // ENTRY_CHANGES)
        lap = None
        if self.guid is None or self._next + (entries + len(sectors)) * SECTOR > self.length:
            lap = self.guid = uuid4()
            self._next = 0
        changes = sorted(sectors.items())
        tail = self._next
        steps = []
        for i in range(0, len(changes), ENTRY_CHANGES):
            self._sequence += 1
            entry = pack_entry(
                self.guid,
                self._sequence,
                tail,
                changes[i : i + ENTRY_CHANGES],
                flushed_size,
                last_size,
            )
            steps.append(Write(self.offset + self._next, entry))
            self._next += len(entry)
        return steps, lap


def pack_entry(
    guid: UUID,
    sequence: int,
    tail: int,
    changes: Sequence[tuple[int, bytes]],
    flushed_size: int,
    last_size: int,
) -> bytes:
    """An entry that changes a few sectors, given as (file offset, 4096 bytes)."""
    entry = bytearray(SECTOR)
    length = (1 + len(changes)) * SECTOR
    number = sequence.to_bytes(8, "little")
    _HEADER.pack_into(
        entry,
        0,
        *(_ENTRY, 0, length, tail, sequence, len(changes), 0),
        *(guid.bytes_le, flushed_size, last_size),
    )
    for i, (offset, sector) in enumerate(changes):
        _DESCRIPTOR.pack_into(
            entry,
            _HEADER.size + i * _DESCRIPTOR.size,
            *(_DATA_DESCRIPTOR, sector[-4:], sector[:8], offset, sequence),
        )
        entry += _DATA + number[4:] + sector[8:-4] + number[:4]
    entry[4:8] = crc32c(bytes(entry)).to_bytes(4, "little")
    return bytes(entry)
