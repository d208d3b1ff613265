"""VDI: fields, refusals, and what the count says while blocks come and go."""

from __future__ import annotations

import contextlib
import random
import struct
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.make_vdi import FIELDS, FREE, MIB, make
from tests.reference import Reference
from virtmount import hostfile
from virtmount.errors import Corrupt, NotAnImage, Unsupported, VirtmountError
from virtmount.formats.vdi import COUNT_AT, VDI
from virtmount.formats.vdi_map import DISCARDED, runs
from virtmount.hostfile import HostFile
from virtmount.image import Dirty, Kind, Match, extents
from virtmount.plan import Barrier, Extend, Plan, Punch, Write


def field(path: Path, name: str) -> int:
    offset, code = FIELDS[name]
    value: int
    (value,) = struct.unpack_from("<" + code, path.read_bytes(), offset)
    return value


def the_map(path: Path) -> list[int]:
    at, count = field(path, "map_offset"), field(path, "blocks")
    return list(struct.unpack_from(f"<{count}I", path.read_bytes(), at))


def check_is_clean(path: Path) -> None:
    subprocess.run(["qemu-img", "check", "-q", "-f", "vdi", path], check=True)


def test_probe() -> None:
    head = bytes(64) + bytes.fromhex("7f10dabe") + bytes(444)
    assert VDI.probe(head, b"", 512) is Match.SURE
    assert VDI.probe(bytes(512), b"", 512) is Match.NO
    assert VDI.probe(head[:67], b"", 67) is Match.NO


def test_reads_what_the_map_says(tmp_path: Path) -> None:
    make(tmp_path / "a.vdi", [2, FREE, 0, DISCARDED, 1], block_size=4096)
    with HostFile(tmp_path / "a.vdi") as file:
        image = VDI(file)
        assert (image.size, image.cluster_size, image.variant) == (5 * 4096, 4096, "dynamic")
        assert [e.kind for e in extents(image, 0, image.size)] == [
            Kind.DATA,
            Kind.ABSENT,
            Kind.DATA,
            Kind.ZERO,
            Kind.DATA,
        ]
        assert Reference([image]).pread(0, image.size) == b"".join(
            bytes([value]) * 4096 for value in (3, 0, 1, 0, 2)
        )


def test_virtualbox_puts_map_and_data_at_whole_mebibytes(tmp_path: Path) -> None:
    make(tmp_path / "a.vdi", [1, 0, FREE], map_offset=MIB, data_offset=2 * MIB)
    with HostFile(tmp_path / "a.vdi", writable=True) as file:
        with Reference([VDI(file)]) as disk:
            assert disk.pread(MIB - 1, 2) == b"\x02\x01"
            disk.pwrite(2 * MIB + 5, b"new")
    assert the_map(tmp_path / "a.vdi") == [1, 0, 2]
    assert (tmp_path / "a.vdi").stat().st_size == 5 * MIB
    check_is_clean(tmp_path / "a.vdi")


def test_details(tmp_path: Path) -> None:
    make(tmp_path / "a.vdi", [1, FREE, 0], block_size=8192, count=7)
    with HostFile(tmp_path / "a.vdi") as file:
        assert VDI(file).details() == {
            "version": "1.1",
            "block_size": 8192,
            "blocks": 3,
            "blocks_mapped": 2,
            "blocks_allocated": 7,
            "map_offset": 512,
            "data_offset": 1024,
            "uuid": str(uuid.UUID(int=1)),
            "modification_uuid": str(uuid.UUID(int=2)),
            "comment": "",
        }


