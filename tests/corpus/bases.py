"""Small images that the hostile ones are made of.

Where things lie in them is read from the files by a few lines here, not by the drivers.  A format
joins with a module of its name in this folder, that has MAKERS and mutations().
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType

from tests.formats import make_vhdx
from virtmount.formats import TABLE

KIB, MIB = 1 << 10, 1 << 20
HOLE = 64 * KIB  # zeros of at least this length are not kept in memory

# Guest clusters of every base but the fixed ones: what is in them.
DATA = (5, 3, 7, 0)  # in this order in the file
ABSENT = (1, 2, 4, 6)
QEMU_NAMES = {"vhd": "vpc"}

# QCOW2 only.  The third L2 table, of clusters from 128 on, does not exist.
PACKED, ZEROED, SECOND = (10, 11), (20, 21), (70, 66, 100)


@dataclass
class Base:
    """An image, its guest's bytes, and where its tables lie."""

    name: str
    format: str
    path: Path
    cluster: int
    at: dict[str, int] = field(default_factory=dict)
    metadata: list[tuple[int, int]] = field(default_factory=list)  # (offset, length)
    big: bool = False  # how its numbers are written

    @cached_property
    def content(self) -> bytes:
        return self.path.read_bytes()

    @cached_property
    def pieces(self) -> list[tuple[int, bytes]]:
        """What is not zero, with its offsets."""
        raw = self.content
        parts = [(at, raw[at : at + HOLE]) for at in range(0, len(raw), HOLE)]
        return [(at, part) for at, part in parts if part.strip(b"\0")]

    @cached_property
    def guest(self) -> bytes:
        return _guest_path(self.path).read_bytes()

    @property
    def size(self) -> int:
        return len(self.content)

    def number(self, offset: int, width: int) -> int:
        raw = self.content[offset : offset + width]
        return int.from_bytes(raw, "big" if self.big else "little")


@dataclass(frozen=True)
class Maker:
    """How a base is made.

    `make` writes the image, and answers with the guest's bytes where qemu-img cannot say them;
    `locate` fills Base.at and Base.metadata.  `beside` writes the further files that belong to it.
    `seal` makes checksums right again, for random changes: of an image as its pieces of HOLE bytes.
    """

    format: str
    make: Callable[[Path], bytes | None]
    cluster: int
    locate: Callable[[Base], None]
    big: bool = False
    file_name: str = "image"
    beside: Callable[[Path], None] | None = None
    seal: Callable[[dict[int, bytearray]], None] | None = None


def _guest_path(path: Path) -> Path:
    return path.with_name(path.name + ".guest")


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert done.returncode == 0, (command, said)
    assert "failed" not in said, (command, said)


def _qemu(
    path: Path,
    format: str,
    size: int,
    options: Sequence[str] = (),
    commands: Sequence[str] = (),
    more: Sequence[str] = (),
) -> None:
    words = [word for option in options for word in ("-o", option)]
    run("qemu-img", "create", "-q", "-f", format, *words, *more, path, str(size))
    if commands:
        words = [word for command in commands for word in ("-c", command)]
        run("qemu-io", "-f", format, *words, path)


def _writes(cluster: int, clusters: Sequence[int], length: int) -> list[str]:
    """One for each cluster, in this order, each with bytes of its own."""
    return [f"write -q -P {c % 251 + 1} {c * cluster} {length}" for c in clusters]


def _qcow2(path: Path, *options: str, parent: bool = False, compress: bool = True) -> None:
    cluster = 512
    commands = _writes(cluster, (*DATA, *SECOND), cluster)
    if compress:
        commands += [f"write -q -c -P {c} {c * cluster} {cluster}" for c in PACKED]
    if "compat=0.10" not in options:
        commands += [f"write -q -z {ZEROED[0] * cluster} {len(ZEROED) * cluster}"]
    more: list[str] = []
    if parent:
        below = path.with_name("parent.raw")
        below.write_bytes(b"\xee" * 192 * cluster)
        more = ["-F", "raw", "-b", below.name]
    _qemu(path, "qcow2", 192 * cluster, (f"cluster_size={cluster}", *options), commands, more)


