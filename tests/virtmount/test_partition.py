"""Partition tables, against sfdisk's reading of tables that sfdisk wrote, and damaged ones."""

from __future__ import annotations

import json
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from virtmount.partition import Partition, Table, read_table

MIB = 1 << 20


def make(path: Path, size: int, script: str) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["sfdisk", "-q", path], input=script, text=True, check=True)
    return path


def read_file(path: Path, sector_size: int = 512) -> Table | None:
    data = path.read_bytes()
    return read_bytes(data, sector_size)


def read_bytes(data: bytes | bytearray, sector_size: int = 512) -> Table | None:
    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data)
        return bytes(data[offset : offset + length])

    return read_table(read, len(data), sector_size)


def by_sfdisk(path: Path) -> tuple[str, str, list[Partition]]:
    """The same table as sfdisk reads it, without the uuids of MBR partitions."""
    out = subprocess.run(
        ["sfdisk", "--json", path], check=True, capture_output=True, text=True
    ).stdout
    table = json.loads(out)["partitiontable"]
    unit = table["sectorsize"]
    partitions = [
        Partition(
            int(entry["node"].removeprefix(str(path)).removeprefix("p")),
            entry["start"] * unit,
            entry["size"] * unit,
            entry["type"],
            entry.get("uuid", ""),
            entry.get("name", ""),
            entry.get("bootable", False) or "LegacyBIOSBootable" in entry.get("attrs", ""),
        )
        for entry in table.get("partitions", [])
    ]
    return table["label"], table["id"], partitions


GPT = """label: gpt
size=2M, type=linux, name="hé 分区"
size=1M, type=uefi, attrs="LegacyBIOSBootable"
start=5M, size=1, type=swap
"""
MBR = """label: dos
label-id: 0x12345678
size=10M, type=83, bootable
size=20M, type=5
size=5M, type=c
size=5M, type=82
size=6M
size=3M, type=7
size=2M
"""


@pytest.mark.parametrize("script", [GPT, MBR], ids=["gpt", "mbr"])
def test_agrees_with_sfdisk(tmp_path: Path, script: str) -> None:
    path = make(tmp_path / "disk", 64 * MIB, script)
    table = read_file(path)
    assert table is not None
    label, disk_id, expected = by_sfdisk(path)
    assert (table.label, table.id, table.problems) == (label, disk_id, ())
    found = list(table.partitions)
    if label == "dos":
        assert [p.uuid for p in found] == [f"12345678-{p.number:02x}" for p in found]
        assert [p.number for p in found if p.is_extended] == [2]
        found = [Partition(p.number, p.start, p.size, p.type, "", "", p.bootable) for p in found]
        assert [p.number for p in found] == [1, 2, 3, 4, 5, 6, 7]
    assert found == expected


@pytest.mark.parametrize("size", [0, 511, 512, 1024, 4096])
def test_blank_disks_have_no_table(size: int) -> None:
    assert read_bytes(bytes(size)) is None


def test_a_bare_file_system_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "fat"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
    # What mkfs.fat and mkfs.ntfs write: a jump, text, and the signature of every boot sector.
    with path.open("r+b") as file:
        file.write(b"\xeb\x3c\x90mkfs.fat")
        file.seek(510)
        file.write(b"\x55\xaa")
    assert read_file(path) is None
    data = bytearray(path.read_bytes())
    data[446:462] = b"Press any key to"
    assert read_bytes(data) is None


def test_an_empty_mbr_is_a_table(tmp_path: Path) -> None:
    table = read_file(make(tmp_path / "disk", MIB, "label: dos\n"))
    assert table is not None
    assert table.partitions == ()


