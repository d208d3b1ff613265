"""virtmount resize, commit and rebase."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.virtmount.tools import (
    FORMATS,
    MIB,
    ROOT,
    names,
    qemu_img,
    qemu_info,
    sparse_content,
    virtmount,
)
from virtmount import api, cli, copying, formats, rebasing
from virtmount.checking import check
from virtmount.committing import commit
from virtmount.conversion import convert
from virtmount.creation import create
from virtmount.errors import Busy, ParentMissing, Unsupported, VirtmountError
from virtmount.hostfile import HostFile
from virtmount.image import Image
from virtmount.rebasing import rebase
from virtmount.resizing import resize
from virtmount.upkeep import Progress, Repair

SIZE = 13 * MIB + 512
RESIZABLE = tuple(name for name in FORMATS if formats.load(name).resize is not Image.resize)
CHILDREN = tuple(name for name in FORMATS if formats.load(name).rebase is not Image.rebase)

NOT_OVER_PARENTS = ("qcow", "qed")  # resize refuses a child of theirs


@pytest.fixture(autouse=True)
def no_descriptors_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before  # others may be collected meanwhile


def content(path: Path, form: str | None = None) -> bytes:
    with api.open(path, form) as disk:
        return disk.pread(0, disk.size)


def make(path: Path, form: str, data: bytes) -> Path:
    """An image of `form` with this content."""
    raw = path.with_suffix(".tmp")
    raw.write_bytes(data)
    convert(raw, path, form)
    raw.unlink()
    return path


def sound(path: Path, form: str) -> None:
    """As far as there is a check."""
    if not formats.load(form).checks:
        return
    found = check(path, form)
    assert not found.exit_code, found.findings


# resize


@pytest.mark.parametrize("form", RESIZABLE)
def test_growing(tmp_path: Path, form: str) -> None:
    data = sparse_content(SIZE)
    path = make(tmp_path / "disk.image", form, data)
    changed = resize(path, 3 * MIB, form, relative=True)
    assert changed.size == SIZE + 3 * MIB
    assert content(path, form) == data + bytes(3 * MIB)
    sound(path, form)
    if form != "vhd":
        assert qemu_info(path, form)["virtual-size"] == SIZE + 3 * MIB
    with api.open(path, form, writable=True) as disk:
        disk.pwrite(disk.size - 100, b"e" * 100)
    # So far that tables must move.
    resize(path, 40 << 30, form)
    with api.open(path, form, writable=True) as disk:
        assert disk.size == 40 << 30
        assert disk.pread(0, SIZE + 3 * MIB) == data + bytes(3 * MIB - 100) + b"e" * 100
        assert disk.pread((40 << 30) - MIB, MIB) == bytes(MIB)
        disk.pwrite((40 << 30) - 5, b"there")
    sound(path, form)


@pytest.mark.parametrize("form", RESIZABLE)
def test_shrinking_is_meant_or_refused(tmp_path: Path, form: str) -> None:
    data = sparse_content(SIZE)
    path = make(tmp_path / "disk.image", form, data)
    before = path.read_bytes()
    with pytest.raises(VirtmountError, match="would be lost") as caught:
        resize(path, 2 * MIB, form)
    assert "--shrink" in (caught.value.hint or "")
    assert path.read_bytes() == before
    try:
        resize(path, 2 * MIB, form, shrink=True)
    except Unsupported:
        assert form != "raw"
        assert path.read_bytes() == before
    else:
        assert content(path, form) == data[: 2 * MIB]
        sound(path, form)
        resize(path, SIZE, form)
        assert content(path, form) == data[: 2 * MIB] + bytes(SIZE - 2 * MIB)


@pytest.mark.parametrize("form", [form for form in CHILDREN if form in RESIZABLE])
def test_growing_child_does_not_show_more_of_its_parent(tmp_path: Path, form: str) -> None:
    """The parent is longer than the child was."""
    data = random.Random(1).randbytes(12 * MIB)
    parent = make(tmp_path / f"base.{form}", form, data)
    child = tmp_path / f"child.{form}"
    create(child, 4 * MIB, form, parent=parent)
    if form in NOT_OVER_PARENTS:
        with pytest.raises(Unsupported, match="parent"):
            resize(child, 8 * MIB, form)
        assert content(child) == data[: 4 * MIB]
        return
    for size in (8 * MIB, 16 * MIB):
        resize(child, size, form)
        assert content(child) == data[: 4 * MIB] + bytes(size - 4 * MIB)


def test_resize_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 2 * MIB)
    done = virtmount("resize", path, "+1M", "--json")
    assert json.loads(done.stdout)["size"] == 3 * MIB
    assert cli.main(["resize", str(path), "1M"]) == 1
    assert cli.main(["resize", "--shrink", str(path), "1M"]) == 0
    assert path.read_bytes() == b"x" * MIB
    assert cli.main(["resize", "--shrink", str(path), "--", "-512K"]) == 0
    assert path.stat().st_size == MIB // 2
    assert cli.main(["resize", str(path), "much"]) == 2
    assert cli.main(["resize", "--shrink", str(path), "--", "-1G"]) == 6
    with api.open(path, "raw"):
        assert cli.main(["resize", str(path), "2M"]) == 5
    assert path.stat().st_size == MIB // 2


# commit


def written_child(
    folder: Path, form: str, base: bytes, size: int | None = None
) -> tuple[Path, bytearray]:
    """base.FORM and child.FORM, which hides parts of it with data and with zeros."""
    parent = make(folder / f"base.{form}", form, base)
    child = folder / f"child.{form}"
    create(child, size, form, parent=parent)
    with api.open(child, writable=True) as disk:
        model = bytearray(disk.pread(0, disk.size))
        rng = random.Random(4)
        for _ in range(12):
            start = rng.randrange(5 * MIB)
            data = rng.choice([rng.randbytes(100_000), rng.randbytes(512), bytes(70_000)])
            disk.pwrite(start, data)
            model[start : start + len(data)] = data
        disk.discard(3 * MIB, MIB)
        model = bytearray(disk.pread(0, disk.size))
    return child, model


@pytest.mark.parametrize("form", CHILDREN)
def test_commit(tmp_path: Path, form: str) -> None:
    child, model = written_child(tmp_path, form, sparse_content(SIZE))
    parent = tmp_path / f"base.{form}"
    own = content(child)
    assert own == model
    assert content(parent) != model
    told: list[Progress] = []
    assert commit(child, report=told.append).path == str(parent)
    assert told[-1].done <= told[-1].total
    assert content(parent, form) == model
    # The child knows its parent's new state, and goes on.
    with api.open(child, writable=True) as disk:
        assert disk.pread(0, disk.size) == model
        disk.pwrite(0, b"more")
    commit(child)
    assert content(parent)[:4] == b"more"
    assert content(parent)[4:] == model[4:]
    for path in (parent, child):
        sound(path, form)
    assert names(tmp_path) == {parent.name, child.name}


def test_commit_of_a_longer_child_into_raw(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(sparse_content(2 * MIB + 100))
    child = tmp_path / "child.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "raw", child, "6M")
    with api.open(child, writable=True) as disk:
        disk.pwrite(5 * MIB, b"the end")
        disk.pwrite(100, b"x" * 100_000)
        model = disk.pread(0, disk.size)
    virtmount("commit", child)
    assert base.read_bytes() == model
    assert content(child) == model


def test_commit_goes_one_step_down(tmp_path: Path) -> None:
    """The parent's own parents are read, not written."""
    low = tmp_path / "low.img"
    low.write_bytes(sparse_content(4 * MIB, 2))
    before = low.read_bytes()
    middle, top = tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", low.name, "-F", "raw", middle)
    qemu_img("create", "-f", "qcow2", "-b", middle.name, "-F", "qcow2", top)
    with api.open(top, writable=True) as disk:
        disk.pwrite(MIB + 7, b"t" * 300)
        disk.write_zeroes(2 * MIB, MIB)
        model = disk.pread(0, disk.size)
    commit(top)
    assert content(middle) == model
    assert low.read_bytes() == before
    qemu_img("check", middle)
    qemu_img("compare", middle, top)


