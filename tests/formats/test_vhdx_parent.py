"""Differencing VHDX disks: bitmaps, locators, chains, writing.  7-Zip is the other reader."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest

import virtmount
from tests.formats import make_vhdx as mk
from tests.formats.make_vhdx import MIB, Item, make
from tests.formats.vhdx_chains import CHILD, PARENT, contents_by_7zip, make_pair
from tests.reference import Reference
from virtmount import hostfile
from virtmount.chain import open_chain
from virtmount.errors import Corrupt, Denied, ParentMissing, Unsupported, VirtmountError
from virtmount.formats.vhdx import VHDX
from virtmount.formats.vhdx_locator import Locator
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Dirty, Kind, Options, extents
from virtmount.plan import Barrier, Plan, Punch, Write


@contextmanager
def opened(path: Path, *, writable: bool = False, force: bool = False) -> Iterator[Reference]:
    chain = open_chain(path, "vhdx", writable=writable, force=force)
    try:
        with Reference(chain.images) as disk:
            yield disk
    finally:
        chain.close()


def contents(path: Path) -> bytes:
    with opened(path) as disk:
        return disk.pread(0, disk.size)


# Reading


@pytest.mark.parametrize(
    ("block_size", "sector_size", "count"), [(MIB, 512, 13), (8 * MIB, 512, 7), (MIB, 4096, 13)]
)
def test_sectors_of_the_child_hide_those_of_the_parent(
    tmp_path: Path, block_size: int, sector_size: int, count: int
) -> None:
    size = count * block_size - 24 * sector_size  # 7-Zip wants a multiple of eight
    pair = make_pair(tmp_path, size, block_size, sector_size=sector_size)
    with opened(pair.child.path) as disk:
        assert disk.top.variant == "differencing"
        assert disk.top.grain == sector_size
        assert disk.pread(0, size) == pair.content
        assert disk.images[1].grain == block_size
    assert contents_by_7zip(pair.child.path) == pair.content


def test_bits_count_from_the_lowest_of_each_byte(tmp_path: Path) -> None:
    bits = (b"\x01", b"\x80", b"\xff", b"\x00", b"\xf0\x00\xff\x01")
    pair = make_pair(tmp_path, 40 * MIB, bits=bits)
    assert contents(pair.child.path) == pair.content == contents_by_7zip(pair.child.path)


def test_the_engine_reads_the_same(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 20 * MIB)
    with virtmount.open(pair.child.path) as disk:
        assert disk.pread(0, disk.size) == pair.content


def test_a_bitmap_is_that_of_its_own_chunk(tmp_path: Path) -> None:
    """Blocks of 256 MiB: every 16 of them have a bitmap block of their own."""
    block, sectors = 256 * MIB, 256 * MIB // 512
    first = b"\1".ljust(sectors // 8, b"\0")
    last = bytes(sectors // 8 - 1) + b"\x80"
    made = make(
        tmp_path / "child.vhdx",
        40 * block,
        {17: b"17" * 256, 0: b"00" * 256, 33: b"".ljust(512)},
        block_size=block,
        parent=mk.below(PARENT, "parent.vhdx"),
        partial={17: first, 0: last},
    )
    with open(made.path, "r+b") as file:
        file.seek(made.hosts[0] + block - 512)
        file.write(b"end!" * 128)
    make(
        tmp_path / "parent.vhdx",
        40 * block,
        {17: b"p" * 1024},
        block_size=block,
        data_write=PARENT,
        file_write=UUID(int=9),
    )
    with opened(made.path) as disk:
        assert disk.pread(17 * block, 1024) == b"17" * 256 + b"p" * 512
        assert disk.pread(0, 512) == bytes(512)
        assert disk.pread(block - 1024, 1024) == bytes(512) + b"end!" * 128
        assert disk.pread(33 * block, 512) == b" " * 512
        assert len(disk.top.slow(17)) == 2
        # 2.5: with a parent the last entry is that of a bitmap, and two of the three are needed.
        top = disk.top
        assert isinstance(top, VHDX)
        assert top.table.count == 51
        spans = {span.offset for span in disk.top.metadata()}
        assert spans >= set(made.bitmaps.values())


def test_without_partial_blocks_there_is_no_small_grain(tmp_path: Path) -> None:
    make(tmp_path / "parent.vhdx", 8 * MIB, {1: b"p" * MIB}, data_write=PARENT)
    made = make(tmp_path / "child.vhdx", 8 * MIB, {3: b"x"}, parent=mk.below(PARENT, "parent.vhdx"))
    # Garbage where the entry of a bitmap lies that nobody needs.
    made.write(made.bitmap_entry(0), struct.pack("<Q", made.hosts[3] | mk.PRESENT))
    with opened(made.path) as disk:
        assert disk.top.grain == MIB
        assert disk.pread(3 * MIB, 1) == b"x"
        assert disk.pread(MIB, MIB) == b"p" * MIB


@pytest.mark.parametrize(
    "entry", [0, 2 * MIB | 6, 1 << 50 | 6, 3, 500 * MIB | 6], ids=["0", "BAT", "far", "3", "end"]
)
def test_a_block_whose_bitmap_is_nowhere_is_an_error(tmp_path: Path, entry: int) -> None:
    pair = make_pair(tmp_path, 12 * MIB)
    made = pair.child
    made.write(made.bitmap_entry(0), struct.pack("<Q", entry))
    raw = struct.unpack("<12Q", made.read(made.bat, 96))
    with opened(made.path) as disk:
        for block in range(12):
            if raw[block] & 7 == mk.PARTIAL:
                with pytest.raises(OSError, match="no valid host offset"):
                    disk.pread(block * MIB, 512)
            else:
                assert disk.pread(block * MIB, MIB) == pair.content[block * MIB :][:MIB]


def test_partial_blocks_where_none_can_lie(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 12 * MIB)
    made = pair.child
    for place in (0, MIB, 3 * MIB, made.bitmaps[0], 1 << 50):
        made.write(made.entry_offset(0), struct.pack("<Q", place | mk.PARTIAL))
        with opened(made.path) as disk, pytest.raises(OSError, match="no valid host offset"):
            disk.pread(0, 512)


def test_a_bitmap_that_a_log_brings(tmp_path: Path) -> None:
    """Replayed in memory: the entry of a bitmap, and bits in it."""
    pair = make_pair(tmp_path, 12 * MIB)
    made = pair.child
    entry = made.read(made.bitmap_entry(0), 8)
    block = next(b for b in range(12) if made.read(made.entry_offset(b), 1)[0] & 7 == mk.PARTIAL)
    page = made.bitmaps[0] + block * 256 // 4096 * 4096
    within = block * 256 % 4096
    sector = bytearray(made.read(page, 4096))
    sector[within : within + 256] = b"\xff" * 256
    table = bytearray(made.read(made.bat + 32768, 4096))
    assert bytes(table[:8]) == entry
    made.write(made.bitmap_entry(0), bytes(8))
    changes: list[tuple[int, bytes | int]] = [(page, bytes(sector)), (made.bat + 32768, table)]
    made.put_entry(0, mk.log_entry(1, changes, flushed=made.end))
    made.put_headers(
        mk.header(1, log_guid=mk.LOG_GUID), mk.header(2, log_guid=mk.LOG_GUID, data_write=CHILD)
    )
    pair.content[block * MIB : (block + 1) * MIB] = made.read(made.hosts[block], MIB)
    assert contents(made.path) == pair.content
    with opened(made.path, writable=True) as disk:
        assert disk.pread(0, disk.size) == pair.content
        disk.pwrite(512, b"w" * 512)
        pair.content[512:1024] = b"w" * 512
        assert disk.pread(0, disk.size) == pair.content
    assert contents(made.path) == pair.content == contents_by_7zip(made.path)


# Parents


def test_identity_and_names(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 3 * MIB)
    with HostFile(pair.child.path) as file:
        image = VHDX(file)
        assert image.parent is not None
        assert image.parent.names == ("parent.vhdx",)
        assert image.parent.identity == str(PARENT)
        assert image.parent.format == "vhdx"
        assert image.identity == str(CHILD)
        assert image.details()["relative_path"] == ".\\parent.vhdx"


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"relative_path": "parent.vhdx"}, ("parent.vhdx",)),
        ({"relative_path": ".\\parent.vhdx"}, ("parent.vhdx",)),
        ({"relative_path": ".\\a\\b\\p.vhdx"}, ("p.vhdx", "a/b/p.vhdx")),
        ({"relative_path": "..\\p.vhdx"}, ("p.vhdx", "../p.vhdx")),
        # The child's own name in another folder: not the child.
        ({"relative_path": "..\\child.vhdx"}, ("../child.vhdx",)),
        ({"relative_path": "child.vhdx"}, ("child.vhdx",)),
        ({"absolute_win32_path": "C:\\vm\\p.vhdx"}, ("p.vhdx",)),
        ({"absolute_win32_path": "\\\\?\\C:\\vm\\p.vhdx"}, ("p.vhdx",)),
        ({"absolute_win32_path": "\\\\server\\share\\p.vhdx"}, ("p.vhdx",)),
        ({"absolute_win32_path": "/srv/p.vhdx"}, ("p.vhdx", "/srv/p.vhdx")),
        ({"volume_path": "\\\\?\\Volume{x}\\p.vhdx"}, ("p.vhdx",)),
        ({"volume_path": "/srv/p.vhdx"}, ("p.vhdx",)),
        ({"relative_path": "D:\\p.vhdx"}, ("p.vhdx",)),
        ({"relative_path": "\\p.vhdx"}, ("p.vhdx",)),
        (
            {
                "relative_path": "..\\x\\p.vhdx",
                "volume_path": "\\\\?\\Volume{x}\\y\\q.vhdx",
                "absolute_win32_path": "C:\\y\\p.vhdx",
            },
            ("p.vhdx", "q.vhdx", "../x/p.vhdx"),
        ),
        ({"relative_path": "..\\"}, ("../",)),
        ({"relative_path": ""}, ()),
        ({}, ()),
    ],
)
def test_paths_of_windows(values: dict[str, str], names: Sequence[str]) -> None:
    assert Locator(PARENT, values).names("child.vhdx") == names


def test_a_moved_chain_is_found_beside_the_child(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 3 * MIB)
    locator = mk.below(PARENT, "..\\..\\elsewhere\\parent.vhdx")
    made = make(tmp_path / "moved.vhdx", 3 * MIB, parent=locator, file_write=UUID(int=9))
    with opened(made.path) as disk:
        assert disk.images[1].files[0].path.name == pair.parent.path.name


def test_the_child_in_a_folder_below(tmp_path: Path) -> None:
    """With its parent's own name, above it: only if the user allows files outside the folder."""
    make(tmp_path / "disk.vhdx", MIB, {0: b"p" * MIB}, data_write=PARENT)
    (tmp_path / "snapshots").mkdir()
    path = tmp_path / "snapshots" / "disk.vhdx"
    make(path, MIB, parent=mk.below(PARENT, "..\\disk.vhdx"))
    with pytest.raises(Denied, match="outside of the image's folder"):
        open_chain(path)
    chain = open_chain(path, options=Options(allow_outside=True))
    assert Reference(chain.images).pread(0, MIB) == b"p" * MIB
    chain.close()


