"""Attach and detach, as the command line and Python do it; the work is the daemon's.

Names.  An attached disk is /dev/NAME with partitions /dev/NAMEp1 …, links to the kernel's nodes.
NAME is the letters of the format's name and the first free number: vhdx0, vdi0, qcow0, raw0.  A
name that ends in a digit is what makes the p before a partition's number the kernel's own custom;
qcow2-0 would read as a partition of something, and a format's version says nothing about a disk.
--name takes any other.

The module is not called attach, because virtmount.attach is the function.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from virtmount import errors, nodes, state
from virtmount.errors import Busy, Denied, VirtmountError
from virtmount.image import Options
from virtmount.state import Record

OPENED_TIMEOUT = 2.0  # udev opens a device for a moment whenever somebody closed it
POLL = 0.05
ASK = b'{"ask": "passphrase"}\n'  # from the daemon; answered with a line of base64
Passphrase = Callable[[], bytes]
_ROOT = str(Path(__file__).resolve().parent.parent)
# Not our child: nobody here could wait for it.
_PROGRAM = (
    "import os, sys; os.fork() and os._exit(0); sys.path.insert(0, sys.argv[1]); "
    "from virtmount.daemon import main; sys.exit(main(int(sys.argv[2])))"
)


@dataclass(frozen=True, slots=True)
class Order:
    """What to attach, and how."""

    image: str
    read_only: bool = False
    format: str | None = None
    transport: str = "auto"
    cache: str = "writeback"
    name: str | None = None
    allow_outside: bool = False
    parent_format: str | None = None
    snapshot: str | None = None  # an internal one; then read-only
    search_path: tuple[str, ...] = ()
    size_from: str | None = None
    force: bool = False  # although a parent is another one or was written since
    overlay: str | None = None  # the folder of a file that takes all writes


class Attachment(os.PathLike[str]):
    """An attached disk.  As a context manager it is detached at the end of the block."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __repr__(self) -> str:
        return f"<Attachment {self.path}: {self.image}>"

    def __fspath__(self) -> str:
        return self.path

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def path(self) -> str:
        """/dev/NAME."""
        return self.record.path

    @property
    def device(self) -> str:
        """The kernel's node."""
        return self.record.device

    @property
    def image(self) -> str:
        return self.record.image

    @property
    def size(self) -> int:
        return self.record.size

    @property
    def partitions(self) -> list[str]:
        """Paths of the partitions that the kernel has now, by number."""
        return [path for path, _ in self.partition_sizes()]

    def partition_sizes(self) -> list[tuple[str, int]]:
        """The same with the bytes of each."""
        found = nodes.partitions(self.record.kernel_name)
        return [(f"{self.path}p{node.number}", node.size) for node in found]

    def detach(self, *, force: bool = False) -> None:
        """Flush everything and take the disk away; harmless when repeated.

        Busy while it is in use, unless `force`: then its users see I/O errors.
        """
        with contextlib.suppress(errors.NotAttached):
            detach(current(self.record), force=force)


def attach(
    path: str | os.PathLike[str],
    *,
    read_only: bool = False,
    format: str | None = None,
    transport: str = "auto",
    cache: str = "writeback",
    name: str | None = None,
    allow_outside: bool = False,
    parent_format: str | None = None,
    force: bool = False,
    overlay: str | os.PathLike[str] | None = None,
    options: Options | None = None,
) -> Attachment:
    """Attach an image; returns when the device and its partitions can be used.

    With `overlay`, a folder, the image and its parents are only read: what is written goes to a
    file without a name there, and is thrown away at detach.  `options` says what there is to say
    beyond that, and allow_outside then counts in there; with a snapshot the disk is read-only.

    The disk stays attached after this process, until detach().  Raises a VirtmountError, or the
    OSError that the host gave.
    """
    told = options or Options(allow_outside=allow_outside)
    order = Order(
        os.path.abspath(path),
        read_only,
        format,
        transport,
        cache,
        name,
        told.allow_outside,
        parent_format,
        told.snapshot,
        told.search_path,
        told.size_from,
        force,
        None if overlay is None else os.path.abspath(overlay),
    )
    return attach_as(order, told.passphrase)


def attach_as(order: Order, passphrase: Passphrase | None = None) -> Attachment:
    """`passphrase` is called only if the image needs one, in this process."""
    refuse_without_root()
    return Attachment(_start_daemon(order, passphrase))


def refuse_without_root() -> None:
    if os.geteuid():
        raise Denied("virtmount", "", "a block device needs root", hint="sudo virtmount …")


