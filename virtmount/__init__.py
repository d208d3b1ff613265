"""Virtual disk images as block devices.

with virtmount.attach("disk.vhdx") as disk:     # /dev/vhdx0, needs root
    subprocess.run(["mount", disk.partitions[0], "/mnt"])

with virtmount.open("disk.vhdx") as disk:       # no device, no root
    disk.pread(0, 512)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from virtmount.api import ImageInfo, OpenDisk, inspect, map_extents, open
    from virtmount.attachment import Attachment, attach
    from virtmount.errors import VirtmountError

__version__ = "0.1.0"
__all__ = [
    "Attachment",
    "ImageInfo",
    "OpenDisk",
    "VirtmountError",
    "attach",
    "inspect",
    "map_extents",
    "open",
]
_HOMES = {"Attachment": "attachment", "attach": "attachment", "VirtmountError": "errors"}


def __getattr__(name: str) -> Any:
    """Loaded at first use: `virtmount --version` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"virtmount.{_HOMES.get(name, 'api')}"), name)
