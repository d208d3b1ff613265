"""The contract between a format driver and everything else.

A driver says where guest bytes are and what must be written in which order.  It never touches
guest data (except to inflate it), never schedules, locks, retries or logs, and performs no write:
it reads through HostFile and answers with Plans.  All methods are called from one thread, except
inflate(), which several threads call at once.

The types for making, checking and changing whole images are in upkeep.py.

Units: every offset and size is in bytes; a *cluster* is the driver's allocation unit and a power
of two; a *leaf* is the part of the mapping table that maps `entries_per_leaf` clusters (a power
of two).  Guest cluster c belongs to leaf c // entries_per_leaf.
"""

from __future__ import annotations

import enum
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from virtmount.errors import Unsupported
from virtmount.hostfile import HostFile
from virtmount.plan import Plan
from virtmount.upkeep import Choice, Finding, New, Packer, Progress, Repair, Snapshot


class Match(enum.IntEnum):
    """How sure a probe is.  LIKELY is for formats known by their tail or by text."""

    NO = 0
    LIKELY = 1
    SURE = 2


class Kind(enum.IntEnum):
    """What one table entry says about its cluster.  The numbers are those of native/engine.h."""

    ABSENT = 0  # this image holds nothing: the parent decides; zeros without one
    ZERO = 1  # reads as zeros, whatever the parent holds
    DATA = 2  # at the host offset, ours alone: written in place
    SHARED = 3  # at the host offset, but somebody else's too: copied before a write
    COMPRESSED = 4  # inflate() has the bytes; copied before a write
    PARTIAL = 5  # pieces of the cluster differ: slow() has them
    INVALID = 6  # the entry points where no cluster can lie: EIO


class Rule(NamedTuple):
    """An entry with `entry & mask == value` is of this kind."""

    mask: int
    value: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Layout:
    """How to decode a table of `width`-byte entries; native/decode.c does the same.

    The first matching rule (at most five) gives the kind, else DATA.  For DATA and SHARED the
    host offset is (entry & mask) * scale + bias; one below `low`, not a multiple of 512, or at or
    past last_place() is INVALID.  So is one that is not a multiple of `align` (a power of two).
    """

    width: int
    byteorder: str
    mask: int
    scale: int = 1
    bias: int = 0
    rules: tuple[Rule, ...] = ()
    low: int = 512
    align: int = 512


@dataclass(frozen=True, slots=True)
class Leaf:
    """Where the table for one leaf lies.

    `table` is the byte offset of its first entry in file number `table_file`, or None: then all
    clusters of the leaf are `kind` (ABSENT, ZERO, INVALID, COMPRESSED, or PARTIAL: slow() is asked
    for each), or, where `base` is given, DATA that lies in order from byte `base` of file number
    `data_file`.  `data_file` is also the file that decoded host offsets refer to.
    """

    table: int | None = None
    table_file: int = 0
    data_file: int = 0
    kind: Kind = Kind.ABSENT
    base: int | None = None


class Extent(NamedTuple):
    """A run of guest bytes: kind, and for DATA and SHARED the host offset in file `file`."""

    guest_offset: int
    length: int
    kind: Kind
    host_offset: int = 0
    file: int = 0


class Run(NamedTuple):
    """`count` adjacent host clusters from byte `host_offset` of file `file`."""

    host_offset: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    file: int = 0


class Dirty(NamedTuple):
    """Guest cluster `cluster` now lives at `host_offset`, where its data has been written.

    With `barrier` the data must be durable before the mapping is: the cluster hides older data
    (a parent's, a compressed or shared cluster's) or its host cluster was used before.
    """

    cluster: int
    host_offset: int
    barrier: bool = True


class Reservation(NamedTuple):
    """Host clusters that read as zeros after `plan`; `reused` if they held data before."""

    runs: tuple[Run, ...]
    plan: Plan
    reused: bool = False


@dataclass(frozen=True, slots=True)
class Caps:
    """What the driver can do with this image as it was opened."""

    write: bool = False  # begin, reserve, commit, release, end
    discard: bool = False  # discard(): give whole clusters back
    zero_hides_parent: bool = False  # a discarded cluster reads as zeros even over a parent


