"""Host files in memory, a log of what was done to them, and what a power cut can leave of it.

The model of the host: a completed sync makes everything durable that was done before it.  Of what
was done since, a power cut leaves any subset (the page cache writes back in any order), each
write whole or in any subset of its 512-byte sectors.  A change of length may be missing while a
later write is there: the file is then as long as that write needs.  Of two writes to one place the
later one wins if it is there at all.  A killed process leaves every step: the prefix.

This is stricter than most host file systems (ext4 in ordered mode never leaves some of these
states), so what holds here holds there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from virtmount.errors import Corrupt
from virtmount.hostfile import HostFile
from virtmount.patches import Patches

CHUNK = 4096
SECTOR = 512  # what a disk writes wholly or not at all
EXHAUSTIVE = 8  # up to so many steps since the last sync all their subsets are tried


class Store:
    """The bytes of a file, sparse, cheap to copy: chunks are never changed in place."""

    __slots__ = ("chunks", "size")

    def __init__(self, size: int = 0, chunks: dict[int, bytes] | None = None) -> None:
        self.size = size
        self.chunks = {} if chunks is None else chunks

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Store:
        store = cls()
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            at = 0
            while at < size:
                try:
                    at = os.lseek(file.fileno(), at, os.SEEK_DATA) // CHUNK * CHUNK
                except OSError:
                    break  # only a hole is left
                file.seek(at)
                data = file.read(1 << 20)
                for i in range(0, len(data), CHUNK):
                    chunk = data[i : i + CHUNK]
                    if chunk != HOLE[: len(chunk)]:
                        store.write(at + i, chunk)
                at += len(data)
        store.resize(size)
        return store

    @classmethod
    def of(cls, data: bytes) -> Store:
        store = cls(len(data))
        for at in range(0, len(data), CHUNK):
            chunk = data[at : at + CHUNK]
            if chunk != HOLE[: len(chunk)]:
                store.write(at, chunk)
        return store

    def save(self, path: str | os.PathLike[str]) -> None:
        with open(path, "wb") as file:
            for index, chunk in sorted(self.chunks.items()):
                file.seek(index * CHUNK)
                file.write(chunk)
            file.truncate(self.size)

    def copy(self) -> Store:
        return Store(self.size, self.chunks.copy())

    def held(self) -> list[int]:
        """Offsets of the chunks that are not holes."""
        return sorted(index * CHUNK for index in self.chunks)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes, with zeros past the end."""
        first, last = offset // CHUNK, -(-(offset + length) // CHUNK)
        get, hole = self.chunks.get, HOLE
        data = b"".join([get(index, hole) for index in range(first, last)])
        skip = offset - first * CHUNK
        return data if skip == 0 and len(data) == length else data[skip : skip + length]

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self.size = max(self.size, offset + len(view))
        while view:
            index, within = divmod(offset, CHUNK)
            part = view[: CHUNK - within]
            if len(part) == CHUNK:
                self.chunks[index] = bytes(part)
            else:
                chunk = bytearray(self.chunks.get(index, HOLE))
                chunk[within : within + len(part)] = part
                self.chunks[index] = bytes(chunk)
            offset += len(part)
            view = view[len(part) :]

    def take(self, offset: int, source: Store, source_offset: int, length: int) -> None:
        """Copy a range of another store; what it has no chunks for is taken to be zeros here."""
        aligned = offset % CHUNK == source_offset % CHUNK == length % CHUNK == 0
        shift = (offset - source_offset) // CHUNK
        chunks = source.chunks
        for index in range(source_offset // CHUNK, -(-(source_offset + length) // CHUNK)):
            if index not in chunks:
                continue
            if aligned:
                self.chunks[index + shift] = chunks[index]
                continue
            low = max(index * CHUNK, source_offset)
            high = min((index + 1) * CHUNK, source_offset + length)
            piece = chunks[index][low - index * CHUNK : high - index * CHUNK]
            self.write(offset + low - source_offset, piece)
        self.size = max(self.size, offset + length)

    def zero(self, offset: int, length: int) -> None:
        """The range reads as zeros; the length stays."""
        end = min(offset + length, self.size)
        while offset < end:
            index, within = divmod(offset, CHUNK)
            step = min(CHUNK - within, end - offset)
            if step == CHUNK:
                self.chunks.pop(index, None)
            elif index in self.chunks:
                chunk = bytearray(self.chunks[index])
                chunk[within : within + step] = bytes(step)
                self.chunks[index] = bytes(chunk)
            offset += step

    def resize(self, size: int) -> None:
        if size < self.size:
            # What is cut off must read as zeros if the file grows again.
            self.zero(size, self.size - size)
            for index in [i for i in self.chunks if i * CHUNK >= size]:
                del self.chunks[index]
        self.size = size


HOLE = bytes(CHUNK)


@dataclass(frozen=True, slots=True)
class Wrote:
    offset: int
    data: bytes

    def apply(self, store: Store) -> None:
        store.write(self.offset, self.data)

    def __str__(self) -> str:
        return f"write {len(self.data)} at {self.offset:#x} [{summary(self.data)}]"


@dataclass(frozen=True, slots=True)
class Resized:
    """ftruncate, up or down."""

    size: int
    before: int

    def apply(self, store: Store) -> None:
        # Growing must not cut off a later write that is there without it.
        if self.size < self.before or self.size > store.size:
            store.resize(self.size)

    def __str__(self) -> str:
        return f"resize {self.before:#x} to {self.size:#x}"


@dataclass(frozen=True, slots=True)
class Punched:
    offset: int
    length: int

    def apply(self, store: Store) -> None:
        store.zero(self.offset, self.length)

    def __str__(self) -> str:
        return f"punch {self.length} at {self.offset:#x}"


Change = Wrote | Resized | Punched


@dataclass(frozen=True, slots=True)
class Synced:
    """A sync that has ended.

    `leaves` are the numbers of the events that it does not cover: changes that had not ended
    when it was called.
    """

    leaves: frozenset[int] = frozenset()

    def __str__(self) -> str:
        return "sync" + (f" without {sorted(self.leaves)}" if self.leaves else "")


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that the one who writes says, such as: this flush was acknowledged."""

    text: str
    flushed: bool = False

    def __str__(self) -> str:
        return f"-- {self.text}"


Event = Change | Synced | Mark


def summary(data: bytes) -> str:
    """Enough of some bytes to tell tables from data."""
    if not any(data):
        return "zeros"
    text = data[:16].hex(" ", 4)
    return text if len(data) <= 16 else f"{text} …"


class Log:
    """What was done to a file from `base` on."""

    def __init__(self, base: Store) -> None:
        self.base = base.copy()
        self.events: list[Event] = []

    def mark(self, text: str, flushed: bool = False) -> None:
        self.events.append(Mark(text, flushed))

    def epochs(self) -> Iterator[Epoch]:
        """The stretches between syncs, each with what is durable while it lasts."""
        durable = self.base.copy()
        entries: list[tuple[int, Event]] = []
        start = 0
        for number, event in enumerate(self.events):
            if not isinstance(event, Synced):
                entries.append((number, event))
                continue
            yield Epoch(durable.copy(), start, entries)
            start = number + 1
            left = []
            for entry in entries:
                if entry[0] in event.leaves:
                    left.append(entry)
                elif isinstance(entry[1], Change):
                    entry[1].apply(durable)
            entries = left
        yield Epoch(durable, start, entries)


@dataclass(frozen=True, slots=True)
class Cut:
    """One state that a power cut can leave.

    `at` is the number of log events that had happened; `kept` the numbers of the changes since
    the last sync that lasted; `torn` the sectors that are left of those that lasted in part.
    """

    at: int
    kept: tuple[int, ...]
    torn: dict[int, frozenset[int]]
    model: str


class Epoch:
    """Numbered events, none of them a sync, over what was durable at event `start`."""

    def __init__(self, durable: Store, start: int, entries: Sequence[tuple[int, Event]]) -> None:
        self.durable = durable
        self.start = start
        self.events = dict(entries)
        self.changes = {
            number: event for number, event in entries if not isinstance(event, Mark | Synced)
        }
        self._flushes = [
            number for number, event in entries if isinstance(event, Mark) and event.flushed
        ]

    def build(self, cut: Cut) -> Store:
        """The file as this cut leaves it."""
        store = self.durable.copy()
        for number in cut.kept:
            change = self.changes[number]
            if isinstance(change, Resized) or number not in cut.torn:
                change.apply(store)
            else:
                apply_torn(store, change, cut.torn[number])
        return store

    def cuts(self, rng: random.Random, torn_each: int = 2, many: int = 24) -> Iterator[Cut]:
        """Cuts of this epoch: prefixes, all subsets of a few steps or `many` of many, torn ones."""
        numbers = list(self.changes)
        prefixes = [tuple(numbers[:count]) for count in range(len(numbers) + 1)]
        for kept in prefixes:
            yield from self._judged(kept, {}, "prefix")
        seen = set(prefixes)
        for kept in self._subsets(rng, many):
            if kept not in seen:
                seen.add(kept)
                yield from self._judged(kept, {}, "subset")
        for count in range(1, len(numbers) + 1):
            for _ in range(torn_each):
                kept = tuple(
                    number
                    for number in numbers[:count]
                    if number == numbers[count - 1] or rng.random() < 0.7
                )
                torn = tear(rng, {number: self.changes[number] for number in kept})
                if torn:
                    yield from self._judged(kept, torn, "torn")

    def _subsets(self, rng: random.Random, many: int) -> Iterator[tuple[int, ...]]:
        numbers = list(self.changes)
        if len(numbers) <= EXHAUSTIVE:
            for count in range(1, len(numbers)):
                yield from combinations(numbers, count)
            return
        for alone in rng.sample(numbers, many // 3):
            yield (alone,)
        for missing in rng.sample(numbers, many // 3):
            yield tuple(number for number in numbers if number != missing)
        for _ in range(many // 3):
            likely = rng.choice((0.2, 0.5, 0.8))
            yield tuple(number for number in numbers if rng.random() < likely)

    def _judged(
        self, kept: tuple[int, ...], torn: dict[int, frozenset[int]], model: str
    ) -> Iterator[Cut]:
        """The same state at every moment at which it is worth judging.

        Just after its newest change, because then the fewest values are legal, and after each
        later acknowledged flush of the epoch, because that makes older values illegal.
        """
        first = max(self.start, kept[-1] + 1 if kept else 0)
        yield Cut(first, kept, torn, model)
        for number in self._flushes:
            if number >= first:
                yield Cut(number + 1, kept, torn, model)

    def describe(self, cut: Cut, most: int = 40) -> str:
        """The steps of the epoch for a person: + lasted, ~ in part, - lost."""
        lines = []
        for number, event in self.events.items():
            if number >= cut.at:
                break
            sign = " "
            if number in self.changes:
                sign = "~" if number in cut.torn else "+" if number in cut.kept else "-"
            line = f"  {sign} {number}: {event}"
            if number in cut.torn:
                line += f", sectors left {sorted(cut.torn[number])}"
            lines.append(line)
        if len(lines) > most:
            lines = [f"    … {len(lines) - most} more", *lines[-most:]]
        title = f"cut after {cut.at} events, model {cut.model}; since the last sync:"
        return "\n".join([title, *lines])


def tear(rng: random.Random, kept: Mapping[int, Change]) -> dict[int, frozenset[int]]:
    """Choose changes that lasted only in part, the newest among them, and which sectors did."""
    torn = {}
    newest = max(kept)
    for number, change in kept.items():
        if isinstance(change, Resized) or (number != newest and rng.random() < 0.5):
            continue
        count = len(sectors_of(change))
        if count < 2:
            continue
        at = rng.randrange(1, count)
        left: Iterable[int] = (
            range(at),
            range(at, count),
            [sector for sector in range(count) if sector != at],
            [sector for sector in range(count) if rng.random() < 0.5],
        )[rng.randrange(4)]
        torn[number] = frozenset(left)
    return torn


def sectors_of(change: Wrote | Punched) -> range:
    """The host sectors that a change touches."""
    length = len(change.data) if isinstance(change, Wrote) else change.length
    return range(change.offset // SECTOR, -(-(change.offset + length) // SECTOR))


def apply_torn(store: Store, change: Wrote | Punched, left: frozenset[int]) -> None:
    """Do only the sectors `left`, counted from the first that the change touches."""
    length = len(change.data) if isinstance(change, Wrote) else change.length
    first = change.offset // SECTOR
    for sector in sorted(left):
        low = max(change.offset, (first + sector) * SECTOR)
        high = min(change.offset + length, (first + sector + 1) * SECTOR)
        if isinstance(change, Wrote):
            store.write(low, change.data[low - change.offset : high - change.offset])
        else:
            store.zero(low, high - low)


class SimulatedFile(HostFile):
    """A host file in memory.  Every change goes into `log`, if there is one."""

    def __init__(
        self,
        store: Store,
        *,
        name: str = "simulated",
        writable: bool = True,
        log: Log | None = None,
    ) -> None:
        self.path = Path(name)
        self.writable = writable
        self.is_device = False
        self.fd = -1
        self.store = store
        self.log = log
        self._patches = Patches()

    @property
    def patched(self) -> bool:
        """Whether reads differ from `store`."""
        return bool(self._patches)

    @property
    def size(self) -> int:
        return max(self.store.size, self._patches.end)

    def pread_padded(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length >= 1 << 63:
            raise Corrupt(self, f"byte {offset}", f"{length} bytes wanted, no file is that long")
        return self._patches.applied(offset, self.store.read(offset, length))

    def lock(self) -> None:
        pass

    def pwrite(self, offset: int, data: bytes) -> None:
        self._change(Wrote(offset, bytes(data)))

    def punch(self, offset: int, length: int) -> None:
        length = min(length, self.store.size - offset)
        if length > 0:
            self._change(Punched(offset, length))

    def truncate(self, size: int) -> None:
        self._change(Resized(size, self.store.size))

    def sync(self) -> None:
        if self.log is not None:
            self.log.events.append(Synced())

    def _change(self, change: Change) -> None:
        assert self.writable, f"{self} was opened read-only: {change}"
        if self.log is not None:
            self.log.events.append(change)
        change.apply(self.store)
