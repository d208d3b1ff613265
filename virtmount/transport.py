"""What brings a disk before the kernel: ublk, FUSE under loop, or loop alone.

The life of a transport, on the daemon's main thread (loop alone: on the caller's, no daemon):

    made       the disk is open; nothing is on the system yet
    start()    the device exists, is served, and its partitions were looked for: nodes are in /dev
    stop()     the device is gone; no request is under way any more.  Then the Pager is closed,
               which flushes: a transport never flushes the image itself

`start` undoes what it did before it raises.  Links in /dev and the record in /run are not the
transport's business (nodes.py, state.py).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, ClassVar


class Transport(ABC):
    """One device.  `name` is what --transport says and `list` shows."""

    name: ClassVar[str]
    daemon: ClassVar[bool] = True  # a process of ours must live as long as the device

    device: str = ""  # the kernel's own node, /dev/ublkb0 or /dev/loop3, once started
    features: dict[str, Any]  # what was chosen and granted; plain values, for list --json

    @property
    def kernel_name(self) -> str:
        """ublkb0, loop3: the name under /sys/block."""
        return os.path.basename(self.device)

    @abstractmethod
    def start(self) -> str:
        """Create the device, serve it, wait for its partitions; returns `device`.

        Raises NoTransport where this kernel cannot, Denied without root; OSError otherwise.
        """

    @abstractmethod
    def stop(self) -> None:
        """Take the device away, in use or not; harmless when it is gone or was never there.

        Requests under way end first, with data where the server still answers.  Whoever still has
        the device open sees EIO: asking before is the caller's business.
        """

    @abstractmethod
    def wait_gone(self, timeout: float | None = None) -> bool:
        """Wait until somebody else took the device away; False after `timeout` seconds.

        Woken by stop() too.  Called on a thread of its own.
        """
