"""Raw: the file is the disk.  A regular file or a block device.

Nothing in such a file says that it is an image, so the probe never claims more than LIKELY.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from virtmount.errors import NotAnImage, Unsupported
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Caps, Dirty, Image, Leaf, Match, Options
from virtmount.plan import Barrier, Extend, Plan, Punch, Truncate
from virtmount.upkeep import Choice, Finding, New, Progress, Repair, Severity

SECTOR = 512
CLUSTER = 64 << 10  # nominal: what discard gives back, and the unit where a chain needs one
LEAF = 1024
MAX_SIZE = (1 << 63) - (1 << 20)


class Raw(Image):
    name: ClassVar[str] = "raw"
    creates: ClassVar[bool] = True
    checks: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = ("raw", "img")
    choices: ClassVar[Mapping[str, Choice]] = {}

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.LIKELY if size > 0 else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        size = file.size
        if size == 0:
            raise NotAnImage(file, "", "empty: a raw image has at least one byte")
        if size > MAX_SIZE:
            raise NotAnImage(file, "", f"{size} bytes, the largest disk has {MAX_SIZE}")
        self.files = [file]
        self.variant = "device" if file.is_device else "file"
        # A file that ends inside a sector: the rest reads as zeros, and the first write to that
        # sector makes the file whole.
        self.size = -(-size // SECTOR) * SECTOR
        self.sector_size = SECTOR
        self.cluster_size = CLUSTER
        self.entries_per_leaf = LEAF
        self.flat = 0
        self.caps = Caps(write=file.writable, discard=file.writable, zero_hides_parent=True)

    def leaf(self, index: int) -> Leaf:
        return Leaf(base=index * LEAF * CLUSTER)

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        assert not dirty, "every cluster is written in place"
        return Plan()

    def discard(self, first: int, count: int) -> Plan:
        end = min((first + count) * CLUSTER, self.size)
        return Plan(Punch(first * CLUSTER, end - first * CLUSTER))

    # Whole images

    @classmethod
    def create(cls, new: New) -> Plan:
        """A hole of that size."""
        if new.parent is not None:
            raise Unsupported(new.name, "parent", "a raw image has none", hint="--format qcow2")
        if new.sector_size != SECTOR:
            text = f"{new.sector_size} bytes: a raw image records none, so it has {SECTOR}"
            raise Unsupported(new.name, "sector size", text, hint=f"--sector-size {SECTOR}")
        return Plan(Extend(new.size), Barrier)

    @classmethod
    def check(
        cls, file: HostFile, options: Options, repair: Repair
    ) -> Iterator[Finding | Plan | Progress]:
        """There are no metadata, so nothing is ever wrong."""
        size = cls(file, options).size
        if size != file.size:
            text = f"the file ends {size - file.size} bytes before a whole sector, read as zeros"
            yield Finding(Severity.NOTE, f"byte {file.size}", text)

    def resize(self, size: int) -> Plan:
        """Both ways: the caller has asked whether the rest may go."""
        file = self.files[0]
        if file.is_device:
            raise Unsupported(file, "", "a device has the size that it has")
        return Plan(Extend(size) if size > file.size else Truncate(size), Barrier)
