"""VDI as a whole: made, checked and mended, grown, with a header of long ago, with extra data."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.crash.checkers import check_vdi
from tests.crash.simulate import SimulatedFile, Store
from tests.formats.cuts import cut_everywhere
from tests.formats.make_vdi import FIELDS, FREE, MIB, make, make_extra, make_old
from tests.formats.test_vdi import check_is_clean, field, the_map
from tests.reference import Reference
from virtmount import hostfile
from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats import vdi, vdi_check, vdi_resize
from virtmount.formats.vdi import COUNT_AT, VDI
from virtmount.formats.vdi_map import DISCARDED
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Kind, Options, extents
from virtmount.plan import Plan
from virtmount.upkeep import Finding, New, Repair, Severity

KIB = 1 << 10


def create(path: Path, size: int, sector_size: int = 512, **options: str) -> None:
    path.touch()
    with HostFile(path, writable=True) as file:
        new = New([file], str(path), size, options, lambda name: 0, sector_size)
        hostfile.execute(VDI.create(new), [file])


def content(path: Path) -> bytes:
    with HostFile(path) as file:
        image = VDI(file)
        return Reference([image]).pread(0, image.size)


def patch(path: Path, **fields: int) -> None:
    with path.open("r+b") as file:
        for name, value in fields.items():
            offset, code = FIELDS[name]
            file.seek(offset)
            file.write(struct.pack("<" + code, value))


def checked(path: Path, repair: Repair = Repair.NOTHING) -> list[Finding]:
    """Findings; the plans are carried out."""
    with HostFile(path, writable=repair is not Repair.NOTHING) as file:
        return run_check(file, repair)


def run_check(file: HostFile, repair: Repair) -> list[Finding]:
    found = []
    for item in VDI.check(file, DEFAULTS, repair):
        if isinstance(item, Plan):
            assert repair is not Repair.NOTHING
            hostfile.execute(item, [file])
            file.sync()
        elif isinstance(item, Finding):
            found.append(item)
    return found


# Making


def test_a_new_image_is_laid_out_as_virtualbox_does_it(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    create(path, 5 * MIB + 1)
    assert (field(path, "map_offset"), field(path, "data_offset")) == (MIB, 2 * MIB)
    assert field(path, "disk_size") == 5 * MIB + 512
    raw = path.read_bytes()
    assert raw[360:364] == raw[468:472] == struct.pack("<I", 512)  # VirtualBox refuses 0
    for at in (392, 408):
        assert uuid.UUID(bytes_le=raw[at : at + 16]).version == 4
    assert not checked(path)
    check_is_clean(path)
    assert the_map(path) == [FREE] * 6
    with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
        disk.pwrite(5 * MIB + 511, b"x")
    check_is_clean(path)
    assert content(path) == bytes(5 * MIB + 511) + b"x"


def test_qemu_reads_and_writes_a_new_image(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    create(path, 300 * MIB)
    info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", path]))
    assert (info["format"], info["virtual-size"]) == ("vdi", 300 * MIB)
    subprocess.run(
        ["qemu-io", "-f", "vdi", "-c", f"write -P 7 {299 * MIB} 512", path],
        check=True,
        capture_output=True,
    )
    with HostFile(path) as file:
        assert Reference([VDI(file)]).pread(299 * MIB, 513) == b"\7" * 512 + b"\0"


@pytest.mark.parametrize("block_size", ["128K", "256k", "4MiB", "128M", "1048576"])
def test_block_sizes(tmp_path: Path, block_size: str) -> None:
    path = tmp_path / "a.vdi"
    create(path, 9 * MIB, block_size=block_size)
    random_ = random.Random(block_size)
    model = bytearray(9 * MIB)
    with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
        for _ in range(10):
            at, data = random_.randrange(8 * MIB), random_.randbytes(random_.randrange(200_000))
            disk.pwrite(at, data)
            model[at : at + len(data)] = data
    assert content(path) == model
    assert not checked(path)


def test_a_fixed_image_is_all_there(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    create(path, 3 * MIB + 512, subformat="fixed")
    assert path.stat().st_size == 2 * MIB + 4 * MIB
    with HostFile(path) as file:
        image = VDI(file)
        assert (image.variant, image.flat) == ("fixed", 2 * MIB)
    assert the_map(path) == [0, 1, 2, 3]
    assert content(path) == bytes(3 * MIB + 512)
    assert not checked(path)
    check_is_clean(path)


@pytest.mark.parametrize(
    ("options", "size", "complaint"),
    [
        ({"subformat": "split"}, MIB, "subformat: 'split', know dynamic and fixed"),
        ({"block_size": "64K"}, MIB, "block_size: '64K', know powers of two from 128K to 128M"),
        ({"block_size": "3M"}, MIB, "block_size"),
        ({"block_size": "1G"}, MIB, "block_size"),
        ({"block_size": "x"}, MIB, "block_size"),
        ({}, 0, "size: 0 bytes"),
        ({}, (64 << 40) + 1, "size: 70368744177665 bytes"),
    ],
)
def test_what_cannot_be_made(
    tmp_path: Path, options: dict[str, str], size: int, complaint: str
) -> None:
    with pytest.raises(Unsupported, match=complaint):
        create(tmp_path / "a.vdi", size, 512, **options)
    assert (tmp_path / "a.vdi").stat().st_size == 0


def test_larger_sectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="sectors of 4096 bytes"):
        create(tmp_path / "a.vdi", MIB, sector_size=4096)


def test_the_largest_image_takes_little_memory_to_make(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    path.touch()
    with HostFile(path, writable=True) as file:
        plan = VDI.create(New([file], "a.vdi", 64 << 40, {}, lambda name: 0))
    assert len({id(step.data) for step in plan if hasattr(step, "data")}) <= 3


# Headers and blocks that VirtualBox knows and qemu does not


def test_a_header_before_1_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make_old(path, [2, FREE, 0, DISCARDED, 1])
    with HostFile(path) as file:
        image = VDI(file)
        kinds = [extent.kind for extent in extents(image, 0, image.size)]
        assert kinds[:4] == [Kind.COMPRESSED, Kind.ABSENT, Kind.COMPRESSED, Kind.ZERO]
        assert image.details()["version"] == "0.2"
        assert image.details()["comment"] == "of 06"
        assert image.identity == str(uuid.UUID(int=1))
        expected = b"".join(bytes([value]) * MIB for value in (3, 0, 1, 0, 2))
        assert Reference([image]).pread(0, 5 * MIB) == expected
    assert not checked(path)


def test_a_header_before_1_1_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make_old(path, [1, 0, 0])  # not even mended
    before = path.read_bytes()
    with HostFile(path, writable=True) as file:
        with pytest.raises(Unsupported, match=r"header\+68: version 0.2 is only read"):
            VDI(file)
    (found,) = checked(path, Repair.ALL)
    assert (found.severity, found.repaired) == (Severity.DAMAGE, False)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("at", "value", "complaint"),
    [
        (72, 7, r"header\+72: image type 7"),
        (72, 4, r"header\+404: no parent is named"),
        (404, 1, r"header\+404: linkage_uuid names a parent"),
        (352, 0, r"header\+352: disk size 0"),
        (360, 3, r"header\+360: block size 3"),
        (360, 32 << 20, r"header\+360: blocks of 33554432 bytes that do not begin at whole"),
        (364, 1, r"header\+364: 1 blocks of"),
        (364, 1 << 25, r"header\+364: map ends at"),
    ],
)
def test_an_old_header_that_is_wrong(tmp_path: Path, at: int, value: int, complaint: str) -> None:
    path = tmp_path / "a.vdi"
    make_old(path, [0, 1])
    with path.open("r+b") as patched:
        patched.seek(at)
        patched.write(struct.pack("<I", value))
    with HostFile(path) as file, pytest.raises((Corrupt, Unsupported), match=complaint):
        VDI(file)


def test_an_old_block_past_the_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make_old(path, [1, 0])
    with path.open("r+b") as cut:
        cut.truncate(428 + MIB)
    with HostFile(path) as file:
        image = VDI(file)
        assert image.inflate(1) == b"\1" * MIB
        with pytest.raises(Corrupt, match="map entry 0 at 420: block 1 lies past the end"):
            image.inflate(0)


@pytest.mark.parametrize("extra", [1, 511, 512, 4096])
def test_extra_data_in_front_of_every_block_is_skipped(tmp_path: Path, extra: int) -> None:
    path = tmp_path / "a.vdi"
    make_extra(path, [2, FREE, 0, 1], extra)
    expected = b"\3" * MIB + bytes(MIB) + b"\1" * MIB + b"\2" * MIB
    assert content(path) == expected
    assert not checked(path)
    if extra % 512:
        with HostFile(path, writable=True) as file:
            with pytest.raises(Unsupported, match=r"header\+380: .* only read"):
                VDI(file)
        return
    with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
        disk.pwrite(MIB + 5, b"new")
        disk.discard(2 * MIB, MIB)
        disk.pwrite(0, b"old")
    model = bytearray(expected)
    model[MIB + 5 : MIB + 8], model[:3] = b"new", b"old"
    model[2 * MIB : 3 * MIB] = bytes(MIB)
    assert content(path) == model
    raw = path.read_bytes()
    assert raw[1024 : 1024 + extra] == b"\xee" * extra
    assert len(raw) == 1024 + (max(the_map(path)[:2] + the_map(path)[3:]) + 1) * (extra + MIB)
    assert not checked(path)


def test_extra_data_there_and_its_block_not(tmp_path: Path) -> None:
    """The layout alone would take such a block for one that is cut short."""
    path = tmp_path / "a.vdi"
    make_extra(path, [0, 1], 4096)
    with path.open("r+b") as cut:
        cut.truncate(1024 + 4096 + MIB + 4096)
    with HostFile(path) as file:
        disk = Reference([VDI(file)])
        assert disk.pread(0, MIB) == b"\1" * MIB
        with pytest.raises(Corrupt, match="block 1 lies past the end"):
            disk.pread(MIB, 1)


# Checking


def damaged(path: Path) -> None:
    """Two owners of blocks 0 and 3, a block past the end, one that there never was; a low count."""
    make(path, [0, 3, 2, 1, FREE, FREE, FREE, FREE, FREE, FREE], count=2)
    patched = [0, 3, 0, 1, 3, DISCARDED, 9, FREE, 77, FREE]
    with path.open("r+b") as file:
        file.seek(512)
        file.write(struct.pack("<10I", *patched))


DAMAGE = [
    "count 2 does not cover block 3: other programs would write over what is in use",
    "block 0 has another owner: gets a copy when mended",
    "block 3 has another owner: gets a copy when mended",
    "block 9 lies past the end of the file at 4195328: reads as zeros when mended",
    "block 77, know 0 to 9: reads as zeros when mended",
]


def test_check_finds_everything_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    damaged(path)
    before = path.read_bytes()
    found = checked(path)
    assert [item.text for item in found if item.severity is Severity.DAMAGE] == DAMAGE
    assert [item.place for item in found][:3] == [
        "header+388",
        "map entry 2 at 520",
        "map entry 4 at 528",
    ]
    assert not any(item.repaired for item in found)
    assert path.read_bytes() == before


def test_only_leaks_are_mended_where_that_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    damaged(path)
    before = path.read_bytes()
    assert not any(item.repaired for item in checked(path, Repair.LEAKS))
    assert path.read_bytes() == before


def test_repair_gives_every_second_owner_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    damaged(path)
    found = checked(path, Repair.ALL)
    assert [item.text for item in found if item.severity is Severity.DAMAGE] == DAMAGE
    assert all(item.repaired for item in found)
    assert content(path) == b"".join(
        bytes([value]) * MIB for value in (1, 4, 1, 2, 4, 0, 0, 0, 0, 0)
    )
    assert not checked(path)
    check_is_clean(path)


@pytest.mark.parametrize(
    ("blocks", "count", "tail", "places"),
    [
        ([0, FREE, 1], 3, 0, {"header+388"}),  # a count too high: what a power cut leaves
        ([0, FREE, 1, FREE], 2, 1, {"byte 2098176"}),  # room at the end
        ([0, FREE, 2, FREE], 3, 0, {"map"}),  # a hole: qemu counts what is mapped
        ([3, FREE, 1, FREE, FREE], 5, 1, {"map", "header+388", "byte 4195328"}),
    ],
)
def test_leaks_are_found_and_mended(
    tmp_path: Path, blocks: list[int], count: int, tail: int, places: set[str]
) -> None:
    path = tmp_path / "a.vdi"
    make(path, blocks, count=count, tail=tail)
    before = content(path)
    for repair in (Repair.NOTHING, Repair.LEAKS):
        found = checked(path, repair)
        assert {item.place for item in found} == places
        assert {item.severity for item in found} == {Severity.LEAK}
        assert {item.repaired for item in found} == {repair is Repair.LEAKS}
    assert not checked(path)
    assert content(path) == before
    check_is_clean(path)


def test_mending_leaks_leaves_the_modification_uuid_to_the_children(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [0, FREE, 1], count=3)
    before = path.read_bytes()[392:456]
    checked(path, Repair.ALL)
    assert path.read_bytes()[392:456] == before


def test_the_next_session_that_writes_mends_the_count_too(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [0, FREE, 1, FREE], count=4, tail=1)
    with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
        disk.pwrite(0, b"x")
    assert not checked(path)
    check_is_clean(path)


def test_over_a_parent_holes_go_to_discarded_blocks_and_the_last_blocks_move(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.vdi"
    make(path, [6, FREE, DISCARDED, 0, 5, FREE, FREE, 3], kind=4, linkage_uuid=7)
    before = content(path)
    (found, *_) = checked(path, Repair.ALL)
    assert (found.place, found.text) == ("map", "3 of the first 7 blocks are not used")
    assert found.repaired
    assert the_map(path) == [2, FREE, 1, 0, 4, FREE, FREE, 3]
    assert content(path) == before
    assert path.stat().st_size == 1024 + 5 * MIB
    assert not checked(path)


def test_more_than_that_is_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.vdi"
    make(path, [6, FREE, 0, 5, FREE, FREE, 3], kind=4, linkage_uuid=7)
    before = content(path)
    monkeypatch.setattr(vdi, "MAX_MOVED", MIB)
    assert not checked(path, Repair.ALL)[0].repaired
    assert the_map(path) == [1, FREE, 0, 5, FREE, FREE, 3]
    assert content(path) == before


@pytest.mark.parametrize(
    ("size", "cut", "severity"), [(3, 512, "damage"), (2.5, 512 * KIB, "note")]
)
def test_a_file_that_ends_inside_its_last_block(
    tmp_path: Path, size: float, cut: int, severity: str
) -> None:
    path = tmp_path / "a.vdi"
    make(path, [0, 1, 2], disk_size=int(size * MIB))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - cut)
    before = content(path)
    (found,) = checked(path, Repair.ALL)
    assert (found.severity.value, found.repaired) == (severity, True)
    assert path.stat().st_size == 1024 + 3 * MIB
    assert content(path) == before
    assert not checked(path)


def test_null_uuids_are_worth_knowing(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [0])
    with path.open("r+b") as file:
        file.seek(392)
        file.write(bytes(32))
    assert [item.severity for item in checked(path, Repair.ALL)] == [Severity.NOTE] * 2
    assert not checked(path)
    with HostFile(path) as opened:
        assert VDI(opened).identity


def test_a_parent_in_an_image_without_one_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [0], linkage_uuid=1)
    (found,) = checked(path, Repair.ALL)
    assert (found.place, found.severity, found.repaired) == ("header+424", Severity.DAMAGE, False)


def test_bytes_behind_the_last_block_are_a_note(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [0, FREE], tail=2)
    found = checked(path, Repair.ALL)
    assert [(item.severity, item.text) for item in found] == [
        (Severity.NOTE, "1048576 bytes behind the last possible block")
    ]
    assert path.stat().st_size == 1024 + 3 * MIB


def test_what_is_no_vdi_cannot_be_checked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(4096))
    with pytest.raises(NotAnImage, match="no VDI signature"):
        checked(tmp_path / "a")


def test_a_hostile_map_is_checked_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every entry wrong: findings end, and so does the work."""
    monkeypatch.setattr(vdi_check, "MAX_FINDINGS", 30)
    monkeypatch.setattr(vdi_check, "MAX_COPIES", 30)
    path = tmp_path / "a.vdi"
    make(path, [FREE] * 20000, block_size=512, map_offset=512, data_offset=512 * 200)
    with path.open("r+b") as file:
        file.seek(512)
        file.write(struct.pack("<I", 0) * 20000)
        file.truncate(512 * 201)
    found = checked(path)
    assert len(found) == vdi_check.MAX_FINDINGS + 2
    assert (
        found[-1].text == f"{20000 - 1 - vdi_check.MAX_FINDINGS} more entries that cannot be right"
    )
    found = checked(path, Repair.ALL)
    assert sum(item.repaired for item in found) == 1 + vdi_check.MAX_COPIES == len(found) - 1