def test_a_parent_that_was_written_to_is_another(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 3 * MIB)
    with HostFile(pair.parent.path, writable=True) as file, Reference([VHDX(file)]) as disk:
        disk.pwrite(0, b"changed".ljust(512))
    with pytest.raises(ParentMissing, match=f"expected {PARENT}"):
        open_chain(pair.child.path)
    with opened(pair.child.path, force=True) as disk:
        assert len(disk.images) == 2


def test_ten_layers(tmp_path: Path) -> None:
    content = bytearray(12 * MIB)
    rng = random.Random(3)
    for layer in range(10):
        block = rng.randrange(12)
        bits = rng.randbytes(256)
        data = rng.randbytes(MIB)
        locator = mk.below(UUID(int=100 + layer - 1), f".\\{layer - 1}.vhdx") if layer else None
        if not layer:
            bits = b"\xff" * 256
        make(
            tmp_path / f"{layer}.vhdx",
            12 * MIB,
            {block: data},
            parent=locator,
            partial={block: bits} if layer else None,
            data_write=UUID(int=100 + layer),
            file_write=UUID(int=200 + layer),
        )
        for i in range(2048):
            if bits[i // 8] >> i % 8 & 1:
                at = block * MIB + i * 512
                content[at : at + 512] = data[i * 512 : i * 512 + 512]
    assert contents(tmp_path / "9.vhdx") == content == contents_by_7zip(tmp_path / "9.vhdx")
    with virtmount.open(tmp_path / "9.vhdx") as disk:
        assert disk.pread(0, disk.size) == content


def good() -> list[tuple[str, str]]:
    return [("parent_linkage", f"{{{PARENT}}}"), ("relative_path", "parent.vhdx")]


def put(raw: bytes, offset: int, value: bytes) -> bytes:
    return raw[:offset] + value + raw[offset + len(value) :]


@pytest.mark.parametrize(
    ("locator", "kind", "complaint"),
    [
        (b"", Corrupt, "parent locator at .*: 0 bytes"),
        (mk.locator(good(), kind=mk.STRANGER), Unsupported, f"type {mk.STRANGER}"),
        (mk.locator(good(), count=65), Corrupt, "65 keys, at most 64"),
        (mk.locator([], count=3), Corrupt, "3 keys in 20 bytes"),
        (mk.locator(good()[:1]), Corrupt, "none of relative_path"),
        (mk.locator([*good()[:1], ("relative_path", "")]), Corrupt, "none of relative_path"),
        (mk.locator(good()[1:]), Corrupt, "no parent_linkage"),
        (mk.locator([("parent_linkage", "?"), *good()[1:]]), Corrupt, r"is '\?', not a GUID"),
        (mk.locator([*good(), *good()]), Corrupt, "key 2: 'parent_linkage' a second time"),
        (
            put(mk.locator(good()), 20, b"\xff\xff\xff\xff"),
            Corrupt,
            "key 0: 28 bytes at 4294967295",
        ),
        (
            put(mk.locator(good()), 24, b"\xff\xff\xff\xff"),
            Corrupt,
            "key 0: 76 bytes at 4294967295",
        ),
        (put(mk.locator(good()), 28, b"\xff\xff"), Corrupt, "key 0: 65535 bytes"),
        (put(mk.locator(good()), 28, b"\x03"), Corrupt, "key 0: 3 bytes at .* not UTF-16"),
    ],
)
def test_refuses_a_locator(
    tmp_path: Path, locator: bytes, kind: type[VirtmountError], complaint: str
) -> None:
    made = make(tmp_path / "child.vhdx", MIB, parent=locator)
    for writable in (False, True):
        with HostFile(made.path, writable=writable) as file:
            with pytest.raises(VirtmountError, match=complaint) as caught:
                VHDX(file)
            assert caught.type is kind
    with HostFile(made.path) as file:
        assert VHDX(file, Options(changing_parent=True)).parent is None


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        (Item(mk.PARENT_LOCATOR, b"", offset=65535), "outside the metadata"),
        (Item(mk.PARENT_LOCATOR, b"", offset=MIB - 4, length=5), "outside the metadata"),
        (Item(mk.PARENT_LOCATOR, b"", length=0xFFFFFFFF), "outside the metadata"),
        (Item(mk.PARENT_LOCATOR, b"", length=300 << 10), "307200 bytes, at most"),
    ],
)
def test_refuses_the_place_of_a_locator(tmp_path: Path, item: Item, complaint: str) -> None:
    made = make(tmp_path / "child.vhdx", MIB, parent=b"", changed={"locator": item})
    with HostFile(made.path) as file, pytest.raises(Corrupt, match=complaint):
        VHDX(file)


