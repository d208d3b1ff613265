"""check of a VHDX: what it finds, what it mends, and that mending can be cut at any step."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.simulate import Log, SimulatedFile, Store
from tests.formats import make_vhdx as mk
from tests.formats.make_vhdx import MIB, Made, make
from tests.formats.vhdx_chains import CHILD, PARENT, make_pair
from tests.reference import Reference
from virtmount import hostfile
from virtmount.checking import CannotCheck
from virtmount.checking import check as run_check
from virtmount.errors import Corrupt, NotAnImage
from virtmount.formats import vhdx_check
from virtmount.formats.vhdx import VHDX
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS
from virtmount.plan import Plan
from virtmount.upkeep import Finding, Progress, Repair, Severity

STATES = int(os.environ.get("VIRTMOUNT_CRASH_POINTS", "60"))  # about so many; 0: all


def look(file: HostFile, repair: Repair = Repair.NOTHING) -> list[Finding]:
    """All findings, with the plans carried out."""
    found = []
    for item in VHDX.check(file, DEFAULTS, repair):
        if isinstance(item, Plan):
            assert file.writable
            hostfile.execute(item, [file])
            file.sync()
        elif isinstance(item, Finding):
            found.append(item)
        else:
            assert isinstance(item, Progress)
            assert 0 <= item.done <= item.total
    return found


def check(path: Path, repair: Repair = Repair.NOTHING) -> list[Finding]:
    with HostFile(path, writable=repair is not Repair.NOTHING) as file:
        return look(file, repair)


def texts(findings: list[Finding]) -> list[str]:
    return [f"{f.severity.value} {f.place}: {f.text}" for f in findings]


def damages(findings: list[Finding]) -> list[str]:
    return texts([f for f in findings if f.severity is Severity.DAMAGE])


def contents(path: Path) -> bytes:
    with HostFile(path) as file, Reference([VHDX(file)]) as disk:
        return disk.pread(0, disk.size)


def writable(path: Path) -> None:
    """It can be opened for writing and written to."""
    with HostFile(path, writable=True) as file, Reference([VHDX(file)]) as disk:
        disk.pwrite(disk.size - 512, b"w" * 512)
        disk.flush()
        assert disk.pread(disk.size - 512, 512) == b"w" * 512


BLOCKS = {3: b"d" * MIB, 0: b"a" * MIB, 5: b"f" * MIB}


def plain(tmp_path: Path) -> Made:
    return make(tmp_path / "disk.vhdx", 8 * MIB, BLOCKS)


def entry(block: int, value: int) -> Callable[[Made], None]:
    return lambda made: made.write(made.entry_offset(block), struct.pack("<Q", value))


def write(offset: int, data: bytes) -> Callable[[Made], None]:
    return lambda made: made.write(offset, data)


def log(*changes: tuple[int, bytes | int], named: bool = True) -> Callable[[Made], None]:
    def change(made: Made) -> None:
        if changes:
            made.put_entry(0, mk.log_entry(1, changes, flushed=made.end))
        headers = (mk.header(n, log_guid=mk.LOG_GUID) for n in (1, 2))
        made.put_headers(*headers)

    return change


# What is sound


def test_sound_images_have_nothing(tmp_path: Path) -> None:
    assert check(plain(tmp_path).path) == []
    made = make(tmp_path / "fixed.vhdx", 3 * MIB, dict.fromkeys(range(3), b"x"), fixed=True)
    assert check(made.path) == []
    pair = make_pair(tmp_path, 13 * MIB)
    assert check(pair.child.path) == []
    assert check(pair.parent.path) == []


@pytest.mark.parametrize("options", ["block_size=1M", "block_size=8M,subformat=fixed"])
def test_images_of_qemu_lack_only_the_mark_of_regions(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk.vhdx"
    command = ["qemu-img", "create", "-q", "-f", "vhdx", "-o", options, str(path), "40M"]
    subprocess.run(command, check=True)
    command = ["qemu-io", "-f", "vhdx", "-c", "write 3M 2M", "-c", "write 30M 1M", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    before = path.read_bytes()
    found = check(path)[0]
    assert {f.severity for f in check(path)} == {Severity.NOTE}
    assert found.text.startswith("the BAT or the metadata region is not marked as required")
    assert not found.repaired
    assert path.read_bytes() == before
    content = contents(path)
    assert check(path, Repair.ALL)[0].repaired
    assert [f.text for f in check(path) if "between blocks" not in f.text] == []
    raw = path.read_bytes()
    for at in (192 << 10, 256 << 10):
        assert raw[at : at + 65536] == mk.sealed(raw[at : at + 65536])
        assert raw[at + 44] == raw[at + 76] == 1
    assert contents(path) == content
    done = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True, timeout=60)
    assert "No errors" in done.stdout


def test_after_a_session_there_is_nothing(tmp_path: Path) -> None:
    made = plain(tmp_path)
    with HostFile(made.path, writable=True) as file, Reference([VHDX(file)]) as disk:
        for block in (7, 1, 2, 6):
            disk.pwrite(block * MIB, b"x" * 512)
        disk.flush()
        disk.discard(6 * MIB, MIB)
    assert check(made.path) == []


# What is wrong: how it is made, what is found, what it reads as once mended (None: as before)

LOST = {3: bytes(MIB)}
CASES: list[tuple[str, Callable[[Made], None], list[str], dict[int, bytes]]] = [
    (
        "a torn header",
        write(65536 + 9, b"torn"),
        ["note header 1 at 65536: checksum"],
        {},
    ),
    ("no second header", write(131072, bytes(4096)), ["note header 2 at 131072: signature"], {}),
    (
        "a torn region table",
        write((192 << 10) + 20, b"torn"),
        ["damage region table 1 at 196608: checksum"],
        {},
    ),
    (
        "no second region table",
        write(256 << 10, bytes(4096)),
        ["damage region table 2 at 262144: signature"],
        {},
    ),
    (
        "another second region table",
        write(256 << 10, mk.region_table([])),
        ["damage region table 2 at 262144: another one than region table 1"],
        {},
    ),
    ("a log", log((4 * MIB, b"L" * 4096)), ["note log at 1048576: to be replayed, 1 entries"], {}),
    (
        "a log without entries",
        log(),
        ["damage header 2 at 131072: names a log that has no entries"],
        {},
    ),
    (
        "a block past the end",
        entry(3, 100 * MIB | mk.PRESENT),
        ["damage BAT entry of block 3 at 3145752: at 104857600, the file ends at 7340032"],
        LOST,
    ),
    (
        "a block in the BAT",
        entry(3, 3 * MIB | mk.PRESENT),
        ["damage BAT entry of block 3 at 3145752: at 3145728, where the metadata lies"],
        LOST,
    ),
    (
        "a block at 0",
        entry(3, mk.PRESENT),
        ["damage BAT entry of block 3 at 3145752: at 0, where the metadata lies"],
        LOST,
    ),
    ("state 4", entry(3, 4), ["damage BAT entry of block 3 at 3145752: state 4"], LOST),
    ("state 5", entry(2, 5), ["note BAT entry of block 2 at 3145744: state 5"], {}),
    (
        "zero with a place",
        entry(2, 6 * MIB | mk.ZERO),
        ["note BAT entry of block 2 at 3145744: zero, but at 6291456"],
        {},
    ),
    (
        "two blocks at one place",
        entry(4, 5 * MIB | mk.PRESENT),
        ["damage BAT entry of block 4 at 3145760: at 5242880, where another block lies"],
        {4: b"a" * MIB},
    ),
    (
        "space at the end",
        lambda made: os.truncate(made.path, made.end + 5 * MIB + 100),
        ["leak file: 5242980 bytes behind the last block, which ends at 7340032"],
        {},
    ),
    (
        "a file that ends in a block",
        lambda made: os.truncate(made.path, made.end - 4096),
        ["note file: the file ends at 7335936, its last block at 7340032"],
        {5: b"f" * (MIB - 4096) + bytes(4096)},
    ),
]


@pytest.mark.parametrize(
    ("change", "found", "mended"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_finds_and_mends(
    tmp_path: Path,
    change: Callable[[Made], None],
    found: list[str],
    mended: dict[int, bytes],
) -> None:
    made = plain(tmp_path)
    change(made)
    before = made.path.read_bytes()
    first = check(made.path)
    assert len(first) == len([f for f in first if f.text]) >= len(found)
    for expected in found:
        assert any(text.startswith(expected) for text in texts(first)), texts(first)
    assert not any(finding.repaired for finding in first)
    assert made.path.read_bytes() == before
    again = check(made.path, Repair.ALL)
    assert texts(again) == texts(first)
    for finding in again:
        assert finding.repaired or "between blocks" in finding.text
    rest = check(made.path)
    assert [text for text in texts(rest) if "between blocks" not in text] == []
    content = b"".join({**BLOCKS, **mended}.get(b, bytes(MIB)) for b in range(8))
    found_now = contents(made.path)
    if change is CASES[5][1]:
        content = b"".join(
            {**BLOCKS, 3: b"L" * 4096 + b"d" * (MIB - 4096)}.get(b, bytes(MIB)) for b in range(8)
        )
    assert found_now == content
    writable(made.path)
    done = subprocess.run(
        ["qemu-img", "check", made.path], capture_output=True, text=True, timeout=60
    )
    assert "No errors" in done.stdout


def test_a_copy_for_one_of_two_owners(tmp_path: Path) -> None:
    """Both read as before, and no longer change together.  Blocks that overlap by half, too."""
    blocks = {0: bytes([1]) * 4 * MIB, 3: os.urandom(4 * MIB)}
    made = make(tmp_path / "disk.vhdx", 20 * MIB, blocks, block_size=4 * MIB)
    entry(1, made.hosts[0] + 2 * MIB | mk.PRESENT)(made)
    entry(4, made.hosts[3] | mk.PRESENT)(made)
    before = contents(made.path)
    with HostFile(made.path, writable=True) as file, pytest.raises(Corrupt):
        VHDX(file)
    # Block 0 comes first, then 1 does not fit; 3 keeps its place only if 1 does not.
    found = check(made.path, Repair.ALL)
    assert len(damages(found)) == 3 - 1
    assert contents(made.path) == before
    assert damages(check(made.path)) == []
    with HostFile(made.path, writable=True) as file, Reference([VHDX(file)]) as disk:
        for block in (1, 4):
            disk.pwrite(block * 4 * MIB, b"x" * 4 * MIB)
        assert disk.pread(0, 4 * MIB) == before[: 4 * MIB]
        assert disk.pread(12 * MIB, 4 * MIB) == before[12 * MIB : 16 * MIB]


def test_children_refuse_what_reads_otherwise_now(tmp_path: Path) -> None:
    made = plain(tmp_path)
    for change, same in ((write(192 << 10, b"x"), True), (entry(3, 4), False)):
        change(made)
        with HostFile(made.path) as file:
            identity = VHDX(file).identity
        check(made.path, Repair.ALL)
        with HostFile(made.path) as file:
            assert (VHDX(file).identity == identity) == same


def test_leaks_only(tmp_path: Path) -> None:
    made = plain(tmp_path)
    entry(3, 0)(made)
    entry(2, 5)(made)
    os.truncate(made.path, made.end + 3 * MIB)
    (odd, leak, hole) = check(made.path, Repair.LEAKS)
    assert (odd.repaired, leak.repaired) == (False, True)
    assert hole == Finding(Severity.NOTE, "file", "1 MiB between blocks are free")
    assert made.path.stat().st_size == made.end
    assert made.read(made.entry_offset(2), 8) == struct.pack("<Q", 5)
    assert made.read(made.hosts[3], MIB) == bytes(MIB)


@pytest.mark.parametrize("repair", [Repair.LEAKS, Repair.ALL])
def test_where_lost_data_may_lie_nothing_is_given_back(tmp_path: Path, repair: Repair) -> None:
    made = plain(tmp_path)
    entry(3, 100 * MIB | mk.PRESENT)(made)
    os.truncate(made.path, made.end + 3 * MIB)
    (_, leak, hole) = check(made.path, repair)
    assert "what is lost may lie there" in leak.text
    assert not leak.repaired
    assert hole.text == "1 MiB between blocks are free"
    assert made.read(made.hosts[3], MIB) == b"d" * MIB
    assert made.path.stat().st_size == made.end + 3 * MIB


def test_leaks_are_left_where_a_log_is_pending(tmp_path: Path) -> None:
    made = plain(tmp_path)
    log(made.bat_sector({1: 9 * MIB | mk.PRESENT}))(made)
    os.truncate(made.path, made.end + 3 * MIB)
    before = made.path.read_bytes()
    found = check(made.path, Repair.LEAKS)
    assert not any(finding.repaired for finding in found)
    assert made.path.read_bytes() == before


def test_a_fixed_disk_keeps_the_room_for_its_blocks(tmp_path: Path) -> None:
    made = make(tmp_path / "disk.vhdx", 8 * MIB, {0: b"x" * MIB}, fixed=True, file_length=13 * MIB)
    assert texts(check(made.path, Repair.ALL)) == [
        "leak file: 1048576 bytes behind the last block, which ends at 12582912"
    ]
    assert made.path.stat().st_size == 12 * MIB


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda made: made.put_headers(bytes(4096), bytes(4096)), "header 1 at 65536: signature"),
        (
            lambda made: made.put_headers(mk.header(4), mk.header(4, log_length=2 * MIB)),
            "both have sequence number 4",
        ),
        (write(192 << 10, bytes(128 << 10)), "region table 1 at 196608: signature"),
        (write(2 * MIB, b"x"), "metadata table at 2097152: signature"),
        (
            lambda made: [log((4 * MIB, b"L" * 4096))(made), made.write(MIB + 12, b"\0\x10")],
            "names a log that has no entries",
        ),
        (entry(3, 4 * MIB | mk.PARTIAL), "partially present, but there is no parent"),
    ],
)
def test_what_is_not_mended(
    tmp_path: Path, change: Callable[[Made], object], complaint: str
) -> None:
    made = plain(tmp_path)
    change(made)
    before = made.path.read_bytes()
    found = damages(check(made.path))
    assert len(found) == 1
    assert complaint in found[0]
    if "log" not in complaint:
        check(made.path, Repair.ALL)
        if "partially" not in complaint:
            assert made.path.read_bytes() == before


def test_a_log_without_a_whole_sequence_stays(tmp_path: Path) -> None:
    made = plain(tmp_path)
    made.put_entry(0, mk.log_entry(3, [(4 * MIB, b"L" * 4096)], tail=8192, flushed=made.end))
    made.put_headers(mk.header(1, log_guid=mk.LOG_GUID), mk.header(2, log_guid=mk.LOG_GUID))
    before = made.path.read_bytes()
    (found,) = check(made.path, Repair.ALL)
    assert found.text == "1 valid entries, but no whole sequence (MS-VHDX 2.3.3)"
    assert made.path.read_bytes() == before


def test_children(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 13 * MIB)
    made = pair.child
    made.write(made.bitmap_entry(0), bytes(8))
    before = made.path.read_bytes()
    (found, *rest) = check(made.path, Repair.ALL)
    assert found.place == f"BAT entry of sector bitmap 0 at {made.bitmap_entry(0)}"
    assert not found.repaired
    assert rest == [Finding(Severity.LEAK, "file", rest[0].text)]
    assert made.path.read_bytes() == before
    made = make(tmp_path / "child.vhdx", MIB, parent=mk.locator([]), data_write=CHILD)
    (found,) = check(made.path)
    assert found.text == "no parent_linkage"
    # Its parent is not asked for.
    made = make(tmp_path / "child.vhdx", MIB, parent=mk.below(PARENT, "nowhere"))
    assert check(made.path) == []


def test_a_file_without_a_log_is_only_looked_at(tmp_path: Path) -> None:
    made = plain(tmp_path)
    made.put_headers(mk.header(3, log_length=0), mk.header(3, log_length=0))
    entry(3, 4)(made)
    before = made.path.read_bytes()
    found = check(made.path, Repair.ALL)
    assert "writing without a log" in found[0].text
    assert not any(finding.repaired for finding in found)
    assert made.path.read_bytes() == before


def test_strangers(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(MIB))
    with pytest.raises(NotAnImage):
        check(path)
    made = make(
        tmp_path / "disk.vhdx", MIB, regions=[(mk.STRANGER, 4 * MIB, MIB, 1)], file_length=5 * MIB
    )
    with pytest.raises(CannotCheck, match="required region"):
        run_check(made.path)


def test_by_the_command(tmp_path: Path) -> None:
    made = plain(tmp_path)
    entry(3, 4)(made)
    assert run_check(made.path).exit_code == 2
    report = run_check(made.path, repair=Repair.ALL)
    assert (report.exit_code, report.repaired) == (0, 1)


def test_in_several_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is too long for one: nothing twice, and nothing between them is missed."""
    made = make(
        tmp_path / "disk.vhdx",
        60 * MIB,
        {b: bytes([b]) * 4 * MIB for b in (7, 2, 9, 4, 0)},
        block_size=4 * MIB,
    )
    os.truncate(made.path, made.end + 9 * MIB)
    entry(1, made.hosts[0] + MIB | mk.PRESENT)(made)
    entry(3, made.end + 3 * MIB | mk.PRESENT)(made)
    entry(5, 500 * MIB | mk.PRESENT)(made)
    entry(6, 2 * MIB | mk.PRESENT)(made)

    def found() -> tuple[list[str], int]:
        """Which of two blocks at one place is the second one depends on the order."""
        lines = texts(check(made.path))
        alone = [line for line in lines if "another block" not in line]
        return sorted(alone), len(lines) - len(alone)

    whole = found()
    assert whole[1] == 1
    for window in (1, 2, 3, 5, 7, 16):
        monkeypatch.setattr(vhdx_check, "WINDOW", window)
        assert found() == whole


