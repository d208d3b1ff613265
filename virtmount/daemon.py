"""The process behind one attached disk: opens it, serves it, ends in order.

Started by attachment.attach() in a session of its own, with one end of a socket as its only
descriptor; also the body of `attach --foreground`.  In order:

    import everything, open the image and its parents (locked from here on)
    choose the transport, have its driver loaded
    take a name, isolate the process, start the Pager, start the device, make the links
    report readiness; loop alone ends here, the kernel goes on by itself
    wait for SIGTERM, SIGINT or the device's end
    stop the device, remove the links, flush and close the image, remove the record

1. A failure before readiness is undone wholly, and reported with its class, words and errno.
2. After readiness nothing is imported, and nothing is written but to the image and to
   /run/virtmount, where the log is.
3. If the last flush fails, the record stays, with the error, for `detach` and `list` to tell.
4. Signals are taken by the main thread alone, by waiting for them: no handler ever runs.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import json
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from virtmount import loop, nodes, process, state
from virtmount.attachment import ASK, Order, Passphrase, clear
from virtmount.chain import open_chain
from virtmount.disk import Disk
from virtmount.errors import Denied, NoTransport, VirtmountError
from virtmount.image import Chain, Options
from virtmount.links import Links
from virtmount.overlay import lay_over
from virtmount.pager import Pager
from virtmount.state import Record
from virtmount.transport import Transport

log = logging.getLogger("virtmount")

TRANSPORTS = ("auto", "ublk", "fuse", "loop")
ENDING = frozenset({signal.SIGTERM, signal.SIGINT})
GONE = signal.SIGUSR1  # from our own thread to the main one
LOG_BYTES = 1 << 20


class Session:
    """One disk from its opening to its end; on the main thread."""

    def __init__(
        self, order: Order, *, passphrase: Passphrase | None = None, stay: bool = False
    ) -> None:
        self.order, self.passphrase, self.stay = order, passphrase, stay
        self.record = Record("", os.path.abspath(order.image))
        self.disk: Disk | None = None
        self.pager: Pager | None = None
        self.transport: Transport | None = None
        self.links: Links | None = None

    def attach(self) -> Record:
        """Everything until the device can be used; undone where it fails."""
        # Before the first thread, which inherits it.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING | {GONE})
        try:
            self._attach()
        except BaseException:
            with contextlib.suppress(Exception):
                self.end()
            raise
        return self.record

    def _attach(self) -> None:
        order = self.order
        process.protect()
        chain = open_chain(
            order.image,
            order.format,
            writable=not (order.read_only or order.snapshot or order.overlay is not None),
            options=Options(
                allow_outside=order.allow_outside,
                search_path=tuple(order.search_path),
                snapshot=order.snapshot,
                size_from=order.size_from,
                passphrase=self.passphrase,
            ),
            parent_format=order.parent_format,
            force=order.force,
        )
        try:
            self._describe(chain)
            if order.overlay is not None and not order.read_only:
                chain = lay_over(chain, order.overlay)
            self.disk = Disk(chain, cache=order.cache)
        except BaseException:
            chain.close()
            raise
        record = self.record
        record.size, record.read_only = self.disk.size, not self.disk.writable
        record.cache = self.disk.cache
        chosen = choose(order.transport, self.disk)
        served = self.stay or chosen is not make_loop
        self.record.stamp(os.getpid())
        stem = self.record.format.rstrip("0123456789")
        state.claim(self.record, stem, order.name, clear)
        if served:
            process.isolate()
            threading.stack_size(process.STACK)
        self.transport, self.pager = chosen(self.disk, self.record.name)
        self.record.transport = self.transport.name
        self.record.device = self.transport.start()
        self.record.features = self.transport.features
        self.links = Links(self.record.name, self.record.kernel_name)
        self.links.start()
        if served:
            process.settle((str(state.folder().resolve()),))
        else:
            self.record.stamp(0)
        self.record.state = state.ATTACHED
        self.record.since = state.now()
        self.record.save()

    def _describe(self, chain: Chain) -> None:
        """What the images are; an overlay is none of them."""
        record, image = self.record, chain.top
        record.format, record.variant = image.name, image.variant
        record.sector_size = image.sector_size
        record.overlay = "" if self.order.read_only else self.order.overlay or ""
        record.parents = [str(parent.files[0].path.resolve()) for parent in chain.images[1:]]
        record.file_id = state.file_id(f"/proc/self/fd/{image.files[0].fd}")
        record.data_id = state.file_id(f"/proc/self/fd/{image.files[image.flat_file].fd}")

    def wait(self) -> None:
        """Until a signal, or until somebody else took the device away."""
        transport, main = self.transport, threading.main_thread().ident
        assert transport
        assert main

        def watch() -> None:
            transport.wait_gone(None)
            signal.pthread_kill(main, GONE)

        threading.Thread(target=watch, name="watch", daemon=True).start()
        got = signal.sigwait(ENDING | {GONE})
        log.info("ending: %s", "the device is gone" if got == GONE else signal.Signals(got).name)

    def end(self) -> None:
        """Take everything back, in order; the first error is raised after all was tried."""
        record, errors = self.record, []

        def attempt(step: Callable[[], object]) -> None:
            try:
                step()
            except Exception as error:
                log.error("ending: %s", error, exc_info=not isinstance(error, OSError))
                errors.append(error)

        named = bool(record.name)
        if named and record.state == state.ATTACHED:
            record.state = state.ENDING
            attempt(record.save)
        if self.transport:
            attempt(self.transport.stop)
        if self.links:
            attempt(self.links.close)
        if self.pager:
            attempt(self.pager.close)
        if self.disk:
            attempt(self.disk.close)
        if named:
            if errors and record.state == state.ENDING:
                record.state, record.error = state.FAILED, str(errors[0])
                attempt(record.save)
            else:
                attempt(record.remove)
        if errors:
            raise errors[0]


Made = tuple[Transport, Pager | None]
Make = Callable[[Disk, str], Made]  # the disk, and its name in /dev


def choose(wish: str, disk: Disk) -> Make:
    """What makes the transport for this disk, or NoTransport.

    Everything is imported and the kernel's drivers are loaded; no device is created yet.
    """
    if wish not in TRANSPORTS:
        raise VirtmountError("--transport", "", f"{wish!r}, know {', '.join(TRANSPORTS)}")
    if wish == "auto":
        # A flat image needs nobody's help but the kernel's.
        if loop.unsuitable(disk) is None:
            return make_loop
        try:
            return _prepare_ublk()
        except NoTransport as error:
            log.info("%s; trying FUSE under loop", error)
            return _prepare_fuse()
    return {"loop": lambda: make_loop, "ublk": _prepare_ublk, "fuse": _prepare_fuse}[wish]()


def make_loop(disk: Disk, name: str) -> Made:
    return loop.Loop(disk), None


def _prepare_fuse() -> Make:
    from virtmount.fuse import EngineDisk, Fuse, load_library

    load_library()

    def make_fuse(disk: Disk, name: str) -> Made:
        pager = Pager(disk).start()
        transport = Fuse(
            EngineDisk(pager.engine),
            name,
            sector_size=disk.sector_size,
            cluster_size=disk.image.cluster_size,
            read_only=not disk.writable,
            can_discard=disk.can_discard,
        )
        return transport, pager

    return make_fuse


def _prepare_ublk() -> Make:
    from virtmount.ublk import features
    from virtmount.ublk.device import UblkDevice
    from virtmount.ublk.params import Params

    with features.open_control() as control:
        features.known(control)

    def make_ublk(disk: Disk, name: str) -> Made:
        params = Params(
            size=disk.size,
            sector_size=disk.sector_size,
            physical_sector_size=disk.image.physical_sector_size,
            cluster_size=disk.image.cluster_size,
            read_only=not disk.writable,
            volatile_cache=disk.cache != "writethrough",
            discard=disk.can_discard,
            zero_copy=not disk.encrypted,
        )
        pager = Pager(disk).start()
        engine = pager.engine

        def show(kernel_name: str) -> None:
            nodes.show_partitions(
                kernel_name, engine.read, disk.size, disk.sector_size, scanned=True
            )

        return UblkDevice(params, engine.ublk_serve, pager.device_gone, show=show), pager

    return make_ublk


def run(
    order: Order,
    report: Callable[[Record], None],
    *,
    passphrase: Passphrase | None = None,
    stay: bool = False,
) -> None:
    """Attach, tell `report`, and serve until the end.

    Where the kernel needs no help the end is now, unless we shall `stay` in the foreground.
    """
    session = Session(order, passphrase=passphrase, stay=stay)
    record = session.attach()
    if not record.pid:
        report(record)
        return
    try:
        report(record)
        session.wait()
    finally:
        session.end()


# The process and its parent: one line of JSON each way.


def main(descriptor: int) -> int:
    """The whole process: the order comes in at `descriptor`, a report goes out, nothing follows."""
    process.set_name("virtmount")
    with socket.socket(fileno=descriptor) as channel:
        order = Order(**json.loads(receive(channel)))
        try:
            run(
                order,
                lambda record: _ready(channel, record),
                passphrase=functools.cache(lambda: _ask(channel)),
            )
        except BaseException as error:
            if channel.fileno() >= 0:
                with contextlib.suppress(OSError):
                    channel.sendall(_failure(error))
            log.error("%s", error, exc_info=not isinstance(error, OSError | VirtmountError))
            return getattr(error, "exit_code", 1)
    return 0


def _ask(channel: socket.socket) -> bytes:
    """The passphrase, from whoever gave the order."""
    channel.sendall(ASK)
    answer = receive(channel)
    if not answer.endswith(b"\n"):
        raise Denied("virtmount", "", "encrypted, and nobody is there to say the passphrase")
    return base64.b64decode(answer)


def _ready(channel: socket.socket, record: Record) -> None:
    """From here on the process has no terminal, no parent that listens, and a log of its own."""
    if record.pid:
        log_to(str(record.log))
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        os.chdir("/")
    # EPIPE: nobody is there any more who knows that the disk is attached, so it must not be.
    channel.sendall(json.dumps({"record": asdict(record)}).encode() + b"\n")
    channel.close()


def log_to(path: str) -> None:
    handler = CappedLog(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


class CappedLog(logging.FileHandler):
    """Takes LOG_BYTES and then no more: a disk that fails must not fill /run."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream and self.stream.tell() < LOG_BYTES:
            super().emit(record)


def receive(channel: socket.socket) -> bytes:
    """One line, or what there is when the other side has gone."""
    data = b""
    while not data.endswith(b"\n") and (part := channel.recv(1 << 16)):
        data += part
    return data


def _failure(error: BaseException) -> bytes:
    values: dict[str, Any] = {"class": type(error).__name__, "text": str(error)}
    if isinstance(error, VirtmountError):
        values.update(file=error.file, place=error.place, text=error.text, hint=error.hint)
    elif isinstance(error, OSError):
        values["class"] = "OSError"
        values.update(errno=error.errno or errno.EIO, text=error.strerror or str(error))
        values["file"] = os.fspath(error.filename) if error.filename is not None else None
    else:
        values["trace"] = "".join(traceback.format_exception(error))
    return json.dumps({"error": values}).encode() + b"\n"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
