"""Resize and rebase of a VHDX: what they leave, also where they are cut."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest

import virtmount
from tests.crash.simulate import Cut, Epoch, Log, SimulatedFile, Store
from tests.formats import make_vhdx as mk
from tests.formats.make_vhdx import MIB, Item, Made, make
from tests.formats.vhdx_chains import CHILD, PARENT, Pair, contents_by_7zip, make_pair
from tests.reference import Reference
from virtmount import hostfile
from virtmount.chain import open_chain
from virtmount.errors import NeedsRecovery, Unsupported
from virtmount.formats import vhdx_change
from virtmount.formats.vhdx import VHDX
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Image, Options
from virtmount.plan import Plan

GIB, TIB = 1 << 30, 1 << 40
OTHER = UUID(int=0x7003)
STATES = int(os.environ.get("VIRTMOUNT_CRASH_POINTS", "30"))  # about so many; 0: all


def resize(path: Path, size: int) -> None:
    with HostFile(path, writable=True) as file:
        hostfile.execute(VHDX(file).resize(size), [file])


def check(path: Path) -> None:
    done = subprocess.run(
        ["qemu-img", "check", "-f", "vhdx", path], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "No errors were found on the image.\n", done.stderr


def contents_by_qemu(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", "vhdx", "-O", "raw", path, raw], check=True)
    return raw.read_bytes()


@contextmanager
def opened(path: Path, writable: bool = False) -> Iterator[Reference]:
    chain = open_chain(path, writable=writable)
    try:
        with Reference(chain.images) as disk:
            yield disk
    finally:
        chain.close()


def contents(path: Path) -> bytes:
    with opened(path) as disk:
        return disk.pread(0, disk.size)


# Resize


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("block_size", [MIB, 4 * MIB])
def test_a_longer_disk_reads_as_before_and_then_zeros(
    tmp_path: Path, block_size: int, fixed: bool
) -> None:
    size = 5 * block_size - 512 * 5
    blocks = {b: bytes([65 + b]) * block_size for b in (range(5) if fixed else (4, 1, 0))}
    made = make(tmp_path / "disk.vhdx", size, blocks, block_size=block_size, fixed=fixed)
    before = contents(made.path)
    # Entries past the old end mean nothing yet, whatever they are.
    for block in (5, 6, 8, 12):
        made.write(made.entry_offset(block), struct.pack("<Q", made.hosts[0] | mk.PRESENT))
    new = 13 * block_size - 512
    resize(made.path, new)
    expected = before.ljust(new, b"\0")
    with opened(made.path) as disk:
        assert disk.size == new
        assert (disk.top.flat is not None) == fixed
        assert disk.pread(0, new) == expected
    check(made.path)
    assert contents_by_qemu(made.path) == expected
    with opened(made.path, writable=True) as disk:
        for block in range(13):
            disk.pwrite(block * block_size + 512, bytes([block]) * 512)
        content = disk.pread(0, new)
    check(made.path)
    assert contents_by_qemu(made.path) == content


def test_again_and_again(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 3 * MIB, {2: b"c" * MIB, 0: b"a" * MIB})
    size = 3 * MIB
    for step in (512, MIB, 7 * MIB - 512, 40 * MIB):
        size += step
        resize(made.path, size)
        check(made.path)
    resize(made.path, size)  # no change
    assert contents(made.path) == (b"a" * MIB + bytes(MIB) + b"c" * MIB).ljust(size, b"\0")


@pytest.mark.parametrize("writer", ["qemu", "us"])
def test_a_table_without_room_is_moved(tmp_path: Path, writer: str) -> None:
    """131041 blocks are what the entries in 1 MiB can be; one more is too much."""
    path = tmp_path / "disk.vhdx"
    size = 131041 * MIB
    wanted = [131040, 4096, 4095, 0, 77777]
    if writer == "us":
        made = make(path, size, {b: b"%d" % b for b in wanted})
        bat = made.bat
    else:
        options = ["-o", "block_size=1M", "-f", "vhdx"]
        subprocess.run(["qemu-img", "create", "-q", *options, path, str(size)], check=True)
        commands = [w for b in wanted for w in ("-c", f"write -P {b & 0xFF} {b * MIB} 4096")]
        subprocess.run(["qemu-io", "-f", "vhdx", *commands, path], check=True, capture_output=True)
    with opened(path) as disk:
        data = {b: disk.pread(b * MIB, 4096) for b in wanted}
        assert isinstance(disk.top, VHDX)
        bat = disk.top.table.offset
    resize(path, 200 * GIB)
    check(path)
    with opened(path, writable=True) as disk:
        assert disk.size == 200 * GIB
        assert isinstance(disk.top, VHDX)
        assert disk.top.table.offset != bat
        assert {b: disk.pread(b * MIB, 4096) for b in wanted} == data
        # The old place is free again.
        assert disk.top.reserve(1).runs[0].host_offset == bat
        disk.pwrite(199 * GIB, b"new".ljust(512))
        disk.pwrite(131041 * MIB, b"next".ljust(512))
    check(path)
    with opened(path) as disk:
        assert disk.pread(199 * GIB, 512) == b"new".ljust(512)
        assert disk.pread(131041 * MIB, 512) == b"next".ljust(512)
        assert {b: disk.pread(b * MIB, 4096) for b in wanted} == data
    done = subprocess.run(
        ["qemu-io", "-r", "-f", "vhdx", "-c", f"read -v {199 * GIB} 512", path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "6e 65 77 20" in done.stdout


def test_to_64_tib(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", MIB, {0: b"x" * MIB})
    resize(made.path, 64 * TIB)
    check(made.path)
    with opened(made.path, writable=True) as disk:
        disk.pwrite(64 * TIB - 512, b"end".ljust(512))
        assert disk.pread(0, MIB) == b"x" * MIB
    with opened(made.path) as disk:
        assert disk.pread(64 * TIB - 512, 512) == b"end".ljust(512)
    assert made.path.stat().st_blocks * 512 < 8 * MIB


def test_a_size_that_lies_across_two_sectors(tmp_path: Path) -> None:
    """Items may lie anywhere, and both parts must change together."""
    item = Item(mk.VIRTUAL_DISK_SIZE, struct.pack("<Q", 3 * MIB), 6, offset=69632 - 3)
    made = make(tmp_path / "disk.vhdx", 3 * MIB, {0: b"x" * MIB}, changed={"size": item})
    made.write(2 * MIB + 69632 - 3, item.data)
    assert contents(made.path) == (b"x" * MIB).ljust(3 * MIB, b"\0")
    resize(made.path, 300 * MIB)
    check(made.path)
    with opened(made.path) as disk:
        assert disk.size == 300 * MIB


def test_a_log_is_replayed_by_a_resize(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 3 * MIB, {1: b"x" * MIB})
    sector = made.bat_sector({0: made.hosts[1] | mk.PRESENT, 1: 0})
    made.put_entry(0, mk.log_entry(1, [sector], flushed=made.end, last=made.end + MIB))
    made.put_headers(mk.header(1, log_guid=mk.LOG_GUID), mk.header(2, log_guid=mk.LOG_GUID))
    resize(made.path, 9 * MIB)
    check(made.path)
    assert contents_by_qemu(made.path) == (b"x" * MIB).ljust(9 * MIB, b"\0")


def test_a_longer_child(tmp_path: Path) -> None:
    """The table's last entry is that of a bitmap, and stays so."""
    pair = make_pair(tmp_path, 13 * MIB - 4096)
    resize(pair.child.path, 5000 * MIB)
    with opened(pair.child.path) as disk:
        assert disk.pread(0, 13 * MIB - 4096) == pair.content
        assert disk.pread(13 * MIB - 4096, 3 * MIB) == bytes(3 * MIB)
        assert disk.pread(4090 * MIB, 20 * MIB) == bytes(20 * MIB)
    with opened(pair.child.path, writable=True) as disk:
        disk.pwrite(4999 * MIB, b"x" * 512)
        disk.pwrite(0, b"y" * 512)
        pair.content[:512] = b"y" * 512
        assert disk.pread(0, 13 * MIB - 4096) == pair.content


