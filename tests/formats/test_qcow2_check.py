"""Checking and mending QCOW2: the verdicts are those of qemu-img check, and so is what is left.

Where the two differ on purpose, the test says why.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.formats import luks_images
from tests.formats.qcow2_images import (
    content_of,
    create,
    l1_offset,
    l2_offset,
    number,
    opened,
    patch,
    qemu_io,
    run,
    scatter,
    u32,
    u64,
)
from virtmount.errors import NotAnImage, Unsupported
from virtmount.formats.qcow2_check import check
from virtmount.formats.qcow2_tally import Tally, decode, encode
from virtmount.hostfile import HostFile, execute
from virtmount.image import DEFAULTS
from virtmount.plan import Plan
from virtmount.upkeep import Finding, Repair, Severity

KIB, MIB = 1 << 10, 1 << 20
OFFSET = 0x00FFFFFFFFFFFE00
COPIED = 1 << 63

CLEAN, DAMAGED, LEAKY = 0, 2, 3  # exit codes of qemu-img check


def findings(path: Path, repair: Repair = Repair.NOTHING) -> list[Finding]:
    """What the check says; its plans are carried out."""
    found = []
    with HostFile(path, writable=repair is not Repair.NOTHING) as file:
        for item in check(file, DEFAULTS, repair):
            if isinstance(item, Finding):
                found.append(item)
            elif isinstance(item, Plan):
                execute(item, [file])
    return found


def verdict(found: Sequence[Finding]) -> int:
    """As qemu-img check has them, of what is not repaired."""
    left = {finding.severity for finding in found if not finding.repaired}
    if Severity.DAMAGE in left:
        return DAMAGED
    return LEAKY if Severity.LEAK in left else CLEAN


def qemu_verdict(path: Path) -> int:
    command = ["qemu-img", "check", "--output=json"]
    if number(path, 32, 4):
        options = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
        command += ["--object", "secret,id=s,data=geheim", "--image-opts", options]
    else:
        command += ["-f", "qcow2", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    try:
        said = json.loads(done.stdout)
    except ValueError:
        return DAMAGED  # it does not open the image
    if said["check-errors"] or said.get("corruptions"):
        return DAMAGED
    return LEAKY if said.get("leaks") else CLEAN


VARIANTS: dict[str, tuple[str, ...]] = {
    "64k": (),
    "512": ("cluster_size=512",),
    "v2": ("compat=0.10", "cluster_size=4k"),
    "rc1": ("refcount_bits=1", "cluster_size=4k"),
    "rc2": ("refcount_bits=2", "cluster_size=512"),
    "rc64": ("refcount_bits=64", "cluster_size=4k"),
    "rc8": ("refcount_bits=8", "cluster_size=4k"),
    "extended": ("extended_l2=on", "cluster_size=16k"),
    "prealloc": ("preallocation=metadata", "cluster_size=4k"),
}


def cluster_of(path: Path) -> int:
    return 1 << number(path, 20, 4)


def make(path: Path, variant: str = "512", size: int = MIB) -> Path:
    options = VARIANTS[variant]
    create(path, size, *options)
    scatter(path, size, cluster_of(path))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = make(tmp_path / "a.qcow2")
    # Some of the first table's clusters, and a hole among the counted ones.
    qemu_io(path, "write -q -P 3 20k 4k", "write -q -P 4 5k 3k", "discard 21k 512")
    return path


def unused(path: Path) -> int:
    """Where the count of a cluster lies that nothing uses."""
    at = block_at(path)
    return next(at + i for i in range(0, 512, 2) if not number(path, at + i, 2))


def block_at(path: Path) -> int:
    """Where the first refcount block lies."""
    return number(path, number(path, 48))


def mapped(path: Path, table: int = 0) -> list[int]:
    """Offsets of the L2 entries of the active state that have data."""
    at = l2_offset(path, table)
    size = cluster_of(path)
    return [
        at + i
        for i in range(0, size, 8)
        if number(path, at + i) & OFFSET and not number(path, at + i) >> 62 & 1
    ]


# Whole images


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_image_has_no_findings(tmp_path: Path, variant: str) -> None:
    path = make(tmp_path / "a.qcow2", variant)
    before = path.read_bytes()
    assert findings(path) == []
    assert findings(path, Repair.ALL) == []
    assert path.read_bytes() == before


def compressed(path: Path) -> Path:
    create(path, MIB, "cluster_size=4k")
    qemu_io(path, *(f"write -q -c -P {c} {c * 4096} 4096" for c in range(40)))
    return path


def with_snapshots(path: Path, size: str = "512") -> Path:
    make(path, size)
    run("qemu-img", "snapshot", "-c", "one", path)
    qemu_io(path, "write -q -P 77 0 64k", "discard 100k 50k")
    run("qemu-img", "snapshot", "-c", "two", path)
    qemu_io(path, "write -q -P 78 32k 64k")
    return path


def with_bitmap(path: Path) -> Path:
    make(path, "64k", 64 * MIB)
    run("qemu-img", "bitmap", "--add", "-g", "64k", path, "b0")
    run("qemu-img", "bitmap", "--add", "--disable", path, "b1")
    qemu_io(path, "write -q -P 1 1M 1M")
    return path


def with_luks(path: Path) -> Path:
    return luks_images.create(path, MIB + 5 * 512)


def with_data_file(path: Path) -> Path:
    data = path.with_name("data.raw")
    create(path, MIB, f"data_file={data}", "cluster_size=4k")
    qemu_io(path, "write -q -P 3 5k 9k", "write -q -z 100k 8k")
    return path


def with_empty_table(path: Path) -> Path:
    """Discards leave L2 tables with nothing in them."""
    make(path)
    qemu_io(path, "discard 0 1M", "write -q -P 1 3k 1k")
    return path


KINDS = {
    "compressed": compressed,
    "snapshots": with_snapshots,
    "snapshots-4k": lambda path: with_snapshots(path, "rc8"),
    "bitmap": with_bitmap,
    "luks": with_luks,
    "data-file": with_data_file,
    "empty-table": with_empty_table,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_reference_is_counted(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path / "a.qcow2")
    assert findings(path) == []
    assert qemu_verdict(path) == CLEAN


@pytest.mark.parametrize("kind", KINDS)
def test_counts_can_be_made_from_nothing(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path / "a.qcow2")
    patch(path, block_at(path), bytes(cluster_of(path)))
    assert verdict(findings(path)) == DAMAGED
    assert verdict(findings(path, Repair.ALL)) == CLEAN
    assert findings(path) == []
    assert qemu_verdict(path) == CLEAN


# Damaged ones


def snapshot_damage(path: Path, field: int, value: bytes) -> None:
    patch(path, number(path, 64) + field, value)


def swap(path: Path, at: int, change: Callable[[int], int], width: int = 8) -> None:
    patch(path, at, change(number(path, at, width)).to_bytes(width, "big"))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "count too high": lambda p: swap(p, block_at(p) + 2 * 20, lambda v: v + 1, 2),
    "count of an unused cluster": lambda p: patch(p, unused(p), b"\0\1"),
    "count too low": lambda p: patch(p, block_at(p) + 2 * 20, b"\0\0"),
    "count of the header": lambda p: patch(p, block_at(p), b"\0\0"),
    "all counts of a block": lambda p: patch(p, block_at(p), bytes(512)),
    "no block": lambda p: patch(p, number(p, 48), bytes(8)),
    "block past the end": lambda p: patch(p, number(p, 48), u64(1 << 40)),
    "block not aligned": lambda p: swap(p, number(p, 48), lambda v: v + 256),
    "block is the header": lambda p: patch(p, number(p, 48) + 8, u64(512 * 3)),
    "two blocks in one place": lambda p: swap(
        p, number(p, 48) + 8, lambda v: number(p, number(p, 48))
    ),
    "refcount table not aligned": lambda p: swap(p, 48, lambda v: v + 8),
    "refcount table past the end": lambda p: patch(p, 48, u64(1 << 40)),
    "L2 entry without COPIED": lambda p: swap(p, mapped(p)[1], lambda v: v & ~COPIED),
    "L2 entry twice": lambda p: swap(p, mapped(p)[1], lambda v: number(p, mapped(p)[0])),
    "L2 entry past the end": lambda p: patch(p, mapped(p)[1], u64(COPIED | 1 << 40)),
    "L2 entry reserved bits": lambda p: swap(p, mapped(p)[1], lambda v: v | 0x10),
    "L2 entry gone": lambda p: patch(p, mapped(p)[1], bytes(8)),
    "L1 entry without COPIED": lambda p: swap(p, l1_offset(p), lambda v: v & ~COPIED),
    "L1 entry past the end": lambda p: patch(p, l1_offset(p), u64(COPIED | 1 << 40)),
    "L1 entry reserved bits": lambda p: swap(p, l1_offset(p), lambda v: v | 1),
    "L1 entry gone": lambda p: patch(p, l1_offset(p), bytes(8)),
    "L1 entry twice": lambda p: swap(p, l1_offset(p) + 8, lambda v: number(p, l1_offset(p))),
    "data is the L1 table": lambda p: patch(p, mapped(p)[1], u64(COPIED | l1_offset(p))),
    "data is a block": lambda p: patch(p, mapped(p)[1], u64(COPIED | block_at(p))),
    "data is the refcount table": lambda p: patch(p, mapped(p)[1], u64(COPIED | number(p, 48))),
    "data is its L2 table": lambda p: patch(p, mapped(p)[1], u64(COPIED | l2_offset(p))),
    "compressed with COPIED": lambda p: swap(p, mapped(p)[1], lambda v: v | 1 << 62),
}
# What was the guest's is lost there: no repair says that all is well.
LOST = {
    "L2 entry past the end",
    "L2 entry reserved bits",
    "L1 entry past the end",
    "L1 entry reserved bits",
    "data is the L1 table",
    "data is its L2 table",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_mended(image: Path, name: str) -> None:
    DAMAGE[name](image)
    before = image.read_bytes()
    found = findings(image)
    assert verdict(found) == qemu_verdict(image), found
    assert verdict(found) != CLEAN
    assert image.read_bytes() == before
    content = None
    if name not in LOST:
        content = content_of_damaged(image)
    expected = DAMAGED if name in LOST else CLEAN
    after = findings(image, Repair.ALL)
    assert verdict(after) == expected, after
    assert verdict(findings(image)) == expected
    if name in LOST:
        return
    assert findings(image) == []
    assert qemu_verdict(image) == CLEAN
    assert content is None or content_of(image) == content


def content_of_damaged(path: Path) -> bytes | None:
    """What our driver reads, if it reads all of it."""
    try:
        return content_of(path)
    except (NotAnImage, OSError):
        return None


def test_freeing_leaks_only_leaves_damage_alone(image: Path) -> None:
    DAMAGE["count of an unused cluster"](image)
    assert verdict(findings(image)) == LEAKY
    shutil.copy(image, image.with_name("both.qcow2"))
    assert verdict(findings(image, Repair.LEAKS)) == CLEAN
    assert findings(image) == []
    assert qemu_verdict(image) == CLEAN
    both = image.with_name("both.qcow2")
    DAMAGE["L1 entry without COPIED"](both)
    assert verdict(findings(both, Repair.LEAKS)) == DAMAGED
    assert verdict(findings(both)) == DAMAGED
    assert Severity.LEAK not in {finding.severity for finding in findings(both)}


def test_a_flag_follows_the_count_that_was_lowered(image: Path) -> None:
    """Else an image whose only fault is a leak would have a wrong flag afterwards, says qemu."""
    entry = mapped(image)[2]
    at = block_at(image) + 2 * ((number(image, entry) & OFFSET) // 512)
    swap(image, at, lambda v: v + 1, 2)
    swap(image, entry, lambda v: v & ~COPIED)
    assert verdict(findings(image)) == qemu_verdict(image) == LEAKY
    assert [finding.severity for finding in findings(image, Repair.LEAKS)] == [Severity.LEAK]
    assert qemu_verdict(image) == CLEAN


@pytest.mark.parametrize("place", ["L1 entry past the end", "L2 entry past the end"])
def test_leaks_may_belong_to_what_cannot_be_followed(image: Path, place: str) -> None:
    DAMAGE[place](image)
    before = image.read_bytes()
    found = findings(image, Repair.ALL)
    leaks = [finding for finding in found if finding.severity is Severity.LEAK]
    assert leaks
    assert not any(finding.repaired for finding in leaks)
    assert "left alone" in leaks[0].text
    assert image.read_bytes() == before


def test_a_rebuild_keeps_the_counts_of_what_may_be_used(image: Path) -> None:
    """Also where the structure has to be made anew."""
    DAMAGE["L1 entry past the end"](image)
    leaks = leaked(findings(image))
    DAMAGE["block is the header"](image)
    assert verdict(findings(image, Repair.ALL)) == DAMAGED
    assert leaks
    assert leaks < leaked(findings(image))  # and the old structure itself


def leaked(found: Sequence[Finding]) -> set[int]:
    """The clusters that seem unused."""
    clusters: set[int] = set()
    for finding in found:
        if finding.severity is Severity.LEAK and finding.place:
            first, *last = (int(word) for word in finding.place.split() if word.isdigit())
            clusters |= set(range(first, (last or [first])[0] + 1))
    return clusters


def test_one_bit_cannot_count_two_references(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", "rc1")
    entries = mapped(path)
    patch(path, entries[1], u64(number(path, entries[0])))
    assert verdict(findings(path, Repair.ALL)) == DAMAGED
    assert verdict(findings(path)) == qemu_verdict(path) == DAMAGED


def test_more_references_than_a_byte_counts(tmp_path: Path) -> None:
    """Compressed clusters of many guest clusters share one host cluster, as snapshots do."""
    path = make(tmp_path / "a.qcow2", "64k", 40 * MIB)
    entries = mapped(path)
    table = l2_offset(path)
    for i in range(600):
        patch(path, table + i * 8, u64(number(path, entries[0])))
    assert verdict(findings(path)) == qemu_verdict(path) == DAMAGED
    assert verdict(findings(path, Repair.ALL)) == CLEAN
    assert qemu_verdict(path) == CLEAN
    host = (number(path, entries[0]) & OFFSET) // (64 * KIB)
    assert number(path, block_at(path) + 2 * host, 2) == 600


# Marks


def dirty(path: Path) -> Path:
    """lazy_refcounts, and the writer was killed."""
    create(path, MIB, "lazy_refcounts=on", "cluster_size=4k")
    commands = ("write -P 5 3k 100k", "write -P 6 300k 9k", "flush", "write -P 7 500k 4k")
    words = [word for command in (*commands, "sigraise 9") for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *words, path], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert number(path, 72) & 1
    return path


def test_a_dirty_image_is_mended(tmp_path: Path) -> None:
    path = dirty(tmp_path / "a.qcow2")
    content = content_of(path)
    assert content[300 * KIB : 309 * KIB] == b"\6" * 9 * KIB
    assert verdict(findings(path)) == qemu_verdict(path)
    with (
        pytest.raises(Exception, match="reference counts must be rebuilt"),
        opened(path, writable=True),
    ):
        pass
    assert verdict(findings(path, Repair.ALL)) == CLEAN
    assert findings(path) == []
    assert number(path, 72) == 0
    assert qemu_verdict(path) == CLEAN
    assert content_of(path) == content
    with opened(path, writable=True) as disk:
        disk.pwrite(700 * KIB, b"on")
    assert qemu_verdict(path) == CLEAN


def test_marks_go_when_all_is_well_and_stay_when_not(image: Path) -> None:
    swap(image, 72, lambda v: v | 3)
    found = findings(image)
    assert [finding.severity for finding in found] == [Severity.NOTE] * 2
    broken = image.with_name("broken.qcow2")
    shutil.copy(image, broken)
    assert all(finding.repaired for finding in findings(image, Repair.LEAKS))
    assert number(image, 72) == 0
    patch(broken, mapped(broken)[1], u64(COPIED | 1 << 40))
    findings(broken, Repair.ALL)
    assert number(broken, 72) == 3


def test_unknown_autoclear_bits_go_with_the_first_repair(image: Path) -> None:
    swap(image, 88, lambda v: v | 1 << 40 | 1)
    assert findings(image, Repair.ALL) == []
    assert number(image, 88) == 1 << 40 | 1
    DAMAGE["count too low"](image)
    assert verdict(findings(image, Repair.ALL)) == CLEAN
    assert number(image, 88) == 1


def test_bitmaps_without_their_bit_are_leaks(tmp_path: Path) -> None:
    path = with_bitmap(tmp_path / "a.qcow2")
    swap(path, 88, lambda v: 0)
    assert verdict(findings(path)) == qemu_verdict(path) == LEAKY
    assert verdict(findings(path, Repair.LEAKS)) == CLEAN
    assert qemu_verdict(path) == CLEAN


def test_a_table_that_is_cut_short_gets_its_zeros(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    qemu_io(path, "write -q -P 1 0 64k", "write -q -P 2 128k 64k")
    data = [number(path, at) & OFFSET for at in mapped(path)]
    # The table to the end of the file: qemu's preallocation leaves such files.
    table, end = l2_offset(path), max(data) + 64 * KIB
    content = path.read_bytes()
    patch(path, end, content[table : table + 64 * KIB])
    patch(path, l1_offset(path), u64(COPIED | end))
    swap(path, block_at(path) + 2 * (table // (64 * KIB)), lambda v: 0, 2)
    swap(path, block_at(path) + 2 * (end // (64 * KIB)), lambda v: 1, 2)
    with open(path, "r+b") as file:
        file.truncate(end + 512)
    assert [finding.severity for finding in findings(path)] == [Severity.NOTE]
    assert qemu_verdict(path) == CLEAN
    findings(path, Repair.ALL)
    assert findings(path) == []
    assert path.stat().st_size == end + 64 * KIB
    with opened(path, writable=True) as disk:
        disk.pwrite(0, b"written")
    assert qemu_verdict(path) == CLEAN


# Snapshots


@pytest.mark.parametrize(
    ("field", "value"),
    [(0, u64(1 << 40)), (0, u64(513)), (8, u32(1 << 28)), (36, u32(1 << 20))],
    ids=["L1 past the end", "L1 not aligned", "L1 too long", "extra data"],
)
def test_damaged_snapshots(tmp_path: Path, field: int, value: bytes) -> None:
    path = with_snapshots(tmp_path / "a.qcow2")
    patch(path, number(path, 64) + field, value)
    found = findings(path)
    assert verdict(found) == DAMAGED
    assert any("snapshot 0" in finding.place + finding.text for finding in found)
    before = path.read_bytes()
    findings(path, Repair.ALL)
    assert path.read_bytes() == before, "what seems unused may be the snapshot's"


def test_writing_on_after_a_repair_leaves_snapshots_alone(tmp_path: Path) -> None:
    path = with_snapshots(tmp_path / "a.qcow2")
    old = snapshot_content(path, "one")
    patch(path, block_at(path), bytes(512))
    findings(path, Repair.ALL)
    qemu_io(path, "write -q -P 99 0 1M")
    assert snapshot_content(path, "one") == old
    assert qemu_verdict(path) == CLEAN


def snapshot_content(path: Path, name: str) -> bytes:
    raw = path.with_name("snapshot.raw")
    run("qemu-img", "convert", "-l", f"snapshot.name={name}", "-O", "raw", path, raw)
    return raw.read_bytes()


# Against qemu, at random


def flips(path: Path, rng: random.Random) -> None:
    """Some entries of tables are changed."""
    size = cluster_of(path)
    tables = [l1_offset(path), l2_offset(path), block_at(path), number(path, 48)]
    for _ in range(rng.randrange(1, 4)):
        at = rng.choice(tables) + rng.randrange(size // 8) * 8
        old = number(path, at)
        new = rng.choice(
            (
                old ^ 1 << rng.randrange(64),
                0,
                old + size,
                number(path, rng.choice(tables) + rng.randrange(size // 8) * 8),
            )
        )
        patch(path, at, u64(new & (1 << 64) - 1))


@pytest.mark.parametrize("variant", ["512", "v2", "rc2", "rc64"])
def test_random_damage_has_the_verdict_of_qemu(tmp_path: Path, variant: str) -> None:
    base = make(tmp_path / "base.qcow2", variant, 256 * KIB)
    path = tmp_path / "a.qcow2"
    rng = random.Random(variant)
    for i in range(12):
        shutil.copy(base, path)
        flips(path, rng)
        found = findings(path)
        shutil.copy(path, tmp_path / "kept.qcow2")
        # Counts for what lies past the end of the file are nothing to qemu.
        end = path.stat().st_size // cluster_of(path)
        if any(cluster < end for cluster in leaked(found)) or verdict(found) != LEAKY:
            assert verdict(found) == qemu_verdict(path), (i, found)
        after = findings(path, Repair.ALL)
        again = findings(path)
        assert verdict(after) == verdict(again), (i, after, again)
        if verdict(after) == CLEAN:
            assert qemu_verdict(path) == CLEAN, (i, after)


# Refused, and bounded


def test_what_is_no_image_and_what_is_unknown(image: Path) -> None:
    swap(image, 72, lambda v: v | 1 << 50)
    with pytest.raises(Unsupported, match="bit 50"):
        findings(image)
    patch(image, 0, b"nope")
    with pytest.raises(NotAnImage):
        findings(image)


def test_a_header_that_cannot_be_followed_is_a_finding(image: Path) -> None:
    patch(image, 20, u32(40))
    (finding,) = findings(image, Repair.ALL)
    assert finding.place == "header+20"
    assert finding.severity is Severity.DAMAGE


def test_a_file_that_is_too_long_is_refused(image: Path) -> None:
    with open(image, "r+b") as file:
        file.truncate(1 << 37)
    with pytest.raises(Unsupported, match="the most is"):
        findings(image)


def test_many_findings_are_few_lines(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", "512")
    at = block_at(path)
    patch(path, at, b"\0\1\0\2" * 128)
    found = findings(path)
    assert len(found) < 500
    table = l2_offset(path)
    patch(path, table, u64(3 << 40) * 64)
    patch(path, table + 512, u64(3 << 40) * 64)


# Parts


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32, 64])
def test_counts_of_every_width(width: int) -> None:
    numbers = [i * 7 % (1 << min(width, 20)) for i in range(256)]
    assert list(decode(encode(numbers, width), width)) == numbers
    if width < 64:
        with pytest.raises(OverflowError):
            encode([0] * 7 + [1 << width], width)


def test_the_tally_counts_beyond_a_byte() -> None:
    tally = Tally(1000)
    assert tally.add_run(10, 20, 1)
    assert not tally.add_run(10, 20, 3)
    tally.add(12, 300)
    tally.mark(12)
    assert not tally.add_run(10, 20, 1)
    assert list(tally.numbers(10, 4)) == [1, 1, 301, 1]
    tally.add(12, -299)
    assert tally[12] == 2
    assert tally.is_table(12)
    assert tally.used(12, 1)
    assert not tally.used(30, 5000)
    assert tally.numbers(998, 4) == bytes(4)