def _snapshots(path: Path) -> None:
    _qcow2(path)
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-img", "snapshot", "-c", "two", path)


def _bomb(path: Path) -> None:
    """Large clusters, two of them compressed."""
    cluster = 2 * MIB
    commands = [f"write -q -c -P {c} {c * cluster} {cluster}" for c in (0, 2)]
    _qemu(path, "qcow2", 4 * cluster, (f"cluster_size={cluster}",), commands)


def _vdi(path: Path) -> None:
    _qemu(path, "vdi", 8 * MIB, (), _writes(MIB, DATA, 64 * KIB))


def _vdi_fixed(path: Path) -> None:
    _qemu(path, "vdi", 3 * MIB, ("static=on",), _writes(MIB, (0, 2), 64 * KIB))


def _vhdx(path: Path) -> None:
    _qemu(path, "vhdx", 8 * MIB, ("block_size=1M",), _writes(MIB, DATA, 64 * KIB))


def _vhdx_fixed(path: Path) -> None:
    _qemu(
        path, "vhdx", 3 * MIB, ("block_size=1M", "subformat=fixed"), _writes(MIB, (0, 2), 64 * KIB)
    )


def _vhdx_logged(path: Path) -> bytes:
    """The log wants block 1 to be what block 5 is not any more: one entry, one sector."""
    content = {c: bytes([c % 251 + 1]) * 64 * KIB for c in DATA}
    made = make_vhdx.make(path, 8 * MIB, content)
    entry = make_vhdx.log_entry(
        7,
        [made.bat_sector({5: make_vhdx.ZERO, 1: made.hosts[5] | make_vhdx.PRESENT})],
        flushed=made.end,
    )
    made.put_entry(0, entry)
    made.put_headers(
        make_vhdx.header(3, log_guid=make_vhdx.LOG_GUID), make_vhdx.header(2, log_length=MIB)
    )
    content[1] = content.pop(5)  # qemu does not read what has a log
    return b"".join(content.get(c, b"").ljust(MIB, b"\0") for c in range(8))


# name: format, how it is made, cluster size
MAKERS: dict[str, tuple[str, Callable[[Path], bytes | None], int]] = {
    "qcow2": ("qcow2", _qcow2, 512),
    "qcow2-v2": ("qcow2", lambda path: _qcow2(path, "compat=0.10"), 512),
    "qcow2-zstd": ("qcow2", lambda path: _qcow2(path, "compression_type=zstd"), 512),
    "qcow2-bits1": ("qcow2", lambda p: _qcow2(p, "refcount_bits=1", compress=False), 512),
    "qcow2-bits64": ("qcow2", lambda path: _qcow2(path, "refcount_bits=64"), 512),
    "qcow2-child": ("qcow2", lambda path: _qcow2(path, parent=True), 512),
    "qcow2-snapshots": ("qcow2", _snapshots, 512),
    "qcow2-bomb": ("qcow2", _bomb, 2 * MIB),
    "vdi": ("vdi", _vdi, MIB),
    "vdi-fixed": ("vdi", _vdi_fixed, MIB),
    "vhdx": ("vhdx", _vhdx, MIB),
    "vhdx-fixed": ("vhdx", _vhdx_fixed, MIB),
    "vhdx-logged": ("vhdx", _vhdx_logged, MIB),
}
PARENT = "parent.raw"


# A raw image has nothing that could be wrong.
FORMATS = tuple(name for name in TABLE if name != "raw")


def modules() -> dict[str, ModuleType]:
    """What there is of each format in the table."""
    here = Path(__file__).parent
    found = [name for name in FORMATS if (here / f"{name}.py").exists()]
    return {name: import_module(f"tests.corpus.{name}") for name in found}


@cache
def makers() -> Mapping[str, Maker]:
    """All bases by name."""
    found = {
        name: Maker(
            format,
            make,
            cluster,
            {"qcow2": locate_qcow2, "vdi": _map_vdi, "vhdx": _map_vhdx}[format],
            big=format == "qcow2",
            beside=below if name == "qcow2-child" else None,
        )
        for name, (format, make, cluster) in MAKERS.items()
    }
    for format, module in modules().items():
        for name, maker in getattr(module, "MAKERS", {}).items():
            assert name not in found, name
            assert maker.format == format, name
            found[name] = maker
    return found