def test_a_child_whose_last_bitmap_has_moved(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 9 * MIB)
    entry = pair.child.read(pair.child.bitmap_entry(0), 8)
    resize(pair.child.path, 600 * GIB)
    with opened(pair.child.path) as disk:
        assert isinstance(disk.top, VHDX)
        assert disk.top.table.offset != pair.child.bat
        assert pair.child.read(disk.top.table.bitmap_place(0), 8) == entry
        assert disk.pread(0, 9 * MIB) == pair.content
        assert disk.pread(599 * GIB, MIB) == bytes(MIB)


def test_a_file_that_ends_in_its_last_block(tmp_path: Path) -> None:
    """What is new must not lie in what the block has not got yet."""
    made = make(
        tmp_path / "disk.vhdx",
        2 * MIB - 512,
        {0: b"a" * MIB, 1: b"b" * (MIB - 512)},
        fixed=True,
    )
    with open(made.path, "r+b") as file:
        file.truncate(made.hosts[1] + MIB - 512)
    resize(made.path, 4 * MIB)
    assert contents(made.path) == (b"a" * MIB + b"b" * (MIB - 512)).ljust(4 * MIB, b"\0")
    check(made.path)
    with opened(made.path) as disk:
        assert disk.top.flat == made.hosts[0]


def test_what_is_not_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path / "disk.vhdx", 3 * MIB, {1: b"x"})
    before = made.path.read_bytes()
    with HostFile(made.path, writable=True) as file:
        image = VHDX(file)
        for size, complaint in (
            (2 * MIB, "cannot be made smaller than it is, 3145728"),
            (3 * MIB + 1, "must be a multiple of 512"),
            (64 * TIB + 512, "at most 70368744177664"),
        ):
            with pytest.raises(Unsupported, match=complaint):
                image.resize(size)
        assert len(image.resize(3 * MIB)) == 0
        monkeypatch.setattr(vhdx_change, "MAX_TABLE", 4096)
        made.write(made.entry_offset(2000), b"x")
        made.write(made.entry_offset(3000), b"x")
        with pytest.raises(Unsupported, match="more than 4096 bytes of the BAT"):
            image.resize(4000 * MIB)
        made.write(256 << 10, b"torn")
        with pytest.raises(NeedsRecovery, match="they differ") as caught:
            image.resize(64 * TIB)
        assert caught.value.hint == f"virtmount check --repair {made.path}"
        file.is_device = True
        with pytest.raises(Unsupported, match="block device"):
            image.resize(4 * MIB)
    made.write(256 << 10, b"regi")
    for block in (2000, 3000):
        made.write(made.entry_offset(block), b"\0")
    assert made.path.read_bytes() == before