@dataclass(frozen=True, slots=True)
class ParentRef:
    """The image that this one is based on, as recorded in the child; nothing is opened for it.

    `names` are paths in the order in which to try them, relative ones to the child's folder.
    `format` is a driver's name or None where the child does not record it.  `identity` is compared
    with the parent's `identity` where both have one: another image with the right name is refused.
    `searched`: there is no name in the file, `names` were found by looking around.  `stamp`, where
    both have one, says that the parent was not written since: compared with the parent's `stamp`.
    """

    names: tuple[str, ...]
    format: str | None = None
    identity: str | None = None
    searched: bool = False
    stamp: str | None = None


class Span(NamedTuple):
    """`length` bytes at `offset` of the image's file number `file`."""

    offset: int
    length: int
    file: int = 0


@dataclass(frozen=True, slots=True)
class Cipher:
    """How guest data is encrypted on the host, 512 bytes at a time; the engine does it.

    `mode` is "xts" or "cbc" (AES; the key's length says which).  The initialization vector of a
    sector is its number, 64 bits little-endian ("plain64"), counted from byte `origin` of the host
    file it lies in, or of the guest disk where `by_guest`; with `essiv` (CBC only) that is
    encrypted with AES under SHA-256 of the key first.
    """

    mode: str
    key: bytes = field(repr=False)
    essiv: bool = False
    by_guest: bool = False
    origin: int = 0


@dataclass(frozen=True, slots=True)
class Options:
    """What the user said beyond the file's name.  A driver ignores what is not about it.

    `roots`: folders that files named in an image may lie in (siblings.py); none: the folder of the
    image itself.
    """

    allow_outside: bool = False
    roots: tuple[str, ...] = ()
    search_path: tuple[str, ...] = ()  # folders in which a parent without a name is looked for
    snapshot: str | None = None  # name or id of an internal snapshot, instead of the present state
    passphrase: Callable[[], bytes] | None = None  # asked only where one is needed
    size_from: str | None = None  # VHD: "chs" or "current", where the two differ
    described: bool = False  # no guest data will be read: no passphrase is needed
    changing_parent: bool = False  # it is being opened to name another parent: do not insist


DEFAULTS = Options()


