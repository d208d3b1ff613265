"""The served file's operations, without a kernel; tests/device has the same under one."""

from __future__ import annotations

import errno
import logging
import os
import stat
from types import SimpleNamespace
from typing import Any

import pytest

from tests.device.memory import Asked, MemoryDisk
from virtmount import fuse
from virtmount.errors import NoTransport
from virtmount.fuse import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, File

MIB = 1 << 20


def file_on(disk: MemoryDisk, *, read_only: bool = False, can_discard: bool = True) -> File:
    return File(disk, "disk", cluster_size=65536, read_only=read_only, can_discard=can_discard)


def info(flags: int = os.O_RDWR) -> Any:
    return SimpleNamespace(flags=flags, direct_io=0, fh=0)


def test_the_file_is_as_large_as_the_disk() -> None:
    file = file_on(MemoryDisk(MIB))
    for path in ("/disk", None):
        found = file.getattr(path)
        assert stat.S_ISREG(found["st_mode"])
        assert found["st_size"] == MIB
    assert stat.S_ISDIR(file.getattr("/")["st_mode"])
    assert file.statfs("/") == {"f_bsize": 65536, "f_frsize": 65536, "f_blocks": 16}
    with pytest.raises(OSError, match="No such file") as caught:
        file.getattr("/other")
    assert caught.value.errno == errno.ENOENT


def test_reads_and_writes() -> None:
    disk = MemoryDisk(MIB)
    file = file_on(disk)
    assert file.write(None, b"x" * 512, 1024, info()) == 512
    assert file.read(None, 1024, 512, info()) == bytes(512) + b"x" * 512
    assert file.read(None, 4096, MIB - 512, info()) == bytes(512)
    assert file.read(None, 4096, MIB, info()) == b""
    file.fsync(None, 1, info())
    assert disk.asked[-1] == Asked("flush")


def test_the_file_cannot_grow() -> None:
    disk = MemoryDisk(MIB)
    with pytest.raises(OSError, match="No space") as caught:
        file_on(disk).write(None, bytes(1024), MIB - 512, info())
    assert caught.value.errno == errno.ENOSPC
    assert disk.asked == []


def test_a_punched_hole_reads_as_zeros_and_may_give_space_back() -> None:
    disk = MemoryDisk(MIB)
    file = file_on(disk)
    file.write(None, b"x" * MIB, 0, info())
    file.fallocate(None, PUNCH_HOLE | KEEP_SIZE, 1024, 4096, info())
    assert disk.asked[-1] == Asked("unmap", 1024, 4096)
    file.fallocate(None, ZERO_RANGE | KEEP_SIZE, 8192, 4096, info())
    assert disk.asked[-1] == Asked("zero", 8192, 4096)
    assert disk.contents()[:12288].count(0) == 8192


def test_a_disk_that_cannot_give_space_back_says_so() -> None:
    disk = MemoryDisk(MIB)
    file = file_on(disk, can_discard=False)
    with pytest.raises(OSError, match="not supported") as caught:
        file.fallocate(None, PUNCH_HOLE | KEEP_SIZE, 0, 65536, info())
    assert caught.value.errno == errno.EOPNOTSUPP
    file.fallocate(None, ZERO_RANGE | KEEP_SIZE, 0, 65536, info())
    assert disk.asked == [Asked("zero", 0, 65536)]


@pytest.mark.parametrize(
    ("mode", "offset", "length", "code"),
    [
        (0, 0, 512, errno.EOPNOTSUPP),
        (KEEP_SIZE, 0, 512, errno.EOPNOTSUPP),
        (PUNCH_HOLE, 0, 512, errno.EOPNOTSUPP),
        (8, 0, 512, errno.EOPNOTSUPP),  # COLLAPSE_RANGE
        (ZERO_RANGE, 0, 512, errno.EOPNOTSUPP),
        (PUNCH_HOLE | KEEP_SIZE, MIB - 512, 1024, errno.EINVAL),
        (ZERO_RANGE | KEEP_SIZE, MIB, 512, errno.EINVAL),
        (PUNCH_HOLE | KEEP_SIZE, 0, 0, errno.EINVAL),
    ],
)
def test_other_allocation_is_refused(mode: int, offset: int, length: int, code: int) -> None:
    disk = MemoryDisk(MIB)
    with pytest.raises(OSError, match=r".") as caught:
        file_on(disk).fallocate(None, mode, offset, length, info())
    assert caught.value.errno == code
    assert disk.asked == []


def test_a_read_only_file_cannot_be_opened_for_writing() -> None:
    file = file_on(MemoryDisk(MIB), read_only=True)
    assert stat.S_IMODE(file.getattr("/disk")["st_mode"]) == 0o400
    with pytest.raises(OSError, match="Read-only") as caught:
        file.open("/disk", info(os.O_RDWR))
    assert caught.value.errno == errno.EROFS
    opened = info(os.O_RDONLY)
    assert file.open("/disk", opened) == 0
    assert opened.direct_io == 1


def test_released_is_told_at_the_last_close() -> None:
    file = file_on(MemoryDisk(MIB))
    file.open("/disk", info())
    file.open("/disk", info())
    file.release(None, info())
    assert not file.released.is_set()
    file.release(None, info())
    assert file.released.is_set()


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError("no number"), errno.EIO),
        (OSError(-5, "negative"), errno.EIO),
        (ValueError("a bug"), errno.EIO),
        (AssertionError(), errno.EIO),
    ],
)
def test_every_failure_becomes_an_errno(
    raised: Exception, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    disk = MemoryDisk(MIB)
    disk.fail = {"read": raised, "write": raised, "flush": raised, "unmap": raised}
    file = file_on(disk)
    calls = (
        lambda: file.read(None, 512, 0, info()),
        lambda: file.write(None, bytes(512), 0, info()),
        lambda: file.fsync(None, 0, info()),
        lambda: file.fallocate(None, PUNCH_HOLE | KEEP_SIZE, 0, 512, info()),
    )
    for call in calls:
        with caplog.at_level(logging.ERROR), pytest.raises(OSError, match=r".") as caught:
            call()
        assert caught.value.errno == code
    # What has no errno is a bug, and leaves its traceback.
    expected = 0 if code == errno.ENOSPC else len(calls)
    assert sum(1 for record in caplog.records if record.exc_info) == expected


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSE_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(fuse, "LIBRARIES", ("libfuse3.so.99",))
    with pytest.raises(NoTransport) as caught:
        fuse.load_library()
    assert "libfuse3 is not installed" in caught.value.text
    assert "apt install" in (caught.value.hint or "")
    assert "FUSE_LIBRARY_PATH" not in os.environ
