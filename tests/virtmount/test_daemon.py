"""A session with everything real but the kernel's side: order, undoing, reports, signals."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import threading

import pytest

from virtmount import attachment, daemon, errors, nodes, state
from virtmount.attachment import Order
from virtmount.daemon import Session
from virtmount.errors import Busy, NoTransport, ParentMissing, VirtmountError
from virtmount.transport import Transport


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def masked():
    """What Session.attach() blocks is unblocked again."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    while signal.sigpending() & (daemon.ENDING | {daemon.GONE}):
        signal.sigwait(daemon.ENDING | {daemon.GONE})
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


class World:
    """The kernel and the Pager, noting who was called; `fail` names the calls that raise."""

    def __init__(self):
        self.calls = []
        self.fail = {}
        self.gone = threading.Event()

    def call(self, name):
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]


class FakeTransport(Transport):
    name = "fake"

    def __init__(self, world):
        self.world = world
        self.features = {"depth": 1}

    def start(self):
        self.world.call("start")
        self.device = "/dev/fakeb0"
        return self.device

    def stop(self):
        self.world.call("stop")
        self.world.gone.set()

    def wait_gone(self, timeout=None):
        return self.world.gone.wait(timeout)


class FakePager:
    def __init__(self, world, disk):
        self.world, self.disk = world, disk

    def close(self):
        self.world.call("flush")
        self.disk.close()


@pytest.fixture
def world(tmp_path, monkeypatch, masked):
    world = World()
    monkeypatch.setenv("VIRTMOUNT_RUN", str(tmp_path / "run"))

    def make(disk, name):
        world.call("make")
        return FakeTransport(world), FakePager(world, disk)

    monkeypatch.setattr(daemon, "choose", lambda wish, disk: make)
    monkeypatch.setattr(daemon.process, "protect", lambda: None)
    monkeypatch.setattr(daemon.process, "isolate", lambda: world.call("isolate"))
    monkeypatch.setattr(daemon.process, "settle", lambda kept: world.call("settle"))
    monkeypatch.setattr(daemon.threading, "stack_size", lambda size: 0)
    monkeypatch.setattr(nodes, "make_links", lambda name, kernel_name: world.call("links"))
    monkeypatch.setattr(nodes, "remove_links", lambda name, kernel_name: world.call("no links"))
    return world


def locked(image):
    with contextlib.closing(daemon.open_chain(image, "raw", writable=True)):
        return False


def test_from_the_order_to_the_end(world, image):
    session = Session(Order(str(image), format="raw"))
    record = session.attach()
    assert world.calls == ["isolate", "make", "start", "links", "settle"]
    assert (record.name, record.device, record.transport) == ("raw0", "/dev/fakeb0", "fake")
    assert (record.size, record.read_only, record.state) == (1 << 20, False, state.ATTACHED)
    assert record.pid == os.getpid()
    assert state.records() == [record]
    with pytest.raises(Busy):
        locked(image)
    session.end()
    assert world.calls[5:] == ["stop", "no links", "flush"]
    assert state.records() == []
    assert not locked(image)


@pytest.mark.parametrize(
    ("failing", "undone"),
    [
        ("make", []),
        ("start", ["stop", "flush"]),
        ("links", ["stop", "no links", "flush"]),
        ("settle", ["stop", "no links", "flush"]),
    ],
)
def test_failure_on_the_way_is_undone(world, image, failing, undone):
    world.fail[failing] = NoTransport("fake", "", "no")
    session = Session(Order(str(image), format="raw"))
    with pytest.raises(NoTransport):
        session.attach()
    assert world.calls[world.calls.index(failing) + 1 :] == undone
    assert state.records() == []
    assert not locked(image)


def test_image_that_cannot_be_opened_leaves_no_trace(world, tmp_path):
    with pytest.raises(FileNotFoundError):
        Session(Order(str(tmp_path / "none"))).attach()
    assert world.calls == []
    assert state.records() == []


def test_name_that_is_taken_is_known_before_anything_is_made(world, image):
    with pytest.raises(Busy, match="/dev/null"):
        Session(Order(str(image), format="raw", name="null")).attach()
    assert world.calls == []
    assert not locked(image)


@pytest.mark.parametrize("failing", ["stop", "flush"])
def test_end_that_fails_goes_on_and_leaves_word(world, image, failing):
    session = Session(Order(str(image), format="raw"))
    session.attach()
    world.fail[failing] = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        session.end()
    assert world.calls[5:] == ["stop", "no links", "flush"]
    (record,) = state.records()
    assert record.state == state.FAILED
    assert "No space left on device" in record.error


def test_overlay_is_on_top_and_the_image_only_read(world, image, tmp_path):
    folder = tmp_path / "over"
    folder.mkdir()
    session = Session(Order(str(image), format="raw", overlay=str(folder)))
    record = session.attach()
    assert (record.name, record.format, record.variant) == ("raw0", "raw", "file")
    assert (record.overlay, record.read_only, record.parents) == (str(folder), False, [])
    assert record.file_id == state.file_id(str(image))
    assert session.disk.image.name == "overlay"
    with daemon.open_chain(image, "raw").top.files[0], pytest.raises(Busy):
        locked(image)  # for writing
    session.end()
    assert not locked(image)