@pytest.mark.parametrize(
    ("name", "value", "error", "complaint"),
    [
        ("signature", 1, NotAnImage, r"header\+64: no VDI signature"),
        ("version", 0x00010000, Unsupported, r"header\+68: version 1.0, know 0.x and 1.1"),
        ("version", 0x00010002, Unsupported, "version 1.2, know 0.x and 1.1"),
        ("version", 0x00020001, Unsupported, "version 2.1, know 0.x and 1.1"),
        ("header_size", 383, Corrupt, r"header\+72: header of 383 bytes"),
        ("type", 3, Corrupt, r"header\+424: no parent is named, but undo images have one"),
        ("type", 4, Corrupt, r"header\+424: no parent is named, but differencing images"),
        ("type", 0, Unsupported, r"header\+76: image type 0, know 1 \(dynamic\)"),
        ("linkage_uuid", 1, Unsupported, r"header\+424: linkage_uuid names a parent"),
        ("parent_modification_uuid", 1, Unsupported, r"header\+440: parent_modification_uuid"),
        (
            "block_extra",
            (256 << 20) + 1,
            Unsupported,
            r"\+380: 268435457 bytes of extra data",
        ),
        ("block_size", 0, Unsupported, "block size 0"),
        ("block_size", 4097, Unsupported, "block size 4097"),
        ("block_size", 256, Unsupported, "block size 256"),
        ("block_size", 1 << 31, Unsupported, "block size 2147483648"),
        ("disk_size", 0, Corrupt, r"header\+368: disk size 0"),
        ("disk_size", 4 * 4096 + 1, Corrupt, r"header\+384: 4 blocks of 4096 bytes"),
        ("disk_size", (1 << 64) - 1, Corrupt, "4 blocks of 4096 bytes"),
        ("blocks", (1 << 26) + 1, Unsupported, "67108865 blocks, at most"),
        ("blocks", 1 << 26, Corrupt, r"header\+340: map ends at 268435968"),
        ("blocks", 3, Corrupt, "3 blocks of 4096 bytes"),
        ("map_offset", 513, Unsupported, "map_offset 513, not a multiple"),
        ("map_offset", 0, Corrupt, "map_offset 0 lies inside the header"),
        ("map_offset", 1 << 31, Corrupt, "map ends at 2147483664"),
        ("data_offset", 1025, Unsupported, "data_offset 1025, not a multiple"),
        ("data_offset", 512, Corrupt, r"header\+344: data_offset 512 lies before"),
    ],
)
@pytest.mark.parametrize("writable", [False, True])
def test_refuses(
    tmp_path: Path,
    name: str,
    value: int,
    error: type[VirtmountError],
    complaint: str,
    writable: bool,
) -> None:
    make(tmp_path / "a.vdi", [0, 1, 2, FREE], block_size=4096)
    with (tmp_path / "a.vdi").open("r+b") as patched:
        offset, code = FIELDS[name]
        patched.seek(offset)
        patched.write(struct.pack("<" + code, value))
    before = (tmp_path / "a.vdi").read_bytes()
    with HostFile(tmp_path / "a.vdi", writable=writable) as file:
        with pytest.raises(error, match=complaint):
            VDI(file)
    assert (tmp_path / "a.vdi").read_bytes() == before


def test_refuses_a_file_that_ends_inside_the_header(tmp_path: Path) -> None:
    make(tmp_path / "a.vdi", [FREE])
    with (tmp_path / "a.vdi").open("r+b") as file:
        file.truncate(300)
    with HostFile(tmp_path / "a.vdi") as opened, pytest.raises(Corrupt, match="file ends at 300"):
        VDI(opened)


@pytest.mark.parametrize(
    ("blocks", "complaint"),
    [
        ([0, 1, 0, FREE], "map entry 2 at 520: block 0 has another owner"),
        ([0, 1, 2, 2], "map entry 3 at 524: block 2 has another owner"),
        ([FREE, 4, 0, 1], "map entry 1 at 516: block 4, know 0 to 3"),
        ([0, 0xFFFFFFFD, 1, FREE], "block 4294967293, know 0 to 3"),
    ],
)
def test_refuses_a_map_that_cannot_be_right(
    tmp_path: Path, blocks: list[int], complaint: str
) -> None:
    make(tmp_path / "a.vdi", [0, 1, 2, 3], block_size=4096)
    with (tmp_path / "a.vdi").open("r+b") as file:
        file.seek(512)
        file.write(struct.pack("<4I", *blocks))
    with HostFile(tmp_path / "a.vdi") as opened, pytest.raises(Corrupt, match=complaint):
        VDI(opened)


def test_finds_a_second_owner_across_runs_and_pieces_of_the_map(tmp_path: Path) -> None:
    count = 40000  # more than two pieces
    blocks = list(range(count))
    make(tmp_path / "a.vdi", [FREE] * count, block_size=4096, data_offset=512 * 315)
    for first, second in ((0, count - 1), (16383, 16384), (20000, 20001)):
        wrong = list(blocks)
        wrong[second] = first
        with (tmp_path / "a.vdi").open("r+b") as file:
            file.seek(512)
            file.write(struct.pack(f"<{count}I", *wrong))
        with HostFile(tmp_path / "a.vdi") as opened:
            with pytest.raises(Corrupt, match=f"block {first} has another owner"):
                VDI(opened)


