"""A format for tests: every kind that a driver can answer with, at will, and every write in order.

File: JSON at 0, the table of 8-byte entries from 4096 on, then clusters at multiples
of the cluster size.  Nothing is checked: the tests need images that no honest driver would open.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from virtmount.hostfile import HostFile
from virtmount.image import (
    DEFAULTS,
    Caps,
    Dirty,
    Extent,
    Image,
    Kind,
    Layout,
    Leaf,
    Match,
    Options,
    ParentRef,
    Reservation,
    Rule,
    Run,
    Span,
)
from virtmount.plan import Barrier, Extend, Plan, Punch, Write

MAGIC = b'{"toy":'
TABLE = 4096
DIRTY = 4000  # begin() writes here, end() clears
ABSENT, ZERO, PARTIAL, COMPRESSED, INVALID = range(5)
SHARED = 1 << 63


class Toy(Image):
    name: ClassVar[str] = "toy"

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.SURE if head.startswith(MAGIC) else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self.file = file
        self.files = [file]
        self.header: dict[str, Any] = json.loads(file.pread(0, DIRTY).rstrip(b"\0"))
        self.size = self.header["size"]
        self.cluster_size = self.header["cluster"]
        self.entries_per_leaf = self.header["per_leaf"]
        self.sector_size = self.header.get("sector_size", 512)
        self.identity = self.header.get("identity")
        if "parents" in self.header:
            self.parent = ParentRef(
                tuple(self.header["parents"]),
                self.header.get("parent_format"),
                self.header.get("parent_identity"),
            )
        self.clusters = -(-self.size // self.cluster_size)
        self.layout = Layout(
            width=8,
            byteorder="little",
            mask=SHARED - 512,
            rules=(
                Rule(0xFFFFFFFFFFFFFFFF, ABSENT, Kind.ABSENT),
                Rule(0xFFFFFFFFFFFFFFFF, ZERO, Kind.ZERO),
                Rule(0xFFFFFFFFFFFFFFFF, PARTIAL, Kind.PARTIAL),
                Rule(0xFFFFFFFFFFFFFFFF, COMPRESSED, Kind.COMPRESSED),
                Rule(SHARED, SHARED, Kind.SHARED),
            ),
            low=TABLE,
        )
        self.caps = Caps(write=True, discard=True, zero_hides_parent=True)
        self.log: list[str] = []
        self.reused: list[Run] = []
        self.end_of_file = -(-file.size // self.cluster_size) * self.cluster_size
        self.fail: dict[str, BaseException] = {}  # call -> what it raises

    def called(self, name: str) -> None:
        self.log.append(name)
        if name in self.fail:
            raise self.fail[name]

    @property
    def grain(self) -> int:
        return int(self.header["grain"])

    def leaf(self, index: int) -> Leaf:
        self.called("leaf")
        whole = self.header.get("whole", {}).get(str(index))  # leaf -> a kind, or a base
        if whole is not None:
            return Leaf(base=whole) if whole > 100 else Leaf(kind=Kind(whole))
        return Leaf(table=TABLE + index * self.entries_per_leaf * 8)

    def slow(self, cluster: int) -> Sequence[Extent]:
        """Pieces of a grain: SHARED (every such cluster has the same bytes), ABSENT and ZERO."""
        self.called("slow")
        base, grain = cluster * self.cluster_size, self.grain
        kinds = (Kind.SHARED, Kind.ABSENT, Kind.ZERO, Kind.SHARED)
        pieces = []
        for i in range(self.cluster_size // grain):
            kind = kinds[(cluster + i) % 4]
            host = self.header["slow"] + i * grain if kind is Kind.SHARED else 0
            pieces.append(Extent(base + i * grain, grain, kind, host))
        return pieces

    def inflate(self, cluster: int) -> bytes:
        self.called("inflate")
        return bytes([cluster % 251 + 1]) * self.cluster_size

    def metadata(self) -> Iterable[Span]:
        return [Span(0, TABLE + self.clusters * 8)]

    # Writing

    def begin(self) -> Plan:
        self.called("begin")
        return Plan(Write(DIRTY, b"dirty"), Barrier)

    def reserve(self, count: int) -> Reservation:
        self.called("reserve")
        if self.reused:
            run = self.reused.pop()
            length = run.count * self.cluster_size
            return Reservation((run,), Plan(Punch(run.host_offset, length), Barrier), reused=True)
        count = min(count, self.header.get("at_once", 4))
        run = Run(self.end_of_file, count)
        self.end_of_file += count * self.cluster_size
        return Reservation((run,), Plan(Extend(self.end_of_file), Barrier))

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        self.called("commit")
        assert list(dirty) == sorted(dirty)
        assert len({item.cluster for item in dirty}) == len(dirty)
        first = [Barrier] if any(item.barrier for item in dirty) else []
        writes = [self.entry(item.cluster, item.host_offset) for item in dirty]
        return Plan(*first, *writes, Barrier)

    def entry(self, cluster: int, value: int) -> Write:
        return Write(TABLE + cluster * 8, value.to_bytes(8, "little"))

    def discard(self, first: int, count: int) -> Plan:
        self.called("discard")
        count = min(count, self.clusters - first)
        raw = self.file.pread(TABLE + first * 8, count * 8)
        writes, punches = [], []
        for i in range(count):
            value = int.from_bytes(raw[i * 8 : i * 8 + 8], "little")
            writes.append(self.entry(first + i, ZERO))
            if value > INVALID and value < SHARED:
                punches.append(Punch(value, self.cluster_size))
                self.reused.append(Run(value, 1))
        return Plan(*writes, Barrier, *punches)

    def release(self, runs: Sequence[Run]) -> None:
        self.called("release")
        self.reused += [run for run in runs if run.count]

    def end(self) -> Plan:
        self.called("end")
        return Plan(Write(DIRTY, bytes(5)), Barrier)


def make_toy(
    path: Path,
    size: int,
    table: dict[int, int | bytes],
    *,
    cluster: int = 4096,
    grain: int | None = None,
    per_leaf: int = 64,
    **header: Any,
) -> Path:
    """Write an image.  table: guest cluster -> ABSENT …, or its bytes, or a raw entry.

    Clusters are laid out in the order of `table`, so shuffle it.
    """
    grain = grain or cluster
    clusters = -(-size // cluster)
    at = -(-(TABLE + clusters * 8) // cluster) * cluster
    entries = [ABSENT] * clusters
    data = bytearray(at)
    for index, value in table.items():
        if isinstance(value, bytes):
            entries[index] = len(data)
            data += value.ljust(cluster, b"\0")
        else:
            entries[index] = value
    header |= {"size": size, "cluster": cluster, "grain": grain, "per_leaf": per_leaf}
    header["slow"] = len(data)
    for i in range(cluster // grain):  # what slow() answers with
        data += bytes([0xC0 + i % 63]) * grain
    text = MAGIC + b"1," + json.dumps(header).encode()[1:]
    assert len(text) < DIRTY
    data[: len(text)] = text
    for i, value in enumerate(entries):
        data[TABLE + i * 8 : TABLE + i * 8 + 8] = value.to_bytes(8, "little")
    path.write_bytes(data)
    return path
