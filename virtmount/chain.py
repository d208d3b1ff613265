"""Open an image together with the images that it is based on.

A parent's name comes out of a file that a stranger may have written, so by default it leads only
to regular files in or below the folder of the image that the user named, links resolved; the
name is taken as a local path, never as a URL or as qemu's json: text.  A parent's format is the
recorded one.  Where none is recorded, a guess is enough for a parent that names no further file:
else whoever wrote the guest bytes of a raw parent could turn it into an image that leads
anywhere (CVE-2008-2004 and its many children).
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable
from pathlib import Path

from virtmount import formats
from virtmount.errors import Corrupt, Denied, NotAnImage, ParentMissing, Unsupported
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Chain, Image, Options, ParentRef
from virtmount.siblings import (
    NO_SUCH_FILE,
    folders,
    opened_path,
    refuse_outside,
    refuse_strange,
    roots,
)

MAX_DEPTH = 64
MAX_MEMORY = 64 << 20  # twice the longest table of one image

# What qemu records as a format, and what we call it.
QEMU_NAMES = {"vpc": "vhd", "host_device": "raw", "file": "raw"}

_Inode = tuple[int, int, int]


def open_chain(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    writable: bool = False,
    options: Options = DEFAULTS,
    parent_format: str | None = None,
    force: bool = False,
    lock: bool = True,
) -> Chain:
    """The image at `path`, as `format` or by its content, and its parents, which are only read.

    `parent_format` is for a parent whose child does not record one.  `force` takes a parent that
    was changed since, or that is another one, as it is.  Everything is locked, and everything is
    closed again if anything is wrong.
    """
    opener = Opener(path, options=options, parent_format=parent_format, force=force, lock=lock)
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
        options: Options = DEFAULTS,
        parent_format: str | None = None,
        force: bool = False,
        lock: bool = True,
    ) -> None:
        self.path = Path(path)
        # A link to the image: both the link's folder and the image's own are what the user meant.
        self._options = dataclasses.replace(options, roots=options.roots or roots(self.path))
        self._parent_format = parent_format
        self._force = force
        self._lock = lock
        self._seen: dict[_Inode, HostFile] = {}
        self._memory = 0

    def open_top(self, format: str | None, *, writable: bool) -> Image:
        file = HostFile(self.path, writable=writable, lock=self._lock)
        return self._make(
            file,
            self._options,
            lambda: formats.load(format) if format else formats.probe(file),
        )

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
            refuse_strange(child.files[0], "parent", name)
        first: Exception | None = None
        for name in ref.names:
            for folder in folders(child.files[0].path):
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
        if ref.searched and not ref.names:
            raise ParentMissing(
                child.files[0],
                "parent",
                f"no image {ref.identity or ref.stamp} found around it",
                hint="--search-path FOLDER",
            )
        names = " or ".join(map(repr, ref.names)) or "no name"
        raise ParentMissing(child.files[0], "parent", f"not found: {names}")

    def _open_named(self, child: Image, ref: ParentRef, path: str) -> Image:
        real = os.path.realpath(path, strict=True)
        options = self._options
        if ref.searched:  # the user said where to look
            searched = map(os.path.realpath, options.search_path)
            options = dataclasses.replace(options, roots=(*options.roots, *searched))
        refuse_outside(child.files[0], "parent", real, options)
        self._refuse_cycle(child, os.stat(real))
        file = HostFile(real, lock=self._lock)
        # The path may have changed since it was looked at; what counts is what is open.
        try:
            refuse_outside(child.files[0], "parent", opened_path(file) or real, options)
            self._refuse_cycle(child, os.fstat(file.fd))
        except BaseException:
            file.close()
            raise
        recorded = ref.format or self._parent_format
        image = self._make(
            file,
            dataclasses.replace(self._options, snapshot=None, size_from=None),
            lambda: _recorded(child, recorded) if recorded else formats.probe(file),
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
            self._compare(child, ref, image)
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

    def _make(self, file: HostFile, options: Options, driver: Callable[[], type[Image]]) -> Image:
        try:
            self._seen[_inode(os.fstat(file.fd))] = file
            # Image.__init__ takes no argument, every driver's takes these.
            make: Callable[[HostFile, Options], Image] = driver()
            image = make(file, options)
            self._memory += image.memory
            if self._memory > MAX_MEMORY:
                text = f"tables of {self._memory} bytes in the chain, the most is {MAX_MEMORY}"
                raise Unsupported(file, "", text)
            if options.snapshot is not None and not image.snapshots():
                close_image(image)  # what it shows is not what was asked for
                text = f"no snapshot {options.snapshot!r}: {image.name} images hold none"
                raise NotAnImage(file, "--snapshot", text)
            return image
        except BaseException:
            file.close()
            raise

    def _compare(self, child: Image, ref: ParentRef, parent: Image) -> None:
        """Refuse a parent that is not what the child was based on: the child's data would be mixed
        with something else."""
        if self._force:
            return
        for what, expected, found in (
            ("is", ref.identity, parent.identity),
            ("was written since, its state is", ref.stamp, parent.stamp),
        ):
            if expected and found and expected != found:
                raise ParentMissing(
                    child.files[0],
                    "parent",
                    f"{parent.files[0]} {what} {found}, expected {expected}",
                    hint="--force to use it all the same",
                )

    def _refuse_cycle(self, child: Image, status: os.stat_result) -> None:
        if (known := self._seen.get(_inode(status))) is not None:
            raise Corrupt(child.files[0], "parent", f"the chain comes back to {known}")


def close_image(image: Image) -> None:
    for file in image.files:
        file.close()


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


def _inode(status: os.stat_result) -> _Inode:
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else 0
    return (0, 0, device) if device else (status.st_dev, status.st_ino, 0)