def test_a_block_past_the_end_of_the_file_is_an_error_and_the_image_is_not_written(
    tmp_path: Path,
) -> None:
    make(tmp_path / "a.vdi", [0, 1, 2, 3], block_size=4096)
    with (tmp_path / "a.vdi").open("r+b") as file:
        file.truncate(1024 + 2 * 4096)
    with HostFile(tmp_path / "a.vdi") as opened:
        disk = Reference([VDI(opened)])
        assert disk.pread(4096, 4096) == b"\x02" * 4096
        with pytest.raises(OSError, match="no valid host offset"):
            disk.pread(3 * 4096, 1)
    with HostFile(tmp_path / "a.vdi", writable=True) as opened:
        with pytest.raises(Corrupt, match="block 3 lies past the end") as raised:
            VDI(opened)
        assert raised.value.hint


@pytest.mark.parametrize(("size", "shown"), [(4096 + 1, 4096 + 512), (513, 1024), (1, 512)])
def test_a_size_inside_a_sector_is_rounded_up(tmp_path: Path, size: int, shown: int) -> None:
    make(tmp_path / "a.vdi", [0, 1], block_size=4096, disk_size=size)
    with HostFile(tmp_path / "a.vdi") as file:
        assert VDI(file).size == shown


@pytest.mark.parametrize(
    ("blocks", "kind", "cut", "flat"),
    [
        ([0, 1, 2], 2, 0, 1024),
        ([0, 1, 2], 1, 0, None),  # discard changes the map of a dynamic image
        ([0, 2, 1], 2, 0, None),
        ([0, 1, FREE], 2, 0, None),
        ([0, 1, 2], 2, 1, None),  # reading past the end of the file must fail
    ],
)
def test_only_a_whole_fixed_image_in_order_is_flat(
    tmp_path: Path, blocks: list[int], kind: int, cut: int, flat: int | None
) -> None:
    path = tmp_path / "a.vdi"
    make(path, blocks, block_size=4096, kind=kind)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - cut)
    with HostFile(path) as opened:
        assert VDI(opened).flat == flat


