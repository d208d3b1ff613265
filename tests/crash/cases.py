"""The images that are crashed: one per way in which a format can be written."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash import vhds, vhdxs, vmdks
from tests.crash.checkers import (
    VHDX_METADATA,
    VHDX_SECTOR_SIZE,
    Findings,
    check_qcow2,
    check_vdi,
    check_vhd,
    check_vhdx,
    check_vmdk,
    vhdx_regions,
)
from tests.crash.checkers_qcow import check_qcow
from tests.crash.checkers_small import check_parallels, check_qed
from tests.crash.simulate import SimulatedFile, Store
from tests.crash.workload import Mix, patterns
from tests.reference import Reference
from virtmount import hostfile
from virtmount.formats import load
from virtmount.formats.qcow2 import QCOW2
from virtmount.hostfile import HostFile
from virtmount.image import Image, Kind, Options, extents
from virtmount.plan import Plan

SNAPSHOT = "kept"
BASE_WRITES = 1_000_000  # numbers of the writes that made what is there before the workload
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Case:
    """An image, its parent, and the workload that suits it."""

    name: str
    format: str
    size: int
    cluster: int
    options: tuple[str, ...] = ()  # qemu-img create -o
    parent: bool = False
    compressed: bool = False
    snapshot: bool = False  # taken before the workload; it must not change
    before: tuple[str, ...] = ()  # what qemu-io does to the image first
    filled: int = 0  # bytes of data that are there before, as far as the host file goes
    sector: int = 512
    count: int = 60  # requests in the workload
    warmup: int = 0  # write, flush, discard, flush rounds before it, without cuts
    share: float = 1.0  # of the states that are tried; less where one costs more
    foreign: bool = True  # whether qemu reads such images
    mix: Mix = field(default_factory=Mix)
    change: Callable[[Store], None] | None = None  # of the image, for what qemu-img cannot make

    # Makes the image instead of qemu-img, from what the disk is to hold, and may write on that.
    build: Callable[[bytearray], bytes] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def checked(self) -> bool:
        """Whether qemu-img checks such images."""
        return self.foreign and self.format not in ("vpc", "qcow")


def make_vdi_child(store: Store) -> None:
    """A differencing image; which one its parent is, nobody asks here."""
    store.write(0x4C, (4).to_bytes(4, "little"))
    store.write(0x1A8, bytes(range(16)))


_SMALL = Mix(largest=16 * KIB, write=12)
_SPARSE = Mix(zero=2, discard=2)

CASES = (
    Case("qcow2-64k", "qcow2", 8 * MIB, 64 * KIB),
    Case("qcow2-4k", "qcow2", 4 * MIB, 4 * KIB, ("cluster_size=4k",)),
    Case("qcow2-512-rc1", "qcow2", MIB, 512, ("cluster_size=512", "refcount_bits=1"), mix=_SMALL),
    Case("qcow2-512-rc16", "qcow2", MIB, 512, ("cluster_size=512",), mix=_SMALL),
    # Just before the refcount table must grow: 64 counts a block, 64 blocks a table.
    Case(
        "qcow2-512-rc64",
        "qcow2",
        2560 * KIB,
        512,
        ("cluster_size=512", "refcount_bits=64"),
        filled=1920 * KIB,
        share=0.4,
        mix=_SMALL,
    ),
    Case("qcow2-v2", "qcow2", 4 * MIB, 4 * KIB, ("cluster_size=4k", "compat=0.10")),
    Case("qcow2-parent", "qcow2", 4 * MIB, 64 * KIB, parent=True),
    Case(
        "qcow2-v2-parent",
        "qcow2",
        2 * MIB,
        4 * KIB,
        ("cluster_size=4k", "compat=0.10"),
        parent=True,
    ),
    Case("qcow2-compressed", "qcow2", 4 * MIB, 64 * KIB, compressed=True),
    Case("qcow2-compressed-4k", "qcow2", MIB, 4 * KIB, ("cluster_size=4k",), compressed=True),
    Case("qcow2-lazy", "qcow2", 2 * MIB, 64 * KIB, ("lazy_refcounts=on",)),
    Case(
        "qcow2-zero",  # zero clusters that keep a place, and clusters that nobody wrote to
        "qcow2",
        4 * MIB,
        64 * KIB,
        ("preallocation=metadata",),
        before=("write -P 7 1M 2M", "write -z 1M 512k", "discard 2M 256k"),
    ),
    Case(
        "qcow2-snapshot",
        "qcow2",
        4 * MIB,
        64 * KIB,
        before=("write -P 7 0 2M", "write -P 9 3M 300k"),
        snapshot=True,
        share=0.5,
    ),
    Case(
        "qcow2-snapshot-4k",  # several L2 tables are shared as well
        "qcow2",
        4 * MIB,
        4 * KIB,
        ("cluster_size=4k",),
        before=("write -P 7 0 2M", "write -P 9 3M 300k"),
        snapshot=True,
        share=0.25,
    ),
    Case("qcow2-extended", "qcow2", 4 * MIB, 64 * KIB, ("extended_l2=on",), share=0.5),
    Case(
        "qcow2-extended-parent",
        "qcow2",
        2 * MIB,
        16 * KIB,
        ("extended_l2=on,cluster_size=16k",),
        parent=True,
        before=("write -P 7 1M 10k", "write -z 1100k 2k", "write -P 8 300k 1k"),
        share=0.5,
    ),
    Case("raw", "raw", 2 * MIB, 64 * KIB, foreign=False),
    Case("parallels", "parallels", 8 * MIB, 64 * KIB, ("cluster_size=64k",)),
    Case("qed", "qed", 8 * MIB, 4 * KIB, ("cluster_size=4k", "table_size=2"), mix=_SMALL),
    Case(
        "qed-parent",
        "qed",
        4 * MIB,
        64 * KIB,
        ("cluster_size=64k", "table_size=2"),
        parent=True,
    ),
    Case("qcow", "qcow", 4 * MIB, 4 * KIB, share=0.4),
    Case(
        "qcow-compressed",  # qemu-img convert -c makes none of these
        "qcow",
        MIB,
        4 * KIB,
        before=tuple(f"write -c -P {c + 1} {c * 4}k 4k" for c in range(3, 160, 5)),
        share=0.4,
        mix=_SMALL,
    ),
    Case("qcow-parent", "qcow", MIB, 512, parent=True, share=0.3, mix=_SMALL),
    Case("vdi-fixed", "vdi", 4 * MIB, MIB, ("static=on",), mix=_SPARSE),
    Case("vhdx-fixed", "vhdx", 4 * MIB, MIB, ("block_size=1M", "subformat=fixed"), mix=_SPARSE),
    Case("vdi", "vdi", 24 * MIB, MIB, mix=_SPARSE),
    Case(
        "vdi-parent",
        "vdi",
        12 * MIB,
        MIB,
        parent=True,
        foreign=False,
        mix=_SPARSE,
        change=make_vdi_child,
    ),
    Case(
        "vdi-extra",
        "vdi",
        12 * MIB,
        MIB,
        foreign=False,
        mix=_SPARSE,
        change=lambda store: store.write(0x17C, (512).to_bytes(4, "little")),
    ),
    Case("vhd", "vpc", 24 * MIB, 2 * MIB, ("force_size=on",), mix=_SPARSE),
    Case("vhd-exact", "vpc", 4 * MIB, vhds.BLOCK, mix=_SPARSE, build=vhds.exact),
    Case("vhd-parent", "vpc", 4 * MIB, vhds.BLOCK, parent=True, foreign=False, build=vhds.child),
    Case("vhd-fixed", "vpc", 2 * MIB, 64 * KIB, ("force_size=on", "subformat=fixed")),
    Case("vmdk", "vmdk", 8 * MIB, 64 * KIB),
    Case("vmdk-zeroed", "vmdk", 4 * MIB, 64 * KIB, ("zeroed_grain=on",)),
    Case("vmdk-parent", "vmdk", 4 * MIB, 64 * KIB, parent=True, foreign=False, change=vmdks.child),
    Case(
        "vmdk-zeroed-parent",
        "vmdk",
        4 * MIB,
        64 * KIB,
        ("zeroed_grain=on",),
        parent=True,
        foreign=False,
        change=vmdks.child,
    ),
    # qemu would write over the header.
    Case(
        "vmdk-no-tables",
        "vmdk",
        4 * MIB,
        4 * KIB,
        foreign=False,
        mix=_SMALL,
        change=vmdks.without_tables,
    ),
    Case("vhdx", "vhdx", 24 * MIB, MIB, ("block_size=1M",), mix=_SPARSE),
    Case(
        "vhdx-4096",
        "vhdx",
        24 * MIB,
        MIB,
        ("block_size=1M",),
        sector=4096,
        foreign=False,
        mix=_SPARSE,
    ),
    Case(
        "vhdx-parent",
        "vhdx",
        12 * MIB,
        MIB,
        parent=True,
        share=0.5,
        foreign=False,
        mix=_SPARSE,
        build=vhdxs.child,
    ),
    Case(
        "vhdx-wrap", "vhdx", 16 * MIB, MIB, ("block_size=1M", "log_size=1M"), warmup=70, mix=_SPARSE
    ),
)


@dataclass
class Made:
    """A case's image before the workload, with what it holds."""

    case: Case
    store: Store
    parent: Store | None
    content: Store
    execute: Callable[[Plan, Sequence[HostFile]], None] = hostfile.execute

    def open(self, file: SimulatedFile) -> Reference:
        """The chain over this child, through our drivers."""
        return Reference(self.images(file), files_execute=self.execute)

    def check(self, store: Store, before: Store) -> Findings:
        """`before`: the same image when it was opened."""
        if self.case.format == "raw":
            return Findings()
        if self.case.format == "vhdx":
            return check_vhdx(store, before.size)
        if self.case.format in ("qed", "parallels"):
            return {"qed": check_qed, "parallels": check_parallels}[self.case.format](store)
        if self.case.format == "qcow":
            return check_qcow(store)
        return {"qcow2": self._check_qcow2, "vdi": check_vdi, "vmdk": check_vmdk, "vpc": check_vhd}[
            self.case.format
        ](store)

    def _check_qcow2(self, store: Store) -> Findings:
        found = check_qcow2(store)
        if self.case.snapshot:
            file = SimulatedFile(store, name=self.case.name, writable=False)
            kept = content_of([QCOW2(file, Options(snapshot=SNAPSHOT))])
            if kept.read(0, self.case.size) != self.content.read(0, self.case.size):
                found.wrong.append("the snapshot has changed")
        return found

    def images(self, file: SimulatedFile) -> Sequence[Image]:
        images: list[Image] = [open_image(self.case.format, file)]
        if self.parent is not None:
            parent = SimulatedFile(self.parent, name="parent.raw", writable=False)
            images.append(open_image("raw", parent))
        return images

    def settled(self, store: Store) -> Store:
        """What another program has to be given for it to read what we read."""
        return vmdks.settled(store) if self.case.format == "vmdk" else store

    def save(self, store: Store, folder: Path) -> Path:
        """Write the child, and its parent beside it, for another program to read."""
        path = folder / f"image.{self.case.format}"
        store.save(path)
        if self.parent is not None:
            self.parent.save(folder / "parent.raw")
        return path


