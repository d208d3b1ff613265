"""VDI over VDI: the parent is found by its UUID, checked, hidden by zeros, and named anew."""

from __future__ import annotations

import hashlib
import lzma
import os
import random
import shutil
import uuid
from pathlib import Path

import pytest

from tests.formats.make_vdi import FREE, MIB, make, make_base, make_child, name
from tests.formats.test_vdi import field, the_map
from tests.reference import Reference
from virtmount import hostfile
from virtmount.chain import open_chain
from virtmount.errors import Corrupt, Denied, ParentMissing, Unsupported
from virtmount.formats import vdi_parent
from virtmount.formats.raw import Raw
from virtmount.formats.vdi import VDI
from virtmount.formats.vdi_map import DISCARDED
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Image, Kind, Options, extents
from virtmount.upkeep import New

CORPUS = Path(__file__).parents[1] / "corpus" / "images"


def read_chain(path: Path, options: Options = DEFAULTS, *, force: bool = False) -> bytes:
    chain = open_chain(path, options=options, force=force)
    try:
        return Reference(chain.images).pread(0, chain.top.size)
    finally:
        chain.close()


def found(path: Path, options: Options = DEFAULTS) -> tuple[str, ...]:
    with HostFile(path) as file:
        image = VDI(file, options)
        assert image.parent is not None
        assert image.parent.searched
        return image.parent.names


EXPECTED = b"\1" * MIB + b"\1" * MIB + bytes(2 * MIB)  # of make_child() over make_base()


@pytest.mark.parametrize("kind", [3, 4])
def test_undo_and_differencing_images_are_read_over_their_parent(tmp_path: Path, kind: int) -> None:
    make_base(tmp_path / "base.vdi")
    make_child(tmp_path / "child.vdi", kind=kind)
    with HostFile(tmp_path / "child.vdi") as file:
        image = VDI(file)
        assert image.variant == {3: "undo", 4: "differencing"}[kind]
        assert [extent.kind for extent in extents(image, 0, image.size)] == [
            Kind.ABSENT,
            Kind.DATA,
            Kind.ABSENT,
            Kind.ZERO,
        ]
        details = image.details()
    assert details["parent_uuid"] == str(uuid.UUID(int=1))
    assert details["parent_modification_uuid"] == str(uuid.UUID(int=101))
    assert details["parent_found"] == ["base.vdi"]
    assert read_chain(tmp_path / "child.vdi") == EXPECTED


def test_a_snapshot_made_by_virtualbox(tmp_path: Path) -> None:
    for part in ("base", "snap1"):
        packed = CORPUS / f"virtualbox-{part}.vdi.xz"
        (tmp_path / f"{part}.vdi").write_bytes(lzma.decompress(packed.read_bytes()))
    chain = open_chain(tmp_path / "snap1.vdi")
    try:
        assert [image.variant for image in chain.images] == ["differencing", "dynamic"]
        content = Reference(chain.images).pread(0, chain.top.size)
    finally:
        chain.close()
    # Put together from both files by a few lines that know nothing of our driver.
    digest = "c35e52a1b90446a88541e2d8b1a42b43b616fe35024133a6230590d02971c0c3"
    assert hashlib.sha256(content).hexdigest() == digest


@pytest.mark.parametrize(
    ("child", "parent", "seen"),
    [
        ("vm/child.vdi", "vm/base.vdi", "base.vdi"),
        ("vm/child.vdi", "vm/OLD.VDI", "OLD.VDI"),
        ("vm/child.vdi", "vm/Snapshots/base.vdi", "Snapshots/base.vdi"),
        ("vm/Snapshots/child.vdi", "vm/base.vdi", "../base.vdi"),
        ("vm/a/child.vdi", "vm/Snapshots/base.vdi", "../Snapshots/base.vdi"),
    ],
)
def test_where_a_parent_is_looked_for(tmp_path: Path, child: str, parent: str, seen: str) -> None:
    for path in (tmp_path / child, tmp_path / parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    make_base(tmp_path / parent)
    make_child(tmp_path / child)
    (tmp_path / "vm" / "other.vdi").write_bytes(bytes(4096))
    (tmp_path / "vm" / "short.vdi").write_bytes(b"x")
    assert found(tmp_path / child) == (seen,)
    if seen.startswith(".."):
        with pytest.raises(Denied, match="lies outside of the image's folder") as raised:
            read_chain(tmp_path / child)
        assert raised.value.hint
    assert read_chain(tmp_path / child, Options(allow_outside=True)) == EXPECTED


def test_the_search_path_of_the_user(tmp_path: Path) -> None:
    make_base(tmp_path / "bases" / "base.vdi")
    make_child(tmp_path / "vm" / "child.vdi")
    assert found(tmp_path / "vm" / "child.vdi") == ()
    options = Options(search_path=(str(tmp_path / "bases"),))
    assert found(tmp_path / "vm" / "child.vdi", options) == (str(tmp_path / "bases" / "base.vdi"),)
    assert read_chain(tmp_path / "vm" / "child.vdi", options) == EXPECTED
    # What is found there may not lead anywhere else.
    (tmp_path / "other").mkdir()
    (tmp_path / "bases" / "base.vdi").rename(tmp_path / "other" / "base.vdi")
    (tmp_path / "bases" / "base.vdi").symlink_to(tmp_path / "other" / "base.vdi")
    with pytest.raises(Denied, match="lies outside"):
        read_chain(tmp_path / "vm" / "child.vdi", options)


def test_through_a_link_both_folders_are_looked_into(tmp_path: Path) -> None:
    make_base(tmp_path / "store" / "base.vdi")
    make_child(tmp_path / "store" / "child.vdi")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "child.vdi").symlink_to(tmp_path / "store" / "child.vdi")
    assert read_chain(tmp_path / "links" / "child.vdi") == EXPECTED