def test_a_large_fixed_map_of_several_pieces_is_flat(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    count = 40000
    make(path, [FREE] * count, block_size=4096, data_offset=512 * 315, kind=2)
    with path.open("r+b") as file:
        file.seek(512)
        file.write(struct.pack(f"<{count}I", *range(count)))
        file.truncate(512 * 315 + count * 4096)
    with HostFile(path) as opened:
        assert VDI(opened).flat == 512 * 315


# Writing


def test_begin_changes_the_modification_uuid_and_nothing_else_of_the_name(tmp_path: Path) -> None:
    make(tmp_path / "a.vdi", [0, FREE], block_size=4096)
    before = (tmp_path / "a.vdi").read_bytes()
    with HostFile(tmp_path / "a.vdi", writable=True) as file:
        plan = VDI(file).begin()
    (write, barrier) = plan
    assert isinstance(write, Write)
    assert barrier is Barrier
    assert write.offset == 0
    assert write.data[:408] == before[:408]
    assert write.data[424:512] == before[424:512]
    new = uuid.UUID(bytes_le=write.data[408:424])
    assert (new.version, new.int != 2) == (4, True)


def test_the_count_covers_a_block_before_the_map_names_it(tmp_path: Path) -> None:
    make(tmp_path / "a.vdi", [1, FREE, 0, FREE], block_size=4096)
    with HostFile(tmp_path / "a.vdi", writable=True) as file:
        image = VDI(file)
        hostfile.execute(image.begin(), image.files)
        reservation = image.reserve(1)
        extend, header, barrier = reservation.plan
        assert extend == Extend(1024 + 3 * 4096)
        assert isinstance(header, Write)
        assert header.data[COUNT_AT : COUNT_AT + 4] == (3).to_bytes(4, "little")
        assert barrier is Barrier
        assert reservation.runs[0].host_offset == 1024 + 2 * 4096
        assert not reservation.reused
        hostfile.execute(reservation.plan, image.files)
        write, barrier = image.commit([Dirty(3, 1024 + 2 * 4096, barrier=False)])
        assert isinstance(write, Write)
        assert (write.offset, len(write.data)) == (512, 512)
        assert struct.unpack_from("<4I", write.data) == (1, FREE, 0, 2)
        assert barrier is Barrier


def test_a_stale_count_is_not_believed(tmp_path: Path) -> None:
    """qemu and VirtualBox would write the new block over block 1, which is in use."""
    path = tmp_path / "a.vdi"
    make(path, [2, FREE, 1, 0], count=1)
    with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
        disk.pwrite(MIB, b"n" * 512)
        disk.flush()
        assert field(path, "blocks_allocated") == 4
        assert disk.pread(0, 4 * MIB) == (
            b"\3" * MIB + b"n" * 512 + bytes(MIB - 512) + b"\2" * MIB + b"\1" * MIB
        )
    assert the_map(path) == [2, 3, 1, 0]
    check_is_clean(path)


def test_new_map_entries_are_joined_into_whole_sectors(tmp_path: Path) -> None:
    count = 1000
    make(tmp_path / "a.vdi", [FREE] * count, block_size=4096, data_offset=512 + 4096)
    with HostFile(tmp_path / "a.vdi", writable=True) as file:
        image = VDI(file)
        hostfile.execute(image.begin(), image.files)
        hosts: list[int] = []
        while len(hosts) < 4:
            reservation = image.reserve(4 - len(hosts))
            hostfile.execute(reservation.plan, image.files)
            for run in reservation.runs:
                hosts += [run.host_offset + i * 4096 for i in range(run.count)]
        clusters = [0, 127, 128, 700]  # sectors 0, 0, 1 and 5 of the map
        plan = image.commit([Dirty(c, h) for c, h in zip(clusters, hosts, strict=True)])
        barrier, first, second, last = plan
        assert barrier is last is Barrier
        assert isinstance(first, Write)
        assert isinstance(second, Write)
        assert (first.offset, len(first.data)) == (512, 1024)
        assert (second.offset, len(second.data)) == (512 + 5 * 512, 512)


def test_what_follows_the_last_block_is_zeroed_before_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [0, FREE, FREE, FREE], tail=1)  # a block that a crash left behind
    with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
        disk.pwrite(3 * MIB + 512, b"n" * 512)
        assert disk.pread(3 * MIB, MIB) == bytes(512) + b"n" * 512 + bytes(MIB - 1024)
    assert the_map(path) == [0, FREE, FREE, 1]
    assert path.stat().st_size == 1024 + 2 * MIB
    check_is_clean(path)


def test_discard_makes_the_unmapping_durable_before_it_punches(tmp_path: Path) -> None:
    make(tmp_path / "a.vdi", [3, FREE, 1, 2, 0], block_size=4096)
    with HostFile(tmp_path / "a.vdi", writable=True) as file:
        image = VDI(file)
        hostfile.execute(image.begin(), image.files)
        write, barrier, punch = image.discard(0, 4)
        assert isinstance(write, Write)
        unmapped = (DISCARDED, FREE, DISCARDED, DISCARDED, 0)
        assert struct.unpack_from("<5I", write.data) == unmapped
        assert barrier is Barrier
        assert punch == Punch(1024 + 4096, 3 * 4096)


def test_discarding_nothing_writes_nothing(tmp_path: Path) -> None:
    make(tmp_path / "a.vdi", [FREE, DISCARDED, 0, FREE], block_size=4096)
    with HostFile(tmp_path / "a.vdi", writable=True) as file:
        image = VDI(file)
        hostfile.execute(image.begin(), image.files)
        assert image.discard(0, 2).steps == image.discard(3, 1).steps == Plan().steps


def test_a_discarded_block_is_used_again_only_with_a_barrier_before_its_mapping(
    tmp_path: Path,
) -> None:
    make(tmp_path / "a.vdi", [1, 0, FREE], block_size=4096)
    with HostFile(tmp_path / "a.vdi", writable=True) as file:
        image = VDI(file)
        hostfile.execute(image.begin(), image.files)
        hostfile.execute(image.discard(1, 1), image.files)
        reservation = image.reserve(8)
        assert (reservation.runs[0].host_offset, reservation.reused) == (1024, True)
        assert len(reservation.plan) == 0
        assert file.pread(1024, 4096) == bytes(4096)


