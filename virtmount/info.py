"""What an image is, without serving it: `virtmount info`.

Works without root, beside a program that uses the image, and with parents that are missing.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from virtmount.chain import Opener, close_image
from virtmount.errors import VirtmountError
from virtmount.image import DEFAULTS, Chain, Image, Options
from virtmount.upkeep import Snapshot


@dataclass(frozen=True, slots=True)
class ParentInfo:
    """One parent.  With a `problem` it was not opened, and the names are as its child has them."""

    path: str
    format: str | None  # None: the child does not record it
    size: int | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ImageInfo:
    path: str
    format: str
    variant: str
    size: int  # of the guest disk, bytes
    sector_size: int
    physical_sector_size: int
    cluster_size: int
    file_size: int  # all host files, without parents
    allocated: int  # what they take on the host's disk
    identity: str | None
    parents: tuple[ParentInfo, ...]  # nearest first
    state: str  # "in use" where a program has it open for writing, else "idle"
    details: dict[str, Any]  # peculiar to the format

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        return dataclasses.asdict(self)


def inspect(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    allow_outside: bool = False,
    parent_format: str | None = None,
    force: bool = False,
    options: Options | None = None,
) -> ImageInfo:
    """Describe the image at `path`; errors are those of open(), except for those of parents."""
    opener = Opener(
        path,
        options=dataclasses.replace(
            options or Options(allow_outside=allow_outside), described=True
        ),
        parent_format=parent_format,
        force=force,
        lock=False,
    )
    chain = Chain([opener.open_top(format, writable=False)])
    try:
        return _describe(chain.top, _parents(opener, chain))
    finally:
        chain.close()


def snapshots(
    path: str | os.PathLike[str], format: str | None = None, *, options: Options = DEFAULTS
) -> list[Snapshot]:
    """Internal snapshots, oldest first; none where the format has no such thing."""
    told = dataclasses.replace(options, described=True)
    image = Opener(path, options=told, lock=False).open_top(format, writable=False)
    try:
        return list(image.snapshots())
    finally:
        close_image(image)


def _parents(opener: Opener, chain: Chain) -> tuple[ParentInfo, ...]:
    parents: list[ParentInfo] = []
    while (ref := chain.images[-1].parent) is not None:
        try:
            parent = opener.open_parent(chain.images[-1])
        except (VirtmountError, OSError) as error:
            name = ref.names[0] if ref.names else ""
            parents.append(ParentInfo(name, ref.format, problem=str(error)))
            break
        assert parent is not None
        chain.images.append(parent)
        parents.append(ParentInfo(str(parent.files[0]), parent.name, parent.size))
    return tuple(parents)


def _describe(image: Image, parents: tuple[ParentInfo, ...]) -> ImageInfo:
    statuses = [os.fstat(file.fd) for file in image.files]
    return ImageInfo(
        path=str(image.files[0]),
        format=image.name,
        variant=image.variant,
        size=image.size,
        sector_size=image.sector_size,
        physical_sector_size=image.physical_sector_size,
        cluster_size=image.cluster_size,
        file_size=sum(file.size for file in image.files),
        allocated=sum(status.st_blocks * 512 for status in statuses),
        identity=image.identity,
        parents=parents,
        state="in use" if image.files[0].written_elsewhere() else "idle",
        details=image.details(),
    )
