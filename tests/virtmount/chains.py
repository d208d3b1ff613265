"""Random chains of toy images, with every kind in every layer."""

from __future__ import annotations

import random
from pathlib import Path

from tests.virtmount import toy
from tests.virtmount.toy import make_toy
from virtmount.image import Kind

KIB = 1 << 10


def make_image(
    path: Path, rng: random.Random, size: int, parents: list[Path], writable: bool, **options: int
) -> Path:
    """A toy with every kind in it, laid out in shuffled order.

    Some leaves have no table; where the toy is written it could not get one.
    """
    cluster = options["cluster"]
    count = -(-size // cluster)
    kinds: list[int] = [
        toy.ABSENT, toy.ABSENT, toy.ABSENT, toy.ZERO, toy.PARTIAL, toy.COMPRESSED, -1, -1, -2,
    ]  # fmt: skip
    table: dict[int, int | bytes] = {}
    for index in rng.sample(range(count), count):
        kind = rng.choice(kinds)
        table[index] = rng.randbytes(cluster) if kind < 0 else kind
    leaves = -(-count // options["per_leaf"])
    whole = {}
    for leaf in range(1, leaves):
        if rng.random() < 0.3 and not writable:
            whole[leaf] = rng.choice([int(Kind.ABSENT), int(Kind.ZERO)])
    header: dict[str, object] = dict(options)
    if parents:
        form = "raw" if parents[0].suffix == ".raw" else "toy"
        header |= {"parents": [str(p) for p in parents], "parent_format": form}
    return make_toy(path, size, table, whole=whole, **header)  # type: ignore[arg-type]


def make_chain(folder: Path, rng: random.Random, *, writable: bool = False) -> Path:
    """One to four images, of any cluster size, the parents shorter, equal or longer."""
    size = rng.choice([96, 200, 333]) * KIB + 512 * rng.randrange(8)
    parents: list[Path] = []
    if rng.random() < 0.5:
        raw = folder / "base.raw"
        raw.write_bytes(rng.randbytes(rng.choice([size, size // 2, size // 3, 2 * size])))
        parents = [raw]
    for depth in reversed(range(rng.choice([1, 2, 3]))):
        cluster = 512 << rng.randrange(6)
        of = size if depth == 0 else rng.choice([size, size // 1024 * 512, size + 5 * 512])
        parents = [
            make_image(
                folder / f"{depth}.toy",
                rng,
                of,
                parents,
                writable and depth == 0,
                cluster=cluster,
                grain=max(512, cluster >> rng.randrange(3)),
                per_leaf=1 << rng.randrange(1, 8),
            )
        ]
    return parents[0]
