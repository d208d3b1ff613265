"""What check() of a VHD finds, and what it mends, at whatever step it is cut."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.crash.simulate import Log, SimulatedFile, Store
from tests.formats import make_vhd
from tests.formats.make_vhd import FREE, KIB, MIB, Block, Spec, child_of, pattern
from tests.formats.test_vhd import (
    DAMAGE,
    bad_head,
    bad_tail,
    content,
    make_pair,
    read,
    seven_zip,
    short_tail,
    without_head,
    without_tail,
)
from tests.formats.whole_vhd import check
from virtmount import hostfile
from virtmount.errors import NotAnImage, VirtmountError
from virtmount.formats.vhd import VHD
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS
from virtmount.plan import Plan
from virtmount.upkeep import Finding, Progress, Repair, Severity

BLOCK = 64 * KIB
STRIDE = BLOCK + 512
TABLE = 1536
COUNT = 6


def spec() -> Spec:
    blocks = {i: Block(pattern(i, BLOCK)) for i in (4, 0, 2)}
    return Spec(COUNT * BLOCK, blocks, block=BLOCK)


START = {4: 2048, 0: 2048 + STRIDE, 2: 2048 + 2 * STRIDE}  # where the blocks are
END = 2048 + 3 * STRIDE


def entry(index: int, value: int) -> Callable[[bytes], bytes]:
    at = TABLE + 4 * index
    return lambda raw: raw[:at] + struct.pack(">I", value) + raw[at + 4 :]


def bad_header(raw: bytes) -> bytes:
    return raw[: 512 + 39] + bytes([raw[512 + 39] ^ 1]) + raw[512 + 40 :]


def two_copies_differ(raw: bytes) -> bytes:
    return raw[:-512] + make_vhd.footer(make_vhd.DYNAMIC, COUNT * BLOCK, uuid=b"x" * 16)


def both_bad(raw: bytes) -> bytes:
    return bad_head(bad_tail(raw))


def leaking(raw: bytes) -> bytes:
    return raw[:-512] + b"\xee" * 70000 + raw[-512:]


def is_sound(path: Path) -> bool:
    return all(finding.severity is Severity.NOTE for finding in check(path))


WHOLE = content(spec())


def but(*blocks: int) -> bytes:
    """The disk without these blocks."""
    left = bytearray(WHOLE)
    for index in blocks:
        left[index * BLOCK : (index + 1) * BLOCK] = bytes(BLOCK)
    return bytes(left)


def cut_in_block_2(raw: bytes) -> bytes:
    return raw[: START[2] + 512 + 4096]


CUT = bytearray(WHOLE)
CUT[2 * BLOCK + 4096 : 3 * BLOCK] = bytes(BLOCK - 4096)

AS_BEFORE = b""
# damage: place of a finding, its words, what the disk is once it is mended
MENDED: dict[Callable[[bytes], bytes], tuple[str, str, bytes]] = {
    without_head: ("footer at 0", "missing", WHOLE),
    bad_head: ("footer at 0", "checksum [0-9a-f]{8}, computed [0-9a-f]{8}", WHOLE),
    without_tail: ("footer at the end", "missing", WHOLE),
    bad_tail: ("footer at the end", "checksum [0-9a-f]{8}, computed", WHOLE),
    short_tail: ("footer at the end", "whole, 511 bytes", WHOLE),
    two_copies_differ: ("footer at the end", "differs from the one at the beginning", WHOLE),
    both_bad: ("footer at 0", "checksum", WHOLE),
    bad_header: ("header+36 at 512", "checksum [0-9a-f]{8}, computed [0-9a-f]{8}", WHOLE),
    leaking: ("footer at the end", "70000 bytes between the last block and the footer", WHOLE),
    entry(1, 100_000): ("table entry 1 at 1540", "block from 51200000 to", WHOLE),
    entry(1, 0): ("table entry 1 at 1540", "block at 0 lies over metadata at 0", WHOLE),
    entry(0, 3): ("table entry 0 at 1536", "block at 1536 lies over metadata at 1536", but(0)),
    entry(5, START[2] // 512): (
        "table entry 5 at 1556",
        f"block at {START[2]} lies over the one at {START[2]}",
        WHOLE[: 5 * BLOCK] + pattern(2, BLOCK),
    ),
    entry(5, START[2] // 512 - 8): (
        "table entry 5 at 1556",
        "lies over the one at",
        AS_BEFORE,
    ),
    cut_in_block_2: ("table entry 2 at 1544", "the blocks end at", bytes(CUT)),
}
NAMES = [
    *("head missing", "head wrong", "tail missing", "tail wrong", "tail short", "copies differ"),
    *("both wrong", "header wrong", "leak", "far", "at 0", "in the table"),
    *("one place twice", "overlap", "cut in the last block"),
]


@pytest.mark.parametrize("damage", MENDED, ids=NAMES)
def test_what_is_wrong_is_named_and_mended(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    place, words, mended = MENDED[damage]
    path = tmp_path / "a.vhd"
    before = damage(spec().build())
    path.write_bytes(before)
    mended = mended or read(path)
    found = check(path)
    assert path.read_bytes() == before
    (finding, *_) = [f for f in found if f.place == place]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(finding.text)
    assert finding.severity is (Severity.LEAK if damage is leaking else Severity.DAMAGE)
    assert not finding.repaired
    again = check(path, Repair.ALL)
    assert again[0]._replace(repaired=False) == found[0]
    assert all(f.repaired for f in again if f.severity is not Severity.NOTE)
    assert check(path) == []
    assert read(path) == mended
    raw = path.read_bytes()
    assert raw[:512] == raw[-512:]
    if MENDED[damage][2] != AS_BEFORE:  # 7-Zip minds what lies under clear bits
        assert seven_zip(path) == mended
    with HostFile(path, writable=True) as file:
        VHD(file)


@pytest.mark.parametrize("damage", MENDED, ids=NAMES)
def test_a_cut_while_mending_makes_nothing_worse(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """What could be read before can be read after, and the next repair ends it."""
    *_, mended = MENDED[damage]
    path = tmp_path / "a.vhd"
    path.write_bytes(damage(spec().build()))
    before = readable(path)
    mended = mended or read(path)
    log = Log(Store.load(path))
    file = SimulatedFile(log.base.copy(), name=str(path), log=log)
    for item in VHD.check(file, DEFAULTS, Repair.ALL):
        if isinstance(item, Plan):
            hostfile.execute(item, [file])
            file.sync()
    rng = random.Random(1)
    for epoch in log.epochs():
        for cut in epoch.cuts(rng):
            epoch.build(cut).save(path)
            now = readable(path)
            assert set(before) <= set(now)
            for at, data in before.items():
                assert now[at] in (data, mended[at : at + 512])
            check(path, Repair.ALL)
            assert is_sound(path)
            assert read(path) == mended


def readable(path: Path) -> dict[int, bytes]:
    """Every 64th sector that can be read, of an image that opens."""
    from tests.reference import Reference

    found = {}
    with HostFile(path) as file:
        try:
            disk = Reference([VHD(file)])
        except VirtmountError:
            return {}
        for at in range(0, disk.size, 32 * KIB):
            try:
                found[at] = disk.pread(at, 512)
            except OSError:
                continue
    return found


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_every_damaged_footer_is_found_and_mended(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "a.vhd"
    path.write_bytes(damage(spec().build()))
    assert not is_sound(path)
    check(path, Repair.ALL)
    assert path.read_bytes() == spec().build()


def test_only_leaks_are_mended_where_only_they_may_be(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    path.write_bytes(entry(1, 100_000)(leaking(spec().build())))
    found = check(path, Repair.LEAKS)
    assert [(f.severity, f.repaired) for f in found] == [
        (Severity.DAMAGE, False),
        (Severity.LEAK, True),
    ]
    assert path.read_bytes() == entry(1, 100_000)(spec().build())


def test_a_sound_image_has_no_findings(tmp_path: Path) -> None:
    assert check(spec().write(tmp_path / "a.vhd")) == []
    assert check(make_vhd.fixed(tmp_path / "b.vhd", bytes(MIB))) == []
    holes = Spec(COUNT * BLOCK, {0: Block(b"x"), 1: Block(b"y")}, block=BLOCK, gap=2 * STRIDE)
    assert check(holes.write(tmp_path / "c.vhd")) == []


def test_a_fixed_image(tmp_path: Path) -> None:
    path = make_vhd.fixed(tmp_path / "a.vhd", pattern(1, MIB))
    good = path.read_bytes()
    path.write_bytes(bad_tail(good))
    (finding,) = check(path)
    assert (finding.severity, finding.place) == (Severity.DAMAGE, f"footer at {MIB}")
    check(path, Repair.ALL)
    # What was wrong was a byte of the unique id: nothing says what it was.
    assert check(path) == []
    assert path.read_bytes()[:MIB] == good[:MIB]
    path.write_bytes(pattern(1, MIB) + make_vhd.footer(make_vhd.FIXED, MIB + 512))
    (finding,) = check(path, Repair.ALL)
    assert (finding.severity, finding.repaired) == (Severity.DAMAGE, False)
    assert finding.text == f"current_size {MIB + 512}, the data ends at {MIB}"
    path.write_bytes(pattern(1, MIB) + make_vhd.footer(make_vhd.FIXED, MIB - 512))
    (finding,) = check(path)
    assert finding == Finding(
        Severity.NOTE, f"footer at {MIB}", "512 bytes between the disk and its footer"
    )


def test_what_is_worth_knowing(tmp_path: Path) -> None:
    path = Spec(4 * BLOCK, creator=b"vpc ", shape=(7, 4, 17)).write(tmp_path / "a.vhd")
    (finding,) = check(path)
    assert finding.severity is Severity.NOTE
    assert finding.text.startswith("current_size 262144, by its geometry 243712")
    raw = spec().build()
    saved = make_vhd.footer(make_vhd.DYNAMIC, COUNT * BLOCK, saved=1)
    path.write_bytes(saved + raw[512:-512] + saved)
    (finding,) = check(path)
    assert finding.severity is Severity.NOTE
    assert finding.text == "a virtual machine was suspended with this disk"


def test_a_childs_parent_is_compared(tmp_path: Path) -> None:
    path, _ = make_pair(tmp_path)
    assert check(path) == []
    base = tmp_path / "base.vhd"
    child = child_of(base, 4 * BLOCK, {}, block=BLOCK)
    child.timestamp = 700_000_000
    child.write(path)
    os.utime(base, (make_vhd_epoch(700_000_000), make_vhd_epoch(700_000_000)))
    assert check(path) == []
    os.utime(base, (make_vhd_epoch(700_000_001), make_vhd_epoch(700_000_001)))
    (finding,) = check(path)
    assert finding.severity is Severity.NOTE
    assert finding.text.endswith("was changed, or copied, since this image was made")
    base.write_bytes(
        base.read_bytes()[:-512] + make_vhd.footer(make_vhd.FIXED, MIB, uuid=b"x" * 16)
    )
    found = check(path)
    assert "expected 50515253-5455-5657-5859-5a5b5c5d5e5f" in found[0].text
    base.unlink()
    assert check(path) == []
    child.paths, child.name = [], ""
    child.write(path)
    (finding,) = check(path)
    assert (finding.severity, finding.text) == (Severity.DAMAGE, "no name of a parent")


def make_vhd_epoch(seconds: int) -> int:
    """Seconds since 1970 of what a VHD counts from 2000 on."""
    return seconds + 946684800


@pytest.mark.parametrize(
    ("at", "value", "place"),
    [
        (60, 9, "footer+60 at 0"),
        (48, 0, "footer+48 at 0"),
        (16, 1 << 31, "footer+16"),
        (512 + 28, 1, "header+28 at 512"),
        (512 + 32, 12345, "header+32 at 512"),
    ],
)
def test_what_cannot_be_mended_is_said(tmp_path: Path, at: int, value: int, place: str) -> None:
    raw = bytearray(spec().build())
    width = 8 if at in (16, 48) else 4
    for start in (0, len(raw) - 512) if at < 512 else (0,):
        raw[start + at : start + at + width] = value.to_bytes(width, "big")
        if at < 512:
            raw[start : start + 512] = make_vhd.summed(bytes(raw[start : start + 512]), 64)
    raw[512:1536] = make_vhd.summed(bytes(raw[512:1536]), 36)
    if at == 60:
        raw[-512:] = bytes(512)
    path = tmp_path / "a.vhd"
    path.write_bytes(raw)
    found = check(path, Repair.ALL)
    assert found[-1].severity is Severity.DAMAGE
    assert not found[-1].repaired
    assert found[-1].place == (place if at != 60 else "footer+60 at 0")
    assert path.read_bytes() == raw


def test_both_copies_wrong_beyond_belief(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    raw = bytearray(both_bad(spec().build()))
    raw[48:56] = raw[-464:-456] = b"\xff" * 8
    path.write_bytes(raw)
    (finding,) = check(path, Repair.ALL)
    assert finding.text.startswith("no whole copy: at 0: checksum")
    assert path.read_bytes() == raw


def test_nothing_to_check(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    path.write_bytes(bytes(MIB))
    with pytest.raises(NotAnImage, match="no VHD footer"):
        check(path)


def test_many_blocks_in_one_place(tmp_path: Path) -> None:
    """Each gets a place of its own with what it read as."""
    path = tmp_path / "a.vhd"
    small = Spec(64 * 4096, {0: Block(pattern(0, 4096))}, block=4096)
    raw = bytearray(small.build())
    raw[TABLE : TABLE + 64 * 4] = raw[TABLE : TABLE + 4] * 64
    path.write_bytes(raw)
    assert len(check(path)) == 63
    check(path, Repair.ALL)
    assert check(path) == []
    assert read(path) == pattern(0, 4096) * 64
    entries = struct.unpack(">64I", path.read_bytes()[TABLE : TABLE + 256])
    assert len(set(entries)) == 64
    assert FREE not in entries


def test_it_says_how_far_it_is(tmp_path: Path) -> None:
    with HostFile(spec().write(tmp_path / "a.vhd")) as file:
        items = [i for i in VHD.check(file, DEFAULTS, Repair.NOTHING) if isinstance(i, Progress)]
    assert items[-1] == Progress(COUNT, COUNT)


VALUES = st.one_of(
    st.sampled_from([0, 1, 4, 5, 130, 133, 262, 391, 512, 1 << 31, FREE - 1, FREE]),
    st.integers(0, FREE),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    fields=st.lists(
        st.tuples(st.one_of(st.integers(0, 84), st.integers(512, 600)), VALUES), max_size=2
    ),
    entries=st.lists(st.tuples(st.integers(0, COUNT - 1), VALUES), max_size=4),
    sums=st.booleans(),
    cut=st.one_of(st.just(0), st.integers(0, 150_000)),
    more=st.sampled_from([b"", bytes(512), b"\xee" * 5000]),
)
def test_whatever_is_mended_stays_mended_and_keeps_what_could_be_read(
    fields: list[tuple[int, int]],
    entries: list[tuple[int, int]],
    sums: bool,
    cut: int,
    more: bytes,
) -> None:
    raw = bytearray(spec().build())
    for index, value in entries:
        raw[TABLE + 4 * index : TABLE + 4 * index + 4] = value.to_bytes(4, "big")
    for at, value in fields:
        raw[at : at + 4] = value.to_bytes(4, "big")
    if sums:
        raw[:512] = make_vhd.summed(bytes(raw[:512]), 64)
        raw[512:1536] = make_vhd.summed(bytes(raw[512:1536]), 36)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.vhd")
        path.write_bytes(bytes(raw[: len(raw) - cut]) + more)
        before = readable(path)
        try:
            found = check(path, Repair.ALL)
        except VirtmountError:
            return
        after = readable(path)
        assert before.items() <= after.items()
        again = [f for f in check(path) if f.severity is not Severity.NOTE]
        if all(f.repaired for f in found if f.severity is not Severity.NOTE):
            assert again == []
            with HostFile(path, writable=True) as file:
                VHD(file)
        assert check(path, Repair.ALL) is not None
