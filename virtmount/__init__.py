"""Virtual disk images as block devices.

with virtmount.attach("disk.vhdx") as disk:     # /dev/vhdx0, needs root
    subprocess.run(["mount", disk.partitions[0], "/mnt"])

with virtmount.open("disk.vhdx") as disk:       # no device, no root
    disk.pread(0, 512)

virtmount.convert("disk.vmdk", "disk.qcow2")    # and create, check, resize, compare, commit, rebase
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from virtmount.api import ImageInfo, OpenDisk, inspect, map_extents, open
    from virtmount.attachment import Attachment, attach
    from virtmount.checking import CheckReport, check
    from virtmount.committing import commit
    from virtmount.comparison import Comparison, compare
    from virtmount.conversion import convert
    from virtmount.creation import create
    from virtmount.errors import VirtmountError
    from virtmount.image import Options
    from virtmount.info import snapshots
    from virtmount.rebasing import rebase
    from virtmount.resizing import resize
    from virtmount.streaming import cat
    from virtmount.upkeep import Finding, Progress, Repair, Severity, Snapshot

__version__ = "0.1.0"
__all__ = [
    "Attachment",
    "CheckReport",
    "Comparison",
    "Finding",
    "ImageInfo",
    "OpenDisk",
    "Options",
    "Progress",
    "Repair",
    "Severity",
    "Snapshot",
    "VirtmountError",
    "attach",
    "cat",
    "check",
    "commit",
    "compare",
    "convert",
    "create",
    "inspect",
    "map_extents",
    "open",
    "rebase",
    "resize",
    "snapshots",
]
# Each name and its module.  No module is called as a function is: importing it would hide that.
_HOMES = {
    "Attachment": "attachment",
    "CheckReport": "checking",
    "Comparison": "comparison",
    "Finding": "upkeep",
    "ImageInfo": "api",
    "OpenDisk": "api",
    "Options": "image",
    "Progress": "upkeep",
    "Repair": "upkeep",
    "Severity": "upkeep",
    "Snapshot": "upkeep",
    "VirtmountError": "errors",
    "attach": "attachment",
    "cat": "streaming",
    "check": "checking",
    "commit": "committing",
    "compare": "comparison",
    "convert": "conversion",
    "create": "creation",
    "inspect": "api",
    "map_extents": "api",
    "open": "api",
    "rebase": "rebasing",
    "resize": "resizing",
    "snapshots": "info",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Loaded at first use: `virtmount --version` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"virtmount.{_HOMES[name]}"), name)