def test_failing_overlay_leaves_nothing_open(world, image, tmp_path):
    with pytest.raises(FileNotFoundError):
        Session(Order(str(image), format="raw", overlay=str(tmp_path / "none"))).attach()
    assert not locked(image)
    assert state.records() == []


def test_everything_that_was_ordered_reaches_the_driver(world, image, monkeypatch):
    seen = []

    def open_chain(*arguments, **options):
        seen.append(options)
        raise ParentMissing("x", "", "stop here")

    monkeypatch.setattr(daemon, "open_chain", open_chain)
    order = Order(
        str(image),
        allow_outside=True,
        parent_format="vdi",
        snapshot="before",
        search_path=["/a", "/b"],  # as JSON has it
        size_from="chs",
        force=True,
    )
    with pytest.raises(ParentMissing):
        Session(order, passphrase=lambda: b"word").attach()
    (options,) = seen
    told = options.pop("options")
    assert options == {"writable": False, "parent_format": "vdi", "force": True}
    assert (told.allow_outside, told.snapshot, told.size_from) == (True, "before", "chs")
    assert told.search_path == ("/a", "/b")
    assert told.passphrase() == b"word"


def test_parent_that_has_gone_gets_no_disk(world, image):
    def report(record):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        daemon.run(Order(str(image), format="raw"), report)
    assert world.calls[-3:] == ["stop", "no links", "flush"]
    assert state.records() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_session(world, image, number):
    seen = []

    def report(record):
        seen.append(record.state)
        # To this thread: whoever runs the tests may have others, which do not block it.
        signal.pthread_kill(threading.get_ident(), number)

    daemon.run(Order(str(image), format="raw"), report)
    assert seen == [state.ATTACHED]
    assert world.calls[-3:] == ["stop", "no links", "flush"]


def test_device_that_went_away_ends_the_session(world, image):
    daemon.run(Order(str(image), format="raw"), lambda record: world.gone.set())
    assert world.calls[-3:] == ["stop", "no links", "flush"]
    assert state.records() == []


# Choosing


class Shape:
    """As much of a Disk as choose() looks at."""


@pytest.fixture
def machine(monkeypatch):
    """(flat?, ublk's error, fuse's error) of a machine and an image."""

    def make(flat=False, ublk=None, fuse=None):
        def prepare(name, error):
            def raise_or_name():
                if error:
                    raise error
                return name

            return raise_or_name

        monkeypatch.setattr(daemon.loop, "unsuitable", lambda disk: None if flat else "mapped")
        monkeypatch.setattr(daemon, "_prepare_ublk", prepare("ublk", ublk))
        monkeypatch.setattr(daemon, "_prepare_fuse", prepare("fuse", fuse))

    return make


MISSING = NoTransport("ublk", "", "no module")


@pytest.mark.parametrize(
    ("wish", "situation", "chosen"),
    [
        ("auto", {"flat": True}, daemon.make_loop),
        ("auto", {}, "ublk"),
        ("auto", {"ublk": MISSING}, "fuse"),
        ("ublk", {"flat": True}, "ublk"),
        ("fuse", {"flat": True}, "fuse"),
        ("loop", {}, daemon.make_loop),  # which says itself why it cannot
    ],
)
def test_choice(machine, wish, situation, chosen):
    machine(**situation)
    assert daemon.choose(wish, Shape()) == chosen


def test_wish_is_not_replaced_by_something_else(machine):
    machine(ublk=MISSING)
    with pytest.raises(NoTransport, match="no module"):
        daemon.choose("ublk", Shape())


def test_denied_is_no_reason_to_try_something_else(machine):
    machine(ublk=errors.Denied("ublk", "", "needs root"))
    with pytest.raises(errors.Denied):
        daemon.choose("auto", Shape())


def test_unknown_transport(machine):
    with pytest.raises(VirtmountError, match="know auto, ublk, fuse, loop"):
        daemon.choose("nbd", Shape())


# Errors on their way to the parent


def sent(error):
    line = daemon._failure(error)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    return attachment.understand_error(json.loads(line)["error"])


CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, VirtmountError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_error_arrives_with_class_words_and_hint(kind):
    error = sent(kind("disk.vhdx", "header 2", "wrong\nchecksum", hint="virtmount doctor"))
    assert type(error) is kind
    assert str(error) == "disk.vhdx: header 2: wrong\nchecksum"
    assert (error.hint, error.exit_code) == ("virtmount doctor", kind.exit_code)


def test_host_error_arrives_with_errno_and_file():
    error = sent(FileNotFoundError(errno.ENOENT, "No such file or directory", "/disk.img"))
    assert isinstance(error, FileNotFoundError)
    assert (error.errno, error.filename) == (errno.ENOENT, "/disk.img")


def test_error_of_ours_arrives_with_its_traceback():
    try:
        raise ZeroDivisionError("in the daemon")
    except ZeroDivisionError as raised:
        error = sent(raised)
    assert type(error) is VirtmountError
    assert "ZeroDivisionError: in the daemon" in str(error)
    assert "test_daemon.py" in error.__notes__[0]


def test_log_stops_growing(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon, "LOG_BYTES", 200)
    handler = daemon.CappedLog(tmp_path / "log")
    for _ in range(100):
        handler.emit(logging.LogRecord("virtmount", logging.ERROR, "", 0, "x" * 50, (), None))
    handler.close()
    assert 200 <= (tmp_path / "log").stat().st_size < 300
