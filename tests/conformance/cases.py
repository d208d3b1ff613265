"""The images that every driver and every engine is tested with.

A format joins with a line in CASES.  Images are made by qemu-img and filled by qemu-io in a
shuffled order, so that neighbouring guest clusters are not neighbours in the file: with an image
written from front to back a reader that runs past the end of a cluster is not noticed.
"""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class Layer:
    """One image file: what qemu-img create gets, and what is written into it."""

    format: str
    size: int
    cluster: int
    options: tuple[str, ...] = ()  # -o of qemu-img create
    zeroed: bool = False  # some clusters are made zero clusters
    compressed: bool = False  # some clusters are written compressed
    writes: int = 14
    snapshots: int = 0  # internal ones: made half-way, so that some clusters are shared


@dataclass(frozen=True)
class Case:
    """A chain, the image itself first.  `mapped`: qemu-img map knows where the data is."""

    name: str
    layers: tuple[Layer, ...]
    mapped: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def top(self) -> Layer:
        return self.layers[0]


def raw(size: int = 3 * MIB + 3 * 512) -> Layer:
    return Layer("raw", size, 64 * KIB)


def vdi(size: int = 7 * MIB + 512, *options: str) -> Layer:
    return Layer("vdi", size, MIB, options)


def vhdx(size: int, block: int, *options: str) -> Layer:
    return Layer("vhdx", size, block, (f"block_size={block}", *options))


def vhd(size: int, *options: str) -> Layer:
    return Layer("vpc", size, 2 * MIB, ("force_size=on", *options))


def qcow2(
    size: int, cluster: int, *options: str, zeroed: bool = False, compressed: bool = False
) -> Layer:
    return Layer("qcow2", size, cluster, (f"cluster_size={cluster}", *options), zeroed, compressed)


def vmdk(
    size: int, subformat: str = "monolithicSparse", *options: str, zeroed: bool = False
) -> Layer:
    return Layer("vmdk", size, 64 * KIB, (f"subformat={subformat}", *options), zeroed)


def qed(size: int, cluster: int, *options: str) -> Layer:
    return Layer("qed", size, cluster, (f"cluster_size={cluster}", *options), zeroed=True)


def qcow(size: int, cluster: int, *, compressed: bool = False) -> Layer:
    return Layer("qcow", size, cluster, compressed=compressed)


def parallels(size: int, cluster: int) -> Layer:
    return Layer("parallels", size, cluster, (f"cluster_size={cluster}",))


def one(name: str, *layers: Layer, mapped: bool = True) -> Case:
    return Case(name, layers, mapped)


ODD = 3 * MIB + 5 * 512  # ends inside a cluster of every size

