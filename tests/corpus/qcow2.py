"""Hostile QCOW2 images.  Their parents are in chains.py."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from functools import partial

from tests.corpus import qcow2_features
from tests.corpus.bases import KIB, MIB, PACKED, ZEROED, Base
from tests.corpus.mutations import (
    ANY,
    OPENS,
    PART,
    Edit,
    Field,
    Mutation,
    Writes,
    grid,
    nothing,
    writing,
)

MAKERS = qcow2_features.MAKERS
COPIED, COMPRESSED = 1 << 63, 1 << 62
U32, U64 = 0xFFFFFFFF, (1 << 64) - 1
CLUSTER = 512
UNCOUNTED = "its reference count is 0"
OVERLAP = "two tables overlap"
NO_TABLE = "a table, not a cluster"
FIRST_TABLE, ALL = tuple(range(64)), tuple(range(192))

FIELDS = (
    Field("magic", 0, 4, r"header\+0", {}),
    Field("version", 4, 4, r"header\+4", {2: OPENS, 3: OPENS, 4: r"header\+4"}),
    # No parent, as the name has no length; but the extensions must end before it.
    Field(
        "backing_offset",
        8,
        8,
        r"header\+8",
        {0: OPENS, 111: r"header\+8", 112: OPENS, 113: OPENS, 120: OPENS, 513: r"header\+8"},
    ),
    Field("backing_length", 16, 4, OPENS, {1023: OPENS, 1024: OPENS}),
    Field(
        "cluster_bits",
        20,
        4,
        r"header\+20",
        {8: r"header\+20", 10: r"header\+40", 21: r"header\+40", 22: r"header\+20"},
    ),
    Field(
        "size", 24, 8, r"header\+36", {0: "0 bytes", 1: OPENS, 98303: OPENS, 98305: r"header\+36"}
    ),
    Field("crypt_method", 32, 4, r"header\+32", {0: OPENS, 1: "no passphrase", 2: "LUKS"}),
    Field(
        "l1_size",
        36,
        4,
        r"header\+36",
        {
            2: r"header\+36",
            4: OPENS,
            64: OPENS,
            65: (OPENS, OVERLAP),  # the second L1 cluster is an L2 table
            1 << 22: r"header\+40",
            (1 << 22) + 1: r"header\+36",
        },
    ),
    Field(
        "l1_offset",
        40,
        8,
        r"header\+40",
        {
            512: r"header\+40.*overlaps",
            1024: (OPENS, "byte"),  # refcounts as an L1 table
            2048: OPENS,  # an L2 table: guest data becomes a table, and is counted
            6656: (OPENS, "byte"),  # half of a cluster of compressed data
            7168: r"header\+40",
        },
    ),
    Field(
        "refcount_offset",
        48,
        8,
        r"header\+48",
        {
            1024: (OPENS, "byte"),  # a refcount block as the table of blocks
            1536: r"header\+40.*overlaps",
            2048: (OPENS, "byte"),
            6656: (OPENS, "byte"),
            7168: r"header\+48",
        },
    ),
    Field(
        "refcount_clusters",
        56,
        4,
        r"header\+56",
        {
            0: r"header\+56",
            1: OPENS,
            2: (OPENS, OVERLAP),  # the block lies in the table
            3: r"header\+40.*overlaps",
            16384: r"header\+48",
            16385: r"header\+56",
        },
    ),
    Field(
        "snapshots",
        60,
        4,
        r"header\+60",
        {
            0: OPENS,
            1: r"header\+64",
            65536: r"header\+64",
            65537: r"header\+60",
        },
    ),
    Field("snapshots_offset", 64, 8, OPENS, {}),
    Field(
        "incompatible",
        72,
        8,
        r"header\+72",
        {
            0: OPENS,
            1: (OPENS, r"header\+72.*not closed"),
            2: (OPENS, r"header\+72.*corrupt"),
            4: r"header\+72.*an external data file, without its name",
            8: r"header\+104",
            16: r"header\+20.*extended L2",
            32: r"header\+72.*bit 5",
        },
    ),
    Field("compatible", 80, 8, OPENS, {}),
    Field("autoclear", 88, 8, OPENS, {}),
    # Wrong counts do no harm to a reader, and tables with count 0 are not written to.
    Field(
        "refcount_order",
        96,
        4,
        r"header\+96",
        {
            0: (OPENS, UNCOUNTED),
            1: (OPENS, UNCOUNTED),
            2: (OPENS, UNCOUNTED),
            3: (OPENS, UNCOUNTED),
            4: OPENS,
            5: (OPENS, UNCOUNTED),
            6: (OPENS, UNCOUNTED),
            7: r"header\+96",
        },
    ),
    Field(
        "header_length",
        100,
        4,
        r"header\+100",
        {103: r"header\+100", 104: OPENS, 111: OPENS, 112: OPENS, 113: OPENS, 512: OPENS},
    ),
    Field("compression", 104, 1, r"header\+104", {0: OPENS, 2: r"header\+104"}),
)
SNAPSHOTS = (
    Field(
        "snapshots",
        60,
        4,
        r"header\+60",
        {
            0: OPENS,
            1: OPENS,
            2: OPENS,
            3: "byte 8848",
            65536: "byte 8848",
        },
    ),
    Field(
        "snapshots_offset",
        64,
        8,
        r"header\+64",
        {
            512: (OPENS, OVERLAP),
            1024: (OPENS, "byte 1024: snapshot's L1 table"),  # counts read as snapshots
            8704: OPENS,
        }
        | {
            offset: f"byte {offset}"
            for offset in (9216, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 512)
        },
    ),
)
OTHER_BYTES = {("version", 2), ("l1_offset", 1024), ("l1_offset", 2048), ("l1_offset", 6656)}


def put(offset: int, value: int, width: int = 8) -> Edit:
    return lambda base: [(offset, value.to_bytes(width, "big"))]


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def l1(index: int, value: int) -> Edit:
    return lambda base: [(base.at["l1"] + 8 * index, u64(value))]


def put_at(name: str, offset: int, data: bytes) -> Edit:
    return lambda base: [(base.at[name] + offset, data)]


def l2(cluster: int, value: int | str, copied: bool = True) -> Edit:
    """The entry of a guest cluster; a word names the table that it leads to."""

    def edit(base: Base) -> Writes:
        table, index = divmod(cluster, base.cluster // 8)
        at = base.at[f"l2.{table}"] + 8 * index
        if isinstance(value, int):
            return [(at, u64(value))]
        return [(at, u64(base.at[value] | (COPIED if copied else 0)))]

    return edit


def mutations() -> Iterator[Mutation]:
    for prefix, fields in (("qcow2", FIELDS), ("qcow2-snapshots", SNAPSHOTS)):
        for field, value, read, write in grid(fields):
            yield Mutation(
                f"{prefix}: {field.name}={value:#x}",
                prefix,
                put(field.offset, value, field.width),
                read,
                write,
                # The 65th entry is one of an L2 table, so its data lies where no data may lie.
                eio=(0,) if (field.name, value) == ("l1_size", 65) else (),
                guest=(field.name, value) not in OTHER_BYTES,
                loose=(field.name, value) == ("l1_offset", 2048),
            )
    yield from headers()
    yield from first_tables()
    yield from second_tables()
    yield from counts()
    yield from streams()
    yield from files()
    yield from large()
    yield from qcow2_features.mutations()


def headers() -> Iterator[Mutation]:
    def extension(kind: int, length: int, data: bytes = b"") -> Edit:
        return lambda base: [(112, struct.pack(">II", kind, length) + data)]

    for length, read in (
        (0, OPENS),
        (U32, r"header\+116"),
        (U32 - 7, r"header\+116"),
        (393, r"header\+116"),
        (392, OPENS),
    ):
        yield Mutation(
            f"qcow2: an extension of {length} bytes", "qcow2", extension(99, length), read
        )
    name = struct.pack(">BB46s", 0, 7, b"\x1b[2J\x07evil\r\n")
    yield Mutation(
        "qcow2: a feature named to harm terminals",
        "qcow2",
        lambda base: [(72, u64(1 << 7)), *extension(0x6803F857, 48, name + bytes(8))(base)],
        r"header\+72.*evil",
    )
    yield Mutation(
        "qcow2: compression type 2",
        "qcow2",
        lambda base: [(72, u64(8)), (104, b"\2")],
        r"header\+104.*type 2",
    )
    yield Mutation(
        "qcow2: zlib data, called zstd",
        "qcow2",
        lambda base: [(72, u64(8)), (104, b"\1")],
        eio=PACKED,
    )
    yield Mutation(
        "qcow2: zstd data, called zlib",
        "qcow2-zstd",
        lambda base: [(72, u64(0)), (104, b"\0")],
        eio=PACKED,
    )
    for length in (0, 1025, 1 << 31, U32):
        yield Mutation(
            f"qcow2-snapshots: {length} extra bytes",
            "qcow2-snapshots",
            put_at("snapshots", 36, struct.pack(">I", length)),
            "byte 8740.*extra" if length else "byte 8788.*extra",  # then the second one is amiss
        )
    yield Mutation(
        "qcow2-snapshots: names of 64 KiB",
        "qcow2-snapshots",
        lambda base: [(base.at["snapshots"] + 12, b"\xff" * 4)],
        "byte",
    )


def first_tables() -> Iterator[Mutation]:
    """Entries of L1."""
    past = 7168
    for name, index, value, write, eio in (
        ("nothing, but COPIED", 2, COPIED, OPENS, ()),
        ("reserved bits only", 2, 0x7F000000000001FF, OPENS, ()),
        ("the past", 2, past | COPIED, NO_TABLE, range(128, 192)),
        ("the end of numbers", 2, U64, NO_TABLE, range(128, 192)),
        ("2^55", 2, 1 << 55, NO_TABLE, range(128, 192)),
        ("the cut cluster at the end", 2, 6656 | COPIED, "ends inside an L2 table", None),
        ("L1", 2, 1536 | COPIED, OVERLAP, None),
        ("refcount table", 2, 512 | COPIED, OVERLAP, None),
        ("refcount block", 2, 1024 | COPIED, OVERLAP, None),
        ("the same L2 table", 2, 2048 | COPIED, OVERLAP, None),
        ("guest data", 2, 2560 | COPIED, OPENS, None),
    ):
        yield Mutation(
            f"qcow2: L1[{index}] leads to {name}",
            "qcow2",
            l1(index, value),
            OPENS,
            write,
            eio=tuple(eio or ()),
            guest=eio is not None,
            loose=name == "guest data",
        )
    yield Mutation("qcow2: L1[0] leads to nothing", "qcow2", l1(0, 0), guest=False)
    yield Mutation(
        "qcow2: L1[0] leads to itself", "qcow2", l1(0, 1536 | COPIED), OPENS, OVERLAP, guest=False
    )
    yield Mutation("qcow2: L1[0] not COPIED", "qcow2", l1(0, 2048), OPENS)
    yield Mutation(
        "qcow2: L1[0] unaligned",
        "qcow2-bomb",
        lambda base: [(base.at["l1"], u64((base.at["l2.0"] + 512) | COPIED))],
        OPENS,
        NO_TABLE,
        eio=(0, 1, 2, 3),
    )


def second_tables() -> Iterator[Mutation]:
    """Entries of L2: guest cluster 5 leads where it must not."""
    for name, value in (
        ("the refcount table", "refcounts"),
        ("the refcount block", "block"),
        ("L1", "l1"),
        ("its own table", "l2.0"),
        ("another L2 table", "l2.1"),
        ("2^55", 1 << 55 | COPIED),
        ("the end of numbers", 0x00FFFFFFFFFFFE00 | COPIED),
    ):
        yield Mutation(f"qcow2: data in {name}", "qcow2", l2(5, value), eio=(5,))
        if isinstance(value, str):
            yield Mutation(
                f"qcow2: shared data in {name}",
                "qcow2",
                l2(5, value, copied=False),
                eio=(5,),
            )
    # A new cluster will lie there, and then has two owners: counts are believed, not recounted.
    yield Mutation(
        "qcow2: data just past the end", "qcow2", l2(5, 7168 | COPIED), eio=(5,), loose=True
    )
    yield Mutation(
        "qcow2: data in the snapshot table",
        "qcow2-snapshots",
        l2(5, "snapshots"),
        eio=(5,),
    )
    for name, value in (
        ("the header", COPIED),
        ("the header, shared", 0),
        ("reserved bits", 0x3F000000000001FE),
    ):
        # Offset 0 means that there is nothing.
        yield Mutation(f"qcow2: data in {name}", "qcow2", l2(5, value), guest=False)
    yield Mutation(
        "qcow2: reserved bits of data",
        "qcow2",
        lambda base: l2(5, base.number(2048 + 40, 8) | 0x3F000000000001FE)(base),
    )
    yield Mutation(
        "qcow2: data in the cut cluster", "qcow2", l2(5, 6656 | COPIED), guest=False, loose=True
    )
    yield Mutation(
        "qcow2: two owners",
        "qcow2",
        lambda base: l2(5, base.number(2048, 8))(base),
        guest=False,
        loose=True,
    )
    yield Mutation(
        "qcow2: every cluster has the same place",
        "qcow2",
        lambda base: [(2048, u64(base.number(2048, 8)) * 64)],
        guest=False,
        loose=True,
    )
    yield Mutation("qcow2: zero and allocated past the end", "qcow2", l2(ZEROED[0], 1 | 1 << 55))
    yield Mutation("qcow2: zero and allocated in L1", "qcow2", l2(ZEROED[0], 1 | 1536 | COPIED))
    yield Mutation("qcow2: zero in version 2", "qcow2-v2", l2(20, 1), eio=(20,))
    # Compressed: bit 61 counts one more sector.
    for name, value, eio in (
        ("in the header", 0, True),
        ("in L1", 1536, True),
        ("in its own table", 2048 + 40, True),
        ("in the refcount block", 1024 | 1 << 61, True),
        ("past the end", 1 << 40, True),
        ("at the end of numbers", (1 << 61) - 1, True),
        ("across the end", 6671, True),
        ("and all bits set", COMPRESSED - 1, True),
        ("and COPIED", COPIED | 1536, True),
    ):
        yield Mutation(
            f"qcow2: compressed {name}", "qcow2", l2(5, COMPRESSED | value), eio=(5,) if eio else ()
        )
    yield Mutation(
        "qcow2: a whole table of compressed clusters",
        "qcow2",
        lambda base: [(2048, u64(base.number(2048 + PACKED[0] * 8, 8)) * 64)],
        guest=False,
        loose=True,
    )
    # 2 MiB clusters: half of one is another's, and tables lie beside.

    def before(place: str, base: Base) -> Writes:
        return l2(1, (base.at[place] // 512 * 512 - 512) | COPIED)(base)

    for name, place in (("data", "packed"), ("L1", "l1"), ("its own table", "l2.0")):
        yield Mutation(
            f"qcow2: large cluster that ends in {name}",
            "qcow2-bomb",
            partial(before, place),
            eio=() if name == "data" else (1,),
            guest=name != "data",
            loose=True,
        )


def counts() -> Iterator[Mutation]:
    """Reference counts: nothing to a reader."""
    for base_name in ("qcow2", "qcow2-bits1", "qcow2-bits64"):
        yield Mutation(
            f"{base_name}: all counts 0",
            base_name,
            lambda base: [(1024, bytes(512))],
            OPENS,
            UNCOUNTED,
        )
        yield Mutation(
            f"{base_name}: all counts at their most",
            base_name,
            lambda base: [(1024, b"\xff" * 512)],
            OPENS,
        )
    for name, at in (("header", 0), ("refcount table", 512), ("L1", 1536), ("first L2", 2048)):
        yield Mutation(
            f"qcow2: the {name} is not counted",
            "qcow2",
            writing((1024 + at // 512 * 2, b"\0\0")),
            OPENS,
            UNCOUNTED,
        )
    # Found when the block would be handed out.
    yield Mutation(
        "qcow2: the refcount block is not counted",
        "qcow2",
        lambda base: [(1024 + 2 * 2, b"\0\0")],
    )
    yield Mutation(
        "qcow2: no data is counted",
        "qcow2",
        lambda base: [(1024 + 2 * 5, bytes(8)), (1024 + 20, bytes(2 * 4))],
        loose=True,
    )
    for name, value, write in (
        ("nothing", 0, UNCOUNTED),
        ("itself", 512, OVERLAP),
        ("L1", 1536, OVERLAP),
        ("an L2 table", 2048, OVERLAP),
        ("the header", 511, UNCOUNTED),
        ("the past", 7168, NO_TABLE),
        ("2^62", 1 << 62, NO_TABLE),
        ("2^63", 1 << 63, NO_TABLE),
        ("the end of numbers", U64, NO_TABLE),
    ):
        yield Mutation(
            f"qcow2: refcount table leads to {name}",
            "qcow2",
            writing((512, u64(value))),
            OPENS,
            write,
        )
    for index in (1, 2, 63):
        yield Mutation(
            f"qcow2: one block twice, also as block {index}",
            "qcow2",
            writing((512 + 8 * index, u64(1024))),
            OPENS,
            OVERLAP,
        )
    block = 6 * KIB + 512  # a free cluster, once the file is longer

    def far(cluster_bits: int, index: int) -> Edit:
        return lambda base: [(512 + 8 * index, u64(block)), (block, bytes(510) + b"\0\1")]

    yield Mutation(
        "qcow2-bits1: a cluster past the end is counted",
        "qcow2-bits1",
        far(9, 1),
        OPENS,
        OPENS,
        loose=True,
    )
    yield Mutation(
        "qcow2-bits1: a cluster far past the end is counted",
        "qcow2-bits1",
        far(9, 63),
        OPENS,
        OPENS,
        loose=True,
    )


def streams() -> Iterator[Mutation]:
    """Compressed data that does not inflate, or does so for ever."""
    at = {"qcow2": 10, "qcow2-zstd": 10}
    for base_name in at:
        for name, data in (
            ("zeros", bytes(16)),
            ("ones", b"\xff" * 16),
            ("text", b"not what you want"[:16]),
            ("the reserved block type", b"\x07" + bytes(15)),
            ("a far distance", b"\x4b\x04\xff\xff\xff\xff\xff\xff" * 2),
        ):
            yield Mutation(
                f"{base_name}: compressed data is {name}",
                base_name,
                put_at("packed", 0, data),
                eio=PACKED if base_name == "qcow2" else (10,),  # zlib's two lie together
                loose=True,
            )
    for name, data in (
        ("too short by a byte", deflated(bytes(2 * MIB - 1))),
        ("empty", deflated(b"")),
        ("stored, and cut", b"\x01\xff\xff\x00\x00" + bytes(100)),
        ("empty blocks without end", b"\x00\x00\x00\xff\xff" * (512 * KIB)),
    ):
        yield Mutation(f"qcow2-bomb: {name}", "qcow2-bomb", stream(data), eio=(0,))

    def endless(base: Base) -> Writes:
        packer = zlib.compressobj(9, zlib.DEFLATED, -12)
        piece = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
        return stream(piece * 3000)(base)

    # Zeros are what a bomb is made of; the cluster takes as many as it has room for.
    yield Mutation("qcow2-bomb: gigabytes of zeros", "qcow2-bomb", endless, guest=False)
    yield from zstd_streams()


def stream(data: bytes, *writes: tuple[int, bytes]) -> Edit:
    """As the data of guest cluster 0, with as many sectors as it needs, and counted."""

    def edit(base: Base) -> Writes:
        place = base.at["packed"] + MIB
        first, last = place // base.cluster, (place + len(data) + 512) // base.cluster
        return [
            *writes,
            (place, data),
            # The other compressed cluster lies in the first one as well.
            (base.at["block"] + 2 * first, b"\0\2" + b"\0\1" * (last - first)),
            *l2(0, COMPRESSED | (len(data) + 1023) // 512 << 49 | place)(base),
        ]

    return edit


def zstd_streams() -> Iterator[Mutation]:
    magic = struct.pack("<I", 0xFD2FB528)
    rle = (1 << 17) << 3 | 1 << 1  # a block of 128 KiB times one byte

    def frame(descriptor: int, rest: bytes, blocks: bytes) -> bytes:
        return magic + bytes([descriptor]) + rest + blocks

    zeros = rle.to_bytes(3, "little") + b"\0"
    last = (rle | 1).to_bytes(3, "little") + b"\0"

    def window(log: int) -> bytes:
        return bytes([(log - 10) << 3])

    skippable = struct.pack("<II", 0x184D2A50, 0)

    for name, data, fails in (
        ("16 blocks", frame(0, window(17), zeros * 15 + last), False),
        ("gigabytes of zeros", frame(0, window(17), zeros * (900 * KIB)), True),
        ("a window of 128 MiB", frame(0, window(27), zeros * 15 + last), False),
        ("a window of 2 GiB", frame(0, window(31), zeros * 15 + last), True),
        ("a window of 2^41", frame(0, b"\xff", zeros * 15 + last), True),
        ("2^64 bytes in one segment", frame(0xE0, b"\xff" * 8, zeros * 16), True),
        ("2^63 bytes, said first", frame(0xC0, window(17) + u64(128)[::-1], zeros * 16), True),
        ("a dictionary", frame(3, window(17) + b"\1\2\3\4", zeros * 15 + last), True),
        ("frames that are skipped", skippable * (400 * KIB // PART), True),
        ("one that skips 4 GiB", struct.pack("<II", 0x184D2A5F, U32) + bytes(64), True),
        ("empty frames", frame(0x20, b"\0", b"\1\0\0") * (300 * KIB // PART), True),
    ):
        yield Mutation(
            f"qcow2-bomb: zstd: {name}",
            "qcow2-bomb",
            stream(data, (72, u64(8)), (104, b"\1")),
            # The other compressed cluster is zlib's.
            eio=(0, 2) if fails else (2,),
            guest=fails,
        )


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def files() -> Iterator[Mutation]:
    """Cut short, lengthened."""
    for size, read in (
        (0, r"header\+0"),
        (3, r"header\+0"),
        (7, r"header\+4"),
        (23, r"header\+20"),
        (71, r"header\+100"),
        (103, r"header\+100"),
        (112, r"header\+40"),
        (511, r"header\+40"),
        (512, r"header\+40"),
        (1024, r"header\+40"),
        (1536, r"header\+40"),
    ):
        yield Mutation(f"qcow2: cut at {size}", "qcow2", nothing, read, size=size)
    for size, write in (
        (1537, OPENS),  # one byte of L1: all its entries are 0
        (2048, NO_TABLE),
        (2049, "ends inside an L2 table"),
        (2560, NO_TABLE),
        (4608, NO_TABLE),
        (5120, "a cluster at 6656, the file ends at 5120"),
        (6144, "a cluster at 6656, the file ends at 6144"),
        (6656, "a cluster at 6656, the file ends at 6656"),
    ):
        yield Mutation(
            f"qcow2: cut at {size}",
            "qcow2",
            nothing,
            OPENS,
            write,
            guest=False,
            size=size,
        )
    yield Mutation("qcow2: 8 TiB of file", "qcow2", nothing, size=1 << 43)


def large() -> Iterator[Mutation]:
    """Few bytes that could ask for much time or memory."""
    entries = (4 << 20) // PART  # of the longest L1 table

    def long_l1(step: int) -> Edit:
        def edit(base: Base) -> Writes:
            table = b"".join(
                struct.pack(">Q", (at * step + 8 * MIB * 8) | COPIED) for at in range(1024)
            )
            return [
                *put(36, entries, 4)(base),
                *put(40, 64 * KIB)(base),
                (64 * KIB, table * (entries // 1024)),
            ]

        return edit

    yield Mutation(
        "qcow2: long L1, sparse",
        "qcow2",
        lambda base: [*put(36, entries, 4)(base), *put(40, 64 * KIB)(base)],
        OPENS,
        UNCOUNTED,
        guest=False,
        size=33 * MIB,
    )
    yield Mutation(
        "qcow2: long L1, full of one table",
        "qcow2",
        lambda base: [
            *put(36, entries, 4)(base),
            *put(40, 64 * KIB)(base),
            (64 * KIB, u64(2048 | COPIED) * entries),
        ],
        OPENS,
        OVERLAP,
        guest=False,
    )
    yield Mutation(
        "qcow2: long L1, full of tables past the end",
        "qcow2",
        long_l1(512),
        OPENS,
        ANY,
        guest=False,
    )

    def distinct(base: Base) -> Writes:
        """4 Mi tables in a sparse file of some GiB."""
        low = 64 * MIB
        table = struct.pack(f">{entries}Q", *(low + 512 * i | COPIED for i in range(entries)))
        return [*put(36, entries, 4)(base), *put(40, 64 * KIB)(base), (64 * KIB, table)]

    yield Mutation(
        "qcow2: long L1, as many tables",
        "qcow2",
        distinct,
        OPENS,
        ANY,
        guest=False,
        size=64 * MIB + 512 * entries,
    )
    blocks = (1 << 20) // PART  # entries of the longest refcount table

    def far_blocks(base: Base) -> Writes:
        low = 64 * MIB
        table = struct.pack(f">{blocks - 1}Q", *(low + 512 * i for i in range(blocks - 1)))
        return [
            *put(48, 64 * KIB)(base),
            *put(56, 16384 // PART, 4)(base),
            (64 * KIB, u64(1024) + table),
        ]

    yield Mutation(
        "qcow2: many empty refcount blocks",
        "qcow2",
        far_blocks,
        OPENS,
        "refcount table: more than 131072 empty blocks",
        size=64 * MIB + 512 * blocks,
    )
    yield Mutation(
        "qcow2: 65536 snapshots with long names",
        "qcow2",
        lambda base: [
            *put(60, 65536, 4)(base),
            *put(64, 64 * KIB)(base),
            *((64 * KIB + i * 131112 + 12, b"\xff\xff\xff\xff") for i in range(600)),
        ],
        r"header\+60: .* the most is 67108864",
        size=64 * KIB + 65536 * 131112 + 4096,
    )
    yield Mutation(
        "qcow2-bomb: many extensions",
        "qcow2-bomb",
        lambda base: [(112, struct.pack(">II", 0x12345678, 0) * (262000 // PART // PART))],
    )

    def huge(size: int) -> Edit:
        """So large a disk that pointers to all of it take long, and a table for it."""
        return lambda base: [
            *put(24, size)(base),
            *put(36, 4 << 20, 4)(base),
            *put(40, 64 * MIB)(base),
            (64 * MIB, u64(base.at["l2.0"] | COPIED)),
            (base.at["block"] + 2 * 32, b"\0\1" * 16),
        ]

    for size, read in (
        (1 << 58, OPENS),
        ((1 << 58) + 1, "bytes, mapped in pieces"),
        ((1 << 61), "bytes, mapped in pieces"),
        ((1 << 61) + 512, r"header\+36"),
    ):
        yield Mutation(
            f"qcow2-bomb: a disk of {size} bytes",
            "qcow2-bomb",
            huge(size),
            read,
            guest=False,
            size=96 * MIB,
        )