def test_what_cannot_be_committed(tmp_path: Path) -> None:
    create(tmp_path / "alone.vdi", MIB)
    with pytest.raises(VirtmountError, match="has no parent"):
        commit(tmp_path / "alone.vdi")
    base, child = tmp_path / "base.qcow2", tmp_path / "child.qcow2"
    qemu_img("create", "-f", "qcow2", base, "4M")
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", child)
    with api.open(child):  # which reads its parent
        with pytest.raises(Busy):
            commit(child)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ParentMissing):
        commit(child)
    (tmp_path / "elsewhere").rename(base)
    qemu_img("snapshot", "-c", "then", child)
    with pytest.raises(Unsupported, match="its snapshots"):
        commit(child)


# rebase


@pytest.mark.parametrize("form", CHILDREN)
def test_rebase_keeps_what_is_read(tmp_path: Path, form: str) -> None:
    base = sparse_content(SIZE)
    child, model = written_child(tmp_path, form, base)
    other = bytearray(base)
    rng = random.Random(9)
    for at in (0, MIB, 2 * MIB + 512, 7 * MIB, 9 * MIB + 100, SIZE - 512):
        other[at : at + 512] = rng.randbytes(512)
    parent = make(tmp_path / f"other.{form}", form, bytes(other))
    before = parent.read_bytes()
    told: list[Progress] = []
    changed = rebase(child, parent, report=told.append)
    assert [entry.path for entry in changed.parents] == [str(parent)]
    assert told[-1].done == told[-1].total > 0
    (tmp_path / f"base.{form}").unlink()
    assert content(child) == model
    assert parent.read_bytes() == before
    sound(child, form)