# Growing


def grow(path: Path, size: int) -> None:
    with HostFile(path, writable=True) as file:
        image = VDI(file)
        hostfile.execute(image.resize(size), image.files)


def by_qemu(path: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "vdi", path, f"{5 * MIB + 512}"], check=True)


def by_us(path: Path) -> None:
    create(path, 5 * MIB + 512)


@pytest.mark.parametrize("maker", [by_us, by_qemu])
def test_growing(tmp_path: Path, maker: Callable[[Path], None]) -> None:
    """In the gap behind the map, or with the first blocks moved, as qemu leaves no gap."""
    path = tmp_path / "a.vdi"
    maker(path)
    with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
        for block in (3, 0, 5, 1):
            disk.pwrite(block * MIB, bytes([block + 1]) * 512)
    before = content(path)
    stamp = path.read_bytes()[408:424]
    for size in (6 * MIB, 200 * MIB, 3 << 30, 3 << 30, 300 << 30):
        grow(path, size)
        assert not checked(path)
        check_is_clean(path)
        with HostFile(path) as file:
            image = VDI(file)
            assert image.size == size
            disk = Reference([image])
            assert disk.pread(0, len(before)) == before
            rest = min(size - len(before), 8 * MIB)
            assert not disk.pread(len(before), rest).strip(b"\0")
    assert path.read_bytes()[408:424] != stamp
    with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
        disk.pwrite((300 << 30) - 1, b"z")
    check_is_clean(path)