def test_only_regular_files_called_vdi_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_child(tmp_path / "child.vdi")
    make_base(tmp_path / "base.img")
    os.mkfifo(tmp_path / "fifo.vdi")
    (tmp_path / "folder.vdi").mkdir()
    (tmp_path / "null.vdi").symlink_to("/dev/null")
    (tmp_path / "loop.vdi").symlink_to("loop.vdi")
    (tmp_path / "gone.vdi").symlink_to("nowhere")
    opened: list[str] = []

    class Watched(HostFile):
        def __init__(self, path: str, *, lock: bool) -> None:
            opened.append(os.path.basename(path))
            super().__init__(path, lock=lock)

    monkeypatch.setattr(vdi_parent, "HostFile", Watched)
    assert found(tmp_path / "child.vdi") == ()
    assert set(opened) == {"child.vdi"}


def test_the_search_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_child(tmp_path / "child.vdi")
    for number in range(20):
        (tmp_path / f"a{number:02}.vdi").write_bytes(b"x")
    make_base(tmp_path / "z.vdi")
    assert found(tmp_path / "child.vdi") == ("z.vdi",)
    monkeypatch.setattr(vdi_parent, "MAX_HEADERS", 10)
    assert found(tmp_path / "child.vdi") == ()


def test_nothing_is_looked_for_where_the_parent_changes(tmp_path: Path) -> None:
    make_base(tmp_path / "base.vdi")
    make_child(tmp_path / "child.vdi")
    assert found(tmp_path / "child.vdi", Options(changing_parent=True)) == ()


def test_of_two_copies_the_one_in_the_right_state_comes_first(tmp_path: Path) -> None:
    make_base(tmp_path / "a.vdi")
    name(tmp_path / "a.vdi", modification=99)
    make_base(tmp_path / "b.vdi")
    make_child(tmp_path / "child.vdi")
    assert found(tmp_path / "child.vdi") == ("b.vdi", "a.vdi")
    (tmp_path / "b.vdi").unlink()
    with pytest.raises(ParentMissing, match="was written since"):
        read_chain(tmp_path / "child.vdi")
    assert read_chain(tmp_path / "child.vdi", force=True) == EXPECTED


def test_no_parent_far_and_wide(tmp_path: Path) -> None:
    make_base(tmp_path / "base.vdi", number=7)
    make_child(tmp_path / "child.vdi")
    with pytest.raises(ParentMissing, match=r"no image 0{8}-.* found around it"):
        read_chain(tmp_path / "child.vdi")


def test_an_image_that_is_its_own_parent_has_none(tmp_path: Path) -> None:
    make_child(tmp_path / "child.vdi")
    name(tmp_path / "child.vdi", linkage=2)
    with pytest.raises(ParentMissing, match=r"no image 0{8}-.* found around it"):
        read_chain(tmp_path / "child.vdi")


def test_two_images_that_are_each_others_parent(tmp_path: Path) -> None:
    make_child(tmp_path / "a.vdi", number=2)
    make_child(tmp_path / "b.vdi", number=1)
    name(tmp_path / "b.vdi", linkage=2, parent_modification=102)
    with pytest.raises(Corrupt, match="the chain comes back to"):
        read_chain(tmp_path / "a.vdi")


def test_a_chain_of_ten(tmp_path: Path) -> None:
    count = 12
    expected = bytearray(count * MIB)
    make_base(tmp_path / "1.vdi", [0] + [FREE] * (count - 1))
    expected[:MIB] = b"\1" * MIB
    for number in range(2, 11):
        blocks = [FREE] * count
        blocks[number] = 0
        make_child(tmp_path / f"{number}.vdi", blocks, number)
        expected[number * MIB : (number + 1) * MIB] = b"\1" * MIB
    assert read_chain(tmp_path / "10.vdi") == expected