@pytest.mark.parametrize("form", CHILDREN)
def test_rebase_copies_only_differences(tmp_path: Path, form: str) -> None:
    child, model = written_child(tmp_path, form, random.Random(5).randbytes(SIZE))
    same = tmp_path / f"same.{form}"
    make(same, form, content(tmp_path / f"base.{form}"))
    size = child.stat().st_size
    rebase(child, same)
    assert child.stat().st_size < size + 64 * 1024  # no data; maybe the parent's name
    (tmp_path / f"base.{form}").unlink()
    assert content(child) == model


@pytest.mark.parametrize("form", CHILDREN)
def test_rebase_onto_nothing(tmp_path: Path, form: str) -> None:
    child, model = written_child(tmp_path, form, sparse_content(SIZE))
    virtmount("rebase", "--no-parent", child)
    (tmp_path / f"base.{form}").unlink()
    assert api.inspect(child).parents == ()
    assert content(child, form) == model
    sound(child, form)


@pytest.mark.parametrize("form", CHILDREN)
def test_unsafe_rebase_of_a_moved_parent(tmp_path: Path, form: str) -> None:
    child, model = written_child(tmp_path, form, sparse_content(SIZE))
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / f"base.{form}"
    (tmp_path / f"base.{form}").rename(moved)
    with pytest.raises(ParentMissing):
        content(child)
    with pytest.raises(ParentMissing):
        rebase(child, moved)
    virtmount("rebase", "-u", "-b", moved, child)
    if form == "vdi":
        assert content_of(child, moved.parent) == model
    else:
        assert content(child) == model


def content_of(child: Path, search: Path) -> bytes:
    options = api.Options(search_path=(str(search),))
    with api.open(child, options=options) as disk:
        return disk.pread(0, disk.size)


