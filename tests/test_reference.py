"""The oracle itself, against answers worked out by hand: it must not be wrong in silence."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.reference import Reference
from tests.virtmount.toy import (
    ABSENT,
    COMPRESSED,
    DIRTY,
    PARTIAL,
    SHARED,
    TABLE,
    ZERO,
    Toy,
    make_toy,
)
from virtmount.hostfile import HostFile
from virtmount.image import Caps, Extent, Kind

C = 4096


class Recorder(HostFile):
    """A file that notes what is done to it, and fails one kind of call on demand."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, writable=True)
        self.log: list[tuple[str, int, int]] = []
        self.broken: set[str] = set()

    def __enter__(self) -> Recorder:
        return self

    def note(self, name: str, offset: int = 0, length: int = 0) -> None:
        if name in self.broken:
            raise OSError(errno.EIO, "broken")
        self.log.append((name, offset, length))

    def pwrite(self, offset: int, data: bytes) -> None:
        self.note("pwrite", offset, len(data))
        super().pwrite(offset, data)

    def punch(self, offset: int, length: int) -> None:
        self.note("punch", offset, length)
        super().punch(offset, length)

    def truncate(self, size: int) -> None:
        self.note("truncate", size)
        super().truncate(size)

    def sync(self) -> None:
        self.note("sync")
        super().sync()


def inflated(cluster: int) -> bytes:
    return bytes([cluster + 1]) * C


def test_every_kind_reads_as_it_should(tmp_path: Path) -> None:
    table: dict[int, int | bytes] = {3: b"d" * C, 0: ABSENT, 1: ZERO, 2: COMPRESSED}
    path = make_toy(tmp_path / "a", 4 * C, table)
    with HostFile(path) as file:
        disk = Reference([Toy(file)])
        assert disk.pread(0, 4 * C) == bytes(2 * C) + inflated(2) + b"d" * C
        assert disk.pread(3 * C - 1, 2) == b"\x03d"
        assert [extent.kind for _, extent in disk.extents(0, 4 * C)] == [
            Kind.ZERO,
            Kind.ZERO,
            Kind.COMPRESSED,
            Kind.DATA,
        ]


def test_a_partial_cluster_is_read_in_pieces_and_asks_the_parent(tmp_path: Path) -> None:
    child = make_toy(tmp_path / "a", C, {0: PARTIAL}, grain=1024)
    parent = make_toy(tmp_path / "b", C, {0: b"p" * C})
    with HostFile(child) as one, HostFile(parent) as two:
        disk = Reference([Toy(one), Toy(two)])
        # slow() of cluster 0: shared, absent, zero, shared.
        assert disk.pread(0, C) == b"\xc0" * 1024 + b"p" * 1024 + bytes(1024) + b"\xc3" * 1024
        assert disk.pread(1000, 50) == b"\xc0" * 24 + b"p" * 26


def test_parents_of_other_sizes_and_clusters(tmp_path: Path) -> None:
    top = make_toy(tmp_path / "a", 4 * C, {1: b"t" * C, 2: ZERO})
    middle = make_toy(tmp_path / "b", 3 * C, {1: b"m" * 2 * C}, cluster=2 * C)
    base = make_toy(
        tmp_path / "c", 9 * C, {n: bytes([n + 65]) * 512 for n in range(72)}, cluster=512
    )
    with HostFile(top) as one, HostFile(middle) as two, HostFile(base) as three:
        disk = Reference([Toy(one), Toy(two), Toy(three)])
        assert disk.size == 4 * C
        # The middle ends at 3 C, and hides the base from there on.
        below = b"".join(bytes([n + 65]) * 512 for n in range(8))
        assert disk.pread(0, 4 * C) == below + b"t" * C + bytes(C) + bytes(C)
        assert list(disk.extents(3 * C, C)) == [(1, Extent(3 * C, C, Kind.ZERO))]
    make_toy(tmp_path / "a", 4 * C, {})
    with HostFile(top) as one, HostFile(middle) as two, HostFile(base) as three:
        disk = Reference([Toy(one), Toy(two), Toy(three)])
        low = b"".join(bytes([n + 65]) * 512 for n in range(16))
        assert disk.pread(0, 4 * C) == low + b"m" * C + bytes(C)


