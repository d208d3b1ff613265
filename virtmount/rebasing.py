"""Give a differencing image another parent: `virtmount rebase`."""

from __future__ import annotations

import contextlib
import dataclasses
import os

from virtmount import extents
from virtmount.api import OpenDisk
from virtmount.chain import Opener, close_image, open_chain
from virtmount.copying import (
    Content,
    Report,
    Run,
    Source,
    common,
    differences,
    in_order,
    is_same_file,
    pieces,
    quiet,
    union,
)
from virtmount.creation import recorded_name
from virtmount.disk import Disk
from virtmount.errors import Unsupported, VirtmountError
from virtmount.hostfile import execute, sync_all
from virtmount.image import DEFAULTS, Chain, Image, Kind, Options
from virtmount.info import ImageInfo, inspect
from virtmount.pager import Pager
from virtmount.upkeep import Progress


def rebase(
    path: str | os.PathLike[str],
    parent: str | os.PathLike[str] | None,
    format: str | None = None,
    *,
    new_format: str | None = None,
    unsafe: bool = False,
    parent_format: str | None = None,
    force: bool = False,
    options: Options = DEFAULTS,
    report: Report = quiet,
) -> ImageInfo:
    """Record `parent` (or with None no parent), of `new_format` or by its content, in the child.

    What the child reads as stays: where the old parent and the new one differ, the old one's data
    is copied into the child first.  `unsafe` copies nothing and does not open the old parent: for
    a parent that was moved, or that is known to be the same.  Cut at any moment, the child reads
    as before, over the old parent or over the new one.
    """
    if parent is not None and is_same_file(path, parent):
        raise VirtmountError(path, "", "an image cannot be its own parent")
    name = "" if parent is None else recorded_name(path, parent)
    with contextlib.ExitStack() as stack:
        new: Chain | None = None
        if parent is not None:
            new = open_chain(parent, new_format, options=_of_parent(options), force=force)
            stack.callback(new.close)
        base = new.top if new else None
        found = _try(path, format, base, name, options)
        if not unsafe:
            old = open_chain(
                path,
                found,
                writable=True,
                options=options,
                parent_format=parent_format,
                force=force,
            )
            _copy_differences(old, new, report)
            if parent is not None:  # it was handed to the engine, and closed
                new = open_chain(parent, new_format, options=_of_parent(options), force=force)
                stack.callback(new.close)
                base = new.top
        record(path, found, base, name, options)
    told = dataclasses.replace(options, allow_outside=True)
    return inspect(path, found, parent_format=parent_format, force=force, options=told)


def _of_parent(options: Options) -> Options:
    """The user named the new parent, and has said whether it may lead further."""
    return dataclasses.replace(options, snapshot=None, size_from=None)


def _try(
    path: str | os.PathLike[str],
    format: str | None,
    base: Image | None,
    name: str,
    options: Options,
) -> str:
    """Refuse before anything is copied; the child's format."""
    told = dataclasses.replace(options, changing_parent=True)
    image = Opener(path, options=told).open_top(format, writable=True)
    try:
        if image.snapshots():
            text = "its snapshots would show the other parent's data"
            raise Unsupported(path, "", text)
        if base is not None and base.sector_size != image.sector_size:
            text = f"sectors of {base.sector_size} bytes under an image with {image.sector_size}"
            raise Unsupported(path, "", text)
        image.rebase(base, name)  # the plan is not carried out: nothing has been copied
        return image.name
    finally:
        close_image(image)


def record(
    path: str | os.PathLike[str], format: str, base: Image | None, name: str, options: Options
) -> None:
    """Only what the child says about its parent."""
    told = dataclasses.replace(options, changing_parent=True)
    image = Opener(path, options=told).open_top(format, writable=True)
    try:
        execute(image.rebase(base, name), image.files)
        sync_all(image.files)
    finally:
        close_image(image)


def _copy_differences(old: Chain, new: Chain | None, report: Report) -> None:
    """Write into the child what it has from its parents, where the new ones have something else.

    Closes both chains.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(old.close)
        child = old.top
        disk = Disk(old)
        absent, shown = Content(disk.size, child.cluster_size), Content(disk.size)
        for extent in extents.Layer(child).runs(0, disk.size):
            if extent.kind is Kind.ABSENT:
                absent.mark(extent.guest_offset, extent.length)
        for mapped in extents.mapped(old):
            if mapped.depth and not mapped.zero:
                shown.mark(mapped.start, mapped.length)
        other = stack.enter_context(Source(new)) if new is not None else None
        hidden = other.content.runs() if other else iter(())
        wanted = list(common(absent.runs(), union(shown.runs(), hidden)))
        opened = stack.enter_context(OpenDisk(Pager(disk).start()))

        def differing(run: Run) -> tuple[Run, bytes, list[Run]]:
            mine = opened.pread(run.start, run.length)
            theirs = other.read(run) if other else bytes(len(mine))
            return run, mine, list(differences(mine, theirs))

        done, total = 0, sum(run.length for run in wanted)
        with contextlib.closing(in_order(differing, pieces(wanted))) as parts:
            for run, data, changes in parts:
                for change in changes:
                    opened.pwrite(run.start + change.start, data[change.start : change.end])
                done += run.length
                report(Progress(done, total))
