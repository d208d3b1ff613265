"""Fuzz one driver, guided by coverage, with atheris.

    python -m tests.corpus.fuzz FORMAT [FOLDER] [libFuzzer's options]
    python -m tests.corpus.fuzz vhdx found/ -max_total_time=600
    python -m tests.corpus.fuzz qcow2 crash-0123…        run one input again

FORMAT is a driver's name; test_fuzz.py runs each for some seconds.  Inputs that reach new code are
kept in FOLDER.  An input is what the headers and tables of a base image (bases.py) are replaced
with, after one byte that chooses the base; checksums are made right.  The driver is opened, read
through the reference engine, written to, closed, opened again, checked and repaired.  Anything but
VirtmountError and OSError is a finding, and so is an input that takes 5 seconds or a gigabyte.  A
finding becomes a mutation.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

with atheris.instrument_imports(include=["virtmount"]):
    from virtmount import formats
    from virtmount.errors import Unsupported, VirtmountError
    from virtmount.hostfile import HostFile, execute
    from virtmount.image import DEFAULTS, Image, extents
    from virtmount.plan import Plan
    from virtmount.upkeep import Elsewhere, Repair

    DRIVERS: dict[str, type[Image]] = {name: formats.load(name) for name in formats.TABLE}

from tests.corpus import bases, flips
from tests.corpus.bases import KIB, Base
from tests.reference import Reference

PLACES = 6  # of the disk that are read and written
FINDINGS = 200  # of a check
SLOW = {"qcow2-bomb"}  # bases with large clusters
LIMITS = ("-timeout=5", "-rss_limit_mb=1024", "-max_len=16384", "-len_control=0")


class Target:
    """The bases of one format, and a file that is made of one of them each time."""

    def __init__(self, format: str, folder: Path) -> None:
        bases.make_all(folder, format)
        names = [name for name, maker in bases.makers().items() if maker.format == format]
        self.bases = [bases.load(folder, name) for name in names if name not in SLOW]
        if not self.bases:
            sys.exit(f"no base images of {format}")
        self.driver = DRIVERS[format]
        # A folder for each: what lies beside one image is none of another's business.
        self.paths: dict[str, Path] = {}
        for base in self.bases:
            maker = bases.makers()[base.name]
            path = folder / f"{base.name}.fuzzed" / maker.file_name
            path.parent.mkdir()
            if maker.beside:
                maker.beside(path)
            self.paths[base.name] = path

    def seeds(self, folder: Path) -> None:
        """What the bases have, for a start."""
        for number, base in enumerate(self.bases):
            parts = [base.content[at : at + length] for at, length in base.metadata]
            (folder / f"seed-{base.name}").write_bytes(bytes([number]) + b"".join(parts))

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        base = self.bases[data[0] % len(self.bases)]
        self.path = self.paths[base.name]
        self._make(base, data[1:])
        with contextlib.suppress(VirtmountError, OSError):
            self._look()
        with contextlib.suppress(VirtmountError, OSError):
            self._change()
            self._look()
        for repair in (Repair.NOTHING, Repair.ALL) if self.driver.checks else ():
            with contextlib.suppress(VirtmountError, OSError):
                self._check(repair)

    def _make(self, base: Base, data: bytes) -> None:
        image = {at: bytearray(part) for at, part in base.pieces}
        for at, length in base.metadata:
            part, data = data[:length], data[length:]
            for low in range(0, len(part), bases.HOLE):
                piece = part[low : low + bases.HOLE]
                start, within = (at + low) // bases.HOLE * bases.HOLE, (at + low) % bases.HOLE
                target = image.setdefault(start, bytearray())
                target.extend(bytes(max(0, within + len(piece) - len(target))))
                target[within : within + len(piece)] = piece
        if seal := flips.sealer(bases.makers()[base.name]):
            seal(image)
        with open(self.path, "wb") as file:
            for at, made in image.items():
                file.seek(at)
                file.write(made)
            file.truncate(max(base.size, os.fstat(file.fileno()).st_size))

    def _look(self) -> None:
        with self._opened(writable=False) as image:
            image.details()
            with Reference([image]) as disk:
                for at in self._places(image):
                    with contextlib.suppress(OSError, VirtmountError):
                        disk.pread(at, min(4 * KIB, disk.size - at))
            for cluster in range(0, min(256, image.size // image.cluster_size), 64):
                with contextlib.suppress(VirtmountError):
                    list(extents(image, cluster * image.cluster_size, image.cluster_size))
            image.snapshots()

    def _change(self) -> None:
        with self._opened(writable=True) as image:
            disk = Reference([image])
            places = self._places(disk.top)
            for at in places[::2]:
                disk.pwrite(at, b"new" * 100 if at + 300 <= disk.size else b"")
            disk.flush()
            size = disk.top.cluster_size
            # Without the parent that it names; some cannot discard over one.
            alone = image.parent is None or image.caps.zero_hides_parent
            for at in places[1::2] if alone else ():
                at -= at % size
                disk.discard(at, min(size, disk.size - at))
            disk.pwrite(places[0], b"newer")
            disk.close()

    def _check(self, repair: Repair) -> None:
        with HostFile(self.path, writable=repair is Repair.ALL, lock=False) as file:
            for item in itertools.islice(self.driver.check(file, DEFAULTS, repair), FINDINGS):
                if isinstance(item, Plan):
                    execute(item, item.files if isinstance(item, Elsewhere) else [file])

    @contextlib.contextmanager
    def _opened(self, *, writable: bool) -> Iterator[Image]:
        make = self.driver
        with HostFile(self.path, writable=writable, lock=False) as file:
            image: Image = make(file)  # type: ignore[call-arg]
            try:
                list(image.metadata())
                if not image.size:
                    raise Unsupported(file, "", "a disk of 0 bytes")  # as virtmount.disk does
                yield image
            finally:
                for further in image.files:
                    further.close()

    def _places(self, image: Image) -> list[int]:
        clusters = -(-image.size // image.cluster_size)
        chosen = {0, 1, 3, 5, clusters // 2, clusters - 1}
        return [c * image.cluster_size for c in sorted(chosen) if c < clusters][:PLACES]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in DRIVERS:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as made:
        folder, seeds = Path(made) / "bases", Path(made) / "seeds"
        folder.mkdir()
        seeds.mkdir()
        target = Target(sys.argv[1], folder)
        target.seeds(seeds)
        options = [sys.argv[0], *LIMITS, *sys.argv[2:]]
        if not any(Path(option).is_file() for option in sys.argv[2:]):
            options.append(str(seeds))
        atheris.Setup(options, target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
