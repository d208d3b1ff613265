"""Debian kernels, unpacked in a cache folder and never installed.

A kernel in the cache is a folder that appears whole, by a rename:

    VERSION/vmlinuz
    VERSION/modules/    what /lib/modules/VERSION would be, after depmod
    oldest, newest      links to a VERSION

Environment: VIRTMOUNT_CACHE is the folder to use instead of virtmount/ in the
user's cache folder.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .archive import Archive, ArchiveError
from .programs import program

NAMES = ("oldest", "newest")
OLDEST = (6, 12)  # the first series that Debian builds with ublk

# Kept uncompressed, with what they need: to inflate one under emulation takes a second.
PLAIN = (
    *("9p", "9pnet_virtio", "overlay", "virtio_blk", "ublk_drv", "nbd", "loop", "fuse"),
    *("ext4", "xfs", "btrfs", "vfat", "dm-mod", "dm-flakey", "dm-log-writes", "null_blk"),
)


class KernelError(Exception):
    """There is no such kernel, neither in the cache nor in the archive."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel."""

    version: str  # as in `uname -r`
    folder: Path

    @property
    def image(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> Path:
        return self.folder / "modules"

    def needed(self, names: Iterable[str]) -> list[Path]:
        """Return the modules of these names and all they need, in the order to load them.

        Names that are built in, or unknown to this kernel, are left out.
        """
        needs: dict[str, tuple[str, list[str]]] = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            path, _, rest = line.partition(":")
            needs[_module(path)] = path, [_module(need) for need in rest.split()]
        found: dict[str, Path] = {}

        def visit(name: str) -> None:
            if name in needs and name not in found:
                path, wanted = needs[name]
                for need in wanted:
                    visit(need)
                found[name] = self.modules / path

        for name in names:
            visit(name.replace("-", "_"))
        return list(found.values())


def _module(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")


def cache() -> Path:
    """Return the folder that holds the kernels."""
    own = os.environ.get("VIRTMOUNT_CACHE")
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own or Path(user) / "virtmount") / "kernels"


def find(name: str = "newest") -> Kernel:
    """Return a kernel: "oldest", "newest", or a version such as "6.12" or "7.3.4+deb13-amd64".

    From the cache if it is there, else from the archive.
    """
    return _cached(name) or fetch([name])[0]


def fetch(names: Iterable[str] = NAMES) -> list[Kernel]:
    """Bring the cache up to date with the archive; return the kernels of these names.

    One process fetches, others wait for it.  Without the archive, what the cache
    has is good enough.
    """
    cache().mkdir(parents=True, exist_ok=True)
    with _lock():
        for leftover in cache().glob(".new-*"):
            shutil.rmtree(leftover)
        archive, reason = None, ""
        try:
            archive = Archive(cache() / "apt")
            _say("reading the package lists")
            archive.update()
        except (ArchiveError, OSError) as error:
            archive, reason = None, str(error)
            _say(f"the archive cannot be used: {error}")
        kernels = []
        for name in names:
            kernel = None
            try:
                kernel = _fetch(archive, name) if archive else None
            except (ArchiveError, OSError, subprocess.CalledProcessError) as error:
                reason = str(error)
                _say(f"kernel {name}: {error}")
            kernel = kernel or _cached(name)
            if kernel is None:
                raise KernelError(f"no kernel {name}: {reason}")
            kernels.append(kernel)
        return kernels


def _cached(name: str) -> Kernel | None:
    folder = cache() / name
    if name in NAMES:
        return Kernel(folder.resolve().name, folder.resolve()) if folder.exists() else None
    whole = {path.parent.name: path.parent for path in cache().glob("*/vmlinuz")}
    fits = [version for version in whole if _fits(name, version) and version not in NAMES]
    if not fits:
        return None
    version = max(fits, key=_numbers)
    return Kernel(version, whole[version])


def _fits(wanted: str, version: str) -> bool:
    """Say whether a version is the wanted one: 6.12 is 6.12.117 and not 6.121."""
    rest = version.removeprefix(wanted)
    return not rest or (rest != version and not rest[0].isdigit())


def _numbers(version: str) -> tuple[int, ...]:
    upstream = version.partition("+")[0].partition("-")[0]
    return tuple(int(part) if part.isdigit() else 0 for part in upstream.split("."))


def _choose(name: str, offered: Iterable[str]) -> str:
    """Return the upstream version on offer that a name means."""
    new_enough = sorted((v for v in offered if _numbers(v) >= OLDEST), key=_numbers)
    if name == "oldest" and new_enough:  # the latest of the oldest series
        series = _numbers(new_enough[0])[:2]
        fits = [v for v in new_enough if _numbers(v)[:2] == series]
    elif name in NAMES:
        fits = new_enough
    else:
        fits = [v for v in new_enough if _fits(v, name) or _fits(name, v)]
    if not fits:
        raise ArchiveError(f"no such kernel; there are {', '.join(new_enough) or 'none'}")
    return fits[-1]


def _fetch(archive: Archive, name: str) -> Kernel:
    offered = archive.versions()
    upstream = _choose(name, offered)
    kernel = _cached(upstream)
    if kernel is None:
        packages = archive.packages(offered[upstream])
        _say(f"kernel {name}: {' '.join(packages)}")
        with tempfile.TemporaryDirectory(prefix=".new-", dir=cache()) as scratch:
            debs = archive.download(packages, Path(scratch) / "debs")
            kernel = _unpack(debs, Path(scratch))
    if name in NAMES:
        _link(name, kernel.version)
    return kernel


def _unpack(debs: Iterable[Path], scratch: Path) -> Kernel:
    tree = scratch / "tree"
    for deb in debs:
        _say(f"unpacking {deb.name}")
        subprocess.run([program("dpkg-deb", "dpkg"), "-x", deb, tree], check=True)
    if not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")
    folders = list((tree / "lib/modules").iterdir())
    if len(folders) != 1:
        raise ArchiveError(f"the packages hold {len(folders)} kernels")
    version = folders[0].name
    images = [tree / f"boot/vmlinuz-{version}", folders[0] / "vmlinuz"]

    kernel = Kernel(version, scratch / "kernel")
    kernel.folder.mkdir()
    shutil.move(next(path for path in images if path.is_file()), kernel.image)
    depmod: list[str | Path] = [program("depmod", "kmod"), "--basedir", tree, version]
    subprocess.run(depmod, check=True)
    for path in Kernel(version, _view(folders[0], scratch)).needed(PLAIN):
        if path.suffix == ".xz":
            path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
            path.unlink()
    subprocess.run(depmod, check=True)
    shutil.move(folders[0], kernel.modules)

    final = cache() / version
    if final.exists():  # not whole: a whole one would have been used
        shutil.rmtree(final)
    kernel.folder.rename(final)
    return Kernel(version, final)


def _view(modules: Path, scratch: Path) -> Path:
    """Return a folder in which `modules` is where a Kernel expects it."""
    view = scratch / "view"
    view.mkdir()
    (view / "modules").symlink_to(modules)
    return view


def _link(name: str, version: str) -> None:
    new = cache() / f".{name}"
    new.unlink(missing_ok=True)
    new.symlink_to(version)
    new.rename(cache() / name)


@contextmanager
def _lock() -> Iterator[None]:
    with (cache() / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process that fetches kernels")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"vm: {text}", file=sys.stderr, flush=True)