@pytest.mark.parametrize(
    ("path", "kind", "complaint"),
    [
        ("nobody.vhdx", ParentMissing, "not found: 'nobody.vhdx'"),
        ("child.vhdx", Corrupt, "the chain comes back"),
        ("a\0b", Corrupt, "no possible file name"),
        ("\ud800", Corrupt, "no possible file name"),
        ("..\\..\\..\\..\\..\\..\\..\\..\\etc\\passwd", Denied, "outside of the image's folder"),
        ("/etc/passwd", ParentMissing, "not found: 'passwd'"),
    ],
)
def test_where_a_locator_must_not_lead(
    tmp_path: Path, path: str, kind: type[VirtmountError], complaint: str
) -> None:
    locator = mk.locator([*good()[:1], ("relative_path", path)])
    made = make(tmp_path / "child.vhdx", MIB, parent=locator)
    with pytest.raises(VirtmountError, match=complaint) as caught:
        open_chain(made.path)
    assert caught.type is kind


def test_an_absolute_path_of_this_system_needs_the_users_word(tmp_path: Path) -> None:
    locator = mk.locator([*good()[:1], ("absolute_win32_path", "/etc/passwd")])
    made = make(tmp_path / "child.vhdx", MIB, parent=locator)
    with pytest.raises(Denied, match="/etc/passwd lies outside"):
        open_chain(made.path)


