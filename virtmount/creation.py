"""Make an image: `virtmount create`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from virtmount import formats
from virtmount.chain import Opener, close_image, open_chain
from virtmount.disk import round_up
from virtmount.errors import NotAnImage, Unsupported, VirtmountError
from virtmount.hostfile import execute
from virtmount.image import DEFAULTS, Image, Options
from virtmount.info import ImageInfo, inspect
from virtmount.sizes import MAX_SIZE, complete_options
from virtmount.staging import Staging
from virtmount.upkeep import New

SECTOR_SIZES = (512, 4096)


def create(
    path: str | os.PathLike[str],
    size: int | None = None,
    format: str | None = None,
    *,
    settings: Mapping[str, str] | None = None,
    parent: str | os.PathLike[str] | None = None,
    parent_format: str | None = None,
    sector_size: int | None = None,
    overwrite: bool = False,
    force: bool = False,
    options: Options = DEFAULTS,
) -> ImageInfo:
    """Make an empty image of `size` bytes, in `format` or in the one of the name's suffix.

    With a `parent` it is a differencing image that reads as the parent does until it is written;
    size and sector size are then the parent's where they are not given.  `settings` are the
    format's own options (`virtmount create -o help`).  `options` is about opening the parent; its
    passphrase is also the new image's, where that is to be encrypted.

    The image appears when it is whole; nothing is replaced without `overwrite`, which takes no
    image that is in use.
    """
    driver = driver_for(path, format)
    values = complete_options(driver, settings or {})
    with contextlib.ExitStack() as stack:
        base: Image | None = None
        name = ""
        never: list[Path] = []
        if parent is not None:
            chain = open_chain(parent, parent_format, options=options, force=force)
            stack.callback(chain.close)
            base = chain.top
            name = recorded_name(path, parent)
            never = [file.path for image in chain.images for file in image.files]
        if size is None:
            if base is None:
                raise VirtmountError(path, "", "say its size, or --parent")
            size = base.size
        if sector_size is None:
            sector_size = base.sector_size if base else 512
        size = checked_size(path, size, sector_size)
        staging = stack.enter_context(Staging(path, overwrite=overwrite, never=never))
        new = new_image(staging, size, values, sector_size, base, name, options.passphrase)
        execute(driver.create(new), staging.files)
        staging.seal()
        verify(driver, staging, size, options)
        staging.publish()
    told = dataclasses.replace(options, allow_outside=True, snapshot=None, size_from=None)
    return inspect(path, driver.name, options=told)


def driver_for(path: str | os.PathLike[str], format: str | None) -> type[Image]:
    """The driver that makes `format`, or what the suffix of the name stands for."""
    if format is not None:
        driver = formats.load(format)
        if not driver.creates:
            known = ", ".join(able.name for able in creating())
            text = f"{driver.name} images cannot be made, know {known}"
            raise Unsupported(path, "", text)
        return driver
    suffix = os.path.splitext(os.fspath(path))[1].removeprefix(".").lower()
    able = creating()
    # A suffix may be the usual one of one format, and a seldom one of another.
    for usual in (True, False):
        for driver in able:
            if suffix in (driver.suffixes[:1] if usual else driver.suffixes):
                return driver
    known = ", ".join(f".{driver.suffixes[0]}" for driver in able if driver.suffixes)
    text = f"no format has the suffix {suffix!r}, know {known}" if suffix else "no suffix"
    raise Unsupported(path, "", text, hint="say --format")


def creating() -> list[type[Image]]:
    """The drivers that can make images."""
    drivers = (formats.load(name) for name in formats.TABLE)
    return [driver for driver in drivers if driver.creates]


def checked_size(path: str | os.PathLike[str], size: int, sector_size: int) -> int:
    """`size` in whole sectors, rounded up."""
    if sector_size not in SECTOR_SIZES:
        raise Unsupported(path, "", f"sectors of {sector_size} bytes, know 512 and 4096")
    if not 0 < size <= MAX_SIZE:
        raise Unsupported(path, "", f"a disk of {size} bytes, know 1 to {MAX_SIZE}")
    return round_up(size, sector_size)


def recorded_name(child: str | os.PathLike[str], parent: str | os.PathLike[str]) -> str:
    """The parent's path as seen from the child's folder."""
    folder = os.path.dirname(os.path.realpath(child))
    return os.path.relpath(os.path.realpath(parent), folder)


def new_image(
    staging: Staging,
    size: int,
    values: Mapping[str, str],
    sector_size: int,
    parent: Image | None = None,
    parent_name: str = "",
    passphrase: Callable[[], bytes] | None = None,
) -> New:
    return New(
        files=staging.files,
        name=staging.target.name,
        size=size,
        options=values,
        add=staging.add,
        sector_size=sector_size,
        parent=parent,
        parent_name=parent_name,
        passphrase=passphrase,
    )


def verify(driver: type[Image], staging: Staging, size: int, options: Options) -> None:
    """Refuse to hand out what we would not open ourselves."""
    try:
        opener = Opener(staging.path, options=opening(options))
        image = opener.open_top(driver.name, writable=False)
    except NotAnImage as error:
        raise VirtmountError(
            staging.target, "", f"the new {driver.name} image cannot be opened: {error}"
        ) from error
    close_image(image)
    if image.size < size:
        text = f"the new {driver.name} image holds {image.size} bytes of {size}"
        raise VirtmountError(staging.target, "", text)


def opening(options: Options) -> Options:
    """How the new image itself is opened: what is about another image is left out."""
    return Options(passphrase=options.passphrase, changing_parent=True)