def test_what_lay_behind_the_end_of_the_disk_does_not_come_to_light(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [0, 1, 2, 3], disk_size=MIB + 512)
    grow(path, 4 * MIB)
    assert content(path) == b"\1" * MIB + b"\2" * 512 + bytes(3 * MIB - 512)


def test_over_a_parent_the_new_space_hides_it(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [0, FREE], kind=4, linkage_uuid=7, data_offset=2048)
    grow(path, 5 * MIB)
    assert the_map(path) == [0, FREE, DISCARDED, DISCARDED, DISCARDED]


def test_over_a_parent_half_a_block_cannot_be_hidden(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [0, FREE], kind=4, linkage_uuid=7, data_offset=2048, disk_size=MIB + 512)
    with pytest.raises(Unsupported, match="map entry 1: the parent has the disk's last block"):
        grow(path, 5 * MIB)


def test_a_fixed_image_grows_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    create(path, 2 * MIB + 512, subformat="fixed")
    with HostFile(path, writable=True) as file:
        file.pwrite(2 * MIB, b"\7" * 3 * MIB)  # also behind the end of the disk
    grow(path, 5 * MIB + 512)
    with HostFile(path) as file:
        assert VDI(file).flat == 2 * MIB
    assert content(path) == b"\7" * (2 * MIB + 512) + bytes(3 * MIB)
    assert not checked(path)
    check_is_clean(path)