def test_sectors_of_another_size_below(tmp_path: Path) -> None:
    make(tmp_path / "parent.vhdx", MIB, data_write=PARENT, sector_size=4096)
    made = make(tmp_path / "child.vhdx", MIB, parent=mk.below(PARENT, "parent.vhdx"))
    with pytest.raises(Unsupported, match="sectors of 4096 bytes under an image with 512"):
        open_chain(made.path)


def test_a_differencing_disk_is_never_fixed(tmp_path: Path) -> None:
    """2.6.2.1: LeaveBlocksAllocated is ignored with a parent."""
    make(tmp_path / "parent.vhdx", MIB, {0: b"p" * MIB}, data_write=PARENT)
    locator = mk.below(PARENT, "parent.vhdx")
    made = make(tmp_path / "child.vhdx", MIB, {0: b"c" * MIB}, parent=locator, fixed=True)
    with HostFile(made.path, writable=True) as file:
        image = VHDX(file)
        assert (image.variant, image.flat, image.caps.discard) == ("differencing", None, True)


# Writing


def test_writing_to_a_partial_block_moves_it_and_makes_it_whole(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 13 * MIB)
    made = pair.child
    before = struct.unpack("<13Q", made.read(made.bat, 104))
    bitmap = made.read(made.bitmaps[0], MIB)
    below = pair.parent.path.read_bytes()
    partial = [b for b, entry in enumerate(before) if entry & 7 == mk.PARTIAL]
    with opened(made.path, writable=True) as disk:
        for block in partial:
            disk.pwrite(block * MIB + 1536, b"new!" * 128)
            pair.content[block * MIB + 1536 : block * MIB + 2048] = b"new!" * 128
            assert disk.pread(block * MIB, MIB) == pair.content[block * MIB :][:MIB]
        disk.flush()
        assert disk.pread(0, disk.size) == pair.content
        for block in partial:
            assert made.read(made.hosts[block], MIB) == bytes(MIB), "the old place is given back"
    after = struct.unpack("<13Q", made.read(made.bat, 104))
    for block in partial:
        assert after[block] & 7 == mk.PRESENT
        assert after[block] != before[block] & ~7 | mk.PRESENT
    assert made.read(made.bitmaps[0], MIB) == bitmap
    assert pair.parent.path.read_bytes() == below
    assert contents(made.path) == pair.content == contents_by_7zip(made.path)