def _start_daemon(order: Order, passphrase: Passphrase | None) -> Record:
    """Start the process that serves the disk; its report, or the error that it reports.

    A secret goes to it through the socket alone, and only when it asks.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryFile() as complaints:
        subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM, _ROOT, str(theirs.fileno()), order.image],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            check=True,
        )
        theirs.close()
        ours.sendall(json.dumps(asdict(order)).encode() + b"\n")
        # If we are interrupted here, it finds nobody to report to, and takes everything back.
        answer = _receive(ours)
        while answer == ASK:
            ours.sendall(_told(order, passphrase))
            answer = _receive(ours)
        if not answer:
            complaints.seek(0)
            last = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
            raise VirtmountError(order.image, "", f"the daemon died: {' '.join(last)}")
        return _understand(json.loads(answer))


def _told(order: Order, passphrase: Passphrase | None) -> bytes:
    """The answer to ASK."""
    if passphrase is None:
        raise Denied(order.image, "", "encrypted: no passphrase", hint="--passphrase-file FILE")
    return base64.b64encode(passphrase()) + b"\n"


def _receive(channel: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        try:
            part = channel.recv(1 << 16)
        except ConnectionResetError:
            part = b""
        if not part:
            return b""
        data += part
    return data


def _understand(answer: dict[str, Any]) -> Record:
    if "record" in answer:
        return Record(**answer["record"])
    raise understand_error(answer["error"])


def understand_error(values: dict[str, Any]) -> Exception:
    """The exception that the daemon described; see daemon._failure."""
    if values["class"] == "OSError":
        return OSError(values["errno"], values["text"], values["file"])
    known = getattr(errors, values["class"], None)
    if isinstance(known, type) and issubclass(known, VirtmountError) and "file" in values:
        return known(values["file"], values["place"], values["text"], hint=values["hint"])
    error = VirtmountError("virtmount", values["class"], values["text"])
    error.add_note(values.get("trace", ""))
    return error


# Detaching


def current(record: Record) -> Record:
    """The record as it is now; NotAttached if its name belongs to nobody or to another disk."""
    for other in state.find(record.name):
        if (other.device, other.since) == (record.device, record.since):
            return other
    raise errors.NotAttached(record.path, "", "not attached", hint="virtmount list")


def detach(record: Record, *, force: bool = False) -> str:
    """Take an attached disk away; what was written is durable when this returns.

    Returns an empty string, or what the user should know.
    """
    refuse_without_root()
    if record.state == state.FAILED:
        _forget(record)
        raise _failed(record)
    if not record.is_alive():
        _forget(record)
        return (
            f"{record.image}: its process had been killed; what was written after the last flush "
            "may be lost"
        )
    if not force:
        refuse_used(record)
    if record.pid:
        if not force and record.transport == "ublk":
            _stop_unless_open(record)
        _end_daemon(record)
    else:
        _end_loop(record)
    return ""


def refuse_used(record: Record) -> None:
    """Busy, naming all users, while anybody uses the disk or a part of it."""
    deadline = time.monotonic() + OPENED_TIMEOUT
    while users := [
        user
        for user in nodes.users(record.kernel_name)
        if user.kind != "open" or user.pid != record.pid
    ]:
        passing = all(user.kind == "open" for user in users)
        if not passing or time.monotonic() > deadline:
            raise Busy(record.path, "", "; ".join(map(str, users)), hint=_way_out(users))
        time.sleep(POLL)


def _way_out(users: Sequence[nodes.User]) -> str:
    for user in users:
        if user.kind == "mount":
            return f"umount {user.what}"
        if user.kind == "swap":
            return f"swapoff /dev/{user.device}"
    return "--force takes it away from them, who then see I/O errors"


def _stop_unless_open(record: Record) -> None:
    """On kernels that can: stop the device in one step with seeing that nobody has it open."""
    from virtmount.ublk import features
    from virtmount.ublk.device import try_stop

    deadline = time.monotonic() + OPENED_TIMEOUT
    with features.open_control() as control:
        while True:
            try:
                try_stop(control, int(record.features["device_id"]))
                return
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno != errno.EBUSY:
                    raise
                if time.monotonic() > deadline:
                    refuse_used(record)
                    raise Busy(record.path, "", "somebody has it open") from None
            time.sleep(POLL)


def _end_daemon(record: Record) -> None:
    """SIGTERM, and wait: the flush at the end takes as long as the host's storage needs."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(record.pid)
        try:
            # The number is bound now; is it still the same process?
            if record.is_alive():
                signal.pidfd_send_signal(fd, signal.SIGTERM)
                select.select([fd], [], [])
        finally:
            os.close(fd)
    left = [other for other in state.records() if other.name == record.name]
    for other in left:
        if other.state == state.FAILED:
            _forget(other)
            raise _failed(other)
        if other.pid == record.pid and other.started == record.started:
            _forget(other)
            raise VirtmountError(
                record.image, "", "the daemon died before it had flushed everything"
            )


def _failed(record: Record) -> VirtmountError:
    return VirtmountError(record.image, "", f"the end of the last attach failed: {record.error}")


def _end_loop(record: Record) -> None:
    from virtmount import loop

    loop.detach(record.device, record.data_id or record.file_id)
    with state.locked():
        nodes.remove_links(record.name, record.kernel_name)
        record.remove()


def _forget(record: Record) -> None:
    """Take away what a process that is gone left behind."""
    with state.locked():
        clear(record)
        record.remove()


def clear(record: Record) -> None:
    """Links, and a device without a server; called under the lock."""
    nodes.remove_links(record.name, record.kernel_name)
    if record.transport == "fuse":
        from virtmount.fuse import clear_orphan

        clear_orphan(record.device, record.name)
    if record.transport == "ublk" and "device_id" in record.features:
        from virtmount.ublk import features
        from virtmount.ublk.device import delete_dead

        with contextlib.suppress(VirtmountError, OSError):
            with features.open_control() as control:
                delete_dead(control, int(record.features["device_id"]))