# Rebase


def rebase(path: Path, parent: Path | None, name: str = "", options: Options = DEFAULTS) -> None:
    with HostFile(path, writable=True) as file:
        image = VHDX(file, options)
        base: Image | None = None
        if parent:
            base = open_chain(parent).top
        hostfile.execute(image.rebase(base, name), [file])
        if base:
            base.files[0].close()


def other_parent(pair: Pair) -> Path:
    """The same bytes as the parent's in another image."""
    path = pair.parent.path.with_name("other.vhdx")
    shutil.copy(pair.parent.path, path)
    headers = (mk.header(n, data_write=OTHER, file_write=UUID(int=5)) for n in (3, 4))
    Made(path, MIB, 4096, 0, 0, 0, 0).put_headers(*headers)
    return path


def test_another_parent(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 13 * MIB)
    other = other_parent(pair)
    (tmp_path / "parent.vhdx").unlink()
    rebase(pair.child.path, other, "other.vhdx")
    with opened(pair.child.path) as disk:
        assert disk.images[1].files[0].path == other
        assert disk.pread(0, disk.size) == pair.content
        assert disk.top.parent is not None
        assert disk.top.parent.identity == str(OTHER)
        # What it reads as is the same, so its own children need not refuse it.
        assert disk.top.identity == str(CHILD)
    assert contents_by_7zip(pair.child.path) == pair.content


def test_many_parents(tmp_path: Path) -> None:
    """Places of earlier locators are used again."""
    pair = make_pair(tmp_path, 3 * MIB)
    other = other_parent(pair)
    for i in range(40):
        rebase(pair.child.path, other if i % 2 else pair.parent.path, "other.vhdx" + "x" * 30_000)
    rebase(pair.child.path, other, "other.vhdx")
    assert contents(pair.child.path) == pair.content


def test_a_locator_that_cannot_be_read_is_replaced(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 3 * MIB)
    raw = pair.child.path.read_bytes()
    at = raw.index("parent_linkage".encode("utf-16-le"))
    pair.child.write(at, "PARENT".encode("utf-16-le"))
    rebase(pair.child.path, pair.parent.path, "parent.vhdx", Options(changing_parent=True))
    assert contents(pair.child.path) == pair.content


