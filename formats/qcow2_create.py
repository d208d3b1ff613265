"""Making QCOW2 images: empty ones, and compressed ones from front to back.

Source: qemu's docs/interop/qcow2.rst; the options are called as qemu-img calls them.  Used by
qcow2.py only.  The header is written last, so that what was not finished is no image.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import sys
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from virtmount.errors import Denied, Unsupported
from virtmount.formats import luks, qcow2_crypt
from virtmount.formats.qcow2_entries import COPIED, PRESENT, Entries
from virtmount.formats.qcow2_header import (
    COMPRESSION,
    COMPRESSIONS,
    DATA_FILE,
    DATA_FILE_NAME,
    DATA_FILE_RAW,
    EXTENDED_L2,
    FEATURE_NAMES,
    LAZY_REFCOUNTS,
    MAGIC,
    MAX_L1,
    MAX_REFCOUNT_TABLE,
    MIN_EXTENDED_BITS,
)
from virtmount.formats.qcow2_names import FEATURES, backing, extension_area
from virtmount.formats.qcow2_refcount import table_bytes
from virtmount.formats.zstd import Compressor
from virtmount.plan import Barrier, Extend, Plan, Step, Write
from virtmount.upkeep import Choice, New, Packer

CHOICES: Mapping[str, Choice] = {
    "cluster_size": Choice("64K", "what grows at a time: a power of two from 512 to 2M"),
    "compat": Choice("1.1", "1.1 (version 3), or 0.10 (version 2) for very old programs"),
    "refcount_bits": Choice("16", "width of a reference count: a power of two from 1 to 64"),
    "lazy_refcounts": Choice("off", "on: other programs may be late with reference counts"),
    "extended_l2": Choice("off", "on: a cluster is allocated in 32 pieces"),
    "data_file": Choice("", "name of a file beside the image that the data goes into"),
    "data_file_raw": Choice("off", "on: the data file is a raw image by itself"),
    "compression_type": Choice("zlib", "zlib or zstd"),
    "preallocation": Choice("off", "off, or metadata: all tables are made now"),
    "encryption": Choice("off", "off, or luks: what the guest writes is encrypted (AES-256, XTS)"),
}
MAX_TABLES = 64 << 20  # bytes of L2 tables that are made at once
MAX_COUNTED = 1 << 26  # clusters of a compressed image
SECTOR = 512
WINDOW = -12
MEMORY = 9  # of zlib, the most
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_HEADER_V3 = struct.Struct(">QQQIIB7x")
assert _HEADER.size + _HEADER_V3.size == 112


@dataclass(frozen=True, slots=True)
class Shape:
    """What the options ask for."""

    version: int
    cluster_size: int
    order: int
    lazy: bool
    extended: bool
    data_file: str
    raw: bool
    compression: int
    preallocated: bool
    encrypted: bool
    size: int

    @property
    def luks_clusters(self) -> int:
        """What the LUKS header takes."""
        return _clusters(luks.NEW_LENGTH, self.cluster_size) if self.encrypted else 0

    @property
    def entries(self) -> Entries:
        return Entries(
            self.version,
            self.cluster_size,
            extended=self.extended,
            data_file=bool(self.data_file),
        )

    @property
    def clusters(self) -> int:
        return -(-self.size // self.cluster_size)

    @property
    def tables(self) -> int:
        return -(-self.clusters // self.entries.per_table)

    @property
    def l1_size(self) -> int:
        return max(1, self.tables)


def create(new: New) -> Plan:
    shape = read_options(new)
    size = shape.cluster_size
    steps: list[Step] = []
    if shape.data_file:
        steps.append(Extend(shape.size, new.add(shape.data_file)))
    l1_clusters = _clusters(shape.l1_size * 8, size)
    l2_tables = shape.tables if shape.preallocated else 0
    data = 0 if shape.data_file or not shape.preallocated else shape.clusters
    used = 1 + l1_clusters + l2_tables + data + shape.luks_clusters
    # Cluster 0 is the header, then come counts, L1, L2, data.
    table, blocks = _refcount_clusters(new, shape, used)
    l1_at = 1 + table + blocks
    l2_at, data_at = l1_at + l1_clusters, l1_at + l1_clusters + l2_tables
    steps.append(Extend((used + table + blocks) * size))
    steps += _refcounts(shape, 1, table, blocks, array("B", [1]) * (used + table + blocks))
    if l2_tables:
        first = (l2_at * size) | COPIED
        l1 = array("Q", range(first, first + l2_tables * size, size))
        steps.append(Write(l1_at * size, table_bytes(l1)))
        steps += _full_tables(shape, l2_at, 0 if shape.data_file else data_at)
    luks_at = (data_at + data) * size
    if shape.encrypted:
        key_slots, _ = luks.make(_passphrase(new), iterations=luks.NEW_ITERATIONS)
        steps.append(Write(luks_at, key_slots))
    header = make_header(new, shape, l1_at * size, 1, table, luks_at)
    return Plan(*steps, Barrier, Write(0, header), Barrier)


def _passphrase(new: New) -> bytes:
    if new.passphrase is None:
        text = "encrypted: no passphrase"
        raise Denied(new.name, "encryption", text, hint="--passphrase-file FILE")
    return new.passphrase()


def _full_tables(shape: Shape, at: int, data_at: int) -> list[Write]:
    """L2 tables from cluster `at` on that map all data in order from cluster `data_at` on."""
    size, entries = shape.cluster_size, shape.entries
    writes = []
    for number in range(shape.tables):
        first = number * entries.per_table
        count = min(entries.per_table, shape.clusters - first)
        host = (data_at + first) * size | COPIED
        words = array("Q", bytes(count * entries.width))
        words[:: entries.words] = array("Q", range(host, host + count * size, size))
        if entries.extended:
            words[1::2] = array("Q", [PRESENT]) * count
        writes.append(Write((at + number) * size, table_bytes(words)))
    return writes


# Options


def read_options(new: New) -> Shape:
    """What is asked for; Unsupported names the option that cannot be."""
    cluster_size = _cluster_size(new)
    version = {"1.1": 3, "v3": 3, "0.10": 2, "v2": 2}.get(new.options["compat"])
    if version is None:
        raise _refused(new, "compat", "know 1.1 and 0.10")
    bits = new.options["refcount_bits"]
    if bits not in {str(1 << order) for order in range(7)}:
        raise _refused(new, "refcount_bits", "know 1, 2, 4, 8, 16, 32 and 64")
    compression = {name: number for number, name in COMPRESSIONS.items()}.get(
        new.options["compression_type"]
    )
    if compression is None:
        raise _refused(new, "compression_type", f"know {' and '.join(COMPRESSIONS.values())}")
    if new.options["preallocation"] not in ("off", "metadata"):
        raise _refused(new, "preallocation", "know off and metadata")
    if new.options["encryption"] not in ("off", "luks"):
        raise _refused(new, "encryption", "know off and luks")
    raw = _flag(new, "data_file_raw")
    shape = Shape(
        version=version,
        cluster_size=cluster_size,
        order=int(bits).bit_length() - 1,
        lazy=_flag(new, "lazy_refcounts"),
        extended=_flag(new, "extended_l2"),
        data_file=new.options["data_file"],
        raw=raw,
        compression=compression,
        # All of a raw data file is data, also what nobody wrote.
        preallocated=raw or new.options["preallocation"] == "metadata",
        encrypted=new.options["encryption"] == "luks",
        # qemu cuts a disk off at its last whole sector.
        size=-(-new.size // SECTOR) * SECTOR,
    )
    _refuse_combinations(new, shape)
    return shape


def _refuse_combinations(new: New, shape: Shape) -> None:
    if new.sector_size != SECTOR:
        text = f"sectors of {new.sector_size} bytes: QCOW2 has {SECTOR} only"
        raise Unsupported(new.name, "sector_size", text)
    if shape.version < 3:
        later = {
            "refcount_bits": shape.order != 4,
            "lazy_refcounts": shape.lazy,
            "extended_l2": shape.extended,
            "data_file": bool(shape.data_file),
            "compression_type": shape.compression != 0,
            "encryption": shape.encrypted,
        }
        for name, asked in later.items():
            if asked:
                raise _refused(new, name, "version 2 (compat=0.10) has no such thing")
    if shape.extended and shape.cluster_size < 1 << MIN_EXTENDED_BITS:
        raise _refused(new, "extended_l2", f"clusters of {shape.cluster_size} bytes, needs 16K")
    if shape.raw and not shape.data_file:
        raise _refused(new, "data_file_raw", "there is no data_file")
    if shape.raw and new.parent is not None:
        raise _refused(new, "data_file_raw", "a raw image has no parent")
    if shape.encrypted and shape.data_file:
        raise _refused(new, "encryption", "data files are not made encrypted")
    if shape.encrypted and shape.preallocated:
        text = "what is allocated and encrypted does not read as zeros"
        raise _refused(new, "preallocation", text)
    if shape.preallocated and new.parent is not None:
        raise _refused(new, "preallocation", "what is allocated hides the parent")
    if shape.l1_size * 8 > MAX_L1:
        text = f"{shape.size} bytes in clusters of {shape.cluster_size}: larger ones are needed"
        raise Unsupported(new.name, "size", text)
    if shape.preallocated and shape.tables * shape.cluster_size > MAX_TABLES:
        name = "data_file_raw" if shape.raw else "preallocation"
        raise _refused(new, name, f"tables of more than {MAX_TABLES} bytes: larger clusters help")


def _refused(new: New, name: str, text: str) -> Unsupported:
    return Unsupported(new.name, name, f"{new.options[name]!r}: {text}")


def _flag(new: New, name: str) -> bool:
    value = new.options[name].lower()
    if value in ("on", "yes", "true", "1"):
        return True
    if value in ("off", "no", "false", "0", ""):
        return False
    raise _refused(new, name, "know on and off")


def _cluster_size(new: New) -> int:
    text = new.options["cluster_size"]
    match = re.fullmatch(r"([0-9]{1,9})([KM]?)(?:i?B)?", text, re.IGNORECASE)
    size = int(match[1]) * UNITS[match[2].upper()] if match else 0
    if not 512 <= size <= 2 << 20 or size & size - 1:
        raise _refused(new, "cluster_size", "know powers of two from 512 to 2M")
    return size


# Header and counts


def make_header(
    new: New,
    shape: Shape,
    l1_offset: int,
    refcount_at: int,
    refcount_clusters: int,
    luks_offset: int = 0,
) -> bytes:
    """The header, its extensions and the parent's name."""
    incompatible = (
        bool(shape.data_file) << DATA_FILE
        | bool(shape.compression) << COMPRESSION
        | shape.extended << EXTENDED_L2
    )
    more = b""
    if shape.version > 2:
        more = _HEADER_V3.pack(
            incompatible,
            LAZY_REFCOUNTS if shape.lazy else 0,
            DATA_FILE_RAW if shape.raw else 0,
            shape.order,
            _HEADER.size + _HEADER_V3.size,
            shape.compression,
        )
    start = _HEADER.size + len(more)
    name = b""
    extensions: dict[int, bytes] = {}
    if new.parent is not None:
        name, extensions = backing(new.name, new.parent, new.parent_name)
    if shape.data_file:
        extensions[DATA_FILE_NAME] = os.fsencode(shape.data_file)
    if shape.encrypted:
        extensions[qcow2_crypt.EXTENSION] = struct.pack(">QQ", luks_offset, luks.NEW_LENGTH)
    # The names of features are for people: they give way where there is no room.
    wanted = [{**extensions, FEATURE_NAMES: FEATURES}, extensions] if more else [extensions]
    for tried in wanted:
        area = extension_area(tried)
        if start + len(area) + len(name) <= shape.cluster_size:
            break
    else:
        text = f"{shape.cluster_size} bytes have no room for the name of the parent or data file"
        raise _refused(new, "cluster_size", text)
    head = _HEADER.pack(
        MAGIC,
        shape.version,
        start + len(area) if name else 0,
        len(name),
        shape.cluster_size.bit_length() - 1,
        shape.size,
        qcow2_crypt.LUKS if shape.encrypted else 0,
        shape.l1_size,
        l1_offset,
        refcount_at * shape.cluster_size,
        refcount_clusters,
        0,
        0,
    )
    return head + more + area + name