def test_the_old_place_is_given_back_after_the_new_mapping_is_durable(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 13 * MIB)
    made = pair.child
    block = next(b for b in range(13) if made.read(made.entry_offset(b), 1)[0] & 7 == mk.PARTIAL)
    with HostFile(made.path, writable=True) as file:
        image = VHDX(file)
        hostfile.execute(image.begin(), [file])
        reservation = image.reserve(1)
        hostfile.execute(reservation.plan, [file])
        new = reservation.runs[0].host_offset
        assert new not in (*made.hosts.values(), *made.bitmaps.values())
        steps = list(image.commit([Dirty(block, new)]))
        assert steps[0] is Barrier
        assert isinstance(steps[1], Write)
        assert steps[1].data[:4] == b"loge"
        assert steps[-1] == Punch(made.hosts[block], MIB)
        hostfile.execute(Plan(*steps), [file])
        # It is used again, and reads as zeros.
        again = image.reserve(1)
        assert (again.runs[0].host_offset, again.reused) == (made.hosts[block], True)
        assert len(again.plan) == 0


@pytest.mark.parametrize("engine", ["reference", "engine"])
@pytest.mark.parametrize("block_size", [MIB, 4 * MIB])
def test_sessions_of_everything(tmp_path: Path, block_size: int, engine: str) -> None:
    size = 11 * block_size - 4096
    pair = make_pair(tmp_path, size, block_size, seed=block_size)
    rng = random.Random(block_size)
    below = pair.parent.path.read_bytes()
    for session in range(2):
        if engine == "engine":
            disk = virtmount.open(pair.child.path, writable=True)
            chain = None
        else:
            chain = open_chain(pair.child.path, writable=True)
            disk = Reference(chain.images)  # type: ignore[assignment]
        for i in range(40):
            length = rng.randrange(512, 300_000, 512)
            offset = rng.randrange(0, size - length) // 512 * 512
            data = rng.randbytes(length)
            if i % 10 == 4:
                disk.write_zeroes(offset, length)
                data = bytes(length)
            elif i % 10 == 7:
                first = offset // block_size * block_size
                length = min(rng.randrange(1, 4) * block_size, size - first)
                offset, data = first, bytes(length)
                disk.discard(offset, length)
            else:
                disk.pwrite(offset, data)
            pair.content[offset : offset + length] = data
            if rng.random() < 0.3:
                disk.flush()
        assert disk.pread(0, size) == pair.content
        disk.close()
        if chain:
            chain.close()
        assert contents(pair.child.path) == pair.content, session
    assert contents_by_7zip(pair.child.path) == pair.content
    assert pair.parent.path.read_bytes() == below


