"""The bytes of a disk, one after the other: `virtmount cat`."""

from __future__ import annotations

import contextlib
import os

from virtmount.api import open as open_disk
from virtmount.copying import (
    Report,
    Run,
    in_order,
    pieces,
    quiet,
    refuse_range,
    write_all,
)
from virtmount.image import DEFAULTS, Options
from virtmount.upkeep import Progress


def cat(
    path: str | os.PathLike[str],
    fd: int,
    format: str | None = None,
    *,
    offset: int = 0,
    length: int | None = None,
    parent_format: str | None = None,
    force: bool = False,
    options: Options = DEFAULTS,
    report: Report = quiet,
) -> int:
    """Write `length` bytes of the disk from `offset` on (or all that follow) to a descriptor.

    Returns how many.  Bounded memory; the image is locked and only read.
    """
    # Not a Source: nobody waits for a map of a large disk to see its first sector.
    with open_disk(path, format, parent_format=parent_format, force=force, options=options) as disk:
        if length is None:
            length = max(0, disk.size - offset)
        refuse_range(path, offset, length, disk.size)
        done = 0
        wanted = pieces([Run(offset, length)])
        with contextlib.closing(in_order(lambda run: disk.pread(*run), wanted)) as parts:
            for data in parts:
                write_all(fd, data)
                done += len(data)
                report(Progress(done, length))
        return done
