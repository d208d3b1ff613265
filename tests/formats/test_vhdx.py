"""VHDX, read: what qemu-img and make_vhdx.py write, and everything that is refused."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.formats import make_vhdx as mk
from tests.formats.make_vhdx import MIB, Item, Made, make
from tests.reference import Reference
from virtmount.errors import Corrupt, NotAnImage, Unsupported, VirtmountError
from virtmount.formats import probe
from virtmount.formats.vhdx import VHDX
from virtmount.hostfile import HostFile
from virtmount.image import Kind, extents

GIB = 1 << 30
TIB = 1 << 40


def qemu_img(*args: object) -> str:
    done = subprocess.run(
        ["qemu-img", *map(str, args)], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout


def qemu_io(path: Path, *commands: str) -> None:
    args = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "vhdx", *args, path], check=True, capture_output=True)


def contents(path: Path) -> bytes:
    with HostFile(path) as file, Reference([VHDX(file)]) as disk:
        return disk.pread(0, disk.size)


def contents_by_qemu(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    qemu_img("convert", "-f", "vhdx", "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        "subformat=dynamic,block_size=1M",
        "subformat=dynamic,block_size=8M",
        "subformat=dynamic,block_size=256M",
        "subformat=dynamic,block_size=1M,block_state_zero=off",
        "subformat=dynamic,block_size=2M,log_size=3M",
        "subformat=fixed,block_size=1M",
        "subformat=fixed,block_size=32M,block_state_zero=off",
    ],
)
@pytest.mark.parametrize("size", [17 * MIB + 512, 40 * MIB - 512 * 7])
def test_reads_what_qemu_wrote_out_of_order(tmp_path: Path, options: str, size: int) -> None:
    path = tmp_path / "disk.vhdx"
    qemu_img("create", "-q", "-f", "vhdx", "-o", options, path, size)
    rng = random.Random(size)
    offsets = [rng.randrange(0, size - 70000) // 512 * 512 for _ in range(12)]
    qemu_io(
        path,
        *(
            f"write -P {i + 1} {offset} {rng.randrange(512, 70000, 512)}"
            for i, offset in enumerate(offsets)
        ),
        f"write -P 99 {size - 512} 512",
    )
    found = contents(path)
    assert len(found) == size
    assert found == contents_by_qemu(path)
    assert found[-512:] == b"\x63" * 512


def test_a_fixed_disk_in_order_is_flat(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    # By default qemu marks the blocks of a fixed disk as zero and gives them no place.
    options = "subformat=fixed,block_size=2M,block_state_zero=off"
    qemu_img("create", "-q", "-f", "vhdx", "-o", options, path, "11M")
    qemu_io(path, "write -P 7 5M 100k")
    with HostFile(path) as file:
        image = VHDX(file)
        assert image.variant == "fixed"
        assert image.flat is not None
        assert not image.caps.discard
        content = file.pread(image.flat, image.size)
    assert content == contents_by_qemu(path)


def test_a_fixed_disk_out_of_order_or_with_holes_is_not_flat(tmp_path: Path) -> None:
    for number, blocks in enumerate(({1: b"b", 0: b"a"}, {0: b"a"}, {})):
        made = make(tmp_path / f"{number}.vhdx", 2 * MIB, blocks, fixed=True)
        with HostFile(made.path) as file:
            assert VHDX(file).flat is None
        expected = bytearray(2 * MIB)
        for block, content in blocks.items():
            expected[block * MIB : block * MIB + 1] = content
        assert contents(made.path) == expected


def test_a_flat_disk_must_lie_wholly_in_the_file_and_beside_the_metadata(tmp_path: Path) -> None:
    blocks = {0: b"a" * MIB, 1: b"b" * MIB}
    made = make(tmp_path / "whole.vhdx", 2 * MIB, blocks, fixed=True)
    with HostFile(made.path) as file:
        assert VHDX(file).flat == made.hosts[0]
    made = make(tmp_path / "short.vhdx", 2 * MIB, blocks, fixed=True, file_length=made.end - 512)
    with HostFile(made.path) as file:
        assert VHDX(file).flat is None
    made = make(
        tmp_path / "log.vhdx",
        2 * MIB,
        fixed=True,
        entries={0: MIB | mk.PRESENT, 1: 2 * MIB | mk.PRESENT},
    )
    with HostFile(made.path) as file:
        assert VHDX(file).flat is None


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("block_size", [MIB, 2 * MIB, 256 * MIB])
def test_the_entry_of_a_sector_bitmap_is_skipped(
    tmp_path: Path, sector_size: int, block_size: int
) -> None:
    chunk = (sector_size << 23) // block_size
    wanted = [0, chunk - 1, chunk, chunk + 1, 2 * chunk, 3 * chunk - 1]
    content = {block: os.urandom(4096) for block in reversed(wanted)}
    made = make(
        tmp_path / "disk.vhdx",
        3 * chunk * block_size,
        content,
        block_size=block_size,
        sector_size=sector_size,
    )
    # Where a bitmap's entry lies: garbage that would be seen if it were taken for a block's.
    for at in (chunk, 2 * chunk + 1):
        made.write(made.bat + at * 8, struct.pack("<Q", made.hosts[0] | mk.PRESENT))
    with HostFile(made.path) as file:
        image = VHDX(file)
        assert image.sector_size == sector_size
        assert image.entries_per_leaf == min(chunk, 4096)
        disk = Reference([image])
        for block in wanted:
            assert disk.pread(block * block_size, 4096) == content[block]
        for block in (1, chunk + 2, 2 * chunk - 1):
            (extent,) = extents(image, block * block_size, 1)
            assert extent.kind is Kind.ABSENT


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (mk.NOT_PRESENT, Kind.ABSENT),
        (mk.UNDEFINED, Kind.ZERO),
        (mk.ZERO, Kind.ZERO),
        (mk.UNMAPPED, Kind.ZERO),
        (4, Kind.INVALID),
        (5, Kind.ZERO),
        (mk.PRESENT, Kind.DATA),
        (mk.PARTIAL, Kind.INVALID),
    ],
)
def test_states_of_a_block(tmp_path: Path, state: int, kind: Kind) -> None:
    made = make(tmp_path / "disk.vhdx", 2 * MIB, {1: b"x" * MIB})
    host = made.hosts[1]
    made.write(made.entry_offset(1), struct.pack("<Q", host | state))
    with HostFile(made.path) as file:
        _, extent = extents(VHDX(file), 0, 2 * MIB)
        assert extent.kind is kind
        assert extent.host_offset == (host if kind is Kind.DATA else 0)


def test_reserved_bits_of_an_entry_are_not_part_of_the_offset(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", MIB, {0: b"x" * MIB})
    made.write(made.entry_offset(0), struct.pack("<Q", made.hosts[0] | 0xFFFF8 | mk.PRESENT))
    assert contents(made.path) == b"x" * MIB


@pytest.mark.parametrize("host", [0, 1 << 44, 0xFFFFFFFFFFF00000])
def test_a_block_where_none_can_lie_is_an_error_and_not_zeros(tmp_path: Path, host: int) -> None:
    made = make(tmp_path / "disk.vhdx", 2 * MIB, {1: b"x" * MIB}, entries={0: host | mk.PRESENT})
    with HostFile(made.path) as file:
        disk = Reference([VHDX(file)])
        with pytest.raises(OSError, match="no valid host offset"):
            disk.pread(0, 512)
        assert disk.pread(MIB, MIB) == b"x" * MIB


@pytest.mark.parametrize("place", [mk.MIB, 2 * MIB, 3 * MIB])
def test_a_block_over_the_metadata_is_an_error(tmp_path: Path, place: int) -> None:
    made = make(tmp_path / "disk.vhdx", MIB, entries={0: place | mk.PRESENT})
    with HostFile(made.path) as file:
        disk = Reference([VHDX(file)])
        with pytest.raises(OSError, match="no valid host offset"):
            disk.pread(0, 512)


def test_metadata_names_every_structure(tmp_path: Path) -> None:
    made = make(
        tmp_path / "disk.vhdx",
        MIB,
        regions=[(mk.STRANGER, 4 * MIB, MIB, 0)],
        file_length=5 * MIB,
    )
    with HostFile(made.path) as file:
        assert sorted(VHDX(file).metadata()) == [(i * MIB, MIB, 0) for i in range(5)]


# Which copy is used


def test_the_newer_header_is_used(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", MIB)
    for first, second, used in ((5, 4, 1), (4, 5, 2)):
        made.put_headers(
            mk.header(first, data_write=UUID(int=first)),
            mk.header(second, data_write=UUID(int=second)),
        )
        with HostFile(made.path) as file:
            image = VHDX(file)
            assert image.details()["header"] == used
            assert image.identity == str(UUID(int=5))


@pytest.mark.parametrize("torn", [65536, 131072])
def test_a_torn_header_is_passed_over_even_if_it_is_the_newer(tmp_path: Path, torn: int) -> None:
    made = make(tmp_path / "disk.vhdx", MIB, {0: b"x" * MIB})
    made.put_headers(mk.header(7), mk.header(7 if torn == 65536 else 6))
    made.write(torn + 100, b"torn")
    with HostFile(made.path) as file:
        assert VHDX(file).details()["header"] == (2 if torn == 65536 else 1)
    assert contents(made.path) == b"x" * MIB


def test_two_equal_headers_are_one(tmp_path: Path) -> None:
    """Disk2vhd writes them so."""
    made = make(tmp_path / "disk.vhdx", MIB, {0: b"x" * MIB})
    made.put_headers(mk.header(3), mk.header(3))
    assert contents(made.path) == b"x" * MIB
    made.put_headers(mk.header(3), mk.header(3, data_write=UUID(int=9)))
    with HostFile(made.path) as file, pytest.raises(Corrupt, match="sequence number 3"):
        VHDX(file)


@pytest.mark.parametrize("bad", [192 << 10, 256 << 10])
def test_one_region_table_is_enough(tmp_path: Path, bad: int) -> None:
    made = make(tmp_path / "disk.vhdx", MIB, {0: b"x" * MIB})
    made.write(bad + 30, b"torn")
    with HostFile(made.path) as file:
        assert VHDX(file).details()["region_table"] == (2 if bad == 192 << 10 else 1)
    assert contents(made.path) == b"x" * MIB


def test_regions_that_are_not_marked_as_required_are_known_all_the_same(tmp_path: Path) -> None:
    """qemu writes them so."""
    made = make(tmp_path / "disk.vhdx", MIB, {0: b"x" * MIB})
    table = mk.region_table([(mk.BAT, 3 * MIB, MIB, 0), (mk.METADATA, 2 * MIB, MIB, 0)])
    made.write(192 << 10, table)
    assert contents(made.path) == b"x" * MIB


def test_unknown_items_that_are_not_required_do_no_harm(tmp_path: Path) -> None:
    changed = {
        "more": Item(mk.STRANGER, b"whatever", flags=2),
        "user": Item(mk.FILE_PARAMETERS, b"not that one", flags=1),
        "locator": Item(UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c"), b"unused", flags=4),
    }
    made = make(tmp_path / "disk.vhdx", MIB, {0: b"x" * MIB}, changed=changed)
    assert contents(made.path) == b"x" * MIB


def test_details(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 5 * MIB, sector_size=4096, block_size=4 * MIB)
    with HostFile(made.path) as file:
        assert probe(file) is VHDX
        image = VHDX(file)
        assert (image.size, image.variant, image.parent) == (5 * MIB, "dynamic", None)
        assert image.details() == {
            "creator": "make_vhdx",
            "block_size": 4 * MIB,
            "logical_sector_size": 4096,
            "physical_sector_size": 4096,
            "log": "empty",
            "log_size": MIB,
            "header": 2,
            "header_sequence": 2,
            "region_table": 1,
            "disk_id": str(mk.DISK_ID),
            "file_write_guid": str(UUID(int=1)),
            "data_write_guid": str(UUID(int=2)),
        }
        assert not image.caps.write


def test_64_tib_open_at_once(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 64 * TIB, {(64 << 20) - 1: b"end".ljust(MIB)})
    assert made.bat == 3 * MIB
    start = time.process_time()
    with HostFile(made.path) as file:
        image = VHDX(file)
        disk = Reference([image])
        assert disk.pread(64 * TIB - MIB, 3) == b"end"
        assert disk.pread(0, 512) == bytes(512)
    assert time.process_time() - start < 0.5


# Refusals: (what make() is told, what the driver must say)

Change = Callable[[Made], None]


def headers(**fields: Any) -> Change:
    return lambda made: made.put_headers(mk.header(1, **fields), mk.header(2, **fields))


def tables(*regions: tuple[UUID, int, int, int], count: int | None = None) -> Change:
    def change(made: Made) -> None:
        made.write(192 << 10, mk.region_table(regions, count))

    return change


def at(offset: int, data: bytes) -> Change:
    return lambda made: made.write(offset, data)


def item(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"changed": {name: Item(*args, **kwargs)}}


def number(name: str, guid: UUID, value: int, width: int) -> dict[str, Any]:
    return item(name, guid, value.to_bytes(width, "little"))


def parameters(block_size: int, flags: int = 0) -> dict[str, Any]:
    return item("parameters", mk.FILE_PARAMETERS, struct.pack("<II", block_size, flags))


BAT = (mk.BAT, 3 * MIB, MIB, 1)
METADATA = (mk.METADATA, 2 * MIB, MIB, 1)


@pytest.mark.parametrize(
    ("change", "kind", "complaint"),
    [
        (at(0, b"vhdxfilf"), NotAnImage, "signature"),
        (lambda made: made.put_headers(bytes(4096), bytes(4096)), Corrupt, "header 2 at 131072"),
        (headers(version=2), Unsupported, "version 2, know 1"),
        (headers(log_version=1, log_guid=mk.LOG_GUID), Unsupported, "log version 1, know 0"),
        (headers(log_offset=MIB + 4096), Corrupt, "not multiples of 1 MiB"),
        (headers(log_length=MIB + 4096), Corrupt, "not multiples of 1 MiB"),
        (headers(log_offset=0), Corrupt, "inside the header section"),
        (headers(log_offset=1 << 62), Corrupt, "log ends at 4611686018428436480, the file at"),
        (headers(log_length=64 * MIB), Corrupt, "log ends at"),
        (headers(log_length=0, log_guid=mk.LOG_GUID), Corrupt, "a log of 0 bytes"),
        (headers(log_offset=2 * MIB), Corrupt, "overlaps"),
        (
            lambda made: [at(192 << 10, b"x")(made), at(256 << 10, b"x")(made)],
            Corrupt,
            "region table 1 at 196608.*region table 2 at 262144",
        ),
        (tables(BAT, METADATA, count=2048), Corrupt, "2048 entries"),
        (tables(BAT), Corrupt, "no metadata region"),
        (tables(METADATA), Corrupt, "no BAT"),
        (tables(BAT, METADATA, BAT), Corrupt, "second time"),
        (
            tables(BAT, METADATA, (mk.STRANGER, 4 * MIB, MIB, 1)),
            Unsupported,
            "required region 99999999-8888-7777-6666-555555555555",
        ),
        (tables((mk.BAT, 3 * MIB + 512, MIB, 1), METADATA), Corrupt, "BAT at 3146240"),
        (tables((mk.BAT, 3 * MIB, 512, 1), METADATA), Corrupt, "not multiples"),
        (tables((mk.BAT, 3 * MIB, 0, 1), METADATA), Corrupt, "BAT at 3145728 with 0 bytes"),
        (tables((mk.BAT, 0, MIB, 1), METADATA), Corrupt, "inside the header section"),
        (tables((mk.BAT, 3 * MIB, 0xFFF00000, 1), METADATA), Corrupt, "BAT ends at"),
        (tables((mk.BAT, 0xFFFFFFFFFFF00000, MIB, 1), METADATA), Corrupt, "BAT ends at"),
        (tables((mk.BAT, 2 * MIB, MIB, 1), METADATA), Corrupt, "overlaps"),
        (tables((mk.BAT, MIB, MIB, 1), METADATA), Corrupt, "BAT.*overlaps|overlaps BAT"),
        (tables(BAT, METADATA, (mk.STRANGER, 3 * MIB, MIB, 0)), Corrupt, "overlaps"),
        (at(2 * MIB, b"metadatb"), Corrupt, "metadata table at 2097152: signature"),
        (at(2 * MIB + 10, b"\x00\x08"), Corrupt, "2048 entries"),
    ],
)
def test_refuses_a_header_section(
    tmp_path: Path, change: Change, kind: type[VirtmountError], complaint: str
) -> None:
    made = make(tmp_path / "disk.vhdx", MIB, {0: b"x" * MIB})
    change(made)
    check_refusal(made.path, kind, complaint)


@pytest.mark.parametrize(
    ("options", "kind", "complaint"),
    [
        (parameters(MIB, 2), Corrupt, "HasParent is set, but there is no parent locator"),
        (parameters(MIB, 6), Unsupported, "flags 0x6"),
        (parameters(MIB, 4), Unsupported, "flags 0x4"),
        (parameters(0), Corrupt, "block size 0"),
        (parameters(MIB // 2), Corrupt, "block size 524288"),
        (parameters(3 * MIB), Corrupt, "block size 3145728"),
        (parameters(512 * MIB), Corrupt, "block size 536870912"),
        (number("sector", mk.LOGICAL_SECTOR_SIZE, 1024, 4), Corrupt, "logical sector size.*1024"),
        (number("sector", mk.LOGICAL_SECTOR_SIZE, 0, 4), Corrupt, "logical sector size.*: 0"),
        (number("physical", mk.PHYSICAL_SECTOR_SIZE, 520, 4), Corrupt, "physical sector size.*520"),
        (number("size", mk.VIRTUAL_DISK_SIZE, 0, 8), Corrupt, "virtual disk size.*: 0 bytes"),
        (number("size", mk.VIRTUAL_DISK_SIZE, MIB + 1, 8), Corrupt, "not a multiple of the sector"),
        (number("size", mk.VIRTUAL_DISK_SIZE, 64 * TIB + 512, 8), Corrupt, "70368744178176 bytes"),
        (number("size", mk.VIRTUAL_DISK_SIZE, 1 << 63, 8), Corrupt, "9223372036854775808 bytes"),
        # 131072 entries are one MiB; after the 4096th comes the first one of a bitmap.
        (number("size", mk.VIRTUAL_DISK_SIZE, 131042 * MIB, 8), Corrupt, "BAT at.*1048584 needed"),
        (number("size", mk.VIRTUAL_DISK_SIZE, 64 * TIB, 8), Corrupt, "BAT at.* needed"),
        ({"changed": {"parameters": None}}, Corrupt, "no file parameters"),
        ({"changed": {"size": None}}, Corrupt, "no virtual disk size"),
        ({"changed": {"id": None}}, Corrupt, "no virtual disk id"),
        ({"changed": {"sector": None}}, Corrupt, "no logical sector size"),
        ({"changed": {"physical": None}}, Corrupt, "no physical sector size"),
        (item("more", mk.STRANGER, b"?"), Unsupported, f"required system .*{mk.STRANGER}"),
        (item("more", mk.STRANGER, b"?", 5), Unsupported, f"required user .*{mk.STRANGER}"),
        (item("more", mk.VIRTUAL_DISK_ID, bytes(16)), Corrupt, "id a second time"),
        (item("id", mk.VIRTUAL_DISK_ID, bytes(15)), Corrupt, "15 bytes, must have 16"),
        (item("id", mk.VIRTUAL_DISK_ID, bytes(16), offset=65535), Corrupt, "outside the metadata"),
        (item("id", mk.VIRTUAL_DISK_ID, bytes(16), offset=MIB - 15), Corrupt, "outside the meta"),
        (item("id", mk.VIRTUAL_DISK_ID, bytes(16), length=0xFFFFFFFF), Corrupt, "outside the meta"),
    ],
)
def test_refuses_metadata(
    tmp_path: Path, options: dict[str, Any], kind: type[VirtmountError], complaint: str
) -> None:
    made = make(tmp_path / "disk.vhdx", MIB, {0: b"x" * MIB}, **options)
    check_refusal(made.path, kind, complaint)


def check_refusal(path: Path, kind: type[VirtmountError], complaint: str) -> None:
    before = path.read_bytes()
    for writable in (False, True):
        with HostFile(path, writable=writable) as file:
            with pytest.raises(VirtmountError, match=complaint) as caught:
                VHDX(file)
            assert caught.type is kind
            assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_the_largest_table_that_fits_is_read(tmp_path: Path) -> None:
    """One block fewer than the one that is refused above."""
    made = make(
        tmp_path / "disk.vhdx",
        MIB,
        {0: b"x" * MIB},
        **number("size", mk.VIRTUAL_DISK_SIZE, 131041 * MIB, 8),
    )
    with HostFile(made.path) as file:
        assert VHDX(file).size == 131041 * MIB


def test_every_truncation_is_refused_or_read(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 2 * MIB, {0: b"x" * MIB, 1: b"y" * MIB})
    whole = made.path.read_bytes()
    for length in [*range(0, 5 * MIB, 100_000), *range(4 * MIB - 2, 4 * MIB + 2)]:
        made.path.write_bytes(whole[:length])
        with HostFile(made.path) as file:
            if length < 4 * MIB:  # the BAT's end
                with pytest.raises(NotAnImage):
                    VHDX(file)
            else:
                assert VHDX(file).size == 2 * MIB


def test_random_damage_raises_nothing_but_our_errors(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 4 * MIB, {2: b"x" * MIB, 0: b"y" * MIB})
    rng = random.Random(1)
    places = [0, 65536, 131072, 192 << 10, 256 << 10, 2 * MIB, 2 * MIB + 65536, 3 * MIB]
    whole = {place: made.read(place, 4096 if place % 65536 else 128) for place in places}
    opened = 0
    for _ in range(300):
        for place in rng.sample(places, 2):
            data = bytearray(made.read(place, 128))
            data[rng.randrange(128)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            made.write(place, bytes(data))
        for offset, width in ((65536, 4096), (131072, 4096), (192 << 10, 65536)):
            if rng.random() < 0.7:  # or else hardly anything gets past the checksums
                made.write(offset, mk.sealed(made.read(offset, width)))
        with HostFile(made.path) as file:
            try:
                disk = Reference([VHDX(file)])
                opened += 1
                disk.pread(0, min(disk.size, 4 * MIB))
            except (VirtmountError, OSError):
                pass
        for place, data in whole.items():
            made.write(place, data)
    assert opened > 20
