"""Hostile cloop images."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from tests.corpus.bases import KIB, MIB, Base, Maker
from tests.corpus.mutations import ANY, OPENS, Edit, Field, Mutation, grid, nothing
from tests.formats.make_packed import make_cloop

BLOCK, ODD, BLOCKS = 64 * KIB, 100 * 512, 10
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
ONLY_READ = "only read"


def content(block: int) -> bytes:
    random_ = random.Random(block)
    return b"".join(
        random_.randbytes(1000 + i) + bytes([i]) * (block - 1000 - i) for i in range(BLOCKS)
    )


def _locate(base: Base) -> None:
    base.at = {"table": 136, "data": base.number(136, 8), "first": base.number(136, 8)}
    base.metadata = [(0, 136), (136, 8 * (BLOCKS + 1)), (base.at["data"], 64)]


def _maker(block: int) -> Maker:
    def make(path: Path) -> None:
        make_cloop(path, content(block), block)

    return Maker("cloop", make, block if block == BLOCK else 64 * KIB, _locate, big=True)


MAKERS = {"cloop": _maker(BLOCK), "cloop-odd": _maker(ODD)}

FIELDS = (
    Field(
        "block_size",
        128,
        4,
        r"header\+128",
        # Each block then holds more than it should, or less.
        {512: OPENS, BLOCK: OPENS, 2 * BLOCK: OPENS, 8 * MIB: OPENS, 8 * MIB + 512: r"header\+128"},
    ),
    Field(
        "blocks",
        132,
        4,
        r"header\+132",
        # The offsets then lie in the data, or data in the offsets.
        {1: OPENS, BLOCKS - 1: OPENS, BLOCKS: OPENS, BLOCKS + 1: OPENS, 100: OPENS},
    ),
)
OFFSETS = (0, 1, 136, 1 << 31, U32, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, U64)


def offset(index: int, value: int) -> Edit:
    return lambda base: [(136 + 8 * index, struct.pack(">Q", value))]


def mutations() -> Iterator[Mutation]:
    for field, value, read, _ in grid(FIELDS):
        same = (field.name, value) in (("block_size", BLOCK), ("blocks", BLOCKS))
        yield Mutation(
            f"cloop: {field.name}={value:#x}",
            "cloop",
            lambda base, field=field, value=value: [  # type: ignore[misc]
                (field.offset, value.to_bytes(field.width, "big"))
            ],
            read,
            ONLY_READ,
            guest=same,
        )
    for value in OFFSETS:
        yield Mutation(
            f"cloop: offset 5 is {value:#x}",
            "cloop",
            offset(5, value),
            OPENS,
            ONLY_READ,
            eio=(4, 5),
        )
    # A block of 100 sectors reaches into two clusters.
    yield Mutation(
        "cloop-odd: offset 0 past the end", "cloop-odd", offset(0, U64), OPENS, ONLY_READ, eio=(0,)
    )
    yield Mutation(
        "cloop-odd: offset 2 past the end",
        "cloop-odd",
        offset(2, U64),
        OPENS,
        ONLY_READ,
        eio=(0, 1, 2),
    )
    yield from packed()
    yield from files()


def packed() -> Iterator[Mutation]:
    """What the data itself can do.  Block 8 has more behind it then, which is no harm."""

    def last(data: bytes) -> Edit:
        """The last block is this one."""
        return lambda base: [
            (base.size, data),
            (136 + 8 * (BLOCKS - 1), struct.pack(">QQ", base.size, base.size + len(data))),
        ]

    whole = content(BLOCK)[-BLOCK:]
    for name, data in (
        ("no zlib", b"evil" * 100),
        ("deflate without a header", zlib.compress(whole)[2:-4]),
        ("cut short", zlib.compress(whole)[:-100]),
        ("without its checksum", zlib.compress(whole)[:-4]),
        ("a wrong checksum", zlib.compress(whole)[:-4] + b"evil"),
        ("a byte too few", zlib.compress(whole[:-1])),
        ("a byte too many", zlib.compress(whole + b"x")),
        ("a bomb of 64 MiB", zlib.compress(bytes(64 * MIB), 9)),
        ("empty", zlib.compress(b"")),
        ("a dictionary that nobody has", b"\x78\xbb\0\0\0\1" + zlib.compress(whole)[2:]),
        ("longer than any could be", zlib.compress(whole) + bytes(3 * BLOCK)),
    ):
        yield Mutation(f"cloop: block 9 is {name}", "cloop", last(data), OPENS, ONLY_READ, eio=(9,))
    yield Mutation(
        "cloop: all blocks are one",
        "cloop",
        lambda base: [
            (136 + 8 * i, struct.pack(">Q", base.size - 10 if i % 2 else 0)) for i in range(11)
        ],
        OPENS,
        ONLY_READ,
        eio=tuple(range(BLOCKS)),
    )
    yield Mutation(
        "cloop: offsets in reverse",
        "cloop",
        lambda base: [
            (136, b"".join(base.content[136 + 8 * i :][:8] for i in reversed(range(11))))
        ],
        OPENS,
        ONLY_READ,
        eio=tuple(range(BLOCKS)),
    )


def files() -> Iterator[Mutation]:
    """Cut short, lengthened."""
    for size, read in (
        (0, r"header\+0"),
        (1, r"header\+0"),
        (22, r"header\+128"),
        (128, r"header\+128"),
        (132, r"header\+132"),
        (136, r"header\+132"),
        (136 + 8 * BLOCKS, r"header\+132"),
    ):
        yield Mutation(f"cloop: cut at {size}", "cloop", nothing, read, ANY, size=size)
    yield Mutation(
        "cloop: cut behind the offsets",
        "cloop",
        nothing,
        OPENS,
        ONLY_READ,
        eio=tuple(range(BLOCKS)),
        size=136 + 8 * (BLOCKS + 1),
    )
    yield Mutation("cloop: 8 TiB of file", "cloop", nothing, OPENS, ONLY_READ, size=1 << 43)
    for blocks, read in ((1 << 30, OPENS), (U32, "the most is")):
        yield Mutation(
            f"cloop: {blocks} blocks of 8 MiB, sparse",
            "cloop",
            lambda base, blocks=blocks: [(128, struct.pack(">II", 8 * MIB, blocks))],  # type: ignore[misc]
            read,
            ONLY_READ,
            guest=False,
            size=1 << 36,
        )
    yield Mutation(
        "cloop: another version",
        "cloop",
        lambda base: [(10, b"#V4.0 Format")],
        r"header\+0: no script of cloop version 2\.0",
        ANY,
    )
    yield Mutation(
        "cloop: VDI as well",
        "cloop",
        lambda base: [(64, struct.pack("<I", 0xBEDA107F))],
        "looks like vdi and cloop",
        ANY,
        format=None,
    )
