"""VMDK as a whole: made, written, checked and mended, grown, given other parents, packed."""

from __future__ import annotations

import random
import struct
import subprocess
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

import virtmount
from tests.crash.checkers import check_vmdk
from tests.crash.simulate import SimulatedFile, Store
from tests.formats import make_vmdk as make
from tests.formats.cuts import cut_everywhere
from tests.formats.make_vmdk import descriptor, guest, pattern, write
from tests.formats.test_vmdk import (
    GRAIN,
    SECTORS,
    SPARSE,
    entry,
    monolithic,
    qemu_reads,
    read,
    refused,
    set_entry,
)
from tests.reference import Reference
from virtmount import Repair, Severity, hostfile
from virtmount.chain import open_chain
from virtmount.errors import NeedsRecovery, ParentMissing, Unsupported, VirtmountError
from virtmount.formats import vmdk_create
from virtmount.formats.vmdk import VMDK
from virtmount.formats.vmdk_descriptor import parse
from virtmount.formats.vmdk_entries import Claims, Overlap
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS
from virtmount.plan import Plan
from virtmount.upkeep import Elsewhere, Finding, New

MIB = 1 << 20
SUBFORMATS = tuple(vmdk_create.SUBFORMATS)


def made(path: Path, size: int, subformat: str = "monolithicSparse", **more: str) -> Path:
    virtmount.create(path, size, "vmdk", settings={"subformat": subformat, **more})
    return path


def filled(path: Path, seed: int = 1) -> bytearray:
    """Write all over the disk, in no order; what it holds then."""
    random_ = random.Random(seed)
    with virtmount.open(path, writable=True) as disk:
        content = bytearray(
            b"".join(disk.pread(at, min(MIB, disk.size - at)) for at in range(0, disk.size, MIB))
        )
        for number in range(24):
            length = random_.randrange(1, 200) * 512
            at = random_.randrange(0, disk.size - length) // 512 * 512
            data = random_.randbytes(length)
            disk.pwrite(at, data)
            content[at : at + length] = data
            if number % 5 == 4:
                disk.flush()
    return content


def found(path: Path, repair: Repair = Repair.NOTHING) -> list[Finding]:
    return virtmount.check(path, repair=repair).findings


def qemu_check(path: Path) -> None:
    subprocess.run(["qemu-img", "check", "-q", "-f", "vmdk", path], check=True, timeout=60)


# Making and writing


@pytest.mark.parametrize("subformat", SUBFORMATS)
@pytest.mark.parametrize("zeroed", ["off", "on"])
def test_made_and_written(tmp_path: Path, subformat: str, zeroed: str) -> None:
    path = tmp_path / "disk.vmdk"
    size = 5 * MIB + 3 * 512
    if zeroed == "on" and subformat not in ("monolithicSparse", "twoGbMaxExtentSparse"):
        with pytest.raises(Unsupported, match="zeroed_grain"):
            made(path, size, subformat, zeroed_grain=zeroed)
        assert not list(tmp_path.iterdir())
        return
    made(path, size, subformat, zeroed_grain=zeroed)
    told = virtmount.inspect(path)
    assert (told.size, told.variant) == (size, subformat)
    assert read(path) == bytes(size)
    assert not found(path)
    content = filled(path)
    assert read(path) == content == qemu_reads(path)
    assert not found(path)
    content = filled(path, seed=2)
    assert qemu_reads(path) == content
    assert not found(path)
    if subformat != "vmfsSparse":  # qemu does not find its extent
        qemu_check(path)


def test_several_extents_are_written_each_in_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vmdk_create, "SPLIT", 2 * MIB)
    for subformat in ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat"):
        path = made(tmp_path / f"{subformat}.vmdk", 7 * MIB + 512, subformat)
        assert len(virtmount.inspect(path).details["extents"]) == 4
        content = filled(path)
        assert read(path) == content == qemu_reads(path)
        assert not found(path)
    qemu_check(tmp_path / "twoGbMaxExtentSparse.vmdk")


