"""Writing to VHD images: where blocks go, in which order, and what is left at the end."""

from __future__ import annotations

import errno
import random
import struct
from pathlib import Path

import pytest

import virtmount
from tests.conformance.disks import ENGINES, Disk
from tests.formats import make_vhd
from tests.formats.make_vhd import DYNAMIC, FREE, KIB, MIB, Block, Spec, pattern
from tests.formats.test_vhd import content, make_pair, read, seven_zip
from tests.reference import Reference
from virtmount import hostfile
from virtmount.formats.vhd import VHD
from virtmount.formats.vhd_check import check
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Dirty, Reservation, Run
from virtmount.plan import Barrier, Plan, Punch, Truncate, Write
from virtmount.upkeep import Finding, Repair

BLOCK = 64 * KIB
STRIDE = BLOCK + 512
TABLE = 1536


def table(path: Path, count: int, at: int = TABLE) -> list[int]:
    return list(struct.unpack(f">{count}I", path.read_bytes()[at : at + 4 * count]))


def sound(path: Path) -> None:
    with HostFile(path) as file:
        found = list(check(file, DEFAULTS, Repair.NOTHING))
    assert not [item for item in found if isinstance(item, Finding)], found


def begun(file: HostFile) -> VHD:
    """Open for writing, with begin() done."""
    image = VHD(file)
    hostfile.execute(image.begin(), image.files)
    return image


def reserve(image: VHD, count: int) -> Reservation:
    reservation = image.reserve(count)
    hostfile.execute(reservation.plan, image.files)
    return reservation