class Image(ABC):
    """One opened file (or set of files) in one format.

    The constructor, driver(file, options), validates everything that it uses and raises NotAnImage,
    Corrupt, Unsupported or NeedsRecovery before anything is written.  It opens further files only
    with siblings.open_sibling(), puts them into `files`, and closes those again if it raises.
    `file.writable` says whether writing is wanted; a driver that cannot write this variant raises
    Unsupported then.  Read-only images are never written, not even by end().
    """

    name: ClassVar[str]
    files: list[HostFile]
    variant: str = ""
    size: int  # of the guest disk, bytes; any multiple of 1 (the last sector is padded with zeros)
    sector_size: int = 512  # logical
    physical_sector_size: int = 4096
    cluster_size: int
    entries_per_leaf: int
    layout: Layout | None = None  # None: leaf() never answers with a table
    flat: int | None = None  # host offset of guest byte 0 where all data lies in order in one file
    flat_file: int = 0  # ... that file's number
    # The number of a file in which each new cluster lies at its guest offset: reserve() is not
    # called, and what no mapping uses of that file reads as zeros once begin()'s plan is done.
    identity_file: int | None = None
    # (end, file): new clusters of the guest bytes from one zone up to `end` lie in that file;
    # reserve_at() is asked instead of reserve().  Ends are multiples of the cluster, but the last.
    zones: Sequence[tuple[int, int]] = ()
    cipher: Cipher | None = None  # of all DATA and SHARED clusters
    parent: ParentRef | None = None
    identity: str | None = None
    stamp: str | None = None
    caps: Caps = Caps()
    memory: int = 0  # bytes of tables that are kept as long as it is open

    @classmethod
    @abstractmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        """Judge the first 64 KiB, the last 1 KiB and the size of a file; must not raise."""

    @abstractmethod
    def leaf(self, index: int) -> Leaf:
        """Say where the table for leaf `index` lies.

        Answers for this image only: an absent cluster is not a zero cluster, the parent decides.
        Called again after every change to the leaf, so an answer is not cached across commit() or
        discard().  The table must lie inside the file: Corrupt otherwise, and those clusters EIO.
        Entries past the disk's end are ignored, and need not exist in the file.
        """

    def slow(self, cluster: int) -> Sequence[Extent]:
        """The pieces of a PARTIAL cluster, in order and without gaps; multiples of `grain`."""
        raise NotImplementedError

    @property
    def grain(self) -> int:
        """The smallest piece slow() can answer with; the cluster where it is never called."""
        return self.cluster_size

    def inflate(self, cluster: int) -> bytes:
        """The `cluster_size` bytes of a COMPRESSED cluster, never more.  Corrupt or OSError.

        Called from several threads at once, also while a plan is being carried out: a cluster that
        is not compressed any more is Corrupt like any other surprise, the engine looks again.  Past
        the disk's end the cluster is filled up with zeros.  The long work (zlib, zstd ...) should
        let other threads run.
        """
        raise NotImplementedError

    def details(self) -> dict[str, Any]:
        """What `info` shows of this format: plain values, keys in snake_case."""
        return {}

    def metadata(self) -> Iterable[Span]:
        """Host ranges in which no guest cluster may lie.

        A mapping that points into one is INVALID.  Asked once, after open.
        """
        return ()

    # Writing.  The order of calls is begin, then any of reserve, commit, discard, release, then
    # end.  A Plan that was returned is executed to its end before the next call; if that fails,
    # the image is never written again and no further writing call comes.

    def begin(self) -> Plan:
        """Before the session's first write: dirty flags, write GUIDs, unknown autoclear bits."""
        return Plan()

    def reserve(self, count: int) -> Reservation:
        """Find at least one and about `count` host clusters for new data.

        They are taken out of the free ones in memory only; nothing on disk says so until commit()
        maps them, so a crash leaks nothing but file length.  The plan must end with a Barrier
        where the new file size has to be durable before a mapping may name it.  Raises
        OSError(ENOSPC or EFBIG) when the format can address no more.

        This plan alone may fail without the end of writing, because a full host may have room
        again: then the runs come back through release(), whatever of the plan was carried out.
        """
        raise Unsupported(self.files[0], "", f"{self.name}: writing")

    def reserve_at(self, count: int, guest_offset: int) -> Reservation:
        """The same for the zone that `guest_offset` lies in, where the image has `zones`."""
        return self.reserve(count)

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        """Make the new mappings of `dirty` durable; empty where nothing has to be written.

        Sorted by cluster, no cluster twice.  When the plan has been executed up to its last
        Barrier, a flush may be acknowledged.  Replaced host clusters (shared, compressed, zero
        with preallocation) are given back after that, in the same plan.
        """
        raise Unsupported(self.files[0], "", f"{self.name}: writing")

    def discard(self, first: int, count: int) -> Plan:
        """Make guest clusters first … first+count-1 read as zeros and give their space back.

        Only called with caps.discard, and over a parent only with caps.zero_hides_parent; after
        a commit of everything dirty.  The plan must make the unmapping durable before it punches
        or reuses.
        """
        raise Unsupported(self.files[0], "", f"{self.name}: discard")

    def release(self, runs: Sequence[Run]) -> None:  # noqa: B027, nothing to do for most
        """Reserved clusters that were not used come back; their contents are unknown."""

    def end(self) -> Plan:
        """At an orderly detach, after the last commit and release: clean flags, no leaks."""
        return Plan()

    # Whole images.  Each says in its own words what it cannot do.

    choices: ClassVar[Mapping[str, Choice]] = {}  # the options of create()
    creates: ClassVar[bool] = False  # create() and the choices are there
    checks: ClassVar[bool] = False  # check() is there
    suffixes: ClassVar[tuple[str, ...]] = ()  # of file names, without the dot; the usual one first

    @classmethod
    def create(cls, new: New) -> Plan:
        """An empty image (a differencing one with a parent).  Its constructor must accept it.

        Raises Unsupported, naming the option, for what cannot be made.  Not everything need be
        written: new files read as zeros wherever nothing is.
        """
        raise Unsupported(new.files[0], "", f"{cls.name}: images of this format cannot be made")

    @classmethod
    def packer(cls, new: New) -> Packer:
        """Like create(), for a compressed image that is written once, from front to back."""
        raise Unsupported(new.files[0], "", f"{cls.name}: compressed images cannot be made")

    @classmethod
    def check(
        cls, file: HostFile, options: Options, repair: Repair
    ) -> Iterator[Finding | Plan | Progress]:
        """Look at all metadata, also of an image that the constructor refuses.

        Yields findings, now and then how far it is, and, where `file.writable` and `repair` allows
        it, plans: each is executed to its end, and made durable, before the next item is asked for.
        Every plan leaves the image at least as whole as it was, at whatever step it is cut.  Works
        in bounded memory.  Raises NotAnImage where there is nothing to check.
        """
        raise Unsupported(file, "", f"{cls.name}: images of this format cannot be checked")

    def resize(self, size: int) -> Plan:
        """Give the guest disk another size, in an image that is open for writing and idle.

        New space reads as zeros.  A smaller one is Unsupported unless it is the format's way.  The
        plan is all that is carried out: neither begin() nor end() is called around it, so it has
        their flags and GUIDs where the format wants them; then the image is closed.
        """
        raise Unsupported(self.files[0], "", f"{self.name} {self.variant}: resize".rstrip())

    def snapshots(self) -> Sequence[Snapshot]:
        """The internal snapshots, oldest first."""
        return ()

    def rebase(self, parent: Image | None, name: str) -> Plan:
        """Record another parent under `name`, or none; the data is the caller's business.

        `name` is relative to this image's folder where both allow it, else absolute.  Called and
        carried out like resize().
        """
        raise Unsupported(self.files[0], "", f"{self.name}: no parents can be recorded")


