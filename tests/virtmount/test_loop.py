"""Which disks the loop driver alone can serve, and what is written before it gets them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from virtmount import loop
from virtmount.chain import open_chain
from virtmount.disk import Disk
from virtmount.errors import Unsupported
from virtmount.plan import Barrier

MIB = 1 << 20


def create(path: Path, format: str, size: int, *options: str) -> Path:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", format, *options, path, str(size)], check=True
    )
    return path


def reason(
    path: Path, format: str | None = None, *, writable: bool = True, cache: str = "writeback"
) -> str | None:
    disk = Disk(open_chain(path, format, writable=writable), cache=cache)
    try:
        return loop.unsuitable(disk)
    finally:
        disk.close()


def test_flat_images_need_no_daemon(tmp_path: Path) -> None:
    assert reason(create(tmp_path / "a.img", "raw", MIB)) is None
    assert reason(create(tmp_path / "a.vdi", "vdi", MIB, "-o", "static=on")) is None
    assert reason(create(tmp_path / "b.img", "raw", MIB), writable=False) is None
    assert reason(create(tmp_path / "c.img", "raw", MIB), cache="none") is None


def test_others_do_and_why(tmp_path: Path) -> None:
    image = create(tmp_path / "a.vdi", "vdi", MIB)
    assert "translation of every offset" in (reason(image) or "")
    raw = create(tmp_path / "a.img", "raw", MIB)
    assert "write through" in (reason(raw, cache="writethrough") or "")
    odd = tmp_path / "odd.img"
    odd.write_bytes(bytes(MIB + 100))
    # The loop driver would leave out the last, short sector.
    assert "ends before the disk" in (reason(odd) or "")


def test_start_refuses_what_is_unsuitable_and_writes_nothing(tmp_path: Path) -> None:
    image = create(tmp_path / "a.vdi", "vdi", MIB)
    before = image.read_bytes()
    disk = Disk(open_chain(image, writable=True))
    with pytest.raises(Unsupported, match="not for --transport loop"):
        loop.Loop(disk).start()
    disk.close()
    assert image.read_bytes() == before


def test_the_session_is_finished_before_it_begins(tmp_path: Path) -> None:
    """VirtualBox changes the modification UUID with every session; nothing else may change."""
    image = create(tmp_path / "a.vdi", "vdi", 2 * MIB, "-o", "static=on")
    before = image.read_bytes()
    chain = open_chain(image, writable=True)
    loop.finish_metadata(chain.top)
    chain.close()
    after = image.read_bytes()
    assert len(after) == len(before)
    changed = [i for i in range(len(before)) if before[i] != after[i]]
    assert changed
    assert 0x198 <= min(changed) <= max(changed) < 0x1A8
    subprocess.run(["qemu-img", "check", "-q", image], check=True)


def test_a_raw_image_is_not_written_at_all(tmp_path: Path) -> None:
    image = create(tmp_path / "a.img", "raw", MIB)
    before = image.stat().st_mtime_ns
    chain = open_chain(image, writable=True)
    assert Barrier not in list(chain.top.begin())
    loop.finish_metadata(chain.top)
    chain.close()
    assert image.stat().st_mtime_ns == before