@pytest.mark.parametrize("form", CHILDREN)
def test_interrupted_rebase_reads_as_before(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, model = written_child(tmp_path, form, sparse_content(SIZE))
    parent = make(tmp_path / f"other.{form}", form, random.Random(3).randbytes(SIZE))

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rebase(child, parent, report=fail)
    assert content(child) == model
    with monkeypatch.context() as patch:
        patch.setattr(rebasing, "record", fail)
        with pytest.raises(KeyboardInterrupt):
            rebase(child, parent)
    assert content(child) == model
    rebase(child, parent)
    assert content(child) == model


def test_what_cannot_be_rebased(tmp_path: Path) -> None:
    raw, vdi, child = tmp_path / "disk.img", tmp_path / "base.vdi", tmp_path / "child.vdi"
    raw.write_bytes(bytes(MIB))
    create(vdi, MIB)
    create(child, parent=vdi)
    with pytest.raises(Unsupported, match="no parents can be recorded"):
        rebase(raw, vdi)
    with pytest.raises(VirtmountError, match="its own parent"):
        rebase(child, child)
    with api.open(child), pytest.raises(Busy):
        rebase(child, vdi)
    before = child.read_bytes()
    with pytest.raises(FileNotFoundError):
        rebase(child, tmp_path / "none.vdi")
    assert child.read_bytes() == before
    assert raw.read_bytes() == bytes(MIB)


def test_differences_are_whole_grains() -> None:
    a = bytes(20_000)
    b = bytearray(a)
    b[5000], b[9000], b[19_999] = 1, 1, 1
    assert list(copying.differences(a, bytes(b))) == [
        copying.Run(4096, 8192),
        copying.Run(16384, 20_000 - 16384),
    ]


def test_parents_are_searched_for_where_the_user_says(tmp_path: Path) -> None:
    """VDI has no path in the file."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    child, base, other = here / "child.vdi", there / "base.vdi", there / "other.vdi"
    make(base, "vdi", sparse_content(4 * MIB))
    make(other, "vdi", random.Random(1).randbytes(4 * MIB))
    create(child, parent=base)
    model = b"new" + content(base)[3:]
    told = ("--search-path", there)
    with api.open(child, writable=True, options=api.Options(search_path=(str(there),))) as disk:
        disk.pwrite(0, b"new")
    virtmount("convert", child, tmp_path / "copy.img", code=9)
    virtmount("convert", *told, child, tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == model
    virtmount("commit", *told, child)
    assert content(base) == model
    virtmount("rebase", *told, "-b", other, child)
    base.unlink()
    assert content_of(child, there) == model


@pytest.mark.parametrize("verb", ["commit", "rebase"])
def test_child_with_pieces_of_clusters(tmp_path: Path, verb: str) -> None:
    """Subclusters that are there, zero, and the parent's, in one cluster."""
    base = make(tmp_path / "base.img", "raw", random.Random(7).randbytes(SIZE))
    child = tmp_path / "child.qcow2"
    settings = {"extended_l2": "on", "cluster_size": "128K"}
    create(child, format="qcow2", settings=settings, parent=base)
    words = [f"write -q -P {i + 1} {i * 300_000 // 4096 * 4096} 4k" for i in range(40)]
    words += [f"write -q -z {i * 500_000 // 4096 * 4096} 8k" for i in range(25)]
    options = [part for word in words for part in ("-c", word)]
    subprocess.run(["qemu-io", "-f", "qcow2", *options, str(child)], check=True)
    model = content(child)
    assert model != base.read_bytes()
    if verb == "commit":
        commit(child)
        assert base.read_bytes() == model
    else:
        other = make(tmp_path / "other.img", "raw", random.Random(8).randbytes(SIZE))
        rebase(child, other)
        base.unlink()
    assert content(child) == model
    sound(child, "qcow2")
    qemu_img("check", child)


@pytest.mark.parametrize("form", CHILDREN)
def test_interrupted_commit_is_done_again(tmp_path: Path, form: str) -> None:
    child, model = written_child(tmp_path, form, sparse_content(SIZE))

    def fail(progress: Progress) -> None:
        if progress.done > 2 * MIB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit(child, report=fail)
    with api.open(child, force=True) as disk:
        assert disk.pread(0, disk.size) == model
    commit(child, force=True)
    assert content(child) == model
    assert content(tmp_path / f"base.{form}", form) == model


def wait_until_free(path: Path) -> None:
    """The kernel closes files that io_uring has a little after the process is gone."""
    deadline = time.monotonic() + 20
    while True:
        try:
            HostFile(path, writable=True).close()
            return
        except Busy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)


@pytest.mark.parametrize("form", ["qcow2", "vdi", "vhdx"])
@pytest.mark.parametrize("verb", ["commit", "rebase"])
def test_killed_in_the_middle(tmp_path: Path, form: str, verb: str) -> None:
    """The child reads as before, is sound, and the same can be done again."""
    rng = random.Random(6)
    child, model = written_child(tmp_path, form, rng.randbytes(SIZE))
    words: list[object] = ["rebase", "--progress", "-b", tmp_path / f"other.{form}", child]
    make(tmp_path / f"other.{form}", form, rng.randbytes(SIZE))
    if verb == "commit":
        words = ["commit", "--progress", child]
    with subprocess.Popen(
        [sys.executable, "-m", "virtmount", *map(str, words)], stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stderr is not None
        assert b"%" in process.stderr.readline()
        process.kill()
    for path in (child, tmp_path / f"base.{form}"):
        wait_until_free(path)
    with api.open(child, force=True) as disk:
        assert disk.pread(0, disk.size) == model
    check(child, form, repair=Repair.ALL)
    sound(child, form)
    if verb == "commit":
        commit(child, force=True)
        assert content(tmp_path / f"base.{form}", form) == model
    else:
        rebase(child, tmp_path / f"other.{form}", force=True)
        (tmp_path / f"base.{form}").unlink()
    assert content(child) == model