# Cuts


@pytest.mark.parametrize("name", [c[0] for c in CASES])
def test_mending_that_is_cut(tmp_path: Path, name: str) -> None:
    """At any step nothing is worse than it was, and mending again ends it."""
    made = plain(tmp_path)
    ((_, change, _, _),) = [c for c in CASES if c[0] == name]
    change(made)
    store = Store.load(made.path)

    def bad(store: Store) -> set[str]:
        findings = look(SimulatedFile(store, name="disk.vhdx", writable=False))
        return set(damages(findings))

    def read(store: Store) -> list[bytes]:
        image = Reference([VHDX(SimulatedFile(store, name="disk.vhdx", writable=False))])
        found = []
        for block in range(8):
            try:
                found.append(image.pread(block * MIB, MIB))
            except OSError:
                found.append(b"EIO")
        return found

    before, was = bad(store), read(store)
    events = Log(store)
    file = SimulatedFile(store.copy(), name="disk.vhdx", log=events)
    look(file, Repair.ALL)
    after = read(file.store)
    rng = random.Random(name)
    points = [(epoch, cut) for epoch in events.epochs() for cut in epoch.cuts(rng)]
    if STATES and len(points) > STATES:
        points = [
            point
            for point in points
            if point[1].model == "prefix" or rng.random() < STATES / len(points)
        ]
    for i, (epoch, cut) in enumerate(points):
        state = epoch.build(cut)
        place = epoch.describe(cut)
        assert bad(state) <= before, place
        for old, now, end in zip(was, read(state), after, strict=True):
            assert now in (old, end), place
        if i % 4 == 0:
            again = SimulatedFile(state.copy(), name="disk.vhdx")
            look(again, Repair.ALL)
            assert bad(again.store) == set(), place
            assert read(again.store) == after, place