def test_a_new_footer_is_durable_before_a_block_goes_over_the_old_one(tmp_path: Path) -> None:
    path = Spec(8 * BLOCK, {1: Block(pattern(1, BLOCK))}, block=BLOCK).write(tmp_path / "a.vhd")
    old_end = path.stat().st_size - 512
    with HostFile(path, writable=True) as file:
        image = begun(file)
        footer, barrier, emptied, first, second, last = image.reserve(2).plan
    start = -(-(old_end + 512) // 4096) * 4096 - 512
    second_start = start + BLOCK + 4096
    assert [first, second] == [
        Write(start, make_vhd.bits(BLOCK, None)),
        Write(second_start, make_vhd.bits(BLOCK, None)),
    ]
    assert footer == Write(second_start + STRIDE, make_vhd.footer(DYNAMIC, 8 * BLOCK))
    assert barrier is last is Barrier
    assert emptied == Write(old_end, bytes(512))


@pytest.mark.parametrize("block", [4 * KIB, 64 * KIB, 2 * MIB, 8 * MIB])
def test_the_data_of_new_blocks_is_aligned(tmp_path: Path, block: int) -> None:
    spec = Spec(16 * block, {3: Block(b"x")}, block=block)
    path = spec.write(tmp_path / "a.vhd")
    with HostFile(path, writable=True) as file:
        image = begun(file)
        runs = [run for _ in range(3) for run in reserve(image, 2).runs]
        assert all(run.host_offset % 4096 == 0 for run in runs)
        assert len({run.host_offset for run in runs}) == len(runs)


def test_commit_writes_whole_table_sectors_and_only_then_empties_what_was_there(
    tmp_path: Path,
) -> None:
    blocks = {0: Block(pattern(0, BLOCK), [range(4)]), 200: Block(pattern(1, BLOCK))}
    path = Spec(400 * BLOCK, blocks, block=BLOCK).write(tmp_path / "a.vhd")
    old = table(path, 1)[0] * 512
    with HostFile(path, writable=True) as file:
        image = begun(file)
        hosts = [run.host_offset for _ in range(2) for run in reserve(image, 2).runs]
        dirty = [Dirty(c, h, False) for c, h in zip([0, 1, 130, 399], hosts, strict=True)]
        plan = image.commit(dirty)
        first, low, high, last, punch = plan
        assert first is last is Barrier
        assert isinstance(low, Write)
        assert isinstance(high, Write)
        assert (low.offset, len(low.data)) == (TABLE, 1024)
        assert (high.offset, len(high.data)) == (TABLE + 3 * 512, 512)
        assert punch == Punch(old, STRIDE)
        hostfile.execute(plan, image.files)
        assert image.slow(1)[0].host_offset == hosts[1]
        # The emptied place is taken before the file grows.
        again = image.reserve(1)
        assert (again.runs[0].host_offset, again.reused) == (old + 512, True)


def test_no_barrier_where_nothing_is_hidden(tmp_path: Path) -> None:
    path = Spec(4 * BLOCK, block=BLOCK).write(tmp_path / "a.vhd")
    with HostFile(path, writable=True) as file:
        image = begun(file)
        (run, *_) = reserve(image, 1).runs
        write, barrier = image.commit([Dirty(2, run.host_offset, barrier=False)])
        assert isinstance(write, Write)
        assert barrier is Barrier
        assert image.commit([]).steps == ()


def test_discard_unmaps_then_empties_then_reuses(tmp_path: Path) -> None:
    blocks = {i: Block(pattern(i, BLOCK)) for i in (2, 0, 3)}
    path = Spec(4 * BLOCK, blocks, block=BLOCK).write(tmp_path / "a.vhd")
    places = table(path, 4)
    with HostFile(path, writable=True) as file:
        image = begun(file)
        write, barrier, *punches = image.discard(0, 3)
        assert isinstance(write, Write)
        assert struct.unpack_from(">4I", write.data) == (FREE, FREE, FREE, places[3])
        assert barrier is Barrier
        assert punches == [Punch(places[i] * 512, STRIDE) for i in (0, 2)]
        assert image.discard(1, 1).steps == ()
        assert image.discard(3, 1).steps != ()


def test_a_session_ends_with_the_last_block_and_the_footer(tmp_path: Path) -> None:
    path = Spec(40 * BLOCK, block=BLOCK).write(tmp_path / "a.vhd")
    with HostFile(path, writable=True) as file:
        with Reference([VHD(file)]) as disk:
            disk.pwrite(5 * BLOCK, b"x")
        size = file.size
        assert size == table(path, 6)[5] * 512 + STRIDE + 512
        with Reference([VHD(file)]) as disk:
            disk.discard(5 * BLOCK, BLOCK)
        assert file.size == TABLE + 512 + 512
    sound(path)
    assert seven_zip(path) == bytes(40 * BLOCK)


def test_the_end_writes_the_footer_before_it_cuts(tmp_path: Path) -> None:
    path = Spec(40 * BLOCK, block=BLOCK).write(tmp_path / "a.vhd")
    with HostFile(path, writable=True) as file:
        image = begun(file)
        image.release(reserve(image, 3).runs)
        footer, barrier, cut, last = image.end()
        assert footer == Write(TABLE + 512, make_vhd.footer(DYNAMIC, 40 * BLOCK))
        assert barrier is last is Barrier
        assert cut == Truncate(TABLE + 1024)


def test_a_session_that_wrote_nothing_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    spec = Spec(40 * BLOCK, {1: Block(b"x")}, block=BLOCK)
    path = tmp_path / "a.vhd"
    path.write_bytes(spec.build() + bytes(512))
    before = path.read_bytes()
    with HostFile(path, writable=True) as file, Reference([VHD(file)]) as disk:
        disk.pread(0, disk.size)
        disk.flush()
    assert path.read_bytes() == before


def test_free_places_of_earlier_sessions_are_found(tmp_path: Path) -> None:
    blocks = {i: Block(pattern(i, BLOCK)) for i in range(6)}
    path = Spec(12 * BLOCK, blocks, block=BLOCK).write(tmp_path / "a.vhd")
    size = path.stat().st_size
    with virtmount.open(path, writable=True) as disk:
        disk.discard(BLOCK, 3 * BLOCK)
    assert path.stat().st_size == size
    sound(path)
    with virtmount.open(path, writable=True) as disk:
        disk.pwrite(8 * BLOCK + 512, b"n" * 512)
        disk.pwrite(9 * BLOCK, b"m" * BLOCK)
    # Three unaligned places give room for two aligned ones.
    assert path.stat().st_size == size
    expected = bytearray(content(Spec(12 * BLOCK, blocks, block=BLOCK)))
    expected[BLOCK : 4 * BLOCK] = bytes(3 * BLOCK)
    expected[8 * BLOCK + 512 : 8 * BLOCK + 1024] = b"n" * 512
    expected[9 * BLOCK : 10 * BLOCK] = b"m" * BLOCK
    assert read(path) == seven_zip(path) == expected
    sound(path)


def test_what_a_crash_left_behind_the_last_block_is_emptied(tmp_path: Path) -> None:
    spec = Spec(12 * BLOCK, {0: Block(pattern(0, BLOCK))}, block=BLOCK)
    raw = spec.build()
    path = tmp_path / "a.vhd"
    path.write_bytes(raw[:-512] + b"\xee" * (5 * STRIDE) + raw[-512:])
    with HostFile(path, writable=True) as file, Reference([VHD(file)]) as disk:
        disk.pwrite(7 * BLOCK + 512, b"n" * 512)
        assert disk.pread(7 * BLOCK, BLOCK) == bytes(512) + b"n" * 512 + bytes(BLOCK - 1024)
    sound(path)
    assert read(path)[7 * BLOCK :] == bytes(512) + b"n" * 512 + bytes(5 * BLOCK - 1024)


class FullFile(HostFile):
    """Has no room behind byte `most`."""

    most = 1 << 60

    def pwrite(self, offset: int, data: bytes) -> None:
        if offset + len(data) > self.most:
            raise OSError(errno.ENOSPC, "full")
        super().pwrite(offset, data)


def test_a_reservation_that_failed_is_given_back_and_tried_again(tmp_path: Path) -> None:
    """qemu hands one block out twice after such an error."""
    path = Spec(12 * BLOCK, {0: Block(pattern(0, BLOCK))}, block=BLOCK).write(tmp_path / "a.vhd")
    file = FullFile(path, writable=True)
    with file:
        image = begun(file)
        file.most = file.size
        reservation = image.reserve(2)
        with pytest.raises(OSError, match="full"):
            hostfile.execute(reservation.plan, image.files)
        assert file.pread(file.size - 512, 512) == make_vhd.footer(DYNAMIC, 12 * BLOCK)
        image.release(reservation.runs)
        file.most = 1 << 60
        hosts = [run.host_offset for _ in range(2) for run in reserve(image, 2).runs]
        assert len(set(hosts)) == len(hosts) == 4
        assert {run.host_offset for run in reservation.runs} <= set(hosts)
        assert file.pread(file.size - 512, 512) == make_vhd.footer(DYNAMIC, 12 * BLOCK)
        assert all(file.pread_padded(host, BLOCK) == bytes(BLOCK) for host in hosts)
        hostfile.execute(image.commit([Dirty(5, hosts[0]), Dirty(6, hosts[2])]), image.files)
        image.release([Run(hosts[1], 1), Run(hosts[3], 1)])
        hostfile.execute(image.end(), image.files)
    sound(path)


def test_no_place_behind_what_the_table_can_name(tmp_path: Path) -> None:
    path = Spec(12 * BLOCK, block=BLOCK).write(tmp_path / "a.vhd")
    with HostFile(path, writable=True) as file:
        image = begun(file)
        assert image._writer is not None
        image._writer.free_from = (1 << 41) - 4096
        with pytest.raises(OSError, match="too large"):
            image.reserve(1)


def test_xenservers_second_map_stays_true(tmp_path: Path) -> None:
    """It names blocks that are whole; none may go away."""
    spec = Spec(4 * BLOCK, {0: Block(b"x")}, block=BLOCK, creator=b"tap\0")
    with HostFile(spec.write(tmp_path / "a.vhd"), writable=True) as file:
        assert not VHD(file).caps.discard


def test_fixed_images_are_written_in_place_and_punched(tmp_path: Path) -> None:
    data = pattern(1, 8 * BLOCK)
    path = make_vhd.fixed(tmp_path / "a.vhd", data)
    end = path.read_bytes()[-512:]
    expected = bytearray(data)
    with virtmount.open(path, writable=True) as disk:
        disk.pwrite(8 * BLOCK - 512, b"l" * 512)
        expected[-512:] = b"l" * 512
        disk.discard(BLOCK, 2 * BLOCK)
        expected[BLOCK : 3 * BLOCK] = bytes(2 * BLOCK)
    assert path.read_bytes() == expected + end
    with HostFile(path, writable=True) as file:
        assert VHD(file).discard(6, 100).steps == (Punch(6 * BLOCK, 2 * BLOCK),)
        assert VHD(file).discard(7, 1).steps == (Punch(7 * BLOCK, BLOCK),)


@pytest.mark.parametrize("seed", range(4))
def test_many_sessions_of_writes_and_discards(tmp_path: Path, seed: int) -> None:
    """Fragmented tables, partly present blocks, reused places: sound and equal every time."""
    random_ = random.Random(seed)
    path = tmp_path / "a.vhd"
    block, count = 4096, 300
    blocks = {}
    for index in random_.sample(range(count), 120):
        present = None if random_.random() < 0.7 else [range(random_.randrange(1, 8))]
        blocks[index] = Block(pattern(index, block), present)
    spec = Spec(count * block, blocks, block=block, gap=random_.choice([0, 512, 5120]))
    spec.write(path)
    model = bytearray(content(spec))
    for _ in range(5):
        with HostFile(path, writable=True) as file, Reference([VHD(file)]) as disk:
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
        sound(path)
        assert read(path) == model


@pytest.mark.parametrize("opened", ["reference", "engine"])
@pytest.mark.parametrize("seed", range(2))
def test_many_sessions_over_a_parent(tmp_path: Path, seed: int, opened: str) -> None:
    """Blocks become whole as they are written; the parent stays, and 7-Zip agrees."""
    random_ = random.Random(seed)
    path, expected = make_pair(tmp_path, "dynamic")
    base = (tmp_path / "base.vhd").read_bytes()
    model = bytearray(expected)
    for _ in range(4):
        disk: Disk = ENGINES[opened](path, "vhd", True)
        try:
            for _ in range(12):
                offset = random_.randrange(len(model) // 512) * 512
                length = min(random_.choice([512, 4096, 70000]), len(model) - offset)
                if random_.random() < 0.3:
                    disk.write_zeroes(offset, length)
                    model[offset : offset + length] = bytes(length)
                else:
                    data = random_.randbytes(length)
                    disk.pwrite(offset, data)
                    model[offset : offset + length] = data
                if random_.random() < 0.3:
                    disk.flush()
            assert disk.pread(0, disk.size) == model
        finally:
            disk.close()
        sound(path)
        assert read(path) == seven_zip(path) == model
    assert (tmp_path / "base.vhd").read_bytes() == base


def test_plans_of_an_image_without_a_writer_are_empty(tmp_path: Path) -> None:
    path = make_vhd.fixed(tmp_path / "a.vhd", bytes(BLOCK))
    with HostFile(path, writable=True) as file:
        image = VHD(file)
        assert [plan.steps for plan in (image.begin(), image.commit([]), image.end())] == [
            Plan().steps
        ] * 3