def resector(path: Path, sector_size: int) -> bytes:
    """The GPT of a 512-byte disk, as it would be on a disk of larger sectors."""
    old = path.read_bytes()
    data = bytearray(len(old))
    last = len(old) // sector_size - 1
    per_table = 128 * 128 // sector_size
    data[446:512] = old[446:512]
    entries = bytearray(old[1024 : 1024 + 128 * 128])
    for offset in range(0, len(entries), 128):
        first, end = struct.unpack_from("<QQ", entries, offset + 32)
        if entries[offset : offset + 16] != bytes(16):
            ratio = sector_size // 512
            struct.pack_into("<QQ", entries, offset + 32, first // ratio, (end + 1) // ratio - 1)
    for own, other, at in ((1, last, 2), (last, 1, last - per_table)):
        header = bytearray(old[512 : 512 + 92])
        struct.pack_into("<QQQQ", header, 24, own, other, 2 + per_table, last - per_table - 1)
        struct.pack_into("<Q", header, 72, at)
        struct.pack_into("<I", header, 88, zlib.crc32(entries))
        struct.pack_into("<I", header, 16, 0)
        struct.pack_into("<I", header, 16, zlib.crc32(header))
        data[own * sector_size : own * sector_size + 92] = header
        data[at * sector_size : at * sector_size + len(entries)] = entries
    return bytes(data)


def test_4096_byte_sectors(tmp_path: Path) -> None:
    script = "label: gpt\nsize=8M\nsize=4M\n"
    path = make(tmp_path / "disk", 32 * MIB, script)
    small = read_file(path)
    data = resector(path, 4096)
    large = read_bytes(data, 4096)
    assert small is not None
    assert large is not None
    assert large.problems == ()
    assert large.partitions == small.partitions
    # And not found with the wrong sector size, as the kernel does not find it.
    wrong = read_bytes(data, 512)
    assert wrong is not None
    assert wrong.partitions == ()
    assert wrong.kernel_numbers(len(data)) == frozenset()


def gpt_disk(tmp_path: Path) -> bytearray:
    return bytearray(make(tmp_path / "disk", 8 * MIB, GPT).read_bytes())


def test_the_backup_serves_where_the_primary_is_damaged(tmp_path: Path) -> None:
    data = gpt_disk(tmp_path)
    whole = read_bytes(data)
    data[512 + 60] ^= 1
    table = read_bytes(data)
    assert whole is not None
    assert table is not None
    assert table.partitions == whole.partitions
    assert len(table.problems) == 1
    assert "primary GPT header at sector 1: checksum" in table.problems[0]
    # The kernel reads the primary only, so no node is worth waiting for.
    assert whole.kernel_numbers(len(data)) == {1, 2, 3}
    assert table.kernel_numbers(len(data)) == frozenset()


def test_a_damaged_backup_is_reported(tmp_path: Path) -> None:
    data = gpt_disk(tmp_path)
    data[-512] ^= 1
    table = read_bytes(data)
    assert table is not None
    assert len(table.partitions) == 3
    assert table.problems == ("backup GPT header at sector 16383: no signature",)


def test_damaged_entries_are_not_believed(tmp_path: Path) -> None:
    data = gpt_disk(tmp_path)
    data[1024 + 33] ^= 1
    data[-17 * 1024 + 512 + 33] ^= 1
    table = read_bytes(data)
    assert table is not None
    assert table.partitions == ()
    assert all("entries' checksum" in problem for problem in table.problems[:1])


def change_header(at: int, code: str, value: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        del data[-512:]  # no backup
        data += bytes(512)
        struct.pack_into(code, data, 512 + at, value)
        struct.pack_into("<I", data, 512 + 16, 0)
        size = min(struct.unpack_from("<I", data, 512 + 12)[0], 512)
        struct.pack_into("<I", data, 512 + 16, zlib.crc32(data[512 : 512 + size]))

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (change_header(12, "<I", 91), "header size 91"),
        (change_header(12, "<I", 0xFFFFFFFF), "header size 4294967295"),
        (change_header(24, "<Q", 2), "says that it is at sector 2"),
        (change_header(48, "<Q", 1 << 40), "usable sectors 2048 to 1099511627776"),
        (change_header(72, "<Q", 1 << 63), "entries at sector 9223372036854775808"),
        (change_header(80, "<I", 0xFFFFFFFF), "4294967295 entries of 128 bytes"),
        (change_header(80, "<I", 127), "entries' checksum"),
        (change_header(84, "<I", 0), "entry size 0"),
        (change_header(84, "<I", 129), "entry size 129"),
        (change_header(84, "<I", 1 << 31), "bytes are read"),
    ],
)
def test_hostile_headers(
    tmp_path: Path, change: Callable[[bytearray], None], complaint: str
) -> None:
    data = gpt_disk(tmp_path)
    change(data)
    table = read_bytes(data)
    assert table is not None
    assert table.partitions == ()
    assert complaint in table.problems[0]


def mbr(*slots: tuple[int, int, int]) -> bytes:
    body = b"".join(struct.pack("<B3xB3xII", 0, *slot) for slot in slots)
    return bytes(446) + body.ljust(64, b"\0") + b"\x55\xaa"


def test_a_chain_of_extended_records_that_loops_ends() -> None:
    data = bytearray(MIB)
    data[:512] = mbr((5, 100, 1000))
    data[100 * 512 : 101 * 512] = mbr((0x83, 1, 10), (5, 50, 10))
    data[150 * 512 : 151 * 512] = mbr((0x83, 1, 10), (5, 0, 10))
    table = read_bytes(data)
    assert table is not None
    assert [p.number for p in table.partitions] == [1, 5, 6]
    assert table.problems == ("extended boot record at sector 100: the chain does not end",)


def test_a_chain_of_extended_records_is_followed_only_so_far() -> None:
    data = bytearray(4 * MIB)
    data[:512] = mbr((5, 1, 8000))
    for at in range(1, 8001):
        data[at * 512 : (at + 1) * 512] = mbr((0x83, 1, 1), (5, at, 1))
    table = read_bytes(data)
    assert table is not None
    assert len(table.partitions) == 1 + 256
    assert "the chain does not end" in table.problems[-1]
    assert max(table.kernel_numbers(len(data))) == 255


def test_a_chain_that_leaves_the_disk_ends() -> None:
    data = bytearray(MIB)
    data[:512] = mbr((0x0F, 100, 1000))
    data[100 * 512 : 101 * 512] = mbr((0x83, 1, 10), (5, 0xFFFFFFF0, 10))
    table = read_bytes(data)
    assert table is not None
    assert [p.number for p in table.partitions] == [1, 5]
    assert "the disk ends at 2048" in table.problems[-1]


def test_a_partition_past_the_end_is_listed_but_not_waited_for() -> None:
    data = bytearray(MIB)
    data[:512] = mbr((0x83, 1, 10), (0x83, 4000, 10))
    table = read_bytes(data)
    assert table is not None
    assert [p.number for p in table.partitions] == [1, 2]
    assert table.kernel_numbers(MIB) == {1}
    assert table.problems == ("partition 2: ends at 2053120, the disk ends at 1048576",)


def test_names_cannot_carry_control_characters(tmp_path: Path) -> None:
    data = gpt_disk(tmp_path)
    name = "a\x1b[2J".encode("utf-16-le")
    data[1024 + 56 : 1024 + 56 + len(name)] = name
    struct.pack_into("<I", data, 512 + 88, zlib.crc32(data[1024 : 1024 + 128 * 128]))
    change_header(8, "<I", 0x10000)(data)
    table = read_bytes(data)
    assert table is not None
    assert table.partitions[0].name.startswith("a?[2J")