@pytest.mark.parametrize(
    ("blocks", "kind", "size", "complaint"),
    [
        ([0, 1], 1, MIB, "size: 1048576 bytes, the disk has 2097152: it can only grow"),
        ([0, 1], 1, (64 << 40) + 1, "67108865 blocks of 1048576 bytes"),
        ([0, 1], 1, 300 * MIB, "all blocks are in use"),
        ([0, 1], 2, 300 * MIB, "the map of this fixed image cannot grow in place"),
        ([0, FREE], 1, 40 << 40, "a new map of 167772160 bytes"),
    ],
)
def test_growth_that_is_refused(
    tmp_path: Path, blocks: list[int], kind: int, size: int, complaint: str
) -> None:
    path = tmp_path / "a.vdi"
    make(path, blocks, kind=kind)
    before = path.read_bytes()
    with pytest.raises(Unsupported, match=complaint):
        grow(path, size)
    assert path.read_bytes() == before


# Power cuts


def read_store(store: Store, length: int) -> bytes:
    image = VDI(SimulatedFile(store, name="image.vdi", writable=False))
    return Reference([image]).pread(0, min(length, image.size))


def fragmented(path: Path, **fields: int) -> bytes:
    """Blocks of 4 KiB that no order can be guessed from; the map leaves no gap."""
    blocks = [5, FREE, 0, 2, DISCARDED, 1, 4, 3, *[FREE] * 120]
    make(path, blocks, block_size=4096, disk_size=60 * 4096 + 512, **fields)
    return content(path)