def test_the_taken_sectors_of_a_cowd_extent_are_counted(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.vmdk", 9 * MIB, "vmfsSparse")
    extent = tmp_path / "disk-delta.vmdk"
    with virtmount.open(path, writable=True) as disk:
        for at in (0, 5 * MIB, 512, 8 * MIB):
            disk.pwrite(at, b"x" * 512)
        disk.flush()
        held = extent.read_bytes()
        (free,) = struct.unpack_from("<I", held, 28)
        assert free * 512 >= len(held)  # ESX takes what is behind it
        assert held[1648]
    held = extent.read_bytes()
    (free,) = struct.unpack_from("<I", held, 28)
    assert free * 512 == len(held)
    # Header, directory, three tables of 16 KiB, four sectors: nothing that was only reserved.
    assert len(held) == 2048 + 512 + 3 * 16384 + 4 * 512
    assert not held[1648]


def test_the_limits_of_create(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    for size, subformat, words in (
        (2 << 40, "monolithicSparse", "in one sparse extent"),
        (4 << 40, "vmfsSparse", "in one sparse extent"),
        (1 << 40, "twoGbMaxExtentSparse", "extents, at most 254"),
        (MIB, "fullDevice", "'fullDevice', know monolithicSparse"),
        (MIB, "streamOptimized", "know"),
    ):
        with pytest.raises(Unsupported, match=words):
            made(path, size, subformat)
    with pytest.raises(Unsupported, match="adapter_type"):
        made(path, MIB, adapter_type="sata")
    with pytest.raises(Unsupported, match="VMDK has 512 only"):
        virtmount.create(path, MIB, "vmdk", sector_size=4096)
    assert not list(tmp_path.iterdir())
    made(path, 1 << 40)
    assert path.stat().st_blocks < 1000
    assert not found(path)


def test_a_child_is_made_and_written(tmp_path: Path) -> None:
    base = made(tmp_path / "base.vmdk", 4 * MIB)
    below = filled(base)
    raw = base.read_bytes()
    for subformat in ("monolithicSparse", "vmfsSparse"):
        path = tmp_path / f"{subformat}.vmdk"
        virtmount.create(path, parent=base, settings={"subformat": subformat})
        assert read(path) == below
        content = filled(path, seed=3)
        assert content != below
        assert read(path) == content == qemu_reads(path)
        assert base.read_bytes() == raw
        assert not found(path)
    for subformat in ("monolithicFlat", "vmfs"):
        with pytest.raises(Unsupported, match="has no parent"):
            virtmount.create(tmp_path / "x.vmdk", parent=base, settings={"subformat": subformat})
    write(tmp_path / "raw.img", bytes(MIB))
    with pytest.raises(Unsupported, match="the parent of a VMDK is a VMDK"):
        virtmount.create(tmp_path / "x.vmdk", parent=tmp_path / "raw.img")


def test_zeros_over_a_parent_need_no_space_where_the_format_has_them(tmp_path: Path) -> None:
    base = made(tmp_path / "base.vmdk", 4 * MIB)
    filled(base)
    sizes = {}
    for zeroed in ("off", "on"):
        path = tmp_path / f"{zeroed}.vmdk"
        virtmount.create(path, parent=base, settings={"zeroed_grain": zeroed})
        with virtmount.open(path, writable=True) as disk:
            disk.write_zeroes(0, 4 * MIB)
        assert read(path) == bytes(4 * MIB) == qemu_reads(path)
        sizes[zeroed] = path.stat().st_size
    assert sizes["on"] < MIB < sizes["off"]


def test_the_cid_changes_at_the_first_write_and_nothing_else_does(tmp_path: Path) -> None:
    write(tmp_path / "a", pattern(1, 65536))
    text = descriptor('RW 128 FLAT "a" 0', cid="7")
    text = b"\r\n" + text.replace(b"version", b"\xff nobody knows\r\nversion")
    path = write(tmp_path / "disk.vmdk", text)
    with virtmount.open(path, writable=True) as disk:
        disk.pread(0, 512)
    assert path.read_bytes() == text
    seen = set()
    for _ in range(3):
        with virtmount.open(path, writable=True) as disk:
            disk.pwrite(0, b"x" * 512)
            seen.add(path.read_bytes())
            disk.pwrite(512, b"x" * 512)
            assert path.read_bytes() in seen
    at = text.index(b"CID=7") + 4
    assert {len(t) for t in seen} == {len(text)}
    assert {t[:at] + b"7" + t[at + 1 :] for t in seen} == {text}
    assert len(seen | {text}) > 1


def test_virtualbox_hears_that_a_disk_was_written(tmp_path: Path) -> None:
    write(tmp_path / "a", pattern(1, 65536))
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    text = descriptor('RW 128 FLAT "a" 0') + f'ddb.uuid.modification="{uuid}"\n'.encode()
    path = write(tmp_path / "disk.vmdk", text)
    with virtmount.open(path, writable=True) as disk:
        disk.pwrite(0, b"x" * 512)
    after = parse(path, "", path.read_bytes())
    assert after.uuid("modification") not in (None, uuid)


def test_what_may_not_be_written_fails_alone(tmp_path: Path) -> None:
    write(tmp_path / "a", pattern(1, 65536))
    write(tmp_path / "b", pattern(2, 65536))
    text = descriptor('RW 128 FLAT "a" 0', "RW 128 ZERO", 'RDONLY 128 FLAT "b" 0')
    path = write(tmp_path / "disk.vmdk", text)
    with virtmount.open(path, writable=True) as disk:
        for at in (65536, 2 * 65536, 3 * 65536 - 512):
            with pytest.raises(OSError, match="Read-only"):
                disk.pwrite(at, b"x" * 512)
        disk.pwrite(65536 - 512, b"y" * 512)
        disk.flush()
        with pytest.raises(OSError, match="Read-only"):
            disk.pwrite(65536 - 512, b"z" * 1024)
    assert (tmp_path / "b").read_bytes() == pattern(2, 65536)
    content = read(path)
    assert content[65536:] == bytes(65536) + pattern(2, 65536)
    assert content[: 65536 - 512] == pattern(1, 65536)[:-512]
    # A sparse extent that may not be written is more than we can keep from being written.
    write(tmp_path / "s", make.sparse(SECTORS, SPARSE))
    path = write(tmp_path / "r.vmdk", descriptor(f'RDONLY {SECTORS} SPARSE "s"'))
    refused(path, Unsupported, "RDONLY for a SPARSE extent: not written", writable=True)
    assert read(path) == guest(SECTORS, SPARSE, 128)


def test_zeros_between_sparse_extents(tmp_path: Path) -> None:
    size = 128 * 5
    for name in ("a", "b"):
        write(tmp_path / name, make.sparse(size, {1: pattern(1, GRAIN)}))
    text = descriptor(f'RW {size} SPARSE "a"', f"RW {size} ZERO", f'RW {size} SPARSE "b"')
    path = write(tmp_path / "disk.vmdk", text)
    with virtmount.open(path, writable=True) as disk:
        disk.pwrite(5 * GRAIN - 512, b"x" * 512)
        disk.pwrite(10 * GRAIN, b"y" * 512)
        with pytest.raises(OSError, match="Read-only"):
            disk.pwrite(5 * GRAIN, b"z" * 512)
        disk.pwrite(14 * GRAIN, b"w" * 512)
    content = read(path)
    assert content[5 * GRAIN - 512 : 10 * GRAIN + 512] == (
        b"x" * 512 + bytes(5 * GRAIN) + b"y" * 512
    )
    assert content[14 * GRAIN : 14 * GRAIN + 1024] == b"w" * 512 + bytes(512)
    assert not found(path)


def test_tables_that_are_not_there_are_made(tmp_path: Path) -> None:
    """qemu writes over the header instead."""
    sectors = 600 * 128
    text = descriptor(f'RW {sectors} SPARSE "disk.vmdk"', create_type="monolithicSparse")
    path = write(
        tmp_path / "disk.vmdk", make.sparse(sectors, {0: pattern(0, GRAIN)}, text, lazy=True)
    )
    expected = bytearray(guest(sectors, {0: pattern(0, GRAIN)}, 128))
    with virtmount.open(path, writable=True) as disk:
        disk.pwrite(550 * GRAIN + 512, b"x" * 512)
    expected[550 * GRAIN + 512 : 550 * GRAIN + 1024] = b"x" * 512
    assert read(path) == expected == qemu_reads(path)
    assert not check_vmdk(Store.load(path)).wrong
    assert not found(path)


# Packing


def test_a_compressed_image(tmp_path: Path) -> None:
    random_ = random.Random(5)
    content = bytearray(3 * MIB + 7 * 512)
    content[0:GRAIN] = random_.randbytes(GRAIN)  # becomes longer
    content[5 * GRAIN : 6 * GRAIN] = b"abc\n" * (GRAIN // 4)
    content[-512:] = b"z" * 512
    source = write(tmp_path / "source.img", bytes(content))
    path = tmp_path / "disk.vmdk"
    virtmount.convert(source, path, source_format="raw", compress=True)
    assert read(path) == content == qemu_reads(path)
    assert virtmount.inspect(path).variant == "streamOptimized"
    assert path.stat().st_size < 300 << 10
    raw = path.read_bytes()
    assert raw[56:64] == b"\xff" * 8  # as ESX wants it: what is where is said at the end
    assert raw[-1536 + 12 : -1536 + 16] == b"\3\0\0\0"
    assert raw[-1024:-1020] == b"KDMV"
    assert not found(path)
    with path.open("r+b") as file:
        file.seek(128 * 512)
        file.write(b"\1")
    (finding,) = found(path)
    assert finding.severity is Severity.DAMAGE
    assert "a marker of sector 1, expected 0" in finding.text


def test_a_compressed_image_of_many_tables(tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    with source.open("wb") as file:
        for number in (0, 511, 512, 1500):
            file.seek(number * GRAIN)
            file.write(pattern(number, GRAIN))
        file.truncate(100 * MIB)
    path = tmp_path / "disk.vmdk"
    virtmount.convert(source, path, source_format="raw", compress=True)
    assert virtmount.compare(source, path, first_format="raw").same
    assert qemu_reads(path) == source.read_bytes()


def test_a_disk_of_zeros_compressed(tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    source.touch()
    with source.open("r+b") as file:
        file.truncate(100 * MIB)
    path = tmp_path / "disk.vmdk"
    virtmount.convert(source, path, source_format="raw", compress=True)
    assert qemu_reads(path) == bytes(100 * MIB)
    assert not found(path)


# Growing


@pytest.mark.parametrize("subformat", SUBFORMATS)
@pytest.mark.parametrize("more", [512, 9 * MIB])
def test_grown(tmp_path: Path, subformat: str, more: int) -> None:
    path = made(tmp_path / "disk.vmdk", 5 * MIB + 512, subformat)
    content = filled(path)
    if subformat == "vmfsSparse" and more > MIB:
        virtmount.resize(path, more, relative=True)
    else:
        virtmount.resize(path, len(content) + more)
    content += bytes(more)
    assert read(path) == content == qemu_reads(path)
    assert not found(path)
    content = filled(path, seed=4)
    assert read(path) == content == qemu_reads(path)
    with pytest.raises(VirtmountError, match="the rest would be lost"):
        virtmount.resize(path, 512)
    with pytest.raises(Unsupported, match="it can only grow"):
        virtmount.resize(path, 512, shrink=True)


def test_growing_needs_new_directories(tmp_path: Path) -> None:
    """One sector of a directory is enough for 4 GiB."""
    path = made(tmp_path / "disk.vmdk", 3 << 30)
    with virtmount.open(path, writable=True) as disk:
        disk.pwrite((3 << 30) - 512, b"x" * 512)
    virtmount.resize(path, 9 << 30)
    with virtmount.open(path, writable=True) as disk:
        assert disk.pread((3 << 30) - 512, 1024) == b"x" * 512 + bytes(512)
        disk.pwrite((9 << 30) - 512, b"y" * 512)
    assert not found(path)
    qemu_check(path)
    for at, value in (((3 << 30) - 512, ord("x")), ((9 << 30) - 512, ord("y"))):
        done = subprocess.run(
            ["qemu-io", "-r", "-f", "vmdk", "-c", f"read -P {value} {at} 512", path],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "failed" not in done.stdout


def test_what_lay_behind_the_old_end_does_not_show(tmp_path: Path) -> None:
    path = monolithic(tmp_path / "disk.vmdk")
    last = SECTORS // 128
    for copy in (0, 1):
        set_entry(path, copy, last + 1, entry(path, 0, 0))  # behind the disk's end
    at = entry(path, 0, last) * 512
    with path.open("r+b") as file:
        file.seek(at + 7 * 512)
        file.write(b"q" * 4096)
    virtmount.resize(path, MIB, relative=True)
    assert read(path) == guest(SECTORS, SPARSE, 128) + bytes(MIB)
    write(tmp_path / "a", pattern(1, 65536) + b"behind" * 1000)
    flat = write(tmp_path / "flat.vmdk", descriptor('RW 128 FLAT "a" 0'))
    virtmount.resize(flat, MIB)
    assert read(flat) == pattern(1, 65536) + bytes(MIB - 65536)


def test_not_grown(tmp_path: Path) -> None:
    path = monolithic(tmp_path / "disk.vmdk", unclean=1)
    with pytest.raises(NeedsRecovery, match="was not closed"):
        virtmount.resize(path, MIB, relative=True)
    write(tmp_path / "a", bytes(4096))
    path = write(tmp_path / "z.vmdk", descriptor('RW 8 FLAT "a" 0', "RW 8 ZERO"))
    with pytest.raises(Unsupported, match="the last extent cannot grow"):
        virtmount.resize(path, MIB)


def read_store(store: Store) -> bytes:
    image = VMDK(SimulatedFile(store, name="image", writable=False))
    return Reference([image]).pread(0, image.size)


@pytest.mark.parametrize("more", [512, 200 * MIB, 5 << 30])
def test_growing_may_be_cut_at_any_moment(tmp_path: Path, more: int) -> None:
    path = monolithic(tmp_path / "disk.vmdk")
    before = guest(SECTORS, SPARSE, 128)

    def act(file: HostFile) -> None:
        image = VMDK(file)
        size = max(len(before) + more, image.size)
        hostfile.execute(image.resize(size), image.files)
        assert VMDK(file).size == size

    def judge(store: Store) -> None:
        assert not check_vmdk(store).wrong
        image = VMDK(SimulatedFile(store, name="image", writable=False))
        assert image.size in (len(before), len(before) + more)
        assert Reference([image]).pread(0, len(before)) == before

    cut_everywhere(Store.load(path), act, judge, least=4)


# Parents


def test_given_other_parents(tmp_path: Path) -> None:
    bases = [made(tmp_path / f"{name}.vmdk", 2 * MIB) for name in ("a", "another-one")]
    below = [filled(base, seed) for seed, base in enumerate(bases)]
    path = tmp_path / "disk.vmdk"
    virtmount.create(path, parent=bases[0])
    with virtmount.open(path, writable=True) as disk:
        disk.pwrite(MIB, b"x" * 4096)

    def expected(number: int) -> bytes:
        held = bytearray(below[number])
        return bytes(held[:MIB] + b"x" * 4096 + held[MIB + 4096 :])

    assert read(path) == expected(0)
    before = path.read_bytes()
    with HostFile(path, writable=True) as file:
        image = VMDK(file)
        parent = VMDK(HostFile(bases[1]))
        hostfile.execute(image.rebase(parent, bases[1].name), image.files)
        parent.files[0].close()
    told = parse(path, "", path.read_bytes()[512 : 21 * 512])
    assert told.hint == "another-one.vmdk"
    chain = open_chain(path)
    assert chain.images[1].files[0].path.name == "another-one.vmdk"
    chain.close()
    # What the grain that was copied held of the old parent is the caller's business.
    assert read(path)[: MIB // 2] == below[1][: MIB // 2]
    virtmount.rebase(path, bases[0], unsafe=True)
    assert read(path) == expected(0) == qemu_reads(path)
    virtmount.rebase(path, bases[1])
    assert read(path) == expected(0) == qemu_reads(path)
    virtmount.rebase(path, None)
    assert read(path) == expected(0) == qemu_reads(path)
    assert b"parentFileNameHint" not in path.read_bytes()[512 : 21 * 512]
    assert len(before) <= path.stat().st_size
    assert not found(path)


def test_a_parent_that_is_a_vmdk_without_a_cid_is_refused(tmp_path: Path) -> None:
    text = descriptor(f'RW {SECTORS} SPARSE "base.vmdk"').replace(b"\nCID=1234abcd", b"")
    base = write(tmp_path / "base.vmdk", make.sparse(SECTORS, SPARSE, text))
    with pytest.raises(Unsupported, match="has no CID"):
        virtmount.create(tmp_path / "disk.vmdk", parent=base)
    (finding,) = found(base)
    assert "no CID" in finding.text
    found(base, Repair.ALL)
    assert not found(base)
    assert qemu_reads(base) == guest(SECTORS, SPARSE, 128)
    virtmount.create(tmp_path / "disk.vmdk", parent=base)
    assert read(tmp_path / "disk.vmdk") == guest(SECTORS, SPARSE, 128)


# Checking


def without(*grains: int) -> bytes:
    held = {n: data for n, data in SPARSE.items() if n not in grains}
    return guest(SECTORS, held, 128)


def both(path: Path, grain: int, value: int) -> None:
    for copy in (0, 1):
        set_entry(path, copy, grain, value)


def overlap(path: Path) -> None:
    both(path, 5, entry(path, 0, 7))


def half_overlap(path: Path) -> None:
    both(path, 5, entry(path, 0, 7) + 3)


def past_the_end(path: Path) -> None:
    both(path, 5, 1 << 20)


def in_metadata(path: Path) -> None:
    both(path, 5, 27)


def copies_differ(path: Path) -> None:
    set_entry(path, 0, 5, 0)
    set_entry(path, 1, 8, 0)


def lost_table(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(26 * 512)
        file.write(b"\xff\xff\xff\0")


def lost_copy(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(21 * 512)
        file.write(b"\xff\xff\xff\0")


def one_copy(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(21 * 512)
        file.write(bytes(4))


def shared_table(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(21 * 512)
        file.write((27).to_bytes(4, "little"))


def no_tables(path: Path) -> None:
    lost_table(path)
    lost_copy(path)


DAMAGE: dict[str, tuple[Callable[[Path], None], str, bytes | None]] = {
    "overlap": (overlap, "overlaps the one at", None),
    "half-overlap": (half_overlap, "overlaps the one at", None),
    "past-the-end": (past_the_end, "the file ends at", without(5)),
    "in-metadata": (in_metadata, "lies in metadata", without(5)),
    "copies-differ": (copies_differ, "differs from its copy", without()),
    "lost-table": (lost_table, "made from its copy", without()),
    "lost-copy": (lost_copy, "made from its copy", without()),
    "one-copy": (one_copy, "has one copy", without()),
    "shared-table": (shared_table, "another owner", without()),
    "no-tables": (no_tables, "the file ends at", bytes(SECTORS * 512)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_mended(tmp_path: Path, damage: str) -> None:
    act, words, content = DAMAGE[damage]
    path = monolithic(tmp_path / "disk.vmdk")
    act(path)
    before = path.read_bytes()
    report = virtmount.check(path)
    assert report.exit_code == 2
    assert any(words in f.text for f in report.findings if f.severity is Severity.DAMAGE)
    assert path.read_bytes() == before
    if content is None:  # a copy of what was shared
        content = read(path)
    mended = virtmount.check(path, repair=Repair.ALL)
    assert mended.exit_code == 0
    assert mended.repaired
    assert not found(path)
    assert not check_vmdk(Store.load(path)).wrong
    assert read(path) == content == qemu_reads(path)
    # And it can be written again.
    assert qemu_reads(path) != filled(path)
    assert not found(path)


def run_check(file: HostFile, repair: Repair) -> list[Finding]:
    findings = []
    for item in VMDK.check(file, DEFAULTS, repair):
        if isinstance(item, Finding):
            findings.append(item)
        elif isinstance(item, Plan):
            files = item.files if isinstance(item, Elsewhere) else [file]
            hostfile.execute(item, files)
            hostfile.sync_all(files)
    return findings


@pytest.mark.parametrize("damage", ["half-overlap", "copies-differ", "lost-table", "no-tables"])
def test_repair_may_be_cut_at_any_moment(tmp_path: Path, damage: str) -> None:
    act_on, _, content = DAMAGE[damage]
    path = monolithic(tmp_path / "disk.vmdk", unclean=1)
    act_on(path)
    content = content or read(path)

    def act(file: HostFile) -> None:
        run_check(file, Repair.ALL)
        assert not run_check(file, Repair.NOTHING)
        assert read_store(file.store) == content  # type: ignore[attr-defined]

    def judge(store: Store) -> None:
        if damage in ("half-overlap", "copies-differ"):
            assert read_store(store) == content

    cut_everywhere(Store.load(path), act, judge, least=4)


def test_leaks_are_found_and_given_back(tmp_path: Path) -> None:
    path = monolithic(tmp_path / "disk.vmdk")
    both(path, 5, 0)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 10 * GRAIN)
    report = virtmount.check(path)
    assert report.exit_code == 3
    assert report.left[Severity.LEAK] == 2
    cid = virtmount.inspect(path).details["cid"]
    assert virtmount.check(path, repair=Repair.LEAKS).exit_code == 0
    assert virtmount.inspect(path).details["cid"] == cid  # children find what they know
    assert read(path) == without(5)
    assert path.stat().st_size < 12 * GRAIN
    assert not check_vmdk(Store.load(path)).leaked


def test_leaks_over_a_parent_are_closed_up(tmp_path: Path) -> None:
    base = made(tmp_path / "base.vmdk", SECTORS * 512)
    filled(base)
    path = tmp_path / "disk.vmdk"
    virtmount.create(path, parent=base)
    with virtmount.open(path, writable=True) as disk:
        for at in (0, 3, 9, 4, 8):
            disk.pwrite(at * GRAIN, pattern(at, GRAIN))
    first = int.from_bytes(path.read_bytes()[56:64], "little") * 512
    table = int.from_bytes(path.read_bytes()[first : first + 4], "little") * 512
    second = int.from_bytes(path.read_bytes()[48:56], "little") * 512
    copy = int.from_bytes(path.read_bytes()[second : second + 4], "little") * 512
    with path.open("r+b") as file:
        for at in (table, copy):
            file.seek(at)
            file.write(bytes(4))
    content = read(path)
    assert virtmount.check(path).exit_code == 3
    size = path.stat().st_size
    assert virtmount.check(path, repair=Repair.LEAKS).exit_code == 0
    assert path.stat().st_size == size - GRAIN
    assert read(path) == content == qemu_reads(path)


def test_a_file_that_was_not_closed_is_closed(tmp_path: Path) -> None:
    path = monolithic(tmp_path / "disk.vmdk", unclean=1)
    report = virtmount.check(path)
    assert [f.text for f in report.findings] == ["the file was not closed"]
    assert report.exit_code == 0
    found(path, Repair.ALL)
    assert path.read_bytes()[72] == 0
    assert not found(path)


def test_several_extents_are_mended_each_in_its_file(tmp_path: Path) -> None:
    size = 128 * 5
    for name in ("a", "b"):
        write(tmp_path / name, make.sparse(size, {n: pattern(n, GRAIN) for n in (1, 2)}))
    set_entry(tmp_path / "b", 0, 2, 0)
    set_entry(tmp_path / "a", 1, 2, 1 << 20)
    text = descriptor(f'RW {size} SPARSE "a"', f'RW {size} SPARSE "b"', 'RW 8 FLAT "c" 0')
    path = write(tmp_path / "disk.vmdk", text)
    write(tmp_path / "c", bytes(1000))
    words = " ".join(f"{f.place} {f.text}" for f in found(path))
    for part in ("a: grain table 0", "b: grain table 0", "c the file ends at 1000"):
        assert part in words
    found(path, Repair.ALL)
    assert not found(path)
    assert (tmp_path / "c").stat().st_size == 4096
    one = guest(size, {n: pattern(n, GRAIN) for n in (1, 2)}, 128)
    assert read(path) == one + one + bytes(4096)


def test_a_cowd_extent_is_mended(tmp_path: Path) -> None:
    held: dict[int, bytes | int] = {n: pattern(n, 512) for n in (0, 1, 4096)}
    write(tmp_path / "d", make.cowd(10000, held | {2: 1 << 22, 3: 4}))
    path = write(tmp_path / "disk.vmdk", descriptor('RW 10000 VMFSSPARSE "d"'))
    assert virtmount.check(path).left[Severity.DAMAGE] == 2
    assert virtmount.check(path, repair=Repair.ALL).exit_code == 0
    assert read(path) == guest(10000, held, 1)


def test_a_se_sparse_extent_is_looked_at(tmp_path: Path) -> None:
    held: dict[int, bytes | int] = {0: pattern(0, 4096), 5: 7 << 60, 9: 3 << 60 | 1 << 40}
    write(tmp_path / "s", make.se_sparse(4096 * 8, held))
    path = write(tmp_path / "disk.vmdk", descriptor(f'RW {4096 * 8} SESPARSE "s"'))
    assert [f.place for f in found(path)] == ["grain 5", "grain 9"]


def test_a_child_is_checked_without_its_parent(tmp_path: Path) -> None:
    base = made(tmp_path / "base.vmdk", MIB)
    path = tmp_path / "disk.vmdk"
    virtmount.create(path, parent=base)
    base.unlink()
    assert not found(path)
    with pytest.raises(ParentMissing):
        open_chain(path)


@pytest.mark.parametrize("grain", [1, 8, 128])
def test_overlaps_are_what_they_are(grain: int) -> None:
    """Against every pair, with grains that begin anywhere, in runs and alone."""
    random_ = random.Random(grain)
    for _ in range(60):
        claims = Claims(grain, 4000 * 512)
        taken: set[int] = set()
        for _ in range(20):
            first = random_.randrange(1, 3000)
            count = random_.choice((1, 1, 2, 5))
            if random_.random() < 0.5:
                first -= first % grain
            entries = array("I", (first + i * grain for i in range(count)))
            hits = any(abs(entry - other) < grain for entry in entries for other in taken)
            if not hits:
                claims.take(entries)
                taken.update(entries)
                continue
            with pytest.raises(Overlap) as raised:
                claims.take(entries)
            assert raised.value.first in taken
            assert raised.value.second in entries
            assert abs(raised.value.first - raised.value.second) < grain
        free = set(claims.free(0, claims.count))
        for slot in range(claims.count):
            used = any(
                entry < (slot + 1) * grain and slot * grain < entry + grain for entry in taken
            )
            assert (slot in free) == (not used)


def test_options_are_shown() -> None:
    assert set(VMDK.choices) == {"subformat", "adapter_type", "zeroed_grain"}
    new = New([], 'a"b', MIB, {}, lambda name: 0)
    with pytest.raises(Unsupported, match="cannot name"):
        vmdk_create.descriptor(new, "x", [])