@pytest.mark.parametrize("entry", [512, TABLE, 1 << 40])
def test_a_mapping_to_where_no_cluster_can_lie_is_an_error(tmp_path: Path, entry: int) -> None:
    path = make_toy(tmp_path / "a", 2 * C, {0: entry, 1: b"d" * C})
    with HostFile(path, writable=True) as file:
        disk = Reference([Toy(file)])
        for call in (lambda: disk.pread(0, 1), lambda: disk.pwrite(0, b"x")):
            with pytest.raises(OSError, match="no valid host offset") as raised:
                call()
            assert raised.value.errno == errno.EIO
        assert disk.pread(C, C) == b"d" * C


def test_a_write_to_its_own_cluster_stays_in_place(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a", 2 * C, {1: b"d" * C})
    with Recorder(path) as file:
        toy = Toy(file)
        disk = Reference([toy])
        disk.pwrite(C + 100, b"xyz")
        assert file.log == [
            ("pwrite", DIRTY, 5),
            ("sync", 0, 0),
            ("pwrite", 2 * C + 100, 3),
        ]
        disk.flush()
        assert file.log[-1] == ("sync", 0, 0)
        assert toy.log.count("commit") == toy.log.count("reserve") == 0
        assert disk.pread(C, C) == b"d" * 100 + b"xyz" + b"d" * (C - 103)


@pytest.mark.parametrize(
    ("entry", "old"), [(SHARED | 2 * C, b"s" * C), (COMPRESSED, inflated(0)), (ABSENT, b"p" * C)]
)
def test_what_is_not_its_own_is_copied_whole_before_it_is_mapped(
    tmp_path: Path, entry: int, old: bytes
) -> None:
    child = make_toy(tmp_path / "a", 2 * C, {1: b"s" * C, 0: entry})
    parent = make_toy(tmp_path / "b", 2 * C, {0: b"p" * C})
    before = parent.read_bytes()
    with Recorder(child) as one, HostFile(parent) as two:
        disk = Reference([Toy(one), Toy(two)])
        assert disk.pread(0, C) == old
        disk.pwrite(10, b"new")
        new = old[:10] + b"new" + old[13:]
        assert disk.pread(0, C) == new
        assert one.pread(TABLE, 8) == entry.to_bytes(8, "little")  # not mapped yet
        assert [call[0] for call in one.log[-3:]] == ["truncate", "sync", "pwrite"]
        assert one.log[-1][2] == C
        del one.log[:]
        disk.flush()
        # Data durable, mapping, durable; the last is what a flush always does.
        assert [call[0] for call in one.log] == ["sync", "pwrite", "sync", "sync"]
        assert one.log[1] == ("pwrite", TABLE, 8)
        assert disk.pread(0, C) == new
        disk.close()
    assert parent.read_bytes() == before


@pytest.mark.parametrize("entry", [ABSENT, ZERO])
def test_a_new_cluster_over_zeros_gets_only_what_is_written(tmp_path: Path, entry: int) -> None:
    path = make_toy(tmp_path / "a", 2 * C, {0: entry, 1: b"d" * C})
    with Recorder(path) as file:
        disk = Reference([Toy(file)])
        disk.pwrite(512, b"x" * 512)
        assert file.log[-1][2] == 512
        del file.log[:]
        disk.flush()
        assert [call[0] for call in file.log] == ["pwrite", "sync", "sync"]  # no barrier before
        assert disk.pread(0, C) == bytes(512) + b"x" * 512 + bytes(C - 1024)


def test_a_reused_cluster_needs_its_data_durable_before_its_mapping(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a", 2 * C, {0: b"d" * C})
    with Recorder(path) as file:
        disk = Reference([Toy(file)])
        disk.discard(0, C)
        disk.pwrite(C, b"x" * 512)  # gets the cluster that was given back
        assert file.log[-1] == ("pwrite", 2 * C, 512)
        del file.log[:]
        disk.flush()
        assert [call[0] for call in file.log] == ["sync", "pwrite", "sync", "sync"]
        assert disk.pread(0, 2 * C) == bytes(C) + b"x" * 512 + bytes(C - 512)


def test_discard_commits_first_and_takes_whole_clusters_only(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a", 4 * C + 512, {n: bytes([n + 1]) * C for n in (2, 0, 1, 4)})
    with HostFile(path, writable=True) as file:
        toy = Toy(file)
        disk = Reference([toy])
        disk.pwrite(3 * C, b"n" * C)
        disk.discard(512, 4 * C - 512)
        assert toy.log.index("commit") < toy.log.index("discard")
        assert disk.pread(0, C) == b"\1" * C
        assert disk.pread(C, 3 * C) == bytes(3 * C)
        assert disk.pread(4 * C, 512) == b"\5" * 512
        disk.discard(4 * C, 512)  # all there is of the last cluster
        assert disk.pread(4 * C, 512) == bytes(512)
        disk.close()


def test_zeros_are_written_where_clusters_cannot_be_discarded(tmp_path: Path) -> None:
    child = make_toy(tmp_path / "a", 3 * C, {0: b"c" * C})
    parent = make_toy(tmp_path / "b", 3 * C, dict.fromkeys(range(3), b"p" * C))
    with HostFile(child, writable=True) as one, HostFile(parent) as two:
        toy = Toy(one)
        toy.caps = Caps(write=True, discard=True, zero_hides_parent=False)
        disk = Reference([toy, Toy(two)])
        disk.discard(0, 3 * C)
        assert disk.pread(0, 3 * C) == b"c" * C + b"p" * 2 * C
        disk.write_zeroes(512, 2 * C)
        expected = b"c" * 512 + bytes(2 * C) + b"p" * (C - 512)
        assert disk.pread(0, 3 * C) == expected
        assert "discard" not in toy.log
        disk.close()
    with HostFile(child) as one, HostFile(parent) as two:
        assert Reference([Toy(one), Toy(two)]).pread(0, 3 * C) == expected


def test_close_commits_releases_and_ends_in_this_order(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a", 2 * C, {})
    with HostFile(path, writable=True) as file:
        toy = Toy(file)
        disk = Reference([toy])
        disk.pwrite(0, b"x")
        disk.close()
        assert [name for name in toy.log if name != "leaf"] == [
            "begin",
            "reserve",
            "commit",
            "release",
            "end",
        ]
        assert file.pread(DIRTY, 5) == bytes(5)
        with pytest.raises(ValueError, match="closed"):
            disk.pread(0, 1)


def test_reading_calls_nothing_that_writes(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a", 2 * C, {0: b"d" * C})
    with Recorder(path) as file:
        toy = Toy(file)
        with Reference([toy]) as disk:
            disk.pread(0, 2 * C)
            disk.flush()
        assert set(toy.log) == {"leaf"}
        assert file.log == []


def test_a_failed_data_write_gives_the_cluster_back_and_changes_nothing(tmp_path: Path) -> None:
    path = make_toy(tmp_path / "a", 2 * C, {1: b"d" * C})
    with Recorder(path) as file:
        toy = Toy(file)
        disk = Reference([toy])
        disk.pwrite(C, b"D")
        toy_place = toy.end_of_file
        disk._take(0)  # so that the next write needs no plan
        file.broken = {"pwrite"}
        with pytest.raises(OSError, match="broken"):
            disk.pwrite(0, b"x")
        assert toy.log[-1] == "release"
        assert toy.reused[-1].host_offset == toy_place + C
        file.broken = set()
        assert disk.pread(0, C) == bytes(C)
        disk.pwrite(0, b"y")
        assert disk.pread(0, 2) == b"y\0"


@pytest.mark.parametrize("broken", ["pwrite", "sync"])
def test_after_a_failed_commit_nothing_is_written_any_more(tmp_path: Path, broken: str) -> None:
    path = make_toy(tmp_path / "a", 2 * C, {1: b"d" * C})
    with Recorder(path) as file:
        toy = Toy(file)
        disk = Reference([toy])
        disk.pwrite(0, b"x" * C)
        file.broken = {broken}
        with pytest.raises(OSError, match="broken"):
            disk.flush()
        file.broken = set()
        del file.log[:]
        for call in (disk.flush, lambda: disk.pwrite(C, b"y"), lambda: disk.discard(0, C)):
            with pytest.raises(OSError, match="earlier write"):
                call()
        disk.close()
        assert file.log == []
        assert "end" not in toy.log


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, C + 1), (C, 1), (0, -1)])
def test_refuses_ranges_outside_of_the_disk(tmp_path: Path, offset: int, length: int) -> None:
    path = make_toy(tmp_path / "a", C, {})
    with HostFile(path, writable=True) as file:
        disk = Reference([Toy(file)])
        for call in (disk.pread, disk.discard, disk.write_zeroes):
            with pytest.raises(ValueError, match="the disk has 4096"):
                call(offset, length)