@pytest.mark.parametrize("data_offset", [1024, 4096])
def test_growing_may_be_cut_at_any_moment(tmp_path: Path, data_offset: int) -> None:
    path = tmp_path / "a.vdi"
    before = fragmented(path, data_offset=data_offset)

    def act(file: HostFile) -> None:
        image = VDI(file)
        if image.size == len(before):
            hostfile.execute(image.resize(400 * 4096), [file])
        # Again from where it was cut, and written to.
        with Reference([VDI(file)]) as disk:
            assert disk.size == 400 * 4096
            found = disk.pread(0, disk.size)
            assert found[:-1] == before + bytes(disk.size - len(before) - 1)
            disk.pwrite(disk.size - 1, b"z")

    def judge(store: Store) -> None:
        assert not check_vdi(store).wrong
        assert read_store(store, len(before)) == before

    cut_everywhere(Store.load(path), act, judge)


def test_repair_may_be_cut_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    fragmented(path)
    patched = [5, FREE, 0, 2, DISCARDED, 1, 2, 5, 0, FREE, 100, 6000]
    with path.open("r+b") as file:
        file.seek(512)
        file.write(struct.pack("<12I", *patched))
    patch(path, blocks_allocated=3)
    expected = [6, 0, 1, 3, 0, 2, 3, 6, 1, 0, 0, 0]
    length = len(expected) * 4096

    def act(file: HostFile) -> None:
        run_check(file, Repair.ALL)
        assert not run_check(file, Repair.NOTHING)
        assert not check_vdi(file.store).wrong  # type: ignore[attr-defined]
        whole = read_store(file.store, length)  # type: ignore[attr-defined]
        assert whole == b"".join(bytes([value]) * 4096 for value in expected)

    def judge(store: Store) -> None:
        """Whoever reads on reads the same as before or as after, whatever is mended already."""
        entries = struct.unpack("<12I", store.read(512, 48))
        for index, (entry, was) in enumerate(zip(entries, patched, strict=True)):
            if entry != was:
                data = bytes(4096) if entry == DISCARDED else store.read(1024 + entry * 4096, 4096)
                assert data == bytes([expected[index]]) * 4096

    cut_everywhere(Store.load(path), act, judge)


