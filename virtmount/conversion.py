"""Write the disk of one image into a new image: `virtmount convert`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from virtmount.api import OpenDisk
from virtmount.api import open as open_disk
from virtmount.copying import (
    PIECE,
    Report,
    Run,
    Source,
    copy,
    in_order,
    is_zero,
    open_source,
    pieces,
    quiet,
)
from virtmount.creation import checked_size, driver_for, new_image, opening, verify
from virtmount.hostfile import execute
from virtmount.image import DEFAULTS, Image, Options
from virtmount.info import ImageInfo, inspect
from virtmount.sizes import complete_options
from virtmount.staging import Staging
from virtmount.upkeep import New, Packer, Progress

Packed = tuple[int, bytes, bool]  # cluster, its bytes, whether they are compressed


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: str | None = None,
    *,
    source_format: str | None = None,
    settings: Mapping[str, str] | None = None,
    compress: bool = False,
    sector_size: int | None = None,
    overwrite: bool = False,
    parent_format: str | None = None,
    force: bool = False,
    options: Options = DEFAULTS,
    report: Report = quiet,
) -> ImageInfo:
    """Make `target`, in `format` or in the one of its suffix, with what the disk of `source` holds.

    Parents are read through, so the new image stands alone.  Zeros take no space in it.  The
    source is locked and only read.  The target appears under its name when it is whole and
    durable, and not at all if anything fails.  `options`, `parent_format` and `force` are about
    the source, `settings` are create()'s.  `report` is called with bytes read and to be read.
    """
    driver = driver_for(target, format)
    values = complete_options(driver, settings or {})
    with open_source(
        source, source_format, parent_format=parent_format, force=force, options=options
    ) as disk:
        sectors = sector_size or disk.disk.sector_size
        size = checked_size(target, disk.size, sectors)
        never = [file.path for image in disk.chain.images for file in image.files]
        with Staging(target, overwrite=overwrite, never=never) as staging:
            new = new_image(staging, size, values, sectors, passphrase=options.passphrase)
            if compress:
                _pack(driver.packer(new), new, disk, report)
                staging.seal()
            else:
                execute(driver.create(new), staging.files)
                staging.seal()
                with _opened(driver, staging, options) as made:
                    copy(disk, made, report)
            verify(driver, staging, disk.size, options)
            staging.publish()
    return inspect(target, driver.name, options=Options(passphrase=options.passphrase))


@contextlib.contextmanager
def _opened(driver: type[Image], staging: Staging, options: Options) -> Iterator[OpenDisk]:
    """The new image; whole and durable afterwards."""
    with open_disk(staging.path, driver.name, writable=True, options=opening(options)) as disk:
        yield disk


def _pack(packer: Packer, new: New, source: Source, report: Report) -> None:
    """Compressed: threads read and encode, this one writes."""
    size = packer.cluster_size
    step = max(size, PIECE // size * size)

    def encoded(run: Run) -> tuple[Run, list[Packed]]:
        clusters: list[Packed] = []
        # From the first cluster's start: a run of data may begin inside of one.
        start, end = run.start // size * size, run.end
        for part in pieces([Run(start, min(-(-end // size) * size, source.size) - start)], size):
            data = source.read(part)
            if is_zero(data):
                continue
            packed = packer.encode(data + bytes(size - len(data)))
            entry = data if packed is None else packed
            clusters.append((part.start // size, entry, packed is not None))
        return run, clusters

    done, total = 0, source.content.total
    next_cluster = 0  # a cluster may be in two pieces, where the runs are finer than it
    with contextlib.closing(in_order(encoded, pieces(source.content.runs(), step))) as parts:
        for run, clusters in parts:
            for cluster, data, packed in clusters:
                if cluster >= next_cluster:
                    execute(packer.add(cluster, data, packed), new.files)
                    next_cluster = cluster + 1
            done += run.length
            report(Progress(done, total))
    execute(packer.end(), new.files)