CASES = (
    one("raw", raw()),
    one("vdi-dynamic", vdi()),
    one("vdi-static", vdi(3 * MIB + 512, "static=on")),
    one("vhd-dynamic", vhd(15 * MIB + 512)),
    one("vhd-fixed", vhd(3 * MIB + 512, "subformat=fixed")),
    one("vhdx-dynamic-1M", vhdx(7 * MIB + 512, MIB), mapped=False),
    one("vhdx-dynamic-8M", vhdx(19 * MIB, 8 * MIB), mapped=False),
    one("vhdx-fixed", vhdx(5 * MIB, MIB, "subformat=fixed"), mapped=False),
    one("vmdk-sparse", vmdk(ODD)),
    one("vmdk-zeroed", vmdk(ODD, "monolithicSparse", "zeroed_grain=on", zeroed=True)),
    one("vmdk-flat", vmdk(ODD, "monolithicFlat")),
    one("vmdk-split-sparse", vmdk(ODD, "twoGbMaxExtentSparse")),
    one("vmdk-split-flat", vmdk(ODD, "twoGbMaxExtentFlat")),
    one("vmdk-on-vmdk", vmdk(ODD), vmdk(ODD, "twoGbMaxExtentSparse")),
    one(
        "vmdk-zeroed-on-flat",
        vmdk(ODD, "monolithicSparse", "zeroed_grain=on", zeroed=True),
        vmdk(ODD, "monolithicFlat"),
    ),
    one("qcow2-v2", qcow2(ODD, 64 * KIB, "compat=0.10")),
    one("qcow2-v3", qcow2(ODD, 64 * KIB, zeroed=True)),
    one("qcow2-512", qcow2(MIB // 2 + 512, 512, zeroed=True)),
    one("qcow2-4k", qcow2(5 * MIB + 512, 4 * KIB, zeroed=True)),
    one("qcow2-2M", qcow2(11 * MIB + 512, 2 * MIB, zeroed=True)),
    one("qcow2-refcount-1", qcow2(ODD, 4 * KIB, "refcount_bits=1")),
    one("qcow2-refcount-64", qcow2(ODD, 4 * KIB, "refcount_bits=64")),
    one("qcow2-lazy", qcow2(ODD, 64 * KIB, "lazy_refcounts=on")),
    one("qcow2-preallocated", qcow2(ODD, 64 * KIB, "preallocation=metadata", zeroed=True)),
    one("qcow2-compressed", qcow2(ODD, 64 * KIB, compressed=True, zeroed=True)),
    one("qcow2-compressed-512", qcow2(MIB // 2, 512, compressed=True)),
    one("qcow2-compressed-2M", qcow2(11 * MIB + 512, 2 * MIB, compressed=True)),
    one("qcow2-extended", qcow2(ODD, 64 * KIB, "extended_l2=on", zeroed=True)),
    one(
        "qcow2-extended-on-raw",
        qcow2(ODD, 16 * KIB, "extended_l2=on", zeroed=True, compressed=True),
        raw(ODD),
    ),
    one("qcow2-data-file", qcow2(ODD, 64 * KIB, "data_file=data", zeroed=True)),
    one("qcow2-data-file-raw", qcow2(ODD, 64 * KIB, "data_file=data,data_file_raw=on")),
    one(
        "qcow2-extended-data-file-on-raw",
        qcow2(ODD, 64 * KIB, "extended_l2=on,data_file=data", zeroed=True),
        raw(ODD),
    ),
    one(
        "qcow2-snapshots",
        replace(qcow2(ODD, 64 * KIB, zeroed=True, compressed=True), snapshots=2),
    ),
    one("qcow2-zstd", qcow2(ODD, 64 * KIB, "compression_type=zstd", compressed=True)),
    one("parallels", parallels(7 * MIB + 512, MIB)),
    one("parallels-64k", parallels(ODD, 64 * KIB)),
    one("qed", qed(ODD, 64 * KIB)),
    one("qed-4k", qed(9 * MIB + 512, 4 * KIB, "table_size=2")),
    one("qed-on-raw", qed(ODD, 64 * KIB), raw(ODD)),
    one("qcow", qcow(ODD, 4 * KIB, compressed=True)),
    one("qcow-on-raw", qcow(MIB + 5 * 512, 512), raw(ODD)),
    one("qcow-on-qcow", qcow(MIB + 512, 512), qcow(ODD, 4 * KIB, compressed=True)),
    one("qcow2-on-raw", qcow2(ODD, 64 * KIB, zeroed=True), raw(ODD)),
    one("qcow2-v2-on-raw", qcow2(ODD, 64 * KIB, "compat=0.10", zeroed=True), raw(ODD)),
    one("qcow2-on-vdi", qcow2(7 * MIB, 64 * KIB, zeroed=True), vdi(7 * MIB)),
    one("qcow2-on-vhd", qcow2(7 * MIB, 64 * KIB, zeroed=True), vhd(7 * MIB)),
    one("qcow2-on-vhdx", qcow2(7 * MIB, 4 * KIB), vhdx(7 * MIB, MIB), mapped=False),
    one("qcow2-on-shorter", qcow2(ODD, 64 * KIB, zeroed=True), raw(2 * MIB + 512)),
    one("qcow2-on-longer", qcow2(ODD, 64 * KIB, zeroed=True), vdi(7 * MIB)),
    one(
        "qcow2-large-on-small-clusters",
        qcow2(11 * MIB + 512, 2 * MIB, compressed=True, zeroed=True),
        qcow2(11 * MIB + 512, 4 * KIB, zeroed=True),
    ),
    one(
        "qcow2-small-on-large-clusters",
        qcow2(2 * MIB + 512, 512),
        qcow2(4 * MIB, 2 * MIB, compressed=True, zeroed=True),
    ),
    one(
        "qcow2-three-deep",
        qcow2(ODD, 64 * KIB, zeroed=True, compressed=True),
        qcow2(ODD + 64 * KIB, 4 * KIB, "compat=0.10"),
        qcow2(2 * MIB, 64 * KIB, zeroed=True, compressed=True),
        vdi(3 * MIB),
    ),
)

# Large and almost empty: for what happens where one leaf ends and the next begins.
WIDE = (
    one("vdi-wide", vdi(3 * GIB)),
    one("vhd-wide", vhd(9 * GIB)),
    one("vhdx-wide", vhdx(9 * GIB, MIB)),
    one("qcow2-wide", qcow2(GIB + 512, 64 * KIB)),
)


def run(*command: str | Path) -> str:
    """Output of a program that must succeed.

    It stands in the folder of its last file: from there qemu takes the name of a data file.
    """
    folder = next((word.parent for word in reversed(command) if isinstance(word, Path)), None)
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    return done.stdout


def build(case: Case, folder: Path) -> Path:
    """Make the chain in a folder; the same case is always the same image."""
    random_ = random.Random(case.name)
    parent: Path | None = None
    parent_format = ""
    for number, layer in reversed(list(enumerate(case.layers))):
        path = folder / f"{number}.{layer.format}"
        command: list[str | Path] = ["qemu-img", "create", "-q", "-f", layer.format]
        if parent:
            command += ["-b", parent.name, "-F", parent_format]
        for option in layer.options:
            command += ["-o", option]
        run(*command, path, str(layer.size))
        fill(path, layer, random_)
        parent, parent_format = path, layer.format
    assert parent is not None
    return parent


def fill(path: Path, layer: Layer, random_: random.Random) -> None:
    """Write distinct bytes to clusters all over the disk, in no order, with gaps between them."""
    commands: list[str] = []
    patterns = path.parent / "patterns"
    patterns.mkdir(exist_ok=True)
    cluster, size = layer.cluster, layer.size
    touched: set[int] = set()
    for _ in range(layer.writes):
        offset, length = piece(size, cluster, random_)
        shape = random_.random()
        whole = offset // cluster * cluster
        if layer.compressed and shape < 0.35 and whole not in touched:
            # One cluster at a time, nothing written to it before (qemu would refuse), and not
            # random bytes, or it is not stored compressed.
            pattern = patterns / str(len(commands))
            length = min(cluster, size - whole)
            half = random_.randbytes(max(1, length // 8))
            pattern.write_bytes((half + bytes(length))[:length])
            commands.append(f"write -q -c -s {pattern} {whole} {length}")
        elif layer.zeroed and shape < 0.6:
            length = -(-length // cluster) * cluster
            commands.append(f"write -q -z {whole} {min(length, size - whole)}")
        else:
            pattern = patterns / str(len(commands))
            pattern.write_bytes(random_.randbytes(length))
            commands.append(f"write -q -s {pattern} {offset} {length}")
        touched.update(range(whole, offset + length, cluster))
    for number in range(layer.snapshots):
        half = commands[: len(commands) // 2]
        commands = commands[len(half) :]
        run("qemu-io", "-f", layer.format, *(f"-c{command}" for command in half), path)
        run("qemu-img", "snapshot", "-c", f"s{number}", path)
    arguments = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", layer.format, *arguments, path)


def piece(size: int, cluster: int, random_: random.Random) -> tuple[int, int]:
    """A range in sectors: whole clusters, the head or tail of one, its middle, across several."""
    first = random_.randrange(-(-size // cluster)) * cluster
    many = max(2, min(40, 32 * KIB // cluster))
    shape = random_.choice(("whole", "head", "tail", "middle", "several", "across"))
    sector = random_.randrange(1, max(2, cluster // 512)) * 512
    if shape == "whole":
        start, end = first, first + cluster
    elif shape == "head":
        start, end = first, first + sector
    elif shape == "tail":
        start, end = first + sector, first + cluster
    elif shape == "middle":
        start, end = first + sector, first + sector + 512
    elif shape == "several":
        start, end = first, first + random_.randrange(2, many + 1) * cluster
    else:
        start, end = first + sector, first + random_.randrange(1, many) * cluster + sector
    start, end = min(start, size - 512), min(end, size)
    return start, max(end - start, 512)