# Writing


def test_writing_copies_the_rest_of_the_block_from_the_parent(tmp_path: Path) -> None:
    make_base(tmp_path / "base.vdi")
    make_child(tmp_path / "child.vdi")
    before = (tmp_path / "base.vdi").read_bytes()
    chain = open_chain(tmp_path / "child.vdi", writable=True)
    with Reference(chain.images) as disk:
        disk.pwrite(5, b"new")
        disk.pwrite(3 * MIB + 7, b"zero")
        disk.flush()
    chain.close()
    expected = bytearray(EXPECTED)
    expected[5:8], expected[3 * MIB + 7 : 3 * MIB + 11] = b"new", b"zero"
    assert read_chain(tmp_path / "child.vdi") == expected
    assert (tmp_path / "base.vdi").read_bytes() == before


def test_a_discard_over_a_parent_leaves_zeros(tmp_path: Path) -> None:
    """Also of what the child did not hold; the freed block is given to one that reads as zeros."""
    make_base(tmp_path / "base.vdi", [0, 1, 2, 3])
    make_child(tmp_path / "child.vdi", [FREE, 0, 1, FREE])
    chain = open_chain(tmp_path / "child.vdi", writable=True)
    with Reference(chain.images) as disk:
        disk.discard(0, 2 * MIB)
        assert disk.pread(0, 2 * MIB) == bytes(2 * MIB)
        disk.flush()
        assert the_map(tmp_path / "child.vdi")[:2] == [DISCARDED, DISCARDED]
    chain.close()
    assert sorted(the_map(tmp_path / "child.vdi")) == [0, 1, DISCARDED, FREE]
    assert the_map(tmp_path / "child.vdi")[3] == FREE
    assert read_chain(tmp_path / "child.vdi") == bytes(2 * MIB) + b"\2" * MIB + b"\4" * MIB
    assert field(tmp_path / "child.vdi", "blocks_allocated") == 2


def test_a_large_discard_over_a_parent_marks_what_the_map_says_nothing_of(tmp_path: Path) -> None:
    count = 40000  # pieces of the map that hold nothing at all
    make(tmp_path / "c.vdi", [FREE] * count, block_size=512, data_offset=512 * 400, kind=4)
    name(tmp_path / "c.vdi", linkage=1)
    with HostFile(tmp_path / "c.vdi", writable=True) as file:
        image = VDI(file)
        hostfile.execute(image.discard(3, count - 5), image.files)
    entries = the_map(tmp_path / "c.vdi")
    assert entries[:4] == [FREE, FREE, FREE, DISCARDED]
    assert set(entries[3:-2]) == {DISCARDED}
    assert entries[-2:] == [FREE, FREE]


@pytest.mark.parametrize("seed", range(3))
def test_sessions_over_a_parent(tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)
    block, count = 4096, 200
    below = random_.sample(range(count), count)
    make(tmp_path / "base.vdi", below, block_size=block, data_offset=2048)
    name(tmp_path / "base.vdi", uuid=1)
    make(tmp_path / "child.vdi", [FREE] * count, block_size=block, data_offset=2048, kind=4)
    name(tmp_path / "child.vdi", uuid=2, linkage=1)
    model = bytearray(b"".join(bytes([(number + 1) % 256]) * block for number in below))
    with (tmp_path / "base.vdi").open("r+b") as file:
        file.seek(2048)
        for number in range(count):
            file.write(bytes([(number + 1) % 256]) * block)
    for _ in range(4):
        chain = open_chain(tmp_path / "child.vdi", writable=True)
        with Reference(chain.images) as disk:
            for _ in range(25):
                at = random_.randrange(count * block)
                length = min(random_.choice([1, 700, 4096, 30000]), count * block - at)
                if random_.random() < 0.6:
                    data = random_.randbytes(length)
                    disk.pwrite(at, data)
                else:
                    data = bytes(length)
                    disk.write_zeroes(at, length)
                model[at : at + length] = data
            assert disk.pread(0, disk.size) == model
        chain.close()
        assert read_chain(tmp_path / "child.vdi") == model


def test_writing_to_a_parent_is_noticed_by_its_children(tmp_path: Path) -> None:
    make_base(tmp_path / "base.vdi")
    make_child(tmp_path / "child.vdi")
    with HostFile(tmp_path / "base.vdi", writable=True) as file:
        image = VDI(file)
        with Reference([image]) as disk:
            disk.pwrite(0, b"x")
        assert image.stamp != str(uuid.UUID(int=101))
    with pytest.raises(ParentMissing, match="was written since"):
        read_chain(tmp_path / "child.vdi")


# Making and naming


