"""QED: fields, refusals, tables that come and go, what a check finds and mends."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import pytest

from tests.crash.checkers_small import check_qed
from tests.crash.simulate import SimulatedFile, Store
from tests.formats.cuts import cut_everywhere
from tests.reference import Reference
from virtmount import hostfile
from virtmount.chain import open_chain
from virtmount.errors import Corrupt, Unsupported
from virtmount.formats import qed_check
from virtmount.formats.qed import QED
from virtmount.formats.qed_header import NEED_CHECK
from virtmount.formats.raw import Raw
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Dirty, Image, Kind, Match, extents
from virtmount.plan import Barrier, Plan, Punch
from virtmount.upkeep import Finding, New, Repair, Severity

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 4 * KIB


def run(*command: str | Path, code: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done
    return done.stdout


def make(path: Path, size: int = 9 * MIB, *options: str, cluster: int = CLUSTER) -> None:
    """A new image by qemu-img."""
    words = [word for option in options for word in ("-o", option)]
    run(
        "qemu-img", "create", "-q", "-f", "qed", "-o", f"cluster_size={cluster}",
        "-o", "table_size=2", *words, path, str(size),
    )  # fmt: skip


def by_qemu(path: Path, *commands: str) -> None:
    said = run("qemu-io", "-f", "qed", *(w for c in commands for w in ("-c", c)), path)
    assert "failed" not in said


def create(path: Path, size: int, parent: Path | None = None, **options: str) -> None:
    path.touch()
    with HostFile(path, writable=True) as file:
        if parent is None:
            plan = QED.create(New([file], str(path), size, options, lambda name: 0))
        else:
            with HostFile(parent) as below:
                image: Image = Raw(below)
                new = New([file], str(path), size, options, lambda name: 0, 512, image, parent.name)
                plan = QED.create(new)
        hostfile.execute(plan, [file])


def number(path: Path, offset: int, width: int = 8) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return int.from_bytes(file.read(width), "little")


def put(path: Path, offset: int, value: int, width: int = 8) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(width, "little"))


def content(path: Path) -> bytes:
    chain = open_chain(path)
    try:
        return Reference(chain.images).pread(0, chain.top.size)
    finally:
        chain.close()


def run_check(file: HostFile, repair: Repair) -> list[Finding]:
    found = []
    for item in QED.check(file, DEFAULTS, repair):
        if isinstance(item, Plan):
            hostfile.execute(item, [file])
        elif isinstance(item, Finding):
            found.append(item)
    return found


def checked(path: Path, repair: Repair = Repair.NOTHING) -> list[Finding]:
    with HostFile(path, writable=repair is not Repair.NOTHING) as file:
        return run_check(file, repair)


def check_is_clean(path: Path) -> None:
    run("qemu-img", "check", "-q", "-f", "qed", path)
    assert not checked(path)


def test_probe() -> None:
    assert QED.probe(b"QED\0" + bytes(60), b"", 64) is Match.SURE
    assert QED.probe(b"QED", b"", 3) is Match.NO


def test_every_kind_of_entry(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    make(path)
    by_qemu(path, "write -P 3 8k 4k", "write -P 4 5M 4k", "write -z 0 4k")
    with HostFile(path) as file:
        image = QED(file)
        kinds = [extent.kind for extent in extents(image, 0, image.size)]
        assert kinds[:4] == [Kind.ZERO, Kind.ABSENT, Kind.DATA, Kind.ABSENT]
        assert kinds[5 * MIB // CLUSTER] is Kind.DATA
        # The third table does not exist.
        assert image.leaf(2 * 1024 // image.entries_per_leaf).table is None
        assert image.details() == {
            "cluster_size": CLUSTER,
            "table_size": 2,
            "tables": 2,
            "need_check": False,
        }


def test_a_table_larger_than_a_leaf(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    run("qemu-img", "create", "-q", "-f", "qed", path, "3G")
    by_qemu(path, "write -P 3 1G 512", "write -P 4 2500M 512")
    with HostFile(path) as file:
        disk = Reference([QED(file)])
        assert disk.pread(1 << 30, 513) == b"\3" * 512 + b"\0"
        assert disk.pread(2500 * MIB, 513) == b"\4" * 512 + b"\0"
        assert not disk.pread((1 << 30) + 65536, 65536).strip(b"\0")


@pytest.mark.parametrize(
    ("offset", "value", "width", "complaint"),
    [
        (16, 8, 8, r"header\+16: unknown feature bits 0x8"),
        (16, 1 << 63, 8, r"header\+16: unknown feature bits"),
        (4, 2048, 4, r"header\+4: cluster size 2048"),
        (4, 4097, 4, r"header\+4: cluster size 4097"),
        (8, 3, 4, r"header\+8: tables of 3 clusters, know 1, 2, 4, 8, 16"),
        (12, 0, 4, r"header\+12: header of 0 clusters"),
        (40, 512, 8, r"header\+40: table at 512, not a multiple of 4096"),
        (40, 0, 8, r"header\+40: table at 0, inside the header"),
        (40, 1 << 62, 8, r"header\+40: table ends at 4611686018427396096, the file at"),
        (48, 0, 8, r"header\+48: image size 0"),
        (48, 513, 8, r"header\+48: image size 513"),
        (48, (4 << 30) + 512, 8, r"header\+48: image size 4294967808"),
        (16, 1, 8, r"header\+56: parent's name of 0 bytes at 0"),
    ],
)
@pytest.mark.parametrize("writable", [False, True])
def test_refuses(
    tmp_path: Path, offset: int, value: int, width: int, complaint: str, writable: bool
) -> None:
    path = tmp_path / "a.qed"
    make(path)
    put(path, offset, value, width)
    before = path.read_bytes()
    with HostFile(path, writable=writable) as file:
        with pytest.raises((Corrupt, Unsupported), match=complaint):
            QED(file)
    assert path.read_bytes() == before


def test_a_table_that_cannot_be_is_an_error_for_its_clusters_only(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    make(path)
    by_qemu(path, "write -P 3 0 4k", "write -P 4 5M 4k")
    put(path, number(path, 40), 1 << 40)
    with HostFile(path) as file:
        disk = Reference([QED(file)])
        assert disk.pread(5 * MIB, CLUSTER) == b"\4" * CLUSTER
        with pytest.raises(Corrupt, match="L1 entry 0 at 4096: table ends at"):
            disk.pread(0, 1)
    with HostFile(path, writable=True) as file:
        with pytest.raises(Corrupt, match=r"entry 0 at 4096: table ends at .*: not written"):
            QED(file)


# Writing


def test_the_bit_is_there_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    make(path)
    put(path, 32, 7)  # autoclear bits that nobody knows
    with HostFile(path, writable=True) as file, Reference([QED(file)]) as disk:
        assert (number(path, 16), number(path, 32)) == (0, 7)
        disk.pwrite(5, b"x")
        assert (number(path, 16), number(path, 32)) == (NEED_CHECK, 0)
        disk.flush()
        assert number(path, 16) == NEED_CHECK
    assert number(path, 16) == 0
    check_is_clean(path)


def test_a_table_is_durable_before_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    make(path)
    with HostFile(path, writable=True) as file:
        image = QED(file)
        hostfile.execute(image.begin(), image.files)
        reservation = image.reserve(1)
        hostfile.execute(reservation.plan, image.files)
        plan = image.commit([Dirty(0, reservation.runs[0].host_offset, False)])
        _, table, barrier, first, last = plan
        assert barrier is last is Barrier
        assert getattr(table, "offset", 0) >= 3 * CLUSTER
        assert getattr(first, "offset", 0) == CLUSTER  # the first level


def test_discard_keeps_the_cluster_and_empties_it(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    make(path)
    by_qemu(path, "write -P 3 0 16k")
    size = path.stat().st_size
    with HostFile(path, writable=True) as file:
        image = QED(file)
        hostfile.execute(image.begin(), image.files)
        plan = image.discard(1, 5)
        assert {type(step) for step in plan} == {Punch}
        hostfile.execute(plan, image.files)
        hostfile.execute(image.end(), image.files)
    assert content(path)[: 16 * KIB] == b"\3" * CLUSTER + bytes(12 * KIB)
    assert path.stat().st_size == size
    check_is_clean(path)


def test_a_discard_over_a_parent_hides_it(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    (tmp_path / "base.raw").write_bytes(b"\7" * 9 * MIB)
    make(path, 9 * MIB, "backing_file=base.raw", "backing_fmt=raw")
    chain = open_chain(path, writable=True)
    with Reference(chain.images) as disk:
        disk.pwrite(100, b"x")
        disk.discard(0, 8 * MIB)  # also where there are no tables
        assert not disk.pread(0, 8 * MIB).strip(b"\0")
    chain.close()
    assert content(path) == bytes(8 * MIB) + b"\7" * MIB
    check_is_clean(path)


def test_spare_tables_are_not_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    make(path, 300 * MIB)
    for at in range(0, 300 * MIB, 40 * MIB):
        with HostFile(path, writable=True) as file, Reference([QED(file)]) as disk:
            disk.pwrite(at, b"x")
        check_is_clean(path)
    assert path.stat().st_size < 300 * CLUSTER


def test_many_tables_in_one_commit(tmp_path: Path) -> None:
    """More than there are spares."""
    path = tmp_path / "a.qed"
    make(path, 300 * MIB)
    with HostFile(path, writable=True) as file, Reference([QED(file)]) as disk:
        for at in range(0, 300 * MIB, 4 * MIB):
            disk.pwrite(at, b"x")
    found = checked(path)
    assert all(item.severity is Severity.LEAK for item in found)
    with HostFile(path) as file:
        disk = Reference([QED(file)])
        assert all(disk.pread(at, 2) == b"x\0" for at in range(0, 300 * MIB, 4 * MIB))
    size = path.stat().st_size
    with HostFile(path, writable=True) as file, Reference([QED(file)]) as disk:
        disk.pwrite(CLUSTER, b"y")
    assert path.stat().st_size <= size + CLUSTER


def test_what_a_power_cut_left_is_used_first(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    make(path)
    by_qemu(path, "write -P 3 0 4k")
    with path.open("ab") as file:
        file.write(b"\xee" * 2 * CLUSTER)
    put(path, 16, NEED_CHECK)
    size = path.stat().st_size
    with HostFile(path, writable=True) as opened, Reference([QED(opened)]) as disk:
        disk.pwrite(CLUSTER + 1, b"y")
        disk.pwrite(2 * CLUSTER + 1, b"z")
    assert path.stat().st_size == size
    assert content(path)[: 3 * CLUSTER] == (
        b"\3" * CLUSTER + b"\0y".ljust(CLUSTER, b"\0") + b"\0z".ljust(CLUSTER, b"\0")
    )
    check_is_clean(path)


# Whole images


@pytest.mark.parametrize("options", [{}, {"cluster_size": "4K", "table_size": "2"}])
def test_making(tmp_path: Path, options: dict[str, str]) -> None:
    path = tmp_path / "a.qed"
    create(path, 9 * MIB + 1, None, **options)
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    assert (info["format"], info["virtual-size"]) == ("qed", 9 * MIB + 512)
    with HostFile(path, writable=True) as file, Reference([QED(file)]) as disk:
        disk.pwrite(9 * MIB, b"end")
    by_qemu(path, "write -P 5 1M 1k")
    assert content(path) == bytes(MIB) + b"\5" * 1024 + bytes(8 * MIB - 1024) + b"end".ljust(
        512, b"\0"
    )
    check_is_clean(path)


def test_making_a_child(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"\7" * MIB)
    create(tmp_path / "a.qed", MIB, tmp_path / "base.raw")
    assert number(tmp_path / "a.qed", 16) == 5  # a parent, and a raw one
    assert content(tmp_path / "a.qed") == b"\7" * MIB
    out = tmp_path / "out.raw"
    run("qemu-img", "convert", "-f", "qed", "-O", "raw", tmp_path / "a.qed", out)
    assert out.read_bytes() == b"\7" * MIB


@pytest.mark.parametrize(
    ("options", "size", "complaint"),
    [
        ({"cluster_size": "2K"}, MIB, "cluster_size: '2K', know powers of two from 4K to 64M"),
        ({"cluster_size": "5K"}, MIB, "cluster_size"),
        ({"table_size": "1"}, MIB, "table_size: '1', know 2, 4, 8 and 16"),
        ({}, 0, "size: 0 bytes"),
        ({"cluster_size": "4K", "table_size": "2"}, (4 << 30) + 1, "the tables reach 4294967296"),
    ],
)
def test_what_cannot_be_made(
    tmp_path: Path, options: dict[str, str], size: int, complaint: str
) -> None:
    with pytest.raises(Unsupported, match=complaint):
        create(tmp_path / "a.qed", size, None, **options)


def resize(path: Path, size: int) -> None:
    with HostFile(path, writable=True) as file:
        hostfile.execute(QED(file).resize(size), [file])


def test_growing(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    make(path, MIB + 512)
    by_qemu(path, "write -P 3 0 1M")
    with HostFile(path, writable=True) as file, Reference([QED(file)]) as disk:
        disk.pwrite(MIB, b"\4" * 512)
    with HostFile(path, writable=True) as file:
        host = next(iter(extents(QED(file), MIB, 512))).host_offset
        file.pwrite(host + 512, b"\xee" * 512)  # what is behind the end
    for size in (MIB + 512, 5 * MIB, 4 << 30):
        resize(path, size)
        check_is_clean(path)
        info = json.loads(run("qemu-img", "info", "--output=json", path))
        assert info["virtual-size"] == size
        with HostFile(path) as file:
            disk = Reference([QED(file)])
            found = disk.pread(0, min(size, 5 * MIB))
        assert found == (b"\3" * MIB + b"\4" * 512).ljust(len(found), b"\0")
    with pytest.raises(Unsupported, match="it can only grow"):
        resize(path, MIB)
    with pytest.raises(Unsupported, match="the tables reach 4294967296"):
        resize(path, 5 << 30)


def test_growth_that_would_bring_something_to_light_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    make(path, MIB)
    by_qemu(path, "write -P 3 0 4k")
    table = number(path, number(path, 40))
    put(path, table + 8 * 900, 1)
    with pytest.raises(Corrupt, match="1 entries behind the disk's end"):
        resize(path, 2 * MIB)
    put(path, table + 8 * 900, 0)
    put(path, number(path, 40) + 8, table)
    with pytest.raises(Corrupt, match="names tables behind the disk's end"):
        resize(path, 6 * MIB)


def rebase(path: Path, parent: Path | None) -> None:
    with HostFile(path, writable=True) as file:
        image = QED(file)
        if parent is None:
            hostfile.execute(image.rebase(None, ""), [file])
            return
        with HostFile(parent) as below:
            hostfile.execute(image.rebase(Raw(below), parent.name), [file])


def test_rebasing(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    for name, byte in (("one.raw", b"\1"), ("two.raw", b"\2"), ("n" * 250 + ".raw", b"\3")):
        (tmp_path / name).write_bytes(byte * MIB)
        if not path.exists():
            create(path, MIB, tmp_path / name)
        else:
            rebase(path, tmp_path / name)
        assert content(path) == byte * MIB
        info = json.loads(run("qemu-img", "info", "--output=json", path))
        assert info["backing-filename"] == name
    with pytest.raises(Unsupported, match="an image with a parent is not resized"):
        resize(path, 2 * MIB)
    rebase(path, None)
    assert content(path) == bytes(MIB)
    assert number(path, 16) == 0


def damage(path: Path) -> bytes:
    """Clusters with two owners, behind the end, in a table; a table that is none."""
    make(path, 9 * MIB)
    by_qemu(path, "write -P 3 0 4k", "write -P 4 4k 4k", "write -P 5 8k 4k", "write -P 6 5M 4k")
    table = number(path, number(path, 40))
    put(path, table + 8 * 3, number(path, table))
    put(path, table + 8 * 4, 1 << 40)
    put(path, table + 8 * 5, table)
    put(path, table + 8 * 6, 12345)
    put(path, number(path, 40) + 16, 999)
    put(path, 16, NEED_CHECK)
    with path.open("ab") as file:
        file.write(b"\xee" * CLUSTER)
    first = b"".join(bytes([value]) * CLUSTER for value in (3, 4, 5, 3, 0, 0, 0))
    return first.ljust(5 * MIB, b"\0") + b"\6" * CLUSTER + bytes(4 * MIB - CLUSTER)


def test_check_finds_everything_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    damage(path)
    before = path.read_bytes()
    for repair in (Repair.NOTHING, Repair.LEAKS):
        found = checked(path, repair)
        texts = [item.text.split(":")[0] for item in found if item.severity is Severity.DAMAGE]
        assert len(texts) == 5
        assert "not a multiple of 4096" in texts[0]
        assert "past the end" in texts[1]
        assert "over a table" in texts[2]
        assert "not a multiple" in texts[3]
        assert "another owner" in texts[4]
        assert not any(item.repaired for item in found)
        assert path.read_bytes() == before


def test_repair(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    expected = damage(path)
    found = checked(path, Repair.ALL)
    assert len(found) >= 6
    checked(path, Repair.LEAKS)
    check_is_clean(path)
    assert content(path) == expected


def test_leaks(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    make(path)
    by_qemu(path, "write -P 3 0 4k", "write -P 4 4k 4k")
    with path.open("ab") as file:
        file.write(b"\xee" * 3 * CLUSTER)
    table = number(path, number(path, 40))
    put(path, table, 0)
    (inside, behind) = checked(path)
    assert inside.severity is behind.severity is Severity.LEAK
    run("qemu-img", "check", "-q", "-f", "qed", path, code=3)
    checked(path, Repair.LEAKS)
    (left,) = checked(path)
    assert left.text.startswith("1 clusters that nothing names")
    with HostFile(path, writable=True) as opened, Reference([QED(opened)]) as disk:
        disk.pwrite(8 * KIB, b"x")
    check_is_clean(path)


def test_an_image_that_was_not_closed_is_marked_clean(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    make(path)
    put(path, 16, NEED_CHECK)
    assert [item.severity for item in checked(path)] == [Severity.NOTE]
    assert [item.repaired for item in checked(path, Repair.LEAKS)] == [True]
    assert number(path, 16) == 0


def test_too_many_second_owners_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.qed"
    make(path)
    by_qemu(path, "write -P 3 0 4k")
    table = number(path, number(path, 40))
    with path.open("r+b") as file:
        file.seek(table)
        file.write(struct.pack("<Q", number(path, table)) * 20)
    monkeypatch.setattr(qed_check, "MAX_COPIES", 5)
    monkeypatch.setattr(qed_check, "MAX_FINDINGS", 10)
    found = checked(path, Repair.ALL)
    assert len(found) == 11
    assert found[-1].text == "9 more entries that cannot be right"


def test_repair_may_be_cut_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    expected = damage(path)

    def act(file: HostFile) -> None:
        run_check(file, Repair.ALL)
        store = file.store  # type: ignore[attr-defined]
        assert not check_qed(store).wrong
        reader = SimulatedFile(store, name="a.qed", writable=False)
        assert Reference([QED(reader)]).pread(0, 9 * MIB) == expected

    def judge(store: Store) -> None:
        """What could be read before can be read."""
        disk = Reference([QED(SimulatedFile(store, name="a.qed", writable=False))])
        assert disk.pread(0, 4 * CLUSTER) == expected[: 4 * CLUSTER]

    cut_everywhere(Store.load(path), act, judge)


def test_growing_may_be_cut_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    make(path, MIB + 512)
    by_qemu(path, "write -P 3 0 1M", "write -P 4 1M 512")
    before = content(path)

    def act(file: HostFile) -> None:
        image = QED(file)
        if image.size == len(before):
            hostfile.execute(image.resize(9 * MIB), [file])

    def judge(store: Store) -> None:
        image = QED(SimulatedFile(store, name="a.qed", writable=False))
        assert image.size in (len(before), 9 * MIB)
        assert Reference([image]).pread(0, image.size) == before.ljust(image.size, b"\0")

    cut_everywhere(Store.load(path), act, judge, least=2)