def _clusters(length: int, size: int) -> int:
    return -(-length // size)


def _refcount_clusters(new: New, shape: Shape, used: int) -> tuple[int, int]:
    """Clusters of the refcount table and blocks that count `used` clusters and themselves."""
    size = shape.cluster_size
    per_block = size * 8 >> shape.order
    table, blocks = 1, 1
    while True:
        needed = _clusters(used + table + blocks, per_block)
        wider = _clusters(needed * 8, size)
        if needed <= blocks and wider <= table:
            break
        table, blocks = max(table, wider), max(blocks, needed)
    if table * size > MAX_REFCOUNT_TABLE:
        text = f"{shape.size} bytes in clusters of {size}: larger ones are needed"
        raise Unsupported(new.name, "size", text)
    return table, blocks


def _refcounts(shape: Shape, at: int, table: int, blocks: int, counts: array[int]) -> list[Write]:
    """A refcount table at cluster `at`, its blocks behind it."""
    size = shape.cluster_size
    first = (at + table) * size
    entries = array("Q", range(first, first + blocks * size, size))
    return [
        Write(at * size, table_bytes(entries)),
        Write(first, packed_counts(counts, shape.order)),
    ]


def packed_counts(counts: array[int], order: int) -> bytes:
    """Counts as blocks hold them: big-endian, or several in a byte, the first one lowest."""
    if order >= 3:
        wide = counts if counts.itemsize == 1 << order >> 3 else array("BHIQ"[order - 3], counts)
        if sys.byteorder == "little" and order > 3:
            wide = wide[:]
            wide.byteswap()
        return wide.tobytes()
    per_byte, width = 8 >> order, 1 << order
    counts = counts + array(counts.typecode, bytes(-len(counts) % per_byte * counts.itemsize))
    result = bytearray(len(counts) // per_byte)
    for i in range(per_byte):
        shift = i * width
        for at, count in enumerate(counts[i::per_byte]):
            result[at] |= count << shift
    return bytes(result)


# Compressed images


class QCOW2Packer(Packer):
    """Compressed clusters one behind the other, at any byte; tables wherever they are done."""

    def __init__(self, new: New) -> None:
        shape = self._shape = read_options(new)
        if shape.data_file:
            raise _refused(new, "data_file", "compressed data lies in the image")
        if shape.preallocated:
            raise _refused(new, "preallocation", "a compressed image is written but once")
        if shape.encrypted:
            raise _refused(new, "encryption", "compressed clusters are never encrypted")
        self._new = new
        self.cluster_size = shape.cluster_size
        self._entries = shape.entries
        self._zstd: Compressor | None = None
        if COMPRESSIONS[shape.compression] == "zstd":
            try:
                self._zstd = Compressor()
            except OSError as error:
                raise Unsupported(
                    new.name, "compression_type", f"zstd: {error}", hint="apt install libzstd1"
                ) from error
        self._l1 = array("Q", bytes(shape.l1_size * 8))
        self._most = (1 << (1 << shape.order)) - 1
        # Header and L1 first; counts follow when all is known.
        self._end = 1 + _clusters(len(self._l1) * 8, shape.cluster_size)  # in clusters
        self._counts = array("BBBBHIQ"[shape.order], [1]) * self._end
        self._cursor = 0  # where compressed data goes on; 0: nowhere
        self._table = -1  # number of the L2 table that is being filled
        self._words = array("Q")

    def encode(self, data: bytes) -> bytes | None:
        if self._zstd:
            packed = self._zstd.compress(data)
        else:
            press = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, WINDOW, MEMORY)
            packed = press.compress(data) + press.flush()
        return packed if len(packed) < self.cluster_size else None

    def add(self, cluster: int, data: bytes, packed: bool) -> Plan:
        steps: list[Step] = []
        table, within = divmod(cluster, self._entries.per_table)
        if table != self._table:
            steps += self._finish_table()
            self._table = table
            self._words = array("Q", bytes(self.cluster_size))
        at = self._place(len(data)) if packed else self._whole(1)
        if packed:
            words = self._entries.packed(at, len(data))
            for host in self._entries.named(words[0]):
                self._counts[host] += 1
        else:
            words = self._entries.mapped(at)
            self._counts[at // self.cluster_size] = 1
        width = self._entries.words
        self._words[within * width : (within + 1) * width] = array("Q", words)
        return Plan(*steps, Write(at, data))

    def _whole(self, count: int) -> int:
        """The byte offset of so many new clusters, whose counts are still 0."""
        first = self._end
        if first + count > MAX_COUNTED:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self._end += count
        self._counts.extend([0] * count)
        return first * self.cluster_size

    def _place(self, length: int) -> int:
        """Where `length` bytes of compressed data go: behind the last if nothing is in the way."""
        size, at = self.cluster_size, self._cursor
        room = -at % size
        here = bool(room) and self._counts[at // size] < self._most
        if not here or (length > room and at + room != self._end * size):
            at = self._end * size
            room = 0
        if length > room:
            self._whole(_clusters(length - room, size))
        if at >= self._entries.most_packed:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self._cursor = at + length
        return at

    def _finish_table(self) -> list[Step]:
        if self._table < 0:
            return []
        at = self._whole(1)
        self._counts[at // self.cluster_size] = 1
        self._l1[self._table] = at | COPIED
        return [Write(at, table_bytes(self._words))]

    def end(self) -> Plan:
        steps = self._finish_table()
        size, shape = self.cluster_size, self._shape
        at = self._end
        table, blocks = _refcount_clusters(self._new, shape, at)
        self._counts.extend([1] * (table + blocks))
        steps.append(Extend((at + table + blocks) * size))
        steps += _refcounts(shape, at, table, blocks, self._counts)
        steps.append(Write(size, table_bytes(self._l1)))
        header = make_header(self._new, shape, size, at, table)
        return Plan(*steps, Barrier, Write(0, header), Barrier)
