"""VMDK: every subformat read, and what is refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import virtmount
from tests.formats import make_vmdk as make
from tests.formats.make_vmdk import descriptor, guest, pattern, write
from tests.reference import Reference
from virtmount.chain import open_chain
from virtmount.errors import (
    Corrupt,
    Denied,
    NeedsRecovery,
    NotAnImage,
    ParentMissing,
    Unsupported,
    VirtmountError,
)
from virtmount.formats import probe
from virtmount.formats.vmdk import VMDK
from virtmount.formats.vmdk_descriptor import parse
from virtmount.hostfile import HostFile
from virtmount.image import Options

MIB = 1 << 20
GRAIN = 64 << 10
SECTORS = 200 * 128 + 7  # 13 MB, and the last grain is cut short


def content(count: int, length: int) -> dict[int, bytes | int]:
    """Some grains, most of them neighbours of others."""
    return {n: pattern(n, length) for n in (0, 1, 2, 5, 7, 8, 20, count - 2, count - 1)}


SPARSE = content(201, GRAIN)


def read(path: Path, **how: object) -> bytes:
    return read_as(path, "vmdk", **how)


def read_as(path: Path, format: str, **how: object) -> bytes:
    """All of it by the engine, after the reference engine has said the same."""
    chain = open_chain(path, format, **how)  # type: ignore[arg-type]
    try:
        disk = Reference(chain.images)
        said = disk.pread(0, disk.size)
    finally:
        chain.close()
    with virtmount.open(path, format, **how) as opened:  # type: ignore[arg-type]
        found = b"".join(
            opened.pread(at, min(MIB, opened.size - at)) for at in range(0, opened.size, MIB)
        )
    assert found == said
    return found


def qemu_reads(path: Path) -> bytes:
    out = path.parent / "by-qemu"
    subprocess.run(
        ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, out], check=True, timeout=60
    )
    return out.read_bytes()


def refused(
    path: Path, error: type[VirtmountError], words: str, **options: object
) -> VirtmountError:
    writable = bool(options.pop("writable", False))
    with pytest.raises(error, match=words) as raised, HostFile(path, writable=writable) as file:
        VMDK(file, Options(**options))  # type: ignore[arg-type]
    return raised.value


def monolithic(path: Path, **how: object) -> Path:
    text = descriptor(f'RW {SECTORS} SPARSE "{path.name}"', create_type="monolithicSparse")
    return write(path, make.sparse(SECTORS, SPARSE, text, **how))  # type: ignore[arg-type]


# Subformats


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"flags": 1},  # one copy of the tables
        {"lazy": True},
        {"grain": 16, "per_table": 128},
        {"version": 3},
    ],
    ids=["plain", "one-copy", "lazy", "small-grains", "version-3"],
)
def test_hosted_sparse(tmp_path: Path, how: dict[str, int]) -> None:
    grain = how.get("grain", 128)
    held = {n: pattern(n, grain * 512) for n in (0, 1, 2, 9, 130, 131, SECTORS // grain)}
    text = descriptor(f'RW {SECTORS} SPARSE "disk.vmdk"')
    path = write(tmp_path / "disk.vmdk", make.sparse(SECTORS, held, text, **how))  # type: ignore[arg-type]
    expected = guest(SECTORS, held, grain)
    assert read(path) == expected
    assert qemu_reads(path) == expected


@pytest.mark.parametrize("flag", [False, True])
def test_an_entry_of_1_is_a_grain_of_zeros_where_the_header_says_so(
    tmp_path: Path, flag: bool
) -> None:
    held = {**SPARSE, 3: 1}
    text = descriptor(f'RW {SECTORS} SPARSE "disk.vmdk"')
    flags = 7 if flag else 3
    path = write(tmp_path / "disk.vmdk", make.sparse(SECTORS, held, text, version=2, flags=flags))
    if flag:
        assert read(path) == guest(SECTORS, SPARSE, 128) == qemu_reads(path)
        return
    with virtmount.open(path) as disk, pytest.raises(OSError, match="Input/output"):
        disk.pread(3 * GRAIN, 512)


@pytest.mark.parametrize("footer", [False, True])
@pytest.mark.parametrize("version", [1, 3])
def test_stream_optimized(tmp_path: Path, footer: bool, version: int) -> None:
    text = descriptor(f'RW {SECTORS} SPARSE "disk.vmdk"', create_type="streamOptimized")
    made = make.stream(SECTORS, SPARSE, text, footer=footer, version=version)
    path = write(tmp_path / "disk.vmdk", made)
    assert read(path) == guest(SECTORS, SPARSE, 128) == qemu_reads(path)
    refused(path, Unsupported, "written once", writable=True)


def test_cowd(tmp_path: Path) -> None:
    sectors = 10000
    held = {n: pattern(n, 512) for n in (0, 1, 2, 4095, 4096, 8191, 8192, 9999)}
    write(tmp_path / "disk-delta.vmdk", make.cowd(sectors, held))
    path = write(
        tmp_path / "disk.vmdk",
        descriptor(f'RW {sectors} VMFSSPARSE "disk-delta.vmdk"', create_type="vmfsSparse"),
    )
    assert read(path) == guest(sectors, held, 1) == qemu_reads(path)


def test_se_sparse(tmp_path: Path) -> None:
    sectors = 3 * 4096 * 8 - 11
    held: dict[int, bytes | int] = {n: pattern(n, 4096) for n in (0, 1, 4095, 4096, 4099, 12286)}
    expected = guest(sectors, held, 8)
    held |= {2: 1 << 60, 3: 2 << 60}  # unmapped, zero
    write(tmp_path / "disk-sesparse.vmdk", make.se_sparse(sectors, held))
    path = write(
        tmp_path / "disk.vmdk",
        descriptor(f'RW {sectors} SESPARSE "disk-sesparse.vmdk"', create_type="seSparse"),
    )
    assert read(path) == expected == qemu_reads(path)
    refused(path, Unsupported, "cannot be written", writable=True)
    write(tmp_path / "disk-sesparse.vmdk", make.se_sparse(sectors, held, replay=1))
    refused(path, NeedsRecovery, "journal has to be replayed")


def test_se_sparse_numbers_of_grains_are_turned_around(tmp_path: Path) -> None:
    """Grain 4096 and later have bits below bit 48."""
    held: dict[int, bytes | int] = {n: pattern(n, 4096) for n in range(4200)}
    sectors = 4200 * 8
    write(tmp_path / "s", make.se_sparse(sectors, held))
    path = write(tmp_path / "disk.vmdk", descriptor(f'RW {sectors} SESPARSE "s"'))
    assert read(path) == guest(sectors, held, 8)


def test_every_extent_keeps_its_place(tmp_path: Path) -> None:
    """qemu leaves out the ones of zeros and the ones that are not RW."""
    write(tmp_path / "a", pattern(1, 4096))
    write(tmp_path / "b", pattern(2, 8192))
    path = write(
        tmp_path / "disk.vmdk",
        descriptor(
            'RW 8 FLAT "a" 0',
            "RW 5 ZERO",
            'RDONLY 8 VMFS "b" 3',
            "RW 4 ZERO",
            'RW 3 FLAT "b" 13',
        ),
    )
    a, b = pattern(1, 4096), pattern(2, 8192)
    expected = a + bytes(5 * 512) + b[3 * 512 : 11 * 512] + bytes(2048) + b[13 * 512 :]
    assert read(path) == expected


def test_an_extent_without_access_fails_and_keeps_its_place(tmp_path: Path) -> None:
    write(tmp_path / "a", pattern(1, 65536))
    text = descriptor('RW 128 FLAT "a" 0', 'NOACCESS 128 FLAT "missing" 0', 'RW 128 FLAT "a" 0')
    path = write(tmp_path / "disk.vmdk", text)
    with virtmount.open(path) as disk:
        assert disk.size == 3 * 65536
        assert disk.pread(2 * 65536, 65536) == pattern(1, 65536)
        with pytest.raises(OSError, match="Input/output"):
            disk.pread(65536, 512)


def test_extents_of_different_kinds_that_do_not_fit_together_are_read(tmp_path: Path) -> None:
    first, second = 128 * 3 + 5, 77
    held = {n: pattern(n, GRAIN) for n in (0, 2, 3)}
    small = {n: pattern(n + 50, 512) for n in (0, 3, 76)}
    write(tmp_path / "s", make.sparse(first, held))
    write(tmp_path / "c", make.cowd(second, small))
    text = descriptor(f'RW {first} SPARSE "s"', f'RW {second} VMFSSPARSE "c"', "RW 3 ZERO")
    path = write(tmp_path / "disk.vmdk", text)
    assert read(path) == guest(first, held, 128) + guest(second, small, 1) + bytes(3 * 512)
    refused(path, Unsupported, "do not begin where extents do", writable=True)


def test_compressed_extents_beside_others(tmp_path: Path) -> None:
    held = {n: pattern(n, GRAIN) for n in (0, 2, 3)}
    write(tmp_path / "s", make.stream(512, held, b"", footer=True))
    write(tmp_path / "c", make.sparse(300, {1: pattern(9, GRAIN)}))
    text = descriptor('RW 512 SPARSE "s"', 'RW 300 SPARSE "c"', "RW 3 ZERO")
    path = write(tmp_path / "disk.vmdk", text)
    expected = guest(512, held, 128) + guest(300, {1: pattern(9, GRAIN)}, 128) + bytes(1536)
    assert read(path) == expected


@pytest.mark.parametrize("lines", [2047 * 2048, 63 * 64 * 1024])
def test_split_extents_whose_tables_end_anywhere(tmp_path: Path, lines: int) -> None:
    """VMware's and VirtualBox's are 2047 MiB long: 16 grains more than whole tables."""
    grains = lines // 128
    one = {n: pattern(n, GRAIN) for n in (0, grains - 17, grains - 1)}
    two = {n: pattern(n + 7, GRAIN) for n in (0, 1, 15, 16, 511, 512)}
    write(tmp_path / "s1", make.sparse(lines, one))
    write(tmp_path / "s2", make.sparse(1024 * 128, two))
    text = descriptor(f'RW {lines} SPARSE "s1"', f'RW {1024 * 128} SPARSE "s2"')
    path = write(tmp_path / "disk.vmdk", text)
    with virtmount.open(path) as disk:
        for start, held in ((0, one), (lines * 512, two)):
            for number, data in held.items():
                assert disk.pread(start + number * GRAIN, GRAIN) == data
        assert (
            disk.pread((grains - 2) * GRAIN, 3 * GRAIN) == bytes(GRAIN) + one[grains - 1] + two[0]
        )
        assert disk.pread(lines * 512 + 2 * GRAIN, GRAIN) == bytes(GRAIN)


def test_a_flat_extent_is_served_where_it_lies(tmp_path: Path) -> None:
    write(tmp_path / "a", bytes(1024) + pattern(1, 65536))
    path = write(tmp_path / "disk.vmdk", descriptor('RW 128 FLAT "a" 2'))
    with HostFile(path) as file:
        image = VMDK(file)
        assert (image.flat, image.flat_file) == (1024, 1)
        image.files[1].close()
    assert read(path) == pattern(1, 65536)


# Descriptors


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.replace(b"\n", b"\r"),
        lambda text: text.replace(b"=", b" \t= "),
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: b"\n\n  \n" + text,
        lambda text: text.replace(b"# Disk DescriptorFile\n", b""),
        lambda text: text.replace(b"# The Disk Data Base\n#DDB\n", b""),
        lambda text: text.replace(b"createType", b"CREATETYPE").replace(b"CID", b"cid"),
        lambda text: text.replace(b"RW 128 FLAT", b"\t rw   128\tFlat  "),
        lambda text: text.replace(b'" 0', b'"'),
        lambda text: text.replace(b'" 0', b'" 0 partitionUUID 0123'),
        lambda text: text.replace(b"custom", b"2GbMaxExtentFlat"),
        lambda text: text + b"\0" * 300,
        lambda text: text + b"# no end",
        lambda text: text.replace(b"\n\n", b"\nwho knows what this is\n\n"),
    ],
)
def test_descriptors_of_all_kinds(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    write(tmp_path / "a", pattern(1, 65536))
    path = write(tmp_path / "disk.vmdk", change(descriptor('RW 128 FLAT "a" 0')))
    with HostFile(path) as file:
        assert probe(file) is VMDK
    assert read(path) == pattern(1, 65536)
    with virtmount.open(path, writable=True) as disk:
        disk.pwrite(0, b"x" * 512)
    assert path.read_bytes() != change(descriptor('RW 128 FLAT "a" 0'))  # the CID
    assert read(path) == b"x" * 512 + pattern(1, 65536)[512:]


@pytest.mark.parametrize(
    "data",
    [
        b"\xc0" * 512 + descriptor('RW 8 FLAT "a" 0'),
        bytes(512) + descriptor('RW 8 FLAT "a" 0'),
        b"no key\n" + descriptor('RW 8 FLAT "a" 0')[22:],
        descriptor('RW 8 FLAT "a" 0')[22:] + bytes(1 << 20),
    ],
)
def test_a_raw_disk_with_a_descriptor_in_it_is_raw(tmp_path: Path, data: bytes) -> None:
    with HostFile(write(tmp_path / "disk.img", data)) as file:
        assert probe(file).name == "raw"


@pytest.mark.parametrize(
    ("encoding", "codec", "name"),
    [
        ("windows-1252", "cp1252", "größe.vmdk"),
        ("GBK", "gbk", "磁盘.vmdk"),
        ("Shift_JIS", "shift_jis", "ディスク.vmdk"),
        ("Big5", "big5", "磁碟.vmdk"),
        ("UTF-8", "utf-8", "größe.vmdk"),
    ],
)
def test_names_in_other_encodings(tmp_path: Path, encoding: str, codec: str, name: str) -> None:
    write(tmp_path / name, pattern(1, 65536))
    text = descriptor('RW 128 FLAT "NAME" 0', more=[f'encoding="{encoding}"'])
    path = write(tmp_path / "disk.vmdk", text.replace(b"NAME", name.encode(codec)))
    assert read(path) == pattern(1, 65536)


def test_a_name_may_be_on_the_disk_as_it_is_in_the_descriptor(tmp_path: Path) -> None:
    raw = "größe.vmdk".encode("cp1252")
    with open(bytes(tmp_path) + b"/" + raw, "wb") as file:
        file.write(pattern(1, 65536))
    text = descriptor('RW 128 FLAT "NAME" 0', more=['encoding="windows-1252"'])
    path = write(tmp_path / "disk.vmdk", text.replace(b"NAME", raw))
    assert read(path) == pattern(1, 65536)


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ('RW 8 VMFSRDM "a"', Unsupported, "line 8: extent type VMFSRDM"),
        ('RW 8 FLAT "missing" 0', NotAnImage, "line 8: not found: 'missing'"),
        ("RW 8 FLAT", Corrupt, "line 8: a FLAT extent without a file"),
        ('RW 0 FLAT "a" 0', Corrupt, "line 8: extent of 0 sectors"),
        (f'RW {1 << 60} FLAT "a" 0', Corrupt, "line 8: extent of"),
        ('RW eight FLAT "a"', Corrupt, "line 8: no extent"),
        ('RW 8 FLAT "a', Corrupt, "line 8: no extent"),
        ('RW 8 SPARSE "a"', NotAnImage, "without a signature"),
        ('RW 8 SPARSE "a" 7', Unsupported, "begins at byte 3584"),
        ('RW 8 FLAT "disk.vmdk" 0', Corrupt, "itself"),
        ('RW 8 FLAT "../a" 0', Denied, "outside"),
        ('RW 8 FLAT "/dev/zero" 0', Denied, "outside"),
        ('RW 8 FLAT "http://x/a" 0', Unsupported, "not a local file"),
        ('RW 8 FLAT "" 0', Corrupt, "a FLAT extent without a file"),
    ],
)
def test_lines_that_are_refused(
    tmp_path: Path, line: str, error: type[VirtmountError], words: str
) -> None:
    write(tmp_path / "a", bytes(4096))
    folder = tmp_path / "images"
    folder.mkdir()
    write(folder / "a", bytes(4096))
    path = write(folder / "disk.vmdk", descriptor(line))
    refused(path, error, words)


def test_what_is_outside_is_opened_if_the_user_says_so(tmp_path: Path) -> None:
    write(tmp_path / "a", pattern(1, 4096))
    folder = tmp_path / "images"
    folder.mkdir()
    path = write(folder / "disk.vmdk", descriptor('RW 8 FLAT "../a" 0'))
    assert read(path, options=Options(allow_outside=True)) == pattern(1, 4096)


def test_an_encrypted_image_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", bytes(4096))
    more = ['encryption.keySafe = "vmware:key/list/(pair/...)"']
    path = write(tmp_path / "disk.vmdk", descriptor('RW 8 FLAT "a" 0', more=more))
    refused(path, Unsupported, "encryption.keysafe: encrypted")


def test_tracked_changes_are_not_left_untracked(tmp_path: Path) -> None:
    more = ['changeTrackPath = "disk-ctk.vmdk"']
    text = descriptor(f'RW {SECTORS} SPARSE "disk.vmdk"', more=more)
    path = write(tmp_path / "disk.vmdk", make.sparse(SECTORS, SPARSE, text, version=3))
    assert read(path) == guest(SECTORS, SPARSE, 128)
    refused(path, Unsupported, "would not be tracked", writable=True)


@pytest.mark.parametrize("name", ["disk-s001.vmdk", "disk-delta.vmdk", "disk-flat.vmdk"])
def test_an_extent_by_itself_is_refused(tmp_path: Path, name: str) -> None:
    made = make.cowd(100, {1: b"x"}) if "delta" in name else make.sparse(SECTORS, SPARSE)
    path = write(tmp_path / name, made)
    error = refused(path, Unsupported, "an extent of an image whose descriptor is another file")
    assert error.hint
    assert "text" in error.hint
    write(tmp_path / "disk.vmdk", b"")
    error = refused(path, Unsupported, "an extent")
    assert error.hint == "its descriptor seems to be disk.vmdk"


@pytest.mark.parametrize(
    ("offset", "value", "error", "words"),
    [
        (4, b"\x04", Unsupported, r"header\+4: version 4"),
        (8, b"\0\0\4\0", Unsupported, r"header\+8: unknown incompatible flags 0x40000"),
        (12, bytes(8), Corrupt, r"header\+12: capacity 0"),
        (20, b"\x7f", Corrupt, r"header\+20: grains of 127"),
        (28, b"\xff\xff", Corrupt, r"header\+28: descriptor of 20 sectors at sector 65535"),
        (44, b"\xff\1", Unsupported, r"header\+44: 511 entries"),
        (56, b"\0\0\1", Corrupt, r"header\+56: grain directory"),
        (74, b"\n", Corrupt, r"header\+73: line ends 0a 0a 0d 0a"),
        (77, b"\2", Unsupported, r"header\+77: compression method 2"),
    ],
)
def test_headers_that_are_refused(
    tmp_path: Path, offset: int, value: bytes, error: type[VirtmountError], words: str
) -> None:
    path = monolithic(tmp_path / "disk.vmdk")
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value)
    refused(path, error, words)


def test_a_table_that_is_not_in_the_file_costs_its_clusters_only(tmp_path: Path) -> None:
    sectors = 1200 * 128
    held = {n: pattern(n, GRAIN) for n in (0, 600, 1199)}
    text = descriptor(f'RW {sectors} SPARSE "disk.vmdk"')
    path = write(tmp_path / "disk.vmdk", make.sparse(sectors, held, text, flags=1))
    with path.open("r+b") as file:
        file.seek(21 * 512 + 4)
        file.write(b"\xff\xff\xff\x7f")
    with virtmount.open(path) as disk:
        assert disk.pread(0, GRAIN) == pattern(0, GRAIN)
        assert disk.pread(1199 * GRAIN, GRAIN) == pattern(1199, GRAIN)
        with pytest.raises(OSError, match="Input/output"):
            disk.pread(600 * GRAIN, 512)
    refused(path, Corrupt, "grain directory entry 1 at 10756: table at", writable=True)


def test_info(tmp_path: Path) -> None:
    path = monolithic(tmp_path / "disk.vmdk")
    told = virtmount.inspect(path).to_dict()
    assert told["format"] == "vmdk"
    assert told["variant"] == "monolithicSparse"
    assert told["size"] == SECTORS * 512
    assert told["details"]["cid"] == make.CID
    assert told["details"]["extents"][0]["file"] == "disk.vmdk"
    json.dumps(told)


# Both copies of the tables


def set_entry(path: Path, copy: int, grain: int, value: int) -> None:
    """In the first table of the first (0, at sector 26) or the redundant (1, at 21) directory."""
    at = (27 if copy == 0 else 22) * 512 + grain * 4
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value.to_bytes(4, "little"))


def entry(path: Path, copy: int, grain: int) -> int:
    at = (27 if copy == 0 else 22) * 512 + grain * 4
    return int.from_bytes(path.read_bytes()[at : at + 4], "little")


def test_after_a_crash_an_entry_is_taken_from_either_copy(tmp_path: Path) -> None:
    path = monolithic(tmp_path / "disk.vmdk", unclean=1)
    lost = entry(path, 0, 5)
    set_entry(path, 0, 5, 0)
    set_entry(path, 1, 7, 0)
    before = path.read_bytes()
    assert read(path) == guest(SECTORS, SPARSE, 128)
    assert path.read_bytes() == before
    with virtmount.open(path, writable=True) as disk:
        disk.pwrite(100 * GRAIN, b"y" * 512)
    assert entry(path, 0, 5) == entry(path, 1, 5) == lost
    assert entry(path, 0, 7) == entry(path, 1, 7) != 0
    assert path.read_bytes()[72] == 0
    expected = bytearray(guest(SECTORS, SPARSE, 128))
    expected[100 * GRAIN : 100 * GRAIN + 512] = b"y" * 512
    assert read(path) == expected == qemu_reads(path)


def test_in_a_file_that_was_closed_the_first_copy_decides(tmp_path: Path) -> None:
    path = monolithic(tmp_path / "disk.vmdk")
    set_entry(path, 0, 5, 0)
    held = {n: data for n, data in SPARSE.items() if n != 5}
    assert read(path) == guest(SECTORS, held, 128)


def test_a_second_directory_that_is_not_there_does_not_keep_from_reading(tmp_path: Path) -> None:
    path = monolithic(tmp_path / "disk.vmdk")
    with path.open("r+b") as file:
        file.seek(48)
        file.write(b"\xff\xff\xff\xff")
    assert read(path) == guest(SECTORS, SPARSE, 128)
    refused(path, Corrupt, r"header\+48: redundant grain directory", writable=True)


@pytest.mark.parametrize(
    ("grain", "other", "words"),
    [(5, 7, "overlaps the one at"), (5, None, "lies past the end of the file")],
)
def test_not_written_where_that_would_destroy_data(
    tmp_path: Path, grain: int, other: int | None, words: str
) -> None:
    path = monolithic(tmp_path / "disk.vmdk")
    value = 1 << 20 if other is None else entry(path, 0, other) + 1
    for copy in (0, 1):
        set_entry(path, copy, grain, value)
    before = path.read_bytes()
    refused(path, Corrupt, words, writable=True)
    assert path.read_bytes() == before
    with virtmount.open(path) as disk:
        assert disk.pread(8 * GRAIN, GRAIN) == pattern(8, GRAIN)


# Parents


def chain(tmp_path: Path, hint: str, *, parent_cid: str = make.CID) -> Path:
    base = {n: pattern(n, GRAIN) for n in range(0, 60, 3)}
    text = descriptor(f'RW {SECTORS} SPARSE "base.vmdk"')
    write(tmp_path / "base.vmdk", make.sparse(SECTORS, base, text))
    held = {n: pattern(n + 1000, GRAIN) for n in (0, 1, 30)}
    more = [f'parentFileNameHint="{hint}"'] if hint else []
    text = descriptor(f'RW {SECTORS} SPARSE "disk.vmdk"', cid="1", parent=parent_cid, more=more)
    return write(tmp_path / "disk.vmdk", make.sparse(SECTORS, held, text))


def chained() -> bytes:
    held: dict[int, bytes | int] = {n: pattern(n, GRAIN) for n in range(0, 60, 3)}
    return guest(SECTORS, held | {n: pattern(n + 1000, GRAIN) for n in (0, 1, 30)}, 128)


@pytest.mark.parametrize(
    "hint",
    [
        "base.vmdk",
        "./base.vmdk",
        "/vmfs/volumes/somewhere/else/base.vmdk",
        r"C:\\Virtual Machines\\base.vmdk",
        r"\\\\server\\share\\base.vmdk",
        "",  # VirtualBox writes none
    ],
)
def test_a_parent_is_found(tmp_path: Path, hint: str) -> None:
    assert read(chain(tmp_path, hint)) == chained()


def test_a_parent_without_a_name_is_not_there(tmp_path: Path) -> None:
    path = chain(tmp_path, "")
    (tmp_path / "base.vmdk").unlink()
    with pytest.raises(ParentMissing, match="no image 1234abcd found around it"):
        open_chain(path)


def test_a_parent_that_was_written_since_is_refused(tmp_path: Path) -> None:
    path = chain(tmp_path, "base.vmdk")
    with virtmount.open(tmp_path / "base.vmdk", writable=True) as disk:
        disk.pwrite(59 * GRAIN, b"z" * 512)
    with pytest.raises(ParentMissing, match="was written since"):
        open_chain(path)
    chained_again = bytearray(chained())
    chained_again[59 * GRAIN : 59 * GRAIN + 512] = b"z" * 512
    assert read(path, force=True) == chained_again


def test_virtualbox_names_the_parent_by_its_uuid(tmp_path: Path) -> None:
    """And says that there is none in parentCID."""
    path = chain(tmp_path, "", parent_cid="ffffffff")
    ids = [f"{n}0000000-0000-4000-8000-000000000000" for n in (1, 2)]
    for name, own, parent in (("base.vmdk", ids[0], None), ("disk.vmdk", ids[1], ids[0])):
        image = tmp_path / name
        raw = bytearray(image.read_bytes())
        text = bytes(raw[512 : 21 * 512]).split(b"\0")[0]
        text += f'ddb.uuid.image="{own}"\n'.encode()
        if parent:
            text += f'ddb.uuid.parent="{parent}"\n'.encode()
        raw[512 : 512 + len(text)] = text
        image.write_bytes(raw)
    assert read(path) == chained()
    (tmp_path / "base.vmdk").unlink()
    with pytest.raises(ParentMissing, match=ids[0]):
        open_chain(path)


def test_a_chain_of_different_subformats(tmp_path: Path) -> None:
    sectors = 5000
    flat = bytearray(pattern(3, sectors * 512))
    write(tmp_path / "base-flat.vmdk", bytes(flat))
    line = f'RW {sectors} FLAT "base-flat.vmdk" 0'
    text = descriptor(line, cid="a", create_type="monolithicFlat")
    write(tmp_path / "base.vmdk", text)
    small = {n: pattern(n + 2000, 512) for n in (0, 7, 4999)}
    write(tmp_path / "mid-delta.vmdk", make.cowd(sectors, small))
    more = ['parentFileNameHint="base.vmdk"']
    line = f'RW {sectors} VMFSSPARSE "mid-delta.vmdk"'
    text = descriptor(line, cid="b", parent="a", more=more, create_type="vmfsSparse")
    write(tmp_path / "mid.vmdk", text)
    top: dict[int, bytes | int] = {1: pattern(7, 4096), 2: 2 << 60}
    write(tmp_path / "top-sesparse.vmdk", make.se_sparse(sectors, top))
    more = ['parentFileNameHint="mid.vmdk"']
    line = f'RW {sectors} SESPARSE "top-sesparse.vmdk"'
    text = descriptor(line, cid="c", parent="b", more=more, create_type="seSparse")
    path = write(tmp_path / "top.vmdk", text)
    for number, data in small.items():
        assert isinstance(data, bytes)
        flat[number * 512 : number * 512 + 512] = data
    flat[4096:8192] = pattern(7, 4096)
    flat[8192:12288] = bytes(4096)
    assert read(path) == flat == qemu_reads(path)


def test_a_parsed_text_is_changed_and_not_written_anew() -> None:
    text = b'CID=0a1b\r\nParentCID = ffffffff\r\nwhat\r\nRW 8 FLAT "a" 0\r\nx=y'
    parsed = parse("file", "", text)
    new = parsed.with_new_cid()
    assert new is not None
    assert len(new) == len(text)
    assert new[8:] == text[8:]
    assert new[4:8] != text[4:8]
    grown = parsed.with_extent_size(0, 1 << 20)
    assert grown == text.replace(b"RW 8", b"RW 2048")
    named = parsed.with_values(parentCID="12345678", parentFileNameHint='"p"')
    assert named == text.replace(b"ffffffff\r\n", b'12345678\r\nparentFileNameHint="p"\r\n')
    assert parse("file", "", named).without("parentfilenamehint") == text.replace(
        b"ffffffff", b"12345678"
    )