def test_no_parent(tmp_path: Path) -> None:
    """What came from it reads as zeros; that of the blocks in part is none of the old garbage."""
    pair = make_pair(tmp_path, 13 * MIB)
    alone = make_pair(tmp_path, 13 * MIB, name="alone.vhdx").child
    make(
        tmp_path / "parent.vhdx",
        13 * MIB,
        data_write=PARENT,
        file_write=UUID(int=0x8001),
    )
    expected = contents(pair.child.path)  # over a parent that is empty
    assert expected != pair.content
    rebase(alone.path, None)
    with HostFile(alone.path) as file:
        image = VHDX(file)
        assert (image.variant, image.parent) == ("dynamic", None)
        assert image.grain == MIB
    assert contents(alone.path) == expected
    check(alone.path)
    assert contents_by_qemu(alone.path) == expected
    with opened(alone.path, writable=True) as disk:
        assert isinstance(disk.top, VHDX)
        # The bitmap block is nobody's any more.
        assert disk.top.reserve(1).runs[0].host_offset == alone.bitmaps[0]
        disk.pwrite(0, b"x" * 512)
    check(alone.path)


@pytest.mark.parametrize("stale", [False, True])
def test_a_parent_for_a_disk_that_had_none(tmp_path: Path, stale: bool) -> None:
    """Blocks that are not present show it.  What lay in entries of bitmaps means nothing."""
    size = 4200 * MIB
    more = {"locator": Item(mk.PARENT_LOCATOR, b"unused", 4)} if stale else {}
    made = make(tmp_path / "disk.vhdx", size, {3: b"c" * MIB}, entries={2: mk.ZERO}, changed=more)
    for chunk in (0, 1):
        made.write(made.bitmap_entry(chunk), struct.pack("<Q", made.hosts[3] | mk.PRESENT))
    blocks = {b: bytes([b]) * MIB for b in (1, 2, 3)} | {4199: b"z" * MIB}
    parent = make(tmp_path / "parent.vhdx", size, blocks, data_write=PARENT, file_write=OTHER)
    rebase(made.path, parent.path, "parent.vhdx")
    with opened(made.path) as disk:
        assert disk.top.variant == "differencing"
        assert disk.pread(0, 5 * MIB) == bytes(MIB) + b"\1" * MIB + bytes(MIB) + b"c" * MIB + (
            bytes(MIB)
        )
        assert disk.pread(4199 * MIB, MIB) == b"z" * MIB
    for chunk in (0, 1):
        assert made.read(made.bitmap_entry(chunk), 8) == bytes(8)
    rebase(made.path, None)
    check(made.path)


def test_what_is_not_rebased(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 3 * MIB)
    fixed = make(tmp_path / "fixed.vhdx", MIB, {0: b"x"}, fixed=True)
    # Its table has room for its blocks, and not for the entry of their bitmap.
    full = make(tmp_path / "full.vhdx", 131041 * MIB, {0: b"x"})
    for made, complaint in (
        (fixed, "a fixed disk has no place for a parent"),
        (full, "1048832 needed for a disk with a parent"),
    ):
        with HostFile(made.path) as file, HostFile(pair.parent.path) as other:
            with pytest.raises(Unsupported, match=complaint):
                VHDX(file).rebase(VHDX(other), "parent.vhdx")
    with HostFile(pair.parent.path) as file, HostFile(pair.child.path) as other:
        plain, child = VHDX(file), VHDX(other)
        assert len(plain.rebase(None, "")) == 0
        raw = tmp_path / "raw"
        raw.write_bytes(bytes(MIB))
        base = open_chain(raw).top
        with pytest.raises(Unsupported, match="raw is raw, it must be vhdx"):
            child.rebase(base, "raw")
        base.files[0].close()
        # The caller asks first whether it could, with a file that is only read.
        assert len(child.rebase(plain, "parent.vhdx")) > 0
        assert len(child.rebase(None, "")) > 0


def test_no_room_for_a_locator(tmp_path: Path) -> None:
    item = Item(mk.STRANGER, b"?", flags=0, offset=80_000, length=MIB - 80_000)
    made = make(
        tmp_path / "child.vhdx",
        MIB,
        parent=mk.below(PARENT, "parent.vhdx"),
        changed={"more": item},
    )
    parent = make(tmp_path / "parent.vhdx", MIB, data_write=PARENT, file_write=UUID(int=9))
    rebase(made.path, parent.path, "parent.vhdx")
    with pytest.raises(Unsupported, match="no room for a parent locator of"):
        rebase(made.path, parent.path, "x" * 10_000)