@pytest.mark.parametrize("child", [False, True])
def test_mending_leaks_may_be_cut_at_any_moment(tmp_path: Path, child: bool) -> None:
    path = tmp_path / "a.vdi"
    kind = {"kind": 4, "linkage_uuid": 7} if child else {}
    blocks = [5, FREE, 2, FREE, DISCARDED, FREE, 6, FREE]
    make(path, blocks, block_size=4096, count=8, tail=1, **kind)
    before = content(path)

    def act(file: HostFile) -> None:
        run_check(file, Repair.LEAKS)
        assert not run_check(file, Repair.NOTHING)
        assert not check_vdi(file.store).leaked  # type: ignore[attr-defined]

    def judge(store: Store) -> None:
        assert not check_vdi(store).wrong
        assert read_store(store, len(before)) == before

    cut_everywhere(Store.load(path), act, judge)


def test_limits_are_what_the_map_of_the_largest_image_needs() -> None:
    assert vdi_resize.MAX_MAP < 1 << 26 << 2
    assert COUNT_AT == 388


def test_options_are_shown() -> None:
    assert set(VDI.choices) == {"subformat", "block_size"}
    assert (VDI.creates, VDI.checks, VDI.suffixes) == (True, True, ("vdi",))
    assert isinstance(DEFAULTS, Options)
    assert isinstance(VDI.suffixes, Iterable)
