"""The earlier states that an image holds: `virtmount snapshot`."""

from __future__ import annotations

import os

from virtmount.chain import Opener, close_image
from virtmount.image import DEFAULTS, Options
from virtmount.upkeep import Snapshot


def snapshots(
    path: str | os.PathLike[str], format: str | None = None, *, options: Options = DEFAULTS
) -> list[Snapshot]:
    """Internal snapshots, oldest first; none where the format has no such thing.

    Parents are not opened, and a program may use the image meanwhile.
    """
    image = Opener(path, options=options, lock=False).open_top(format, writable=False)
    try:
        return list(image.snapshots())
    finally:
        close_image(image)
