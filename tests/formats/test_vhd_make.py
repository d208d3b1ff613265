"""New VHD images, larger ones, other parents: what is in them, at whatever step they are cut."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import virtmount
from tests.crash.simulate import Log, SimulatedFile, Store
from tests.formats import make_vhd
from tests.formats.make_vhd import (
    DIFFERENCING,
    DYNAMIC,
    FIXED,
    KIB,
    MIB,
    PARENT_UUID,
    Block,
    Spec,
    child_of,
    pattern,
)
from tests.formats.test_vhd import EIGHTS, content, libvhdi, read, seven_zip
from tests.formats.test_vhd_write import sound
from tests.formats.whole_vhd import check, create, rebase, resize
from tests.reference import Reference
from virtmount import hostfile
from virtmount.chain import open_chain
from virtmount.errors import Unsupported, VirtmountError
from virtmount.formats import probe
from virtmount.formats.vhd import VHD
from virtmount.hostfile import HostFile
from virtmount.image import Image, Match, Options
from virtmount.plan import Plan
from virtmount.upkeep import Repair, Severity

BLOCK = 64 * KIB
GIB = 1 << 30


def qemu_size(path: Path) -> int:
    command = ["qemu-img", "info", "-f", "vpc", "--output=json", str(path)]
    done = subprocess.run(command, check=True, capture_output=True)
    return int(json.loads(done.stdout)["virtual-size"])


# Making


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("size", [512, 4096 + 512, 10 * MIB + 1024, 10 * GIB, 2040 * GIB])
def test_every_program_sees_the_exact_size(tmp_path: Path, subformat: str, size: int) -> None:
    path = tmp_path / "new.vhd"
    create(path, size, settings={"subformat": subformat})
    assert qemu_size(path) == size
    with HostFile(path) as file:
        assert probe(file) is VHD
        image = VHD(file)
        assert (image.variant, image.size) == (subformat, size)
        head, tail = file.pread_padded(0, 65536), file.pread_padded(file.size - 1024, 1024)
        assert VHD.probe(head, tail, file.size) is Match.SURE
    assert check(path) == []
    assert path.stat().st_blocks * 512 < 8 * MIB
    info = subprocess.run(["vhdiinfo", str(path)], check=True, capture_output=True, text=True)
    assert f"({size} bytes)" in info.stdout or f"{size} bytes" in info.stdout


@pytest.mark.parametrize("block", ["4K", "65536", "2m", "32M"])
def test_block_sizes_that_are_asked_for(tmp_path: Path, block: str) -> None:
    path = tmp_path / "new.vhd"
    create(path, 9 * MIB + 512, settings={"block_size": block})
    expected = bytearray(9 * MIB + 512)
    with virtmount.open(path, writable=True) as disk:
        for at in (8 * MIB, 5, 9 * MIB, MIB + 100):
            disk.pwrite(at, b"here")
            expected[at : at + 4] = b"here"
    sound(path)
    assert read(path) == seven_zip(path) == expected
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-f", "vpc", "-O", "raw", path, raw], check=True)
    assert raw.read_bytes() == expected


@pytest.mark.parametrize(
    ("size", "settings", "complaint"),
    [
        (2040 * GIB + 512, {}, "know multiples of 512 up to 2190433320960"),
        (MIB, {"subformat": "sparse"}, "'sparse', know dynamic and fixed"),
        (MIB, {"subformat": "differencing"}, "no parent was named"),
        (MIB, {"block_size": "3M"}, "'3M', know powers of two from 4096 to 33554432"),
        (MIB, {"block_size": "2K"}, "'2K', know powers"),
        (MIB, {"block_size": "64M"}, "'64M', know powers"),
        (MIB, {"block_size": "much"}, "'much', know powers"),
        (2040 * GIB, {"block_size": "4K"}, "at most 4194304 are supported"),
    ],
)
def test_what_cannot_be_made_is_refused(
    tmp_path: Path, size: int, settings: dict[str, str], complaint: str
) -> None:
    with pytest.raises(Unsupported, match=complaint):
        create(tmp_path / "new.vhd", size, settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_sectors_of_4096_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="4096, a VHD's sectors have 512"):
        create(tmp_path / "new.vhd", MIB, sector_size=4096)


def base_image(folder: Path, name: str = "base.vhd", start: int = 0x100) -> tuple[Path, bytes]:
    below = b"".join(pattern(start + i, BLOCK) for i in range(4))
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    uuid = bytes([start & 0xFF]) + PARENT_UUID[1:]
    path.write_bytes(below + make_vhd.footer(FIXED, len(below), uuid=uuid))
    return path, below


@pytest.mark.parametrize("name", ["base.vhd", "below/base.vhd", "\xe4\u4e2d \U0001f4bf.vhd"])
def test_a_child_reads_as_its_parent_in_every_program(tmp_path: Path, name: str) -> None:
    base, below = base_image(tmp_path, name)
    path = tmp_path / "child.vhd"
    create(path, parent=base, settings={"block_size": "64K"})
    with HostFile(path) as file:
        image = VHD(file)
        assert (image.variant, image.size) == ("differencing", len(below))
        assert image.parent is not None
        assert image.parent.names[0] == name
        found = image.details()
    windows = ".\\" + name.replace("/", "\\")
    assert found["parent_locators"] == {"W2ru": windows, "W2ku": str(base)}
    assert found["parent_name"] == base.name
    expected = bytearray(below)
    with virtmount.open(path, writable=True) as disk:
        disk.pwrite(BLOCK + 700, b"mine")
    expected[BLOCK + 700 : BLOCK + 704] = b"mine"
    assert read(path) == expected
    assert only_notes(path)
    assert base.read_bytes()[: len(below)] == below
    if name == "base.vhd":  # 7-Zip and libvhdi do not look into folders, nor take such letters
        assert seven_zip(path) == expected
        assert libvhdi(path, tmp_path) == expected


def test_a_childs_parent_is_a_vhd(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    with pytest.raises(Unsupported, match="raw: the parent of a VHD is a VHD"):
        create(tmp_path / "child.vhd", parent=tmp_path / "base.raw")
    base, _ = base_image(tmp_path)
    with pytest.raises(Unsupported, match="fixed: such an image has no parent"):
        create(tmp_path / "child.vhd", parent=base, settings={"subformat": "fixed"})
    odd, _ = base_image(tmp_path, "back\\slash.vhd")
    with pytest.raises(Unsupported, match="no name that Windows can write"):
        create(tmp_path / "child.vhd", parent=odd)


# Growing


def some(size: int, *, gap: int = 0, **fields: object) -> Spec:
    blocks = {i: Block(pattern(i, BLOCK)) for i in (size // BLOCK - 1, 0)}
    spec = Spec(size, blocks, block=BLOCK, gap=gap)
    return dataclasses.replace(spec, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("gap", [0, 8192])
@pytest.mark.parametrize("count", [4, 5, 128, 129, 40000])
def test_growing_a_dynamic_image(tmp_path: Path, gap: int, count: int) -> None:
    """In place while there is room behind the table, else the table moves to the end."""
    spec = some(4 * BLOCK, gap=gap)
    path = spec.write(tmp_path / "a.vhd")
    size = count * BLOCK - 512
    if count == 4:
        size += 512
    assert resize(path, size) == size
    assert qemu_size(path) == size
    assert check(path) == []
    with virtmount.open(path, writable=True) as disk:
        assert disk.pread(0, 4 * BLOCK) == content(spec)
        for at in (size - 512, 2 * BLOCK, size // 2):
            disk.pwrite(at, b"after".ljust(512, b"\0"))
    sound(path)
    with virtmount.open(path) as disk:
        assert disk.pread(size - 512, 512) == b"after".ljust(512, b"\0")
        assert disk.pread(0, BLOCK) == content(spec)[:BLOCK]
        if size < 16 * MIB:
            assert seven_zip(path) == disk.pread(0, size)
    moved = details(path)["table_offset"] != 1536
    assert moved == (count > (128 if gap == 0 else 2048 + 128))


def details(path: Path) -> dict[str, object]:
    with HostFile(path) as file:
        return VHD(file).details()


def test_writing_goes_on_after_growing_and_a_new_parent(tmp_path: Path) -> None:
    """In one session: what was free and holds a table or a name now is not given to a block."""
    path = some(4 * BLOCK, gap=391 * 512).write(tmp_path / "a.vhd")
    base, below = base_image(tmp_path)
    with HostFile(path, writable=True) as file, contextlib.closing(open_chain(base)) as chain:
        image = VHD(file)
        hostfile.execute(image.begin(), [file])
        hostfile.execute(image.resize(20_000 * BLOCK), [file])
        assert image.details()["table_offset"] == 1536
        hostfile.execute(image.rebase(chain.top, base.name), [file])
        with Reference([image, *chain.images]) as disk:
            for index in (1, 2, 7, 19_999):
                disk.pwrite(index * BLOCK, b"n" * 512)
    expected = bytearray(content(some(4 * BLOCK), below).ljust(8 * BLOCK, b"\0"))
    for index in (1, 2, 7):
        expected[index * BLOCK : index * BLOCK + 512] = b"n" * 512
    assert only_notes(path)
    with virtmount.open(path) as disk:
        assert disk.pread(0, 8 * BLOCK) == expected
        assert disk.pread(19_999 * BLOCK, 1024) == b"n" * 512 + bytes(512)


def test_growing_keeps_away_from_what_it_does_not_know(tmp_path: Path) -> None:
    """XenServer has a second map behind the table."""
    path = some(4 * BLOCK, gap=8192).write(tmp_path / "a.vhd")
    raw = bytearray(path.read_bytes())
    raw[2048:2056] = b"tdbatmap"
    path.write_bytes(raw)
    resize(path, 1000 * BLOCK)
    assert details(path)["table_offset"] != 1536
    assert path.read_bytes()[2048:2056] == b"tdbatmap"
    sound(path)


@pytest.mark.parametrize("creator", [b"vpc ", b"qemu", b"win "])
def test_growing_an_image_whose_size_was_its_geometrys(tmp_path: Path, creator: bytes) -> None:
    spec = some(4 * BLOCK, creator=creator, shape=(5, 4, 17))
    path = spec.write(tmp_path / "a.vhd")
    assert resize(path, 9 * BLOCK) == 9 * BLOCK == qemu_size(path)


def test_growing_a_child_shows_zeros_behind_its_parent(tmp_path: Path) -> None:
    base, below = base_image(tmp_path)
    spec = child_of(
        base,
        4 * BLOCK,
        {1: Block(b"x" * BLOCK, EIGHTS)},
        uuid=bytes([0]) + PARENT_UUID[1:],
        block=BLOCK,
    )
    path = spec.write(tmp_path / "child.vhd")
    resize(path, 2000 * BLOCK)
    assert read(path) == content(spec, below) + bytes(1996 * BLOCK)
    assert only_notes(path)


@pytest.mark.parametrize("change", [bytes, lambda raw: raw + bytes(512), lambda raw: raw[:-1]])
def test_growing_a_fixed_image(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    data = pattern(1, MIB)
    path = make_vhd.fixed(tmp_path / "a.vhd", data)
    path.write_bytes(change(path.read_bytes()))
    for size in (MIB + 512, 3 * MIB):
        resize(path, size)
        assert qemu_size(path) == size
        assert read(path) == data + bytes(size - MIB)
        assert check(path) == []
        assert path.stat().st_size == size + 512


def test_growing_into_room_before_the_footer(tmp_path: Path) -> None:
    data = pattern(1, MIB)
    path = tmp_path / "a.vhd"
    path.write_bytes(data + b"\xee" * MIB + make_vhd.footer(FIXED, MIB))
    resize(path, MIB + BLOCK)
    assert read(path) == data + bytes(BLOCK)
    resize(path, 2 * MIB)
    assert read(path) == data + bytes(MIB)
    assert check(path) == []


def test_what_cannot_be_resized(tmp_path: Path) -> None:
    path = some(4 * BLOCK).write(tmp_path / "a.vhd")
    before = path.read_bytes()
    with HostFile(path, writable=True) as file:
        image = VHD(file)
        for size, complaint in (
            (3 * BLOCK, "smaller than the 262144 that there are"),
            (4 * BLOCK + 1, "not a multiple of 512"),
            (2040 * GIB + 512, "a VHD has at most"),
            (1 << 39, "blocks of 65536 bytes, at most 4194304"),
        ):
            with pytest.raises(Unsupported, match=complaint):
                image.resize(size)
    assert path.read_bytes() == before
    saved = make_vhd.footer(DYNAMIC, 4 * BLOCK, saved=1)
    path.write_bytes(saved + before[512:-512] + saved)
    with HostFile(path, writable=True) as file, pytest.raises(Unsupported, match="suspended"):
        VHD(file).resize(8 * BLOCK)


# Other parents


def test_another_parent(tmp_path: Path) -> None:
    first, below = base_image(tmp_path)
    second, other = base_image(tmp_path, "other/second.vhd", 0x200)
    path = tmp_path / "child.vhd"
    create(path, parent=first, settings={"block_size": "64K"})
    with virtmount.open(path, writable=True) as disk:
        disk.pwrite(2 * BLOCK, b"mine")
    for parent, data in ((second, other), (first, below), (second, other), (first, below)):
        rebase(path, parent)
        expected = bytearray(data)
        expected[2 * BLOCK : 3 * BLOCK] = below[2 * BLOCK : 3 * BLOCK]
        expected[2 * BLOCK : 2 * BLOCK + 4] = b"mine"
        assert read(path) == expected
        assert only_notes(path)
        assert int.from_bytes(path.read_bytes()[16:24], "big") == 512, "the header's place"
    assert seven_zip(path) == libvhdi(path, tmp_path) == expected
    size = path.stat().st_size
    for _ in range(20):
        rebase(path, second)
        rebase(path, first)
    assert path.stat().st_size == size, "what the old header took is used again"


def test_no_parent_any_more(tmp_path: Path) -> None:
    base, _ = base_image(tmp_path)
    spec = child_of(
        base,
        4 * BLOCK,
        {1: Block(b"x" * BLOCK, EIGHTS)},
        uuid=bytes([0]) + PARENT_UUID[1:],
        block=BLOCK,
    )
    path = spec.write(tmp_path / "child.vhd")
    rebase(path, None)
    base.unlink()
    with HostFile(path) as file:
        assert VHD(file).variant == "dynamic"
    assert read(path) == content(spec)
    assert check(path) == []


def test_a_first_parent(tmp_path: Path) -> None:
    spec = some(4 * BLOCK)
    path = spec.write(tmp_path / "a.vhd")
    base, below = base_image(tmp_path)
    rebase(path, base)
    assert read(path) == content(spec, below)
    fixed = make_vhd.fixed(tmp_path / "fixed.vhd", bytes(MIB))
    with pytest.raises(Unsupported, match="vhd fixed: no parents can be recorded"):
        rebase(fixed, base)


def test_a_parent_where_there_is_no_room_for_its_name(tmp_path: Path) -> None:
    """It goes to the end of the file then, and nothing else stays there."""
    path = some(4 * BLOCK).write(tmp_path / "a.vhd")
    size = path.stat().st_size
    base, below = base_image(tmp_path)
    rebase(path, base)
    assert read(path) == content(some(4 * BLOCK), below)
    assert size < path.stat().st_size <= size + 1024
    assert only_notes(path)
    assert not check(path, Repair.ALL) or only_notes(path)
    rebase(path, None)
    with virtmount.open(path, writable=True) as disk:
        disk.pwrite(BLOCK, b"x")
    assert read(path)[:BLOCK] == content(some(4 * BLOCK))[:BLOCK]
    sound(path)


def test_a_broken_locator_can_be_replaced(tmp_path: Path) -> None:
    base, below = base_image(tmp_path)
    path = tmp_path / "child.vhd"
    create(path, parent=base)
    raw = bytearray(path.read_bytes())
    raw[512 + 576 + 16 : 512 + 576 + 24] = b"\xff" * 8
    raw[512:1536] = make_vhd.summed(bytes(raw[512:1536]), 36)
    path.write_bytes(raw)
    with pytest.raises(VirtmountError, match="header"):
        read(path)
    rebase(path, base)
    assert read(path) == below


# Cut at every step


def cuts(path: Path, change: Callable[[VHD], Plan], options: Options) -> Iterator[Store]:
    """What a power cut at any moment of a plan can leave of the file; at last all of it."""
    log = Log(Store.load(path))
    file = SimulatedFile(log.base.copy(), name=str(path), log=log)
    hostfile.execute(change(VHD(file, options)), [file])
    rng = random.Random(1)
    for epoch in log.epochs():
        for cut in epoch.cuts(rng):
            yield epoch.build(cut)
    yield file.store


def write_on(path: Path, model: bytes) -> None:
    """Everything still works, and the next session leaves the image sound."""
    expected = bytearray(model)
    with contextlib.closing(open_chain(path, "vhd", writable=True, options=ANY)) as chain:
        with Reference(chain.images) as disk:
            assert disk.pread(0, disk.size) == expected
            for at in (0, len(model) // 2, len(model) - 512):
                disk.pwrite(at, b"next" * 128)
                expected[at : at + 512] = b"next" * 128
    assert read(path, ANY) == expected
    assert only_notes(path)


def only_notes(path: Path) -> bool:
    return all(finding.severity is Severity.NOTE for finding in check(path))


ANY = Options(allow_outside=True)


@pytest.mark.parametrize("gap", [0, 8192])
@pytest.mark.parametrize("kind", [DYNAMIC, FIXED])
def test_a_cut_while_growing_leaves_the_old_size_or_the_new_one(
    tmp_path: Path, gap: int, kind: int
) -> None:
    size, new = 4 * BLOCK, 300 * BLOCK
    path = tmp_path / "a.vhd"
    spec = some(size, gap=gap)
    old = content(spec)
    if kind == FIXED:
        make_vhd.fixed(path, old)
    else:
        spec.write(path)
    sizes = set()
    for store in cuts(path, lambda image: image.resize(new), ANY):
        store.save(path)
        found = read(path)
        assert found[:size] == old
        # The footer that was at the end may be left in a fixed disk that was not grown wholly.
        rest = found[size:].replace(make_vhd.footer(FIXED, size), bytes(512))
        assert not rest.strip(b"\0")
        sizes.add(len(found))
        if kind == DYNAMIC:
            # Each program opens it, whichever footer it goes by.
            assert qemu_size(path) in (size, new)
            assert store.read(store.size - 512, 8) == b"conectix"
            write_on(path, found)
        elif len(found) == size:
            resize(path, new)
            assert read(path) == old + bytes(new - size)
    assert sizes == {size, new}


def test_a_cut_while_rebasing_leaves_the_old_parent_or_the_new_one(tmp_path: Path) -> None:
    first, below = base_image(tmp_path)
    second, other = base_image(tmp_path, "second.vhd", 0x200)
    path = tmp_path / "child.vhd"
    create(path, parent=first, settings={"block_size": "64K"})
    with virtmount.open(path, writable=True) as disk:
        disk.pwrite(BLOCK, b"\1" * BLOCK)
    with contextlib.closing(open_chain(second)) as chain:
        parent: Image = chain.top
        found = set()
        for store in cuts(path, lambda image: image.rebase(parent, second.name), ANY):
            store.save(path)
            assert store.read(store.size - 512, 8) == b"conectix"
            seen = read(path)
            found.add(seen)
            write_on(path, seen)
    mine = b"\1" * BLOCK
    assert found == {
        below[:BLOCK] + mine + below[2 * BLOCK :],
        other[:BLOCK] + mine + other[2 * BLOCK :],
    }


def test_a_cut_while_a_first_parent_goes_to_the_end(tmp_path: Path) -> None:
    path = some(4 * BLOCK).write(tmp_path / "a.vhd")
    base, below = base_image(tmp_path)
    with contextlib.closing(open_chain(base)) as chain:
        parent: Image = chain.top
        found = set()
        for store in cuts(path, lambda image: image.rebase(parent, base.name), ANY):
            store.save(path)
            assert store.read(store.size - 512, 8) == b"conectix"
            seen = read(path)
            found.add(seen)
            write_on(path, seen)
    assert found == {content(some(4 * BLOCK)), content(some(4 * BLOCK), below)}


def test_growing_mends_a_missing_footer_first(tmp_path: Path) -> None:
    for cut in (slice(0, -512), slice(512, None)):
        path = some(4 * BLOCK).write(tmp_path / "a.vhd")
        raw = path.read_bytes()
        path.write_bytes(raw[cut] if cut.start == 0 else bytes(512) + raw[512:])
        resize(path, 5 * BLOCK)
        raw = path.read_bytes()
        assert raw[:512] == raw[-512:]
        assert check(path) == []


def test_the_kind_in_a_childs_footer(tmp_path: Path) -> None:
    base, _ = base_image(tmp_path)
    path = tmp_path / "child.vhd"
    create(path, parent=base)
    assert int.from_bytes(path.read_bytes()[60:64], "big") == DIFFERENCING
    assert os.path.getsize(path) < 32 * KIB