def create_child(path: Path, parent: Path, size: int = 4 * MIB, **options: str) -> None:
    path.touch()
    with HostFile(path, writable=True) as file, HostFile(parent) as below:
        new = New(
            [file],
            str(path),
            size,
            options,
            lambda name: 0,
            parent=VDI(below),
            parent_name=os.path.relpath(parent, path.parent),
        )
        hostfile.execute(VDI.create(new), [file])


def test_a_new_child_shows_its_parent_until_it_is_written(tmp_path: Path) -> None:
    make_base(tmp_path / "base.vdi")
    create_child(tmp_path / "child.vdi", tmp_path / "base.vdi", block_size="128K")
    assert field(tmp_path / "child.vdi", "type") == 4
    base = b"\1" * MIB + b"\2" * MIB + bytes(MIB) + b"\3" * MIB
    assert read_chain(tmp_path / "child.vdi") == base
    chain = open_chain(tmp_path / "child.vdi", writable=True)
    with Reference(chain.images) as disk:
        disk.pwrite(MIB - 1, b"ab")
        disk.discard(3 * MIB, 512 << 10)
    chain.close()
    model = bytearray(base)
    model[MIB - 1 : MIB + 1] = b"ab"
    model[3 * MIB : 3 * MIB + (512 << 10)] = bytes(512 << 10)
    assert read_chain(tmp_path / "child.vdi") == model


@pytest.mark.parametrize(
    ("options", "parent_name", "is_vdi", "complaint"),
    [
        ({"subformat": "fixed"}, "base.vdi", True, "subformat: a fixed image has no parent"),
        ({}, "base.img", True, r"parent: base.img: only files called \*.vdi are looked for"),
        ({}, "base.vdi", False, "parent: base.vdi is raw: the parent of a VDI is a VDI"),
    ],
)
def test_parents_that_no_vdi_has(
    tmp_path: Path, options: dict[str, str], parent_name: str, is_vdi: bool, complaint: str
) -> None:
    make_base(tmp_path / "base.vdi")
    (tmp_path / "a.vdi").touch()
    with (
        HostFile(tmp_path / "a.vdi", writable=True) as file,
        HostFile(tmp_path / "base.vdi") as below,
    ):
        parent: Image = VDI(below) if is_vdi else Raw(below)
        new = New([file], "a.vdi", MIB, options, lambda name: 0, 512, parent, parent_name)
        with pytest.raises(Unsupported, match=complaint):
            VDI.create(new)


def rebase(path: Path, parent: Path | None) -> None:
    with HostFile(path, writable=True) as file:
        image = VDI(file, Options(changing_parent=True))
        if parent is None:
            hostfile.execute(image.rebase(None, ""), [file])
            return
        with HostFile(parent) as below:
            hostfile.execute(image.rebase(VDI(below), parent.name), [file])


def test_rebasing(tmp_path: Path) -> None:
    make_base(tmp_path / "base.vdi")
    make_child(tmp_path / "child.vdi")
    make_base(tmp_path / "other.vdi", [FREE, FREE, 0, FREE], number=50)
    rebase(tmp_path / "child.vdi", tmp_path / "other.vdi")
    assert found(tmp_path / "child.vdi") == ("other.vdi",)
    own = bytes(MIB) + b"\1" * MIB
    assert read_chain(tmp_path / "child.vdi") == own + b"\1" * MIB + bytes(MIB)
    rebase(tmp_path / "child.vdi", None)
    assert field(tmp_path / "child.vdi", "type") == 1
    assert read_chain(tmp_path / "child.vdi") == own + bytes(2 * MIB)
    rebase(tmp_path / "child.vdi", tmp_path / "base.vdi")
    assert field(tmp_path / "child.vdi", "type") == 4
    assert read_chain(tmp_path / "child.vdi") == EXPECTED


def test_a_child_whose_parent_is_unknown_can_be_given_one(tmp_path: Path) -> None:
    make_base(tmp_path / "base.vdi")
    make_child(tmp_path / "child.vdi")
    name(tmp_path / "child.vdi", linkage=0)
    with HostFile(tmp_path / "child.vdi") as file:
        with pytest.raises(Corrupt, match="no parent is named"):
            VDI(file)
    rebase(tmp_path / "child.vdi", tmp_path / "base.vdi")
    assert read_chain(tmp_path / "child.vdi") == EXPECTED


def test_a_fixed_image_is_not_rebased(tmp_path: Path) -> None:
    make_base(tmp_path / "base.vdi")
    shutil.copy(tmp_path / "base.vdi", tmp_path / "fixed.vdi")
    make(tmp_path / "fixed.vdi", [0, 1], kind=2)
    with pytest.raises(Unsupported, match="a fixed image has no parent"):
        rebase(tmp_path / "fixed.vdi", tmp_path / "base.vdi")