# Cuts


def cuts(store: Store, plan: Callable[[VHDX], Plan]) -> Iterator[tuple[Epoch, Cut, Store]]:
    log = Log(store)
    file = SimulatedFile(store.copy(), name="disk.vhdx", log=log)
    hostfile.execute(plan(VHDX(file)), [file])
    rng = random.Random(1)
    found = [(epoch, cut) for epoch in log.epochs() for cut in epoch.cuts(rng)]
    if STATES and len(found) > STATES:  # what each step leaves by itself is always looked at
        found = [
            point
            for point in found
            if point[1].model == "prefix" or rng.random() < STATES / len(found)
        ]
    for epoch, cut in found:
        yield epoch, cut, epoch.build(cut)


def read(store: Store, *parents: Path) -> tuple[int, bytes]:
    """Size and the first bytes, over parents that are opened from their files."""
    images: list[Image] = [VHDX(SimulatedFile(store, name="disk.vhdx", writable=False))]
    files = [HostFile(path, lock=False) for path in parents]
    images += (VHDX(file) for file in files)
    disk = Reference(images)
    content = disk.pread(0, min(disk.size, 7 * MIB))
    for file in files:
        file.close()
    return disk.size, content


@pytest.mark.parametrize("case", ["in place", "moved", "fixed", "child"])
def test_a_resize_that_is_cut(tmp_path: Path, case: str) -> None:
    size, new = 6 * MIB - 4096, 600 * GIB if case == "moved" else 5000 * MIB
    parents: list[Path] = []
    if case == "child":
        pair = make_pair(tmp_path, size)
        made, content = pair.child, bytes(pair.content)
        parents = [pair.parent.path]
    else:
        fixed = case == "fixed"
        blocks = {b: bytes([65 + b]) * MIB for b in (range(6) if fixed else (5, 4, 1, 0))}
        made = make(tmp_path / "disk.vhdx", size, blocks, fixed=fixed)
        content = contents(made.path)
        for block in (6, 7, 600, 4999):
            made.write(made.entry_offset(block), struct.pack("<Q", made.hosts[0] | mk.PRESENT))
    store = Store.load(made.path)
    seen = set()
    for i, (epoch, cut, state) in enumerate(cuts(store, lambda image: image.resize(new))):
        place = epoch.describe(cut)
        found, data = read(state, *parents)
        assert found in (size, new), place
        seen.add(found)
        assert data[:size] == content, place
        assert not data[size:].strip(b"\0"), place
        # Going on: the resize once more, and a write into what is new.
        file = SimulatedFile(state, name="disk.vhdx")
        hostfile.execute(VHDX(file).resize(new), [file])
        images: list[Image] = [VHDX(file)]
        under = [HostFile(path, lock=False) for path in parents]
        with Reference([*images, *(VHDX(parent) for parent in under)]) as disk:
            disk.pwrite(size, b"n" * 4096)
            assert disk.pread(0, size + 8192) == content + b"n" * 4096 + bytes(4096), place
        for parent in under:
            parent.close()
        if case != "child" and i % 12 == 0:
            file.store.save(tmp_path / "cut.vhdx")
            check(tmp_path / "cut.vhdx")
    assert seen == {size, new}