def make(case: Case, folder: Path) -> Made:
    """Create the image with qemu-img, or as the case says."""
    if case.build is not None:
        content = bytearray(case.size)
        _scatter(content, case)
        below = Store.of(bytes(content)) if case.parent else None
        image = Store.of(case.build(content))
        image.save(folder / f"image.{case.format}")
        return Made(case, image, below, Store.of(bytes(content)))
    path = folder / f"image.{case.format}"
    content = bytearray(case.size)
    command = ["qemu-img", "create", "-q", "-f", case.format]
    for option in case.options:
        command += ["-o", option]
    parent: Store | None = None
    if case.filled:
        content[: case.filled] = patterns(BASE_WRITES, 0, case.filled)
    elif case.parent or case.compressed:
        _scatter(content, case)
    if content.strip(b"\0"):
        parent = Store.of(bytes(content))
        parent.save(folder / "parent.raw")
    if case.compressed or case.filled:
        pressed = ["-c"] if case.compressed else []
        command = ["qemu-img", "convert", "-q", *pressed, "-f", "raw", "-O", *command[4:]]
        run([*command, str(folder / "parent.raw"), str(path)])
        parent = None
    elif case.parent and case.change is None:
        run([*command, "-F", "raw", "-b", "parent.raw", str(path)])
    else:
        run([*command, str(path), str(case.size)])
    held = Store.of(bytes(content))
    if case.before:
        run(["qemu-io", "-f", case.format, *(f"-c{command}" for command in case.before), path])
        run(["qemu-img", "convert", "-f", case.format, "-O", "raw", path, folder / "held.raw"])
        held = Store.load(folder / "held.raw")
    if case.snapshot:
        run(["qemu-img", "snapshot", "-c", SNAPSHOT, path])
    store = Store.load(path)
    if case.sector != 512:
        set_vhdx_sector_size(store, case.sector)
    if case.change is not None:
        case.change(store)
    return Made(case, store, parent, held)


