"""Open an image together with the images that it is based on.

A parent's name comes out of a file that a stranger may have written, so by default it leads only
to regular files in or below the folder of the image that the user named, links resolved; the
name is taken as a local path, never as a URL or as qemu's json: text.  A parent's format is the
recorded one.  Where none is recorded, a guess is enough for a parent that names no further file:
else whoever wrote the guest bytes of a raw parent could turn it into an image that leads
anywhere (CVE-2008-2004 and its many children).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from virtmount import formats
from virtmount.errors import Corrupt, Denied, ParentMissing, Unsupported
from virtmount.hostfile import HostFile
from virtmount.image import Chain, Image, ParentRef

MAX_DEPTH = 64
MAX_NAME = 4096
MAX_MEMORY = 64 << 20  # twice the longest table of one image
NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

# What qemu records as a format, and what we call it.
QEMU_NAMES = {"vpc": "vhd", "host_device": "raw", "file": "raw"}

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_Inode = tuple[int, int, int]


def open_chain(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    writable: bool = False,
    allow_outside: bool = False,
    parent_format: str | None = None,
    lock: bool = True,
) -> Chain:
    """The image at `path`, as `format` or by its content, and its parents, which are only read.

    `parent_format` is for a parent whose child does not record one.  Everything is locked, and
    everything is closed again if anything is wrong.
    """
    opener = Opener(path, allow_outside=allow_outside, parent_format=parent_format, lock=lock)
    chain = Chain()
    try:
        chain.images.append(opener.open_top(format, writable=writable))
        while (parent := opener.open_parent(chain.images[-1])) is not None:
            chain.images.append(parent)
    except BaseException:
        chain.close()
        raise
    return chain


class Opener:
    """Opens an image and then, one by one, its parents, remembering where they may lie."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        allow_outside: bool = False,
        parent_format: str | None = None,
        lock: bool = True,
    ) -> None:
        self.path = Path(path)
        self._allow_outside = allow_outside
        self._parent_format = parent_format
        self._lock = lock
        self._seen: dict[_Inode, HostFile] = {}
        self._memory = 0
        # A link to the image: both the link's folder and the image's own are what the user meant.
        self._roots = {os.path.realpath(folder) for folder in _folders(self.path)}

    def open_top(self, format: str | None, *, writable: bool) -> Image:
        file = HostFile(self.path, writable=writable, lock=self._lock)
        return self._make(file, lambda: formats.load(format) if format else formats.probe(file))

    def open_parent(self, child: Image) -> Image | None:
        """The image that `child` is based on, or None."""
        ref = child.parent
        if ref is None:
            return None
        if len(self._seen) >= MAX_DEPTH:
            raise Unsupported(
                child.files[0], "parent", f"more than {MAX_DEPTH} images in the chain"
            )
        for name in ref.names:
            _refuse_strange(child, name)
        first: Exception | None = None
        for name in ref.names:
            for folder in _folders(child.files[0].path):
                try:
                    return self._open_named(child, ref, os.path.join(folder, _local(name)))
                except OSError as error:
                    if error.errno not in NO_SUCH_FILE:
                        raise
                    continue
                except ParentMissing as error:  # there, and another image: the next may be it
                    first = first or error
        if first:
            raise first
        names = " or ".join(map(repr, ref.names)) or "no name"
        raise ParentMissing(child.files[0], "parent", f"not found: {names}")

    def _open_named(self, child: Image, ref: ParentRef, path: str) -> Image:
        real = os.path.realpath(path, strict=True)
        self._refuse_outside(child, real)
        self._refuse_cycle(child, os.stat(real))
        file = HostFile(real, lock=self._lock)
        # The path may have changed since it was looked at; what counts is what is open.
        try:
            self._refuse_outside(child, _opened_path(file) or real)
            self._refuse_cycle(child, os.fstat(file.fd))
        except BaseException:
            file.close()
            raise
        recorded = ref.format or self._parent_format
        image = self._make(
            file, lambda: _recorded(child, recorded) if recorded else formats.probe(file)
        )
        try:
            if not recorded and (image.parent is not None or len(image.files) > 1):
                raise Denied(
                    child.files[0],
                    "parent",
                    f"records no format for {file}, which looks like {image.name} and names "
                    "further files",
                    hint=f"say --parent-format {image.name} if that is what it is",
                )
            if ref.identity and image.identity and ref.identity != image.identity:
                raise ParentMissing(
                    child.files[0],
                    "parent",
                    f"{file} is {image.identity}, expected {ref.identity}",
                )
            if image.sector_size != child.sector_size:
                raise Unsupported(
                    file,
                    "",
                    f"sectors of {image.sector_size} bytes under an image with {child.sector_size}",
                )
        except BaseException:
            close_image(image)
            raise
        return image

    def _make(self, file: HostFile, driver: Callable[[], type[Image]]) -> Image:
        try:
            self._seen[_inode(os.fstat(file.fd))] = file
            # Image.__init__ takes no argument, every driver's takes the file.
            make: Callable[[HostFile], Image] = driver()
            image = make(file)
            self._memory += image.memory
            if self._memory > MAX_MEMORY:
                text = f"tables of {self._memory} bytes in the chain, the most is {MAX_MEMORY}"
                raise Unsupported(file, "", text)
            return image
        except BaseException:
            file.close()
            raise

    def _refuse_outside(self, child: Image, real: str) -> None:
        if self._allow_outside:
            return
        if not any(os.path.commonpath((root, real)) == root for root in self._roots):
            raise Denied(
                child.files[0],
                "parent",
                f"{real} lies outside of the image's folder",
                hint="--allow-outside if you trust the image",
            )
        if not stat.S_ISREG(os.stat(real).st_mode):
            raise Denied(child.files[0], "parent", f"{real} is not a regular file")

    def _refuse_cycle(self, child: Image, status: os.stat_result) -> None:
        if (known := self._seen.get(_inode(status))) is not None:
            raise Corrupt(child.files[0], "parent", f"the chain comes back to {known}")


def close_image(image: Image) -> None:
    for file in image.files:
        file.close()


def _folders(path: Path) -> Iterator[str]:
    """Where a relative name may start: the folder as named, then, for a link, the real one."""
    named = os.path.dirname(os.path.abspath(path))
    yield named
    if path.is_symlink() and (real := os.path.dirname(os.path.realpath(path))) != named:
        yield real


def _refuse_strange(child: Image, name: str) -> None:
    file = child.files[0]
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        encoded = b""
    if not encoded or len(encoded) > MAX_NAME or b"\0" in encoded:
        raise Corrupt(file, "parent", f"no possible file name: {name[:64]!r}")
    if (match := _SCHEME.match(name)) and match[0] != "file:":
        raise Unsupported(
            file,
            "parent",
            f"{name[:64]!r} is not a local file",
            hint="qemu-img rebase -u -b ./FILE for one whose name is meant so",
        )


def _local(name: str) -> str:
    return name.removeprefix("file:")


def _recorded(child: Image, format: str) -> type[Image]:
    name = QEMU_NAMES.get(format, format)
    try:
        return formats.load(name)
    except Unsupported as error:
        known = ", ".join(formats.TABLE)
        raise Unsupported(
            child.files[0], "parent format", f"{format!r} is not supported, know {known}"
        ) from error


def _opened_path(file: HostFile) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{file.fd}")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES):
            return None  # no /proc here
        raise


def _inode(status: os.stat_result) -> _Inode:
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else 0
    return (0, 0, device) if device else (status.st_dev, status.st_ino, 0)
