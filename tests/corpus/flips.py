"""Random changes to the metadata of the base images, from a seed."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping

from tests.corpus.bases import Base, Maker, makers
from tests.corpus.mutations import Case
from tests.corpus.vhdx import HEADERS, LENGTHS, TABLES, sealed

FORMATS = tuple(dict.fromkeys(maker.format for maker in makers().values()))
POWERS = [1 << bit for bit in range(64)]
ODD = [0, 1, 2, 7, 511, 512, 513, 4095, 4096, *POWERS, *(power - 1 for power in POWERS)]


def case(name: str, loaded: Mapping[str, Base]) -> Case:
    """`name` is format:seed."""
    format, _, _ = name.partition(":")
    rng = random.Random(name)
    base = loaded[rng.choice([n for n, maker in makers().items() if maker.format == format])]
    maker = makers()[base.name]
    image = {at: bytearray(data) for at, data in base.pieces}
    size = base.size
    for _ in range(rng.choice((1, 1, 2, 3, 5, 12))):
        start, length = rng.choice(base.metadata)
        if rng.random() < 0.5:
            start, length = base.metadata[0][0], min(base.metadata[0][1], 120)
        _change(rng, base, image, start + rng.randrange(length))
    seal = sealer(maker)
    if seal and rng.random() < 0.9:
        seal(image)
    if rng.random() < 0.05:
        size = rng.randrange(size)
    return Case(
        name=name,
        format=format if rng.random() < 0.8 else None,
        file_name=maker.file_name,
        step=base.cluster,
        guest=None,
        loose=True,
        pieces=[(at, bytes(data)[: max(0, size - at)]) for at, data in image.items()],
        size=size,
        beside=maker.beside,
    )


def _change(rng: random.Random, base: Base, image: dict[int, bytearray], at: int) -> None:
    width = rng.choice((1, 1, 2, 4, 8, 8))
    kind = rng.randrange(5)
    old = int.from_bytes(_get(image, at, width), "little")
    if kind == 0:
        new = _get(image, at, width)
        new[rng.randrange(width)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        new = bytearray(rng.randbytes(width))
    else:
        at -= at % width
        order = "big" if base.big else "little"
        if kind == 2:
            value = rng.choice(ODD)
        elif kind == 3:
            value = old + rng.choice((-1, 1, -512, 512))
        else:  # another place, or what another field says
            value = rng.choice([*base.at.values(), base.size, base.cluster, len(base.guest)])
            value |= rng.choice((0, 0, 6, 1 << 63, 1 << 62))
        new = bytearray((value & (1 << 8 * width) - 1).to_bytes(width, order))  # type: ignore[arg-type]
    for i, byte in enumerate(new):
        part = image.setdefault((at + i) // 65536 * 65536, bytearray())
        within = (at + i) % 65536
        part.extend(bytes(max(0, within + 1 - len(part))))
        part[within] = byte


def _get(image: Mapping[int, bytearray], at: int, length: int) -> bytearray:
    part = image.get(at // 65536 * 65536, bytearray())
    within = at % 65536
    return bytearray(part[within : within + length].ljust(length, b"\0"))


def sealer(maker: Maker) -> Callable[[dict[int, bytearray]], None] | None:
    """What makes the checksums of such an image right, where it has any."""
    return seal_vhdx if maker.format == "vhdx" else maker.seal


def seal_vhdx(image: dict[int, bytearray]) -> None:
    """Checksums that are right, so that more than they are looked at."""
    for at in (*HEADERS, *TABLES):
        if at in image:
            raw = bytes(image[at].ljust(65536, b"\0"))
            image[at][: LENGTHS[at]] = sealed(raw[: LENGTHS[at]])
    for part in image.values():
        if part[:4] == b"loge":
            length = struct.unpack_from("<I", part, 8)[0]
            if length <= len(part):
                part[:length] = sealed(bytes(part[:length]))