def test_what_comes_back_unused_is_punched_before_it_is_used(tmp_path: Path) -> None:
    make(tmp_path / "a.vdi", [0, FREE, FREE], block_size=4096)
    with HostFile(tmp_path / "a.vdi", writable=True) as file:
        image = VDI(file)
        hostfile.execute(image.begin(), image.files)
        hostfile.execute((first := image.reserve(2)).plan, image.files)
        image.release(first.runs)
        again = image.reserve(2)
        assert again.runs == first.runs
        assert again.reused
        assert again.plan.steps == (Punch(1024 + 4096, 2 * 4096),)


def test_no_more_blocks_than_the_map_has_entries(tmp_path: Path) -> None:
    make(tmp_path / "a.vdi", [0, FREE, FREE], block_size=4096)
    with HostFile(tmp_path / "a.vdi", writable=True) as file:
        image = VDI(file)
        hostfile.execute(image.begin(), image.files)
        reservation = image.reserve(100)
        assert reservation.runs[0].count == 2
        hostfile.execute(reservation.plan, image.files)
        with pytest.raises(OSError, match="all 3 blocks are in use"):
            image.reserve(1)


def test_unused_reserved_blocks_are_cut_off_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [0, *[FREE] * 9])
    with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
        disk.pwrite(5 * MIB, b"x")
        disk.flush()
        assert path.stat().st_size > 1024 + 2 * MIB
    assert path.stat().st_size == 1024 + 2 * MIB
    assert field(path, "blocks_allocated") == 2


def test_bytes_behind_the_last_possible_block_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [0, FREE], tail=3)
    with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
        disk.pwrite(0, b"x")
    assert path.stat().st_size == 1024 + 4 * MIB
    assert path.read_bytes()[1024 + 2 * MIB :] == b"\xee" * 2 * MIB
    check_is_clean(path)


def test_holes_in_the_middle_are_closed_at_the_end(tmp_path: Path) -> None:
    """The next free block is then the same whether one counts blocks or takes the largest."""
    path = tmp_path / "a.vdi"
    make(path, [5, FREE, 3, 1, 0, 2, 4, FREE, FREE])
    with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
        disk.discard(2 * MIB, 3 * MIB)  # blocks 3, 1, 0
        disk.discard(0, MIB)  # block 5, the last one
        expected = bytearray(9 * MIB)
        expected[5 * MIB : 6 * MIB] = b"\3" * MIB
        expected[6 * MIB : 7 * MIB] = b"\5" * MIB
        assert disk.pread(0, disk.size) == expected
    entries = the_map(path)
    assert (entries[5], entries[6]) == (2, 4)
    used = [block for block in entries if block < DISCARDED]
    assert sorted(used) == list(range(5))
    assert field(path, "blocks_allocated") == 5
    assert path.stat().st_size == 1024 + 5 * MIB
    check_is_clean(path)
    # The next writer takes a block that nobody has.
    subprocess.run(
        ["qemu-io", "-f", "vdi", "-c", f"write -P 9 {8 * MIB} {MIB}", path],
        check=True,
        capture_output=True,
    )
    expected[8 * MIB :] = b"\x09" * MIB
    with HostFile(path) as file:
        assert Reference([VDI(file)]).pread(0, 9 * MIB) == expected


def test_discarding_everything_leaves_an_empty_image(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [1, FREE, 0, 2])
    with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
        disk.discard(0, disk.size)
    assert the_map(path) == [DISCARDED, FREE, DISCARDED, DISCARDED]
    assert path.stat().st_size == 1024
    assert field(path, "blocks_allocated") == 0
    check_is_clean(path)


def test_a_fixed_image_keeps_its_blocks_when_they_are_discarded(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [0, 1, 2, 3], kind=2)
    size = path.stat().st_size
    with HostFile(path, writable=True) as file:
        image = VDI(file)
        assert image.flat == 1024
        with Reference([image]) as disk:
            disk.discard(MIB, 2 * MIB)
            assert disk.pread(0, disk.size) == b"\1" * MIB + bytes(2 * MIB) + b"\4" * MIB
            assert path.stat().st_blocks * 512 < size - MIB
    assert the_map(path) == [0, 1, 2, 3]
    assert path.stat().st_size == size
    check_is_clean(path)


def test_a_session_that_wrote_nothing_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    make(path, [2, FREE, 0], count=9, tail=1)
    before = path.read_bytes()
    with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
        disk.pread(0, disk.size)
        disk.flush()
    assert path.read_bytes() == before


