"""Give a disk another size: `virtmount resize`."""

from __future__ import annotations

import contextlib
import os

from virtmount.api import OpenDisk
from virtmount.chain import open_chain
from virtmount.creation import checked_size
from virtmount.disk import Disk
from virtmount.errors import VirtmountError
from virtmount.hostfile import execute, sync_all
from virtmount.image import DEFAULTS, Chain, Options
from virtmount.info import ImageInfo, inspect
from virtmount.pager import Pager


def resize(
    path: str | os.PathLike[str],
    size: int,
    format: str | None = None,
    *,
    relative: bool = False,
    shrink: bool = False,
    parent_format: str | None = None,
    force: bool = False,
    options: Options = DEFAULTS,
) -> ImageInfo:
    """Make the disk `size` bytes long, or with `relative` by so much longer, in whole sectors.

    New space reads as zeros.  What a smaller disk has no room for is lost, so that needs `shrink`,
    and not every format can.  Partitions and file systems are the user's business, before
    shrinking and after growing.
    """

    def opened(format: str | None) -> Chain:
        return open_chain(
            path,
            format,
            writable=True,
            options=options,
            parent_format=parent_format,
            force=force,
        )

    with contextlib.closing(opened(format)) as chain:
        Disk(chain)  # refuses what cannot be written
        image = chain.top
        name, old = image.name, image.size
        size = checked_size(path, old + size if relative else size, image.sector_size)
        if size < old and not shrink:
            text = f"{size} bytes is less than {old}: the rest would be lost"
            raise VirtmountError(path, "", text, hint="--shrink if that is meant")
        if size != old:
            execute(image.resize(size), image.files)
            sync_all(image.files)
        shown = min(size, max((parent.size for parent in chain.images[1:]), default=0))
    if old < shown:
        # What a longer parent has behind the old end was hidden, and would show now.
        with OpenDisk(Pager(Disk(opened(name))).start()) as disk:
            disk.write_zeroes(old, shown - old)
    return inspect(path, name, parent_format=parent_format, force=force, options=options)