def last_place(layout: Layout | None, cluster_size: int, file_size: int) -> int:
    """No cluster begins here or later: the file's end, rounded up to where one could begin."""
    first = layout.bias % cluster_size if layout else 0
    return first + -(-(file_size - first) // cluster_size) * cluster_size


def decode(
    layout: Layout, raw: bytes, cluster_size: int, file_size: int
) -> Iterator[tuple[Kind, int]]:
    """Kind and host offset of each entry of a raw table; the slow, obvious twin of decode.c."""
    order = ">" if layout.byteorder == "big" else "<"
    code = {4: "I", 8: "Q"}[layout.width]
    limit = last_place(layout, cluster_size, file_size)
    for (entry,) in struct.iter_unpack(order + code, raw):
        kind = Kind.DATA
        for rule in layout.rules:
            if entry & rule.mask == rule.value:
                kind = rule.kind
                break
        if kind not in (Kind.DATA, Kind.SHARED):
            yield kind, 0
            continue
        host = (entry & layout.mask) * layout.scale + layout.bias
        if host < layout.low or host % layout.align or host >= limit or host >= 1 << 60:
            yield Kind.INVALID, 0
        else:
            yield kind, host


def extents(image: Image, start: int, length: int) -> Iterator[Extent]:
    """What this image alone (no parent) says about guest bytes start … start+length, in order.

    Clusters are not merged.  Reads tables, never data.  The last extent may end past the disk.
    """
    cluster = image.cluster_size
    first, last = start // cluster, -(-(start + length) // cluster)
    while first < last:
        index, within = divmod(first, image.entries_per_leaf)
        count = min(last - first, image.entries_per_leaf - within)
        yield from leaf_extents(image, image.leaf(index), first, within, count)
        first += count


def leaf_extents(image: Image, leaf: Leaf, first: int, within: int, count: int) -> Iterator[Extent]:
    """Extents of `count` clusters from guest cluster `first`, entry `within` of `leaf`."""
    size = image.cluster_size
    if leaf.table is None:
        for i in range(count):
            at = (first + i) * size
            if leaf.base is not None:
                host = leaf.base + (within + i) * size
                yield Extent(at, size, Kind.DATA, host, leaf.data_file)
            elif leaf.kind is Kind.PARTIAL:
                yield from image.slow(first + i)
            else:
                yield Extent(at, size, leaf.kind)
        return
    assert image.layout is not None
    width = image.layout.width
    raw = image.files[leaf.table_file].pread(leaf.table + within * width, count * width)
    file_size = image.files[leaf.data_file].size
    for i, (kind, host) in enumerate(decode(image.layout, raw, size, file_size)):
        if kind is Kind.PARTIAL:
            yield from image.slow(first + i)
        else:
            yield Extent((first + i) * size, size, kind, host, leaf.data_file)


@dataclass(slots=True)
class Chain:
    """An image and its parents, the image itself first.  chain.py opens one."""

    images: list[Image] = field(default_factory=list)

    @property
    def top(self) -> Image:
        return self.images[0]

    def close(self) -> None:
        """Close and unlock all files; harmless when repeated."""
        for image in self.images:
            for file in image.files:
                file.close()