@pytest.mark.parametrize("seed", range(4))
def test_many_sessions_of_writes_and_discards(tmp_path: Path, seed: int) -> None:
    """Fragmented maps, reused blocks, closed holes: clean and equal after every session."""
    random_ = random.Random(seed)
    path = tmp_path / "a.vdi"
    block = 4096
    count = 300  # more than two map sectors
    present = random_.sample(range(count), 120)
    blocks = [FREE] * count
    for block_number, index in enumerate(present):
        blocks[index] = block_number
    make(path, blocks, block_size=block, data_offset=2048)
    with HostFile(path) as file:
        model = bytearray(Reference([VDI(file)]).pread(0, count * block))
    for _ in range(5):
        with HostFile(path, writable=True) as file, Reference([VDI(file)]) as disk:
            for _ in range(60):
                offset = random_.randrange(count * block)
                length = min(random_.choice([1, 700, 4096, 30000]), count * block - offset)
                action = random_.choice(["write", "zero", "discard", "flush"])
                if action == "write":
                    data = random_.randbytes(length)
                    disk.pwrite(offset, data)
                    model[offset : offset + length] = data
                elif action == "zero":
                    disk.write_zeroes(offset, length)
                    model[offset : offset + length] = bytes(length)
                elif action == "discard":
                    first = -(-offset // block) * block
                    last = max(first, (offset + length) // block * block)
                    disk.discard(offset, length)
                    model[first:last] = bytes(last - first)
                else:
                    disk.flush()
            assert disk.pread(0, disk.size) == model
        used = sorted(entry for entry in the_map(path) if entry < DISCARDED)
        assert used == list(range(len(used)))
        assert field(path, "blocks_allocated") == len(used)
        assert path.stat().st_size == 2048 + len(used) * block
        with HostFile(path) as file:
            assert Reference([VDI(file)]).pread(0, count * block) == model


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    changes=st.lists(
        st.tuples(
            st.one_of(
                st.sampled_from([offset for offset, _ in FIELDS.values()]),
                st.integers(0, 535),  # the header and the map
            ),
            st.one_of(
                st.sampled_from([0, 1, 2, 511, 512, 4096, 1 << 31, (1 << 32) - 2, (1 << 32) - 1]),
                st.integers(0, (1 << 32) - 1),
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    cut=st.one_of(st.just(0), st.integers(0, 30000)),
)
def test_whatever_is_wrong_is_refused_or_read_inside_the_file(
    changes: list[tuple[int, int]], cut: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.vdi")
        make(path, [1, FREE, 0, DISCARDED, 2, FREE], block_size=4096)
        content = bytearray(path.read_bytes())
        for offset, value in changes:
            content[offset : offset + 4] = value.to_bytes(4, "little")
        path.write_bytes(content[: len(content) - cut])
        with HostFile(path, writable=True) as file:
            try:
                image = VDI(file)
            except VirtmountError:
                return
            disk = Reference([image])
            # Damaged or not: every block is read, or is an error of its own.
            for offset in range(0, min(disk.size, 1 << 20), 4096):
                with contextlib.suppress(OSError):
                    disk.pread(offset, min(4096, disk.size - offset))
            disk.pwrite(disk.size - 512, b"w" * 512)
            disk.close()
        with HostFile(path) as file:
            disk = Reference([VDI(file)])
            assert disk.pread(disk.size - 512, 512) == b"w" * 512


def test_runs() -> None:
    assert runs([]) == []
    assert runs([1, 2, 5, 7, 8]) == [[1, 2], [5], [7, 8]]


@pytest.mark.parametrize("static", [False, True])
def test_qemu_made(tmp_path: Path, static: bool) -> None:
    path = tmp_path / "a.vdi"
    option = ["-o", "static=on"] if static else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "vdi", *option, path, "3M"], check=True)
    with HostFile(path, writable=True) as file:
        image = VDI(file)
        assert (image.variant, image.flat) == (("fixed", 1024) if static else ("dynamic", None))
        with Reference([image]) as disk:
            disk.pwrite(2 * MIB + 7, b"seven")
            disk.pwrite(MIB - 3, b"across")
    check_is_clean(path)
    raw = tmp_path / "a.img"
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
    expected = bytearray(3 * MIB)
    expected[2 * MIB + 7 : 2 * MIB + 12] = b"seven"
    expected[MIB - 3 : MIB + 3] = b"across"
    assert raw.read_bytes() == expected