def test_qemu_after_a_resize_that_is_cut(tmp_path: Path) -> None:
    """The log may hold region tables: qemu replays it before it reads them."""
    made = make(tmp_path / "disk.vhdx", 6 * MIB, {5: b"z" * MIB, 0: b"a" * MIB})
    content = contents(made.path)
    path = tmp_path / "cut.vhdx"
    sizes = set()
    for epoch, cut, state in cuts(Store.load(made.path), lambda image: image.resize(600 * GIB)):
        if cut.model != "prefix":
            continue
        state.save(path)
        done = subprocess.run(
            ["qemu-img", "check", "-r", "all", path], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{epoch.describe(cut)}"
        with opened(path) as disk:
            sizes.add(disk.size)
            assert disk.pread(0, 6 * MIB) == content
    assert sizes == {6 * MIB, 600 * GIB}


def test_a_rebase_that_is_cut(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 6 * MIB)
    other = other_parent(pair)
    base = open_chain(other).top
    seen = set()
    store = Store.load(pair.child.path)
    for epoch, cut, state in cuts(store, lambda image: image.rebase(base, "other.vhdx")):
        image = VHDX(SimulatedFile(state, name="child.vhdx", writable=False))
        assert image.parent is not None
        seen.add(image.parent.names)
        parent = {"other.vhdx": other, "parent.vhdx": pair.parent.path}[image.parent.names[0]]
        assert read(state, parent)[1] == pair.content, epoch.describe(cut)
    assert seen == {("other.vhdx",), ("parent.vhdx",)}
    base.files[0].close()


def test_a_parting_that_is_cut(tmp_path: Path) -> None:
    """Over the old parent it reads as before wherever the two agree, at any moment."""
    pair = make_pair(tmp_path, 6 * MIB, bits=(bytes(64) + b"\xff" * 64,))
    with opened(pair.child.path, writable=True) as disk:  # as rebase does: copy what differs
        kept = disk.pread(0, disk.size)
        for at in range(0, disk.size, 512):
            layers = {layer for layer, _ in disk.extents(at, 512)}
            if layers == {1} and kept[at : at + 512].strip(b"\0"):
                disk.pwrite(at, kept[at : at + 512])
    assert contents(pair.child.path) == pair.content
    store = Store.load(pair.child.path)
    seen = set()
    for epoch, cut, state in cuts(store, lambda image: image.rebase(None, "")):
        image = VHDX(SimulatedFile(state, name="child.vhdx", writable=False))
        seen.add(image.variant)
        parents = [pair.parent.path] if image.parent else []
        assert read(state, *parents)[1] == pair.content, epoch.describe(cut)
    assert seen == {"dynamic", "differencing"}


# By the tools


def written(path: Path, changes: dict[int, bytes]) -> None:
    with virtmount.open(path, writable=True) as disk:
        for at, data in changes.items():
            disk.pwrite(at, data)


def shown(path: Path) -> bytes:
    with virtmount.open(path) as disk:
        return disk.pread(0, disk.size)


def test_a_chain_is_made_rebased_and_committed(tmp_path: Path) -> None:
    base, child = tmp_path / "base.vhdx", tmp_path / "child.vhdx"
    virtmount.create(base, 20 * MIB, settings={"block_size": "1M"})
    written(base, {0: b"b" * 3 * MIB, 10 * MIB: b"c" * 512})
    virtmount.create(child, parent=base)
    written(child, {MIB + 512: b"x" * 512, 15 * MIB: b"y" * 4096})
    expected = shown(child)
    assert expected[MIB : MIB + 1536] == b"b" * 512 + b"x" * 512 + b"b" * 512

    # The same bytes under another name, and a parent that differs.
    other = tmp_path / "other.vhdx"
    virtmount.create(other, 20 * MIB)
    written(other, {0: b"b" * MIB, 12 * MIB: b"z" * MIB})
    virtmount.rebase(child, other)
    assert shown(child) == expected
    assert contents_by_7zip(child) == expected

    before = shown(other)
    assert before != expected
    virtmount.commit(child)
    assert shown(other) == expected
    assert shown(child) == expected  # it records the parent's new state

    virtmount.rebase(child, None)
    other.unlink()
    base.unlink()
    assert shown(child) == expected
    check(child)
    assert contents_by_qemu(child) == expected


def test_a_child_grows_over_a_longer_parent(tmp_path: Path) -> None:
    base, child = tmp_path / "base.vhdx", tmp_path / "child.vhdx"
    virtmount.create(base, 20 * MIB, settings={"block_size": "1M"})
    written(base, {0: b"b" * 20 * MIB})
    virtmount.create(child, 5 * MIB + 512, parent=base)
    virtmount.resize(child, 12 * MIB)
    assert shown(child) == (b"b" * (5 * MIB + 512)).ljust(12 * MIB, b"\0")


def test_partial_blocks_are_rebased(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 13 * MIB)
    other = tmp_path / "other.vhdx"
    virtmount.create(other, 13 * MIB)
    written(other, {i * MIB: b"o" * 4096 for i in range(13)})
    virtmount.rebase(pair.child.path, other)
    assert shown(pair.child.path) == pair.content
    virtmount.rebase(pair.child.path, None)
    assert shown(pair.child.path) == pair.content
    assert contents_by_qemu(pair.child.path) == pair.content
