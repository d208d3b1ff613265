"""Parallels: fields, refusals, clusters of any size, what a check finds and mends."""

from __future__ import annotations

import hashlib
import json
import lzma
import struct
import subprocess
from pathlib import Path

import pytest

from tests.crash.checkers_small import check_parallels
from tests.crash.simulate import SimulatedFile, Store
from tests.formats.cuts import cut_everywhere
from tests.reference import Reference
from virtmount import hostfile
from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats import parallels_check
from virtmount.formats.parallels import Parallels
from virtmount.formats.parallels_header import IN_USE
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Kind, Match, extents
from virtmount.plan import Plan, Punch
from virtmount.upkeep import Finding, New, Repair, Severity

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB
CORPUS = Path(__file__).parents[1] / "corpus" / "images"


def run(*command: str | Path, code: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done
    return done.stdout


def make(path: Path, size: int = 8 * MIB) -> None:
    run("qemu-img", "create", "-q", "-f", "parallels", "-o", "cluster_size=64k", path, str(size))


def by_qemu(path: Path, *commands: str) -> None:
    said = run("qemu-io", "-f", "parallels", *(w for c in commands for w in ("-c", c)), path)
    assert "failed" not in said


def make_old(
    path: Path, blocks: list[int], sectors: int = 128, data_offset: int = 0, **more: int
) -> None:
    """The old version: entries count sectors; cluster b holds the byte b + 1."""
    head = struct.pack(
        "<16sIIIIIQIIIQ",
        b"WithoutFreeSpace",
        2,
        16,
        8,
        sectors,
        len(blocks),
        more.get("size", len(blocks) * sectors * 512) // 512 | more.get("high", 0) << 32,
        more.get("in_use", 0),
        data_offset,
        0,
        0,
    )
    start = data_offset or -(-(64 + 4 * len(blocks)) // 512)
    table = [start + block * sectors if block >= 0 else 0 for block in blocks]
    with path.open("wb") as file:
        file.write(head + struct.pack(f"<{len(blocks)}I", *table))
        file.truncate(start * 512)
        file.seek(start * 512)
        for block in range(max(blocks) + 1):
            file.write(bytes([block + 1]) * sectors * 512)


def put(path: Path, offset: int, value: int, width: int = 4) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(width, "little"))


def number(path: Path, offset: int, width: int = 4) -> int:
    return int.from_bytes(path.read_bytes()[offset : offset + width], "little")


def content(path: Path) -> bytes:
    with HostFile(path) as file:
        image = Parallels(file)
        return Reference([image]).pread(0, image.size)


def run_check(file: HostFile, repair: Repair) -> list[Finding]:
    found = []
    for item in Parallels.check(file, DEFAULTS, repair):
        if isinstance(item, Plan):
            hostfile.execute(item, [file])
        elif isinstance(item, Finding):
            found.append(item)
    return found


def checked(path: Path, repair: Repair = Repair.NOTHING) -> list[Finding]:
    with HostFile(path, writable=repair is not Repair.NOTHING) as file:
        return run_check(file, repair)


def check_is_clean(path: Path) -> None:
    run("qemu-img", "check", "-q", "-f", "parallels", path)
    assert not checked(path)


@pytest.mark.parametrize("magic", [b"WithoutFreeSpace", b"WithouFreSpacExt"])
def test_probe(magic: bytes) -> None:
    assert Parallels.probe(magic + bytes(48), b"", 64) is Match.SURE
    assert Parallels.probe(magic[:15], b"", 15) is Match.NO


def test_a_bundle_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "DiskDescriptor.xml"
    path.write_text('<?xml version="1.0"?>\n<Parallels_disk_image Version="1.0">\n')
    assert Parallels.probe(path.read_bytes(), b"", 100) is Match.SURE
    with HostFile(path) as file, pytest.raises(Unsupported, match="of a bundle") as raised:
        Parallels(file)
    assert raised.value.hint


def test_every_kind_of_entry(tmp_path: Path) -> None:
    path = tmp_path / "a.hdd"
    make(path)
    by_qemu(path, "write -P 4 128k 64k", "write -P 3 0 64k")
    with HostFile(path) as file:
        image = Parallels(file)
        found = [(e.kind, e.host_offset) for e in extents(image, 0, 3 * CLUSTER)]
        assert found == [(Kind.DATA, 2 * CLUSTER), (Kind.ABSENT, 0), (Kind.DATA, CLUSTER)]
        assert image.details() == {
            "magic": "WithouFreSpacExt",
            "cluster_size": CLUSTER,
            "table_entries": 128,
            "data_offset": CLUSTER,
            "in_use": False,
            "format_extension": False,
        }


def test_an_image_made_by_virtualbox(tmp_path: Path) -> None:
    """Clusters of 63 sectors."""
    path = tmp_path / "a.hdd"
    path.write_bytes(lzma.decompress((CORPUS / "virtualbox.hdd.xz").read_bytes()))
    expected = bytearray(2 * MIB)
    for at in range(0, 2 * MIB, 150016):
        expected[at : at + 5120] = (b"sector %08d\n" % at * 427)[:5120]
    assert hashlib.sha256(content(path)).digest() == hashlib.sha256(expected).digest()
    assert not checked(path)
    before = path.read_bytes()
    with HostFile(path, writable=True) as file:
        with pytest.raises(Unsupported, match=r"header\+28: clusters of 32256 bytes are only read"):
            Parallels(file)
    assert path.read_bytes() == before


@pytest.mark.parametrize("sectors", [1, 3, 63, 127, 129])
def test_clusters_of_any_size_are_read(tmp_path: Path, sectors: int) -> None:
    path = tmp_path / "a.hdd"
    blocks = [5, -1, 0, 3, -1, 1, 4, 2] * 1
    make_old(path, blocks, sectors)
    expected = b"".join(bytes([block + 1]) * sectors * 512 for block in blocks)
    assert content(path) == expected
    with HostFile(path) as file:
        disk = Reference([Parallels(file)])
        for at in range(0, len(expected) - 700, 511):
            assert disk.pread(at, 700) == expected[at : at + 700]


@pytest.mark.parametrize("data_offset", [0, 7])
def test_the_old_version_is_written(tmp_path: Path, data_offset: int) -> None:
    """Its clusters may lie at any sector."""
    path = tmp_path / "a.hdd"
    make_old(path, [2, -1, 0, -1, 1], data_offset=data_offset, high=0xFFFFFFFF)
    expected = bytearray(content(path))
    with HostFile(path, writable=True) as file, Reference([Parallels(file)]) as disk:
        disk.pwrite(CLUSTER + 5, b"new")
        disk.pwrite(7, b"old")
    expected[CLUSTER + 5 : CLUSTER + 8], expected[7:10] = b"new", b"old"
    assert content(path) == expected
    assert not checked(path)
    out = tmp_path / "out.raw"
    run("qemu-img", "convert", "-f", "parallels", "-O", "raw", path, out)
    assert out.read_bytes() == expected


@pytest.mark.parametrize(
    ("offset", "value", "complaint"),
    [
        (16, 3, r"header\+16: version 3, know 2"),
        (28, 0, r"header\+28: clusters of 0 sectors"),
        (28, (1 << 19) + 1, r"header\+28: clusters of 524289 sectors"),
        (32, (1 << 24) + 1, r"header\+32: 16777217 entries, at most"),
        (32, 1 << 24, r"header\+32: table ends at 67108928, the file at"),
        (32, 127, r"header\+36: 16384 sectors in 127 clusters of 128"),
        (36, 0, r"header\+36: 0 sectors"),
        (40, 1, r"header\+36: 4294983680 sectors"),
        (48, 1, r"header\+48: data at 512 begins before the table's end at 576"),
    ],
)
@pytest.mark.parametrize("writable", [False, True])
def test_refuses(tmp_path: Path, offset: int, value: int, complaint: str, writable: bool) -> None:
    path = tmp_path / "a.hdd"
    make(path)
    put(path, offset, value)
    before = path.read_bytes()
    with HostFile(path, writable=writable) as file:
        with pytest.raises((Corrupt, Unsupported), match=complaint):
            Parallels(file)
    assert path.read_bytes() == before


def test_an_extension_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.hdd"
    make(path)
    by_qemu(path, "write -P 3 0 64k")
    put(path, 56, 256, 8)
    assert content(path)[:CLUSTER] == b"\3" * CLUSTER
    with HostFile(path, writable=True) as file:
        with pytest.raises(Unsupported, match=r"header\+56: a format extension"):
            Parallels(file)


# Writing


def test_the_mark_is_there_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.hdd"
    make(path)
    put(path, 52, 1)  # "empty"
    with HostFile(path, writable=True) as file, Reference([Parallels(file)]) as disk:
        assert number(path, 44) == 0
        disk.pwrite(5, b"x")
        assert (number(path, 44), number(path, 52)) == (IN_USE, 0)
        disk.flush()
        assert number(path, 44) == IN_USE
    assert number(path, 44) == 0
    check_is_clean(path)


def test_discard_keeps_the_cluster_and_empties_it(tmp_path: Path) -> None:
    path = tmp_path / "a.hdd"
    make(path)
    by_qemu(path, "write -P 3 0 256k")
    size = path.stat().st_size
    with HostFile(path, writable=True) as file:
        image = Parallels(file)
        hostfile.execute(image.begin(), image.files)
        plan = image.discard(1, 1000)
        assert {type(step) for step in plan} == {Punch}
        hostfile.execute(plan, image.files)
        hostfile.execute(image.end(), image.files)
    assert content(path)[: 4 * CLUSTER] == b"\3" * CLUSTER + bytes(3 * CLUSTER)
    assert path.stat().st_size == size
    check_is_clean(path)


def test_what_a_power_cut_left_is_used_first(tmp_path: Path) -> None:
    path = tmp_path / "a.hdd"
    make(path)
    by_qemu(path, "write -P 3 0 64k")
    with path.open("ab") as file:
        file.write(b"\xee" * 2 * CLUSTER)
    put(path, 44, IN_USE)
    size = path.stat().st_size
    with HostFile(path, writable=True) as opened, Reference([Parallels(opened)]) as disk:
        disk.pwrite(CLUSTER + 1, b"y")
        disk.pwrite(2 * CLUSTER + 1, b"z")
    assert path.stat().st_size == size
    assert content(path)[: 3 * CLUSTER] == (
        b"\3" * CLUSTER + b"\0y".ljust(CLUSTER, b"\0") + b"\0z".ljust(CLUSTER, b"\0")
    )
    check_is_clean(path)


def test_gaps_are_closed_at_the_end(tmp_path: Path) -> None:
    """Among the entries that change are some in the header's sector."""
    path = tmp_path / "a.hdd"
    make(path)
    by_qemu(path, *(f"write -q -P {c + 1} {c * 64}k 64k" for c in range(6)))
    before = content(path)
    for entry in (0, 2):
        put(path, 64 + 4 * entry, 0)
    with HostFile(path, writable=True) as file, Reference([Parallels(file)]) as disk:
        disk.pwrite(5 * CLUSTER, b"x")
    assert path.stat().st_size == 5 * CLUSTER
    expected = bytearray(before)
    expected[:CLUSTER] = expected[2 * CLUSTER : 3 * CLUSTER] = bytes(CLUSTER)
    expected[5 * CLUSTER] = ord("x")
    assert content(path) == expected
    check_is_clean(path)


def test_the_table_reaches_only_so_far(tmp_path: Path) -> None:
    path = tmp_path / "a.hdd"
    make_old(path, [0, -1])
    with HostFile(path, writable=True) as file:
        image = Parallels(file)
        image._use = bytearray(b"\1") * ((1 << 32) // 128)  # as if 2 TiB were in use
        with pytest.raises(OSError, match="the table reaches no further"):
            image.reserve(1)


# Whole images


@pytest.mark.parametrize("options", [{}, {"cluster_size": "64K"}])
def test_making(tmp_path: Path, options: dict[str, str]) -> None:
    path = tmp_path / "a.hdd"
    path.touch()
    with HostFile(path, writable=True) as file:
        new = New([file], str(path), 9 * MIB + 1, options, lambda name: 0)
        hostfile.execute(Parallels.create(new), [file])
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    assert (info["format"], info["virtual-size"]) == ("parallels", 9 * MIB + 512)
    with HostFile(path, writable=True) as file, Reference([Parallels(file)]) as disk:
        disk.pwrite(9 * MIB, b"end")
    by_qemu(path, "write -P 5 1M 1k")
    assert content(path) == bytes(MIB) + b"\5" * 1024 + bytes(8 * MIB - 1024) + b"end".ljust(
        512, b"\0"
    )
    check_is_clean(path)


@pytest.mark.parametrize(
    ("options", "size", "complaint"),
    [
        ({"cluster_size": "32K"}, MIB, "cluster_size: '32K', know powers of two from 64K to 64M"),
        ({"cluster_size": "100K"}, MIB, "cluster_size"),
        ({}, 0, "size: 0 bytes"),
        ({}, (16 << 40) + 1, "size: 17592186044417 bytes"),
    ],
)
def test_what_cannot_be_made(
    tmp_path: Path, options: dict[str, str], size: int, complaint: str
) -> None:
    (tmp_path / "a.hdd").touch()
    with HostFile(tmp_path / "a.hdd", writable=True) as file:
        with pytest.raises(Unsupported, match=complaint):
            Parallels.create(New([file], "a.hdd", size, options, lambda name: 0))


def resize(path: Path, size: int) -> None:
    with HostFile(path, writable=True) as file:
        hostfile.execute(Parallels(file).resize(size), [file])


def test_growing(tmp_path: Path) -> None:
    path = tmp_path / "a.hdd"
    make(path, MIB + 512)
    by_qemu(path, "write -P 3 0 1M")
    with HostFile(path, writable=True) as file, Reference([Parallels(file)]) as disk:
        disk.pwrite(MIB, b"\4" * 512)
    with HostFile(path, writable=True) as file:
        host = next(iter(extents(Parallels(file), MIB, 512))).host_offset
        file.pwrite(host + 512, b"\xee" * 512)  # what is behind the end
        file.pwrite(64 + 17 * 4, b"\xee" * 800)  # and behind the table
    for size in (MIB + 512, 5 * MIB, 1000 * MIB):
        resize(path, size)
        check_is_clean(path)
        info = json.loads(run("qemu-img", "info", "--output=json", path))
        assert info["virtual-size"] == size
        with HostFile(path) as file:
            found = Reference([Parallels(file)]).pread(0, min(size, 20 * MIB))
        assert found == (b"\3" * MIB + b"\4" * 512).ljust(len(found), b"\0")
    with pytest.raises(Unsupported, match="it can only grow"):
        resize(path, MIB)
    with pytest.raises(Unsupported, match="a table of 16385 entries would end at 65604"):
        resize(path, (1 << 30) + 512)


def damage(path: Path) -> bytes:
    """Two owners, behind the end; a file that is too long."""
    make(path)
    by_qemu(path, "write -P 3 0 64k", "write -P 4 64k 64k", "write -P 5 128k 64k")
    for entry, value in ((3, 1), (4, 1 << 30), (5, 2), (120, 5)):
        put(path, 64 + 4 * entry, value)
    put(path, 44, IN_USE)
    with path.open("ab") as file:
        file.write(b"\xee" * CLUSTER)
    put(path, 64 + 4 * 6, 5)
    first = b"".join(bytes([value]) * CLUSTER for value in (3, 4, 5, 3, 0, 4))
    return first.ljust(8 * MIB, b"\0")


def test_check_finds_everything_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.hdd"
    damage(path)
    before = path.read_bytes()
    for repair in (Repair.NOTHING, Repair.LEAKS):
        found = checked(path, repair)
        texts = [item.text for item in found if item.severity is Severity.DAMAGE]
        assert "entry 4 at 80" in [item.place for item in found]
        assert len(texts) == 5
        assert sum("past the end" in text for text in texts) == 3
        assert sum("another owner" in text for text in texts) == 2
        assert not any(item.repaired for item in found)
        assert path.read_bytes() == before


def test_repair(tmp_path: Path) -> None:
    path = tmp_path / "a.hdd"
    expected = damage(path)
    assert all(item.repaired for item in checked(path, Repair.ALL))
    check_is_clean(path)
    assert content(path) == expected


def test_a_cluster_before_the_data_and_one_off_the_grid(tmp_path: Path) -> None:
    path = tmp_path / "a.hdd"
    make_old(path, [0, 1, -1, -1])
    put(path, 64 + 8, number(path, 64) + 1)
    with HostFile(path, writable=True) as file:
        with pytest.raises(Corrupt, match="from its neighbours: not written"):
            Parallels(file)
    put(path, 48, 2)
    texts = [item.text for item in checked(path) if item.severity is Severity.DAMAGE]
    assert "lies before the data" in texts[0]
    checked(path, Repair.ALL)
    assert not checked(path)


def test_too_many_second_owners_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.hdd"
    make(path)
    by_qemu(path, "write -P 3 0 64k")
    with path.open("r+b") as file:
        file.seek(64)
        file.write(struct.pack("<I", 1) * 20)
    monkeypatch.setattr(parallels_check, "MAX_COPIES", 5)
    monkeypatch.setattr(parallels_check, "MAX_FINDINGS", 10)
    found = checked(path, Repair.ALL)
    assert len(found) == 11
    assert found[-1].text == "9 more entries that cannot be right"


def test_what_is_no_image_cannot_be_checked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(4096))
    with pytest.raises(NotAnImage, match="no Parallels magic"):
        checked(tmp_path / "a")


def test_repair_may_be_cut_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "a.hdd"
    expected = damage(path)

    def act(file: HostFile) -> None:
        run_check(file, Repair.ALL)
        store = file.store  # type: ignore[attr-defined]
        assert not check_parallels(store).wrong
        reader = SimulatedFile(store, name="a.hdd", writable=False)
        assert Reference([Parallels(reader)]).pread(0, 8 * MIB) == expected

    def judge(store: Store) -> None:
        """What could be read before can be read."""
        disk = Reference([Parallels(SimulatedFile(store, name="a.hdd", writable=False))])
        assert disk.pread(0, 4 * CLUSTER) == expected[: 4 * CLUSTER]

    cut_everywhere(Store.load(path), act, judge)


def test_growing_may_be_cut_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "a.hdd"
    make(path, MIB + 512)
    by_qemu(path, "write -P 3 0 1M", "write -P 4 1M 512")
    put(path, 64 + 17 * 4, 0xEEEEEEEE)
    before = content(path)

    def act(file: HostFile) -> None:
        image = Parallels(file)
        if image.size == len(before):
            hostfile.execute(image.resize(9 * MIB), [file])

    def judge(store: Store) -> None:
        image = Parallels(SimulatedFile(store, name="a.hdd", writable=False))
        assert image.size in (len(before), 9 * MIB)
        assert Reference([image]).pread(0, image.size) == before.ljust(image.size, b"\0")

    cut_everywhere(Store.load(path), act, judge, least=2)