def test_discard_hides_the_parent(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 13 * MIB)
    made = pair.child
    with opened(made.path, writable=True) as disk:
        assert disk.top.caps.zero_hides_parent
        disk.discard(0, 13 * MIB)
        assert disk.pread(0, disk.size) == bytes(13 * MIB)
    assert struct.unpack("<13Q", made.read(made.bat, 104)) == (mk.ZERO,) * 13
    assert contents_by_7zip(made.path) == bytes(13 * MIB)
    # The bitmap block stays, and what lies before it.
    assert made.path.stat().st_size == made.bitmaps[0] + MIB


def test_what_was_discarded_over_a_parent_is_written_without_it(tmp_path: Path) -> None:
    make(tmp_path / "parent.vhdx", 4 * MIB, {1: b"p" * MIB}, data_write=PARENT)
    made = make(tmp_path / "child.vhdx", 4 * MIB, parent=mk.below(PARENT, "parent.vhdx"))
    with opened(made.path, writable=True) as disk:
        disk.pwrite(MIB + 512, b"1" * 512)
        disk.discard(MIB, MIB)
        disk.pwrite(MIB + 1024, b"2" * 512)
    expected = bytes(MIB + 1024) + b"2" * 512
    assert contents(made.path) == expected.ljust(4 * MIB, b"\0")


def test_bitmaps_and_what_names_them_are_never_given_to_blocks(tmp_path: Path) -> None:
    """Also those that no block needs: the table names them."""
    make(tmp_path / "parent.vhdx", 8 * MIB, {1: b"p" * MIB}, data_write=PARENT)
    made = make(
        tmp_path / "child.vhdx",
        8 * MIB,
        {3: b"x" * MIB},
        parent=mk.below(PARENT, "parent.vhdx"),
        file_length=10 * MIB,
    )
    made.write(made.bitmap_entry(0), struct.pack("<Q", 6 * MIB | mk.PRESENT))
    made.write(6 * MIB, b"\xff" * MIB)
    with opened(made.path, writable=True) as disk:
        for block in (0, 2, 4, 5, 6):
            disk.pwrite(block * MIB, bytes([block]) * 512)
        disk.flush()
        hosts = [e.host_offset for e in extents(disk.top, 0, 8 * MIB) if e.kind is Kind.DATA]
    assert len(hosts) == 6
    assert 6 * MIB not in hosts
    assert made.read(6 * MIB, MIB) == b"\xff" * MIB


def test_two_children_of_one_parent_are_written(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 4 * MIB)
    other = make(tmp_path / "other.vhdx", 4 * MIB, parent=mk.below(PARENT, ".\\parent.vhdx"))
    with opened(pair.child.path, writable=True) as one, opened(other.path, writable=True) as two:
        one.pwrite(0, b"1" * 512)
        two.pwrite(0, b"2" * 512)
    assert contents(pair.child.path)[:512] == b"1" * 512
    assert contents(other.path)[:512] == b"2" * 512


def test_options_are_not_needed(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, MIB)
    with HostFile(pair.child.path) as file:
        assert VHDX(file).parent == VHDX(file, DEFAULTS).parent
