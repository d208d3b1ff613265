"""Write what a differencing image holds into its parent: `virtmount commit`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from virtmount import extents
from virtmount.api import OpenDisk
from virtmount.chain import Opener, close_image, open_chain
from virtmount.copying import PIECE, Report, Run, in_order, pieces, quiet
from virtmount.disk import Disk, round_up
from virtmount.errors import Corrupt, Unsupported, VirtmountError
from virtmount.image import DEFAULTS, Chain, Image, Kind, Options
from virtmount.info import ImageInfo, inspect
from virtmount.pager import Pager
from virtmount.rebasing import record
from virtmount.resizing import resize
from virtmount.siblings import roots
from virtmount.upkeep import Progress

ZERO_STEP = 1 << 30


class _Parent(NamedTuple):
    path: str
    format: str
    size: int
    name: str  # as the child records it


class _Piece(NamedTuple):
    run: Run
    zero: bool


def commit(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    parent_format: str | None = None,
    force: bool = False,
    options: Options = DEFAULTS,
    report: Report = quiet,
) -> ImageInfo:
    """Make the parent of the image at `path` read as the image does; the parent, afterwards.

    The child keeps its data and can be used on or be deleted; where it records the parent's state,
    it records the new one.  The parent grows where the child is longer.  Every other child of that
    parent is spoilt.  Cut at any moment, the child still reads as before, but a format that
    records the parent's state then wants `force`, also to commit once more.
    """
    opener = Opener(path, options=options, parent_format=parent_format, force=force)
    child = opener.open_top(format, writable=False)
    with contextlib.ExitStack() as stack:
        stack.callback(close_image, child)
        if child.snapshots():
            text = "its snapshots are based on the parent, which would change under them"
            raise Unsupported(path, "", text)
        parent = _parent(opener, child)
        below = dataclasses.replace(
            options,
            snapshot=None,
            size_from=None,
            roots=(*roots(Path(path)), *roots(Path(parent.path))),
        )
        if round_up(child.size, child.sector_size) > parent.size:
            resize(
                parent.path,
                round_up(child.size, child.sector_size),
                parent.format,
                force=force,
                options=below,
            )
        chain = open_chain(parent.path, parent.format, writable=True, options=below, force=force)
        _write_into(chain, _alone(path, child.name, options), child, report)
    _record_again(path, child.name, parent, below, options)
    told = dataclasses.replace(below, allow_outside=True)
    return inspect(parent.path, parent.format, force=force, options=told)


def _parent(opener: Opener, child: Image) -> _Parent:
    image = opener.open_parent(child)
    if image is None:
        raise VirtmountError(child.files[0], "", "has no parent to commit into")
    try:
        ref = child.parent
        assert ref is not None
        path = os.path.realpath(image.files[0].path)
        name = os.path.relpath(path, os.path.dirname(os.path.realpath(child.files[0].path)))
        if ref.names and not ref.searched:
            name = ref.names[0]
        return _Parent(path, image.name, round_up(image.size, image.sector_size), name)
    finally:
        close_image(image)


def _alone(path: str | os.PathLike[str], format: str, options: Options) -> Chain:
    """The child once more, without parents: only what it holds itself will be read."""
    return Chain([Opener(path, options=options).open_top(format, writable=False)])


def _write_into(parent: Chain, own: Chain, child: Image, report: Report) -> None:
    """Closes both chains.  `child` is what is asked where data lies: nobody writes to it now."""
    with contextlib.ExitStack() as stack:
        stack.callback(parent.close)
        stack.callback(own.close)
        disk = Disk(own)
        target = stack.enter_context(OpenDisk(Pager(Disk(parent)).start()))
        source = stack.enter_context(OpenDisk(Pager(disk).start()))

        def read(piece: _Piece) -> tuple[_Piece, bytes]:
            return piece, b"" if piece.zero else source.pread(*piece.run)

        with contextlib.closing(in_order(read, _pieces(child, disk.size))) as parts:
            for piece, data in parts:
                if piece.zero:
                    target.write_zeroes(*piece.run)
                else:
                    target.pwrite(piece.run.start, data)
                report(Progress(piece.run.end, disk.size))


def _pieces(child: Image, size: int) -> Iterator[_Piece]:
    """What the child itself says, exactly: the rest of the parent must stay as it is."""
    for extent in extents.Layer(child).runs(0, size):
        if extent.kind is Kind.ABSENT:
            continue
        if extent.kind is Kind.INVALID:
            text = f"guest bytes {extent.guest_offset} to {extent.guest_offset + extent.length - 1}"
            raise Corrupt(child.files[0], "", f"{text} cannot be read: not committed")
        zero = extent.kind is Kind.ZERO
        run = Run(extent.guest_offset, min(extent.length, size - extent.guest_offset))
        for piece in pieces([run], ZERO_STEP if zero else PIECE):
            yield _Piece(piece, zero)


def _record_again(
    path: str | os.PathLike[str], format: str, parent: _Parent, below: Options, options: Options
) -> None:
    """Writing has changed the parent's state; the child that knows the old one learns the new."""
    chain = open_chain(parent.path, parent.format, options=below)
    with contextlib.closing(chain):
        told = dataclasses.replace(options, changing_parent=True)
        child = Opener(path, options=told).open_top(format, writable=False)
        ref = child.parent
        close_image(child)
        assert ref is not None
        pairs = ((ref.stamp, chain.top.stamp), (ref.identity, chain.top.identity))
        if any(old and new and old != new for old, new in pairs):
            record(path, format, chain.top, parent.name, options)
