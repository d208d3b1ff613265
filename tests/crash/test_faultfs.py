"""The failing and recording file system, with plain file I/O."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.faultfs import Mounted
from tests.crash.simulate import Mark, Punched, Resized, Synced, Wrote
from virtmount.errors import Busy
from virtmount.hostfile import HostFile, fallocate

PUNCH_KEEP = 3


@contextlib.contextmanager
def fails(code: int) -> Iterator[None]:
    with pytest.raises(OSError, match=re.escape(os.strerror(code))) as caught:
        yield
    assert caught.value.errno == code


@pytest.fixture(scope="module")
def mounted(folder: Path) -> Iterator[Mounted]:
    source = folder / "source"
    source.mkdir()
    (source / "file").write_bytes(bytes(8192))
    (source / "other").write_bytes(b"beside it")
    with Mounted(source, "file", folder / "mounted") as fs:
        yield fs


@pytest.fixture
def fs(mounted: Mounted) -> Mounted:
    mounted.heal()
    mounted.source.write_bytes(b"-" * 8192)
    mounted.reset()
    return mounted


def test_records_every_change(fs: Mounted) -> None:
    with HostFile(fs.path, writable=True) as file:
        file.pwrite(512, b"a" * 1024)
        fs.mark("hello", flushed=True)
        file.sync()
        file.truncate(100_000)
        file.punch(1000, 5000)
        os.fsync(file.fd)
        fallocate(file.fd, 0, 0, 200_000)
        assert file.size == 200_000
        assert file.pread(500, 20) == b"-" * 12 + b"a" * 8
    log = fs.log()
    assert log.base.read(0, log.base.size) == b"-" * 8192
    assert log.events == [
        Wrote(512, b"a" * 1024),
        Mark("hello", True),
        Synced(),
        Resized(100_000, 8192),
        Punched(1000, 5000),
        Synced(),
        Resized(200_000, 100_000),
    ]
    assert fs.count == 6
    *_, last = log.epochs()
    assert fs.source.read_bytes()[:100_000] == last.durable.read(0, 100_000)


def test_large_and_direct_writes_arrive_whole(fs: Mounted) -> None:
    fd = os.open(fs.path, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 1 << 20) as buffer:
            buffer.write(b"d" * (1 << 20))
            assert os.pwritev(fd, [buffer], 4096) == 1 << 20
    finally:
        os.close(fd)
    changes = fs.log().events
    assert sum(len(change.data) for change in changes if isinstance(change, Wrote)) == 1 << 20
    assert fs.source.read_bytes() == b"-" * 4096 + b"d" * (1 << 20)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_fails_one_change_with_its_errno(fs: Mounted, code: int) -> None:
    with HostFile(fs.path, writable=True) as file:
        fs.fail(2, code)
        file.pwrite(0, b"1" * 2048)
        with fails(code):
            file.pwrite(2048, b"2" * 2048)
        file.pwrite(4096, b"3" * 2048)
    assert fs.failed == ["write"]
    # Half of it may be there, and the log says so.
    assert fs.source.read_bytes() == b"1" * 2048 + b"2" * 1024 + b"-" * 1024 + b"3" * 2048 + (
        b"-" * 2048
    )
    *_, last = fs.log().epochs()
    assert len(last.changes) == 3
    assert last.changes[1] == Wrote(2048, b"2" * 1024)


def test_fails_everything_from_one_change_on(fs: Mounted) -> None:
    with HostFile(fs.path, writable=True) as file:
        fs.fail(2, errno.ENOSPC, forever=True)
        file.sync()
        with fails(errno.ENOSPC):
            file.pwrite(0, b"x")
        with fails(errno.ENOSPC):
            file.sync()
        with fails(errno.ENOSPC):
            file.truncate(5)
        with fails(errno.ENOSPC):
            fallocate(file.fd, PUNCH_KEEP, 0, 4096)
        fs.heal()
        file.sync()
    assert fs.failed == ["write", "fsync", "truncate", "fallocate"]
    assert fs.source.read_bytes() == b"-" * 8192


def test_fails_only_the_kinds_asked_for(fs: Mounted) -> None:
    with HostFile(fs.path, writable=True) as file:
        fs.fail(1, errno.EIO, only=("fsync",))
        file.pwrite(0, b"x")
        file.truncate(10_000)
        with fails(errno.EIO):
            file.sync()
        file.sync()
    assert fs.failed == ["fsync"]


def test_what_a_failed_sync_should_have_kept_may_be_lost_for_ever(fs: Mounted) -> None:
    with HostFile(fs.path, writable=True) as file:
        file.pwrite(0, b"x")
        fs.fail(1, errno.EIO)
        with fails(errno.EIO):
            file.sync()
        file.pwrite(1, b"y")
        file.sync()
    assert fs.log().events == [Wrote(0, b"x"), Wrote(1, b"y"), Synced(frozenset({0}))]


def test_fails_a_read(fs: Mounted) -> None:
    with HostFile(fs.path) as file:
        fs.fail(2, errno.EIO, only=("read",))
        assert file.pread(0, 3) == b"---"
        with fails(errno.EIO):
            file.pread(0, 3)
        assert file.pread(0, 3) == b"---"
    assert fs.failed == ["read"]
    assert fs.reads == 3
    assert fs.count == 0


def test_cuts_writes_short(fs: Mounted) -> None:
    fs.cut()
    fd = os.open(fs.path, os.O_RDWR)
    try:
        assert os.pwrite(fd, b"12345" * 200, 0) == 600
    finally:
        os.close(fd)
    assert fs.log().events == [Wrote(0, b"12345" * 120)]


def test_other_files_are_there_to_read(fs: Mounted) -> None:
    other = fs.path.with_name("other")
    assert other.read_bytes() == b"beside it"
    with fails(errno.EROFS):
        other.write_bytes(b"no")


def test_locks_work_as_on_other_file_systems(fs: Mounted) -> None:
    with HostFile(fs.path, writable=True), pytest.raises(Busy):
        HostFile(fs.path, writable=True)
