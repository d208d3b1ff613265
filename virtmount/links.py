"""Keeps the links in /dev in step with the partitions that a disk has.

Partitioning an attached disk makes and removes the kernel's nodes; the kernel announces each, and
the links follow.  A thread that waits for the announcement, and sleeps in between.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading

from virtmount import nodes

log = logging.getLogger("virtmount")

_KOBJECT_UEVENT = 15  # NETLINK_KOBJECT_UEVENT (linux/netlink.h); group 1 is the kernel's


class Links:
    """The links of one attached disk, from start() to close().

    Busy from start() if a name is taken.  After it, a name that somebody else took is logged.
    """

    def __init__(self, name: str, kernel_name: str) -> None:
        self._name, self._kernel_name = name, kernel_name
        self._lock = threading.Lock()
        self._closed = False
        self._events: socket.socket | None = None
        # Without the right to listen (a container) the links stay as they are now.
        with contextlib.suppress(OSError):
            self._events = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                _KOBJECT_UEVENT,
            )
            self._events.bind((0, 1))

    def start(self) -> None:
        nodes.make_links(self._name, self._kernel_name)
        if self._events:
            threading.Thread(target=self._follow, name="virtmount-links", daemon=True).start()

    def close(self) -> None:
        """Remove them all; harmless when repeated."""
        with self._lock:
            self._closed = True
            nodes.remove_links(self._name, self._kernel_name)

    def _follow(self) -> None:
        assert self._events
        poll = select.poll()
        poll.register(self._events, select.POLLIN)
        seen = nodes.partitions(self._kernel_name)
        while True:
            poll.poll()
            self._read_all()
            with self._lock:
                if self._closed:
                    return
                found = nodes.partitions(self._kernel_name)
                if found == seen:
                    continue
                seen = found
                try:
                    nodes.make_links(self._name, self._kernel_name)
                except Exception as error:
                    log.warning("links of %s: %s", self._name, error)

    def _read_all(self) -> None:
        """One look is enough for all that was announced; ENOBUFS says that some were lost."""
        assert self._events
        while True:
            try:
                self._events.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                continue
