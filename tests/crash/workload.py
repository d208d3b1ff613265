"""What is written to a disk, and what may be read from it after a cut.

Every write has a number, and every sector that it writes says which write and which sector it
is, so that a sector which holds what it must not hold names its origin.  A sector may hold, after
a cut, what it held when the last acknowledged flush was asked for, or anything that was written to
it since: a discard may have zeroed it, a failed write may be there or not.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Protocol

from tests.crash.simulate import CHUNK, HOLE, Store

SECTOR = 512
STRIPE = 16 << 10
ZEROS = bytes(SECTOR)
_UNIT = struct.Struct("<4sIQ")  # magic, write, sector
_MAGIC = b"vmCR"


def pattern(number: int, sector: int) -> bytes:
    """What write `number` puts into a sector; 0 is for zeros."""
    return _UNIT.pack(_MAGIC, number, sector) * (SECTOR // _UNIT.size) if number else ZEROS


@lru_cache(maxsize=256)
def patterns(number: int, offset: int, length: int) -> bytes:
    first = offset // SECTOR
    return b"".join([pattern(number, sector) for sector in range(first, first + length // SECTOR)])


def origin(data: bytes, sector: int) -> str:
    """Who wrote these 512 bytes, in words."""
    if data == ZEROS:
        return "zeros"
    magic, number, place = _UNIT.unpack(data[: _UNIT.size])
    if magic != _MAGIC:
        return f"foreign bytes {data[:16].hex(' ', 4)}"
    if data != pattern(number, place):
        return f"a mixture that begins with write {number}"
    return f"write {number}" if place == sector else f"write {number} of SECTOR {place}"


class Served(Protocol):
    """A disk to work on: the reference engine or the real one."""

    def pread(self, offset: int, length: int) -> bytes: ...
    def pwrite(self, offset: int, data: bytes) -> object: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def write_zeroes(self, offset: int, length: int) -> None: ...


def perform(disk: Served, request: Request) -> bytes | None:
    """Carry a request out.  After a discard, what is there now."""
    if request.op is Op.WRITE:
        disk.pwrite(request.offset, request.data)
    elif request.op is Op.ZERO:
        disk.write_zeroes(request.offset, request.length)
    elif request.op is Op.DISCARD:
        disk.discard(request.offset, request.length)
        return disk.pread(request.offset, request.length)
    else:
        disk.flush()
    return None


def check_discarded(request: Request, before: bytes, seen: bytes) -> None:
    for i, sector in enumerate(request.sectors):
        now = seen[i * SECTOR : (i + 1) * SECTOR]
        if now not in (ZEROS, before[i * SECTOR : (i + 1) * SECTOR]):
            raise AssertionError(f"{request}: sector {sector} holds {origin(now, sector)}")


class Op(Enum):
    WRITE = "write"
    ZERO = "zero"
    DISCARD = "discard"
    FLUSH = "flush"


@dataclass(frozen=True, slots=True)
class Request:
    number: int
    op: Op
    offset: int = 0
    length: int = 0

    def __str__(self) -> str:
        if self.op is Op.FLUSH:
            return f"{self.number}: flush"
        return f"{self.number}: {self.op.value} {self.length} at {self.offset:#x}"

    @classmethod
    def parse(cls, text: str) -> Request:
        number, op, offset, length = text.split()
        return cls(int(number), Op(op), int(offset), int(length))

    @property
    def text(self) -> str:
        return f"{self.number} {self.op.value} {self.offset} {self.length}"

    @property
    def sectors(self) -> range:
        return range(self.offset // SECTOR, (self.offset + self.length) // SECTOR)

    @property
    def data(self) -> bytes:
        return patterns(self.number, self.offset, self.length)

    def apply(self, store: Store) -> None:
        if self.op is Op.WRITE:
            store.write(self.offset, self.data)
        else:
            store.zero(self.offset, self.length)


@dataclass(frozen=True, slots=True)
class Mix:
    """The kinds of requests, by weight, and where they go."""

    write: int = 10
    zero: int = 1
    discard: int = 1
    flush: int = 3
    largest: int = 128 << 10
    hot: float = 0.6  # how many requests go to a few clusters, so that they overlap


def requests(
    rng: random.Random,
    size: int,
    cluster: int,
    count: int,
    mix: Mix,
    first: int = 1,
    grain: int = SECTOR,
) -> Iterator[Request]:
    """A workload of `count` requests, with a flush as the last one."""
    hot = [rng.randrange(0, size, cluster) for _ in range(3)]
    weights = (mix.write, mix.zero, mix.discard, mix.flush)
    for number in range(first, first + count - 1):
        op = rng.choices((Op.WRITE, Op.ZERO, Op.DISCARD, Op.FLUSH), weights)[0]
        if op is Op.FLUSH:
            yield Request(number, op)
            continue
        length = min(_length(rng, cluster, mix.largest, op, grain), size)
        if rng.random() < mix.hot:
            offset = rng.choice(hot) + rng.choice((0, grain, cluster // 2, cluster - grain))
        else:
            offset = rng.randrange(0, size, grain)
        if rng.random() < 0.4:
            offset -= offset % cluster
        offset = max(0, min(offset, size - length))
        yield Request(number, op, offset - offset % grain, length)
    yield Request(first + count - 1, Op.FLUSH)


def striped(
    rng: random.Random, size: int, grain: int, count: int, first: int, owner: int, owners: int
) -> Iterator[Request]:
    """Writes and flushes that touch only every `owners`th stripe: several threads may run such.

    The stripes are smaller than most clusters, so the threads meet in them.
    """
    stripe = max(STRIPE, grain)
    mine = range(owner, size // stripe, owners)
    hot = [rng.choice(mine) for _ in range(3)]
    for number in range(first, first + count):
        if rng.random() < 0.2:
            yield Request(number, Op.FLUSH)
            continue
        place = rng.choice(hot) if rng.random() < 0.5 else rng.choice(mine)
        length = rng.randrange(grain, stripe + 1, grain)
        within = rng.randrange(0, stripe - length + 1, grain)
        op = Op.WRITE if rng.random() < 0.9 else Op.ZERO
        yield Request(number, op, place * stripe + within, length)


def _length(rng: random.Random, cluster: int, largest: int, op: Op, grain: int) -> int:
    if op is not Op.WRITE and rng.random() < 0.7:
        return cluster * rng.randrange(1, 4)  # only whole clusters are unmapped
    length = rng.choice(
        (
            grain,
            rng.randrange(1, 9) * grain,
            4096,
            min(cluster, largest),
            min(2 * cluster, largest),
            rng.randrange(grain, largest + 1),
        )
    )
    return max(grain, length - length % grain)


@dataclass(slots=True)
class Waiting:
    """A request that has changed the disk, or may have, since the last flush."""

    request: Request
    result: bytes | None = None  # what a discard that was acknowledged has left
    replaced: list[range] = field(default_factory=list)  # sectors that flushed data covers

    def value(self, sector: int) -> bytes | None:
        """What it may have put into a sector."""
        if sector not in self.request.sectors or any(sector in done for done in self.replaced):
            return None
        if self.result is not None:
            at = sector * SECTOR - self.request.offset
            return self.result[at : at + SECTOR]
        return pattern(self.request.number if self.request.op is Op.WRITE else 0, sector)

    def apply(self, store: Store) -> None:
        newer = [(done.start * SECTOR, len(done) * SECTOR) for done in self.replaced]
        kept = [(offset, store.read(offset, length)) for offset, length in newer]
        if self.result is not None:
            store.write(self.request.offset, self.result)
        else:
            self.request.apply(store)
        for offset, data in kept:
            store.write(offset, data)


class Model:
    """The legal contents of a disk, from what was asked and acknowledged so far.

    Requests that touch the same sector must not overlap in time.
    """

    def __init__(self, base: Store) -> None:
        self.current = base.copy()  # what a read must return
        self._flushed = base.copy()
        self._since: list[Waiting] = []  # in order
        self._done: set[int] = set()
        self._covered: dict[int, frozenset[int]] = {}  # flush -> requests done when it was asked

    def issued(self, request: Request) -> None:
        if request.op is Op.FLUSH:
            self._covered[request.number] = frozenset(self._done)
        else:
            self._since.append(Waiting(request))

    def acknowledged(
        self, request: Request, seen: bytes | None = None, durable: bool = False
    ) -> None:
        """The request has succeeded, and with `durable` what it changed will last.

        A discard may leave any sector as it was: `seen` is what the disk reads there afterwards.
        """
        if request.op is Op.FLUSH:
            self._flush(self._covered.pop(request.number))
            return
        waiting = next(entry for entry in self._since if entry.request.number == request.number)
        if request.op is Op.DISCARD:
            assert seen is not None
            before = self.current.read(request.offset, request.length)
            if seen.strip(b"\0"):
                check_discarded(request, before, seen)
                waiting.result = seen
        waiting.apply(self.current)
        self._done.add(request.number)
        if durable:
            self._flush(frozenset({request.number}))

    def _flush(self, covered: frozenset[int]) -> None:
        """A request that is not covered was in flight, or failed: its value stays possible."""
        left: list[Waiting] = []
        for entry in self._since:
            if entry.request.number in covered:
                entry.apply(self._flushed)
                for older in left:
                    older.replaced.append(entry.request.sectors)
            else:
                left.append(entry)
        self._since = left
        self._done -= covered

    def wrong_now(self, content: Store) -> list[str]:
        """What a read of the whole disk must not have returned."""
        return self._compare(content, self.current, [])

    def wrong_with_failures(self, content: Store) -> list[str]:
        """The same after requests have failed: each of their sectors may be new or old."""
        failed = [entry for entry in self._since if entry.request.number not in self._done]
        return self._compare(content, self.current, failed)

    def wrong_after_cut(self, content: Store) -> list[str]:
        """What the disk must not hold after a cut at this moment."""
        return self._compare(content, self._flushed, self._since)

    def _compare(self, content: Store, expected: Store, since: list[Waiting]) -> list[str]:
        if content.size != expected.size:
            return [f"{content.size} bytes read of {expected.size}"]
        wrong = []
        for index in sorted(content.chunks.keys() | expected.chunks.keys()):
            chunk, wanted = content.chunks.get(index, HOLE), expected.chunks.get(index, HOLE)
            if chunk == wanted:
                continue
            for within in range(0, CHUNK, SECTOR):
                found, want = chunk[within : within + SECTOR], wanted[within : within + SECTOR]
                at = index * CHUNK + within
                sector = at // SECTOR
                if found == want:
                    continue
                also = [value for entry in since if (value := entry.value(sector)) is not None]
                if found in also:
                    continue
                legal = [origin(value, sector) for value in (want, *also)]
                wrong.append(
                    f"sector {sector} (at {at:#x}) holds {origin(found, sector)}, "
                    f"legal: {' or '.join(legal)}"
                )
        return wrong


@dataclass(frozen=True, slots=True)
class Moment:
    """Something asked or acknowledged, after `at` events of the log."""

    at: int
    request: Request
    done: bool
    seen: bytes | None = None
    durable: bool = False


class History:
    """Requests in the order in which they were asked and acknowledged."""

    def __init__(self, base: Store) -> None:
        self.base = base
        self.moments: list[Moment] = []
        self.model = Model(base)  # as of now

    def issued(self, at: int, request: Request) -> None:
        self.moments.append(Moment(at, request, False))
        self.model.issued(request)

    def acknowledged(
        self, at: int, request: Request, seen: bytes | None = None, durable: bool = False
    ) -> None:
        self.moments.append(Moment(at, request, True, seen, durable))
        self.model.acknowledged(request, seen, durable)

    def replay(self) -> Replay:
        return Replay(self)


class Replay:
    """The model at any event of the log, for rising events."""

    def __init__(self, history: History) -> None:
        self._moments = history.moments
        self._next = 0
        self.model = Model(history.base)

    def advance(self, at: int) -> Model:
        """The model after `at` events.  What was asked just then may already have had effect."""
        while self._next < len(self._moments) and self._moments[self._next].at <= at:
            moment = self._moments[self._next]
            if moment.done:
                self.model.acknowledged(moment.request, moment.seen, moment.durable)
            else:
                self.model.issued(moment.request)
            self._next += 1
        return self.model