def _scatter(content: bytearray, case: Case) -> None:
    """Old data under about half of the disk, in pieces that end inside clusters."""
    rng = random.Random(case.name)
    for i in range(40):
        length = rng.randrange(1, 2 * case.cluster // 512 + 8) * 512
        offset = rng.randrange(0, (case.size - length) // 512) * 512
        content[offset : offset + length] = patterns(BASE_WRITES + i, offset, length)


def set_vhdx_sector_size(store: Store, size: int) -> None:
    """Make an empty 512-byte VHDX one of 4096: nothing has a checksum there.

    The larger sectors make each chunk larger, so the table needs no more entries than it has.
    """
    offset, length = dict(vhdx_regions(store))[VHDX_METADATA]
    table = store.read(offset, length)
    entry = table.index(VHDX_SECTOR_SIZE)
    at = int.from_bytes(table[entry + 16 : entry + 20], "little")
    store.write(offset + at, size.to_bytes(4, "little"))


def run(command: Sequence[str | Path], allowed: Sequence[int] = (0,)) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode in allowed, (command, done.returncode, done.stdout, done.stderr)
    return done.stdout


def open_image(format_name: str, file: HostFile) -> Image:
    driver: Callable[[HostFile], Image] = load(format_name)
    return driver(file)


def content_of(images: Sequence[Image]) -> Store:
    """The whole disk as the drivers map it: the top image over its raw parent."""
    top, *parents = images
    content = Store(top.size)
    if parents:
        file = parents[0].files[0]
        assert isinstance(file, SimulatedFile)
        content.take(0, file.store, 0, top.size)
    for at, length, kind, host_offset, number in extents(top, 0, top.size):
        if kind is Kind.ABSENT:
            continue
        length = min(length, top.size - at)
        if kind is Kind.ZERO:
            content.zero(at, length)
        elif kind is Kind.COMPRESSED:
            content.write(at, top.inflate(at // top.cluster_size)[:length])
        elif kind in (Kind.DATA, Kind.SHARED):
            file = top.files[number]
            assert isinstance(file, SimulatedFile)
            content.zero(at, length)
            if file.patched:
                content.write(at, file.pread_padded(host_offset, length))
            else:
                content.take(at, file.store, host_offset, length)
        else:
            raise AssertionError(f"cluster at {at:#x} is {kind.name}")
    return content