def below(path: Path) -> None:
    (path.parent / PARENT).write_bytes(b"\xee" * (96 << 10))


def make_all(folder: Path, only: str = "") -> None:
    """All bases, or those of one format, with what is read from each beside it."""
    for name, maker in makers().items():
        if only and maker.format != only:
            continue
        path = folder / name
        guest = maker.make(path)
        if guest is None:
            format = QEMU_NAMES.get(maker.format, maker.format)
            run("qemu-img", "convert", "-f", format, "-O", "raw", path, _guest_path(path))
        else:
            _guest_path(path).write_bytes(guest)


def load(folder: Path, name: str) -> Base:
    """A base that make_all() made."""
    maker = makers()[name]
    base = Base(name, maker.format, folder / name, maker.cluster, big=maker.big)
    maker.locate(base)
    return base


OFFSET = 0x00FFFFFFFFFFFE00


def locate_qcow2(base: Base) -> None:
    cluster = base.cluster
    l1, refcounts = base.number(40, 8), base.number(48, 8)
    base.at = {"l1": l1, "refcounts": refcounts, "block": base.number(refcounts, 8)}
    entries = base.number(36, 4)
    base.metadata = [(0, 512), (l1, entries * 8), (refcounts, cluster), (base.at["block"], cluster)]
    for index in range(entries):
        table = base.number(l1 + index * 8, 8) & OFFSET
        if table:
            base.at[f"l2.{index}"] = table
            base.metadata.append((table, cluster))
    if base.number(60, 4):
        base.at["snapshots"] = base.number(64, 8)
        base.metadata.append((base.at["snapshots"], 256))
    first = 0 if base.name == "qcow2-bomb" else PACKED[0]
    entry = base.number(base.at["l2.0"] + first * 8, 8)
    if entry & 1 << 62:
        base.at["packed"] = entry & (1 << 70 - cluster.bit_length() + 1) - 1
        base.metadata.append((base.at["packed"], 512))


def _map_vdi(base: Base) -> None:
    base.at = {"map": base.number(340, 4), "data": base.number(344, 4)}
    base.metadata = [(0, 512), (base.at["map"], base.number(384, 4) * 4)]


def _map_vhdx(base: Base) -> None:
    header = max((64 * KIB, 128 * KIB), key=lambda at: base.number(at + 8, 8))
    base.at = {"log": base.number(header + 72, 8), "log_length": base.number(header + 68, 4)}
    for i in range(base.number(192 * KIB + 8, 4)):
        at = 192 * KIB + 16 + i * 32
        guid = base.content[at : at + 16]
        name = {make_vhdx.BAT.bytes_le: "bat", make_vhdx.METADATA.bytes_le: "metadata"}[guid]
        base.at[name] = base.number(at + 16, 8)
        base.at[f"{name}_length"] = base.number(at + 24, 4)
        base.at[f"{name}_region"] = i
    metadata = base.at["metadata"]
    names = {item.guid.bytes_le: name for name, item in make_vhdx.items(1, 1, 1, 1, 0).items()}
    low, high = metadata + base.at["metadata_length"], 0
    for i in range(base.number(metadata + 10, 2)):
        at = metadata + 32 + i * 32
        name = names[base.content[at : at + 16]]
        base.at[name] = metadata + base.number(at + 16, 4)
        base.at[f"{name}_item"] = i
        low, high = min(low, base.at[name]), max(high, base.at[name] + 16)
    base.metadata = [
        (0, 16),
        (64 * KIB, 80),
        (128 * KIB, 80),
        (192 * KIB, 96),
        (256 * KIB, 96),
        (metadata, 32 + 32 * 6),
        (low, high - low),
        (base.at["bat"], 9 * 8),
    ]
    if any(base.content[base.at["log"] : base.at["log"] + 64]):
        base.metadata.append((base.at["log"], 8192))
