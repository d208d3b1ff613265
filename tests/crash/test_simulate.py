"""The simulation itself: what a cut may leave, what the model calls legal, what the judge finds."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.crash.cases import CASES, Made, make, run
from tests.crash.checkers import COPIED, OFFSET, VHDX_BAT, vhdx_regions
from tests.crash.judge import Judge, points, record
from tests.crash.simulate import (
    Cut,
    Log,
    Mark,
    Punched,
    Resized,
    SimulatedFile,
    Store,
    Synced,
    Wrote,
)
from tests.crash.workload import Model, Op, Request, pattern, patterns
from virtmount import hostfile
from virtmount.hostfile import HostFile
from virtmount.plan import Barrier, Extend, Plan, Punch, Truncate, Write

CASE = {case.name: case for case in CASES}


def logged(size: int = 0) -> tuple[SimulatedFile, Log]:
    log = Log(Store(size))
    return SimulatedFile(Store(size), log=log), log


def states(log: Log) -> dict[tuple[int, ...], Store]:
    """All whole states of the last epoch."""
    *_, epoch = log.epochs()
    return {cut.kept: epoch.build(cut) for cut in epoch.cuts(random.Random(0)) if not cut.torn}


@pytest.mark.parametrize("seed", range(20))
def test_store_is_a_file(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    store, real = Store(), bytearray()
    for _ in range(60):
        at, length = rng.randrange(40_000), rng.randrange(1, 12_000)
        how = rng.randrange(4)
        if how == 0:
            store.resize(at)
            real[at:] = bytes(max(0, at - len(real)))
        elif how == 1:
            store.zero(at, length)
            end = min(at + length, len(real))
            real[at:end] = bytes(max(0, end - at))
        else:
            data = rng.randbytes(length)
            store.write(at, data)
            real += bytes(max(0, at + length - len(real)))
            real[at : at + length] = data
        assert store.size == len(real)
    assert store.read(0, len(real)) == real
    assert store.read(len(real) + 5000, 3) == bytes(3)
    store.save(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == real
    assert Store.load(tmp_path / "file").read(0, len(real)) == real
    moved = Store()
    at = rng.choice((0, 4096, 512, 1))
    moved.take(at, store, 0, store.size)
    assert moved.read(at, store.size) == real


def test_simulated_file_is_a_host_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10_000)
    plan = Plan(
        Write(100, b"abc"),
        Extend(20_000),
        Extend(5),
        Barrier,
        Punch(50, 7000),
        Write(25_000, b"z" * 5000),
        Punch(29_000, 9000),
        Truncate(29_500),
        Truncate(40_000),
    )
    file, log = logged()
    file.pwrite(0, b"x" * 10_000)
    hostfile.execute(plan, [file])
    with HostFile(path, writable=True) as real:
        hostfile.execute(plan, [real])
        assert real.size == file.size
        assert real.pread(0, real.size) == file.pread(0, file.size)
    assert [type(event) for event in log.events] == [
        Wrote, Wrote, Resized, Synced, Punched, Wrote, Punched, Resized
    ]  # fmt: skip


def test_a_cut_leaves_what_was_synced_and_any_subset_of_the_rest() -> None:
    file, log = logged()
    file.pwrite(0, b"a" * 512)
    file.sync()
    file.pwrite(0, b"b" * 512)
    file.pwrite(512, b"c" * 512)
    file.punch(0, 256)
    found = states(log)
    assert len(found) == 8
    assert found[()].read(0, 2000).strip(b"\0") == b"a" * 512
    assert found[(3,)].read(0, 2000).strip(b"\0") == b"a" * 512 + b"c" * 512
    assert found[(2, 4)].read(0, 2000).strip(b"\0") == b"b" * 256
    assert found[(4,)].read(0, 2000).strip(b"\0") == b"a" * 256


def test_a_cut_may_lose_the_length_but_not_a_write_behind_it() -> None:
    file, log = logged(1000)
    file.truncate(9000)
    file.pwrite(4096, b"w" * 512)
    assert {kept: store.size for kept, store in states(log).items()} == {
        (): 1000,
        (0,): 9000,
        (1,): 4608,
        (0, 1): 9000,
    }


def test_a_shrunk_file_reads_as_zeros_when_it_grows_again() -> None:
    file, log = logged()
    file.pwrite(0, b"q" * 8192)
    file.sync()
    file.truncate(100)
    file.truncate(8192)
    found = states(log)
    assert found[(2, 3)].read(0, 8192) == b"q" * 100 + bytes(8092)
    assert found[(3,)].read(0, 8192) == b"q" * 8192


def test_writes_tear_at_sectors() -> None:
    file, log = logged()
    file.pwrite(256, b"t" * 2048)  # five sectors, of the first and last a half
    (epoch,) = log.epochs()
    torn = [cut for cut in epoch.cuts(random.Random(1), torn_each=40) if cut.model == "torn"]
    seen = set()
    for cut in torn:
        data = epoch.build(cut).read(0, 2560)
        sectors = tuple(i for i in range(5) if b"t" in data[i * 512 : i * 512 + 512])
        assert (
            data
            == b"".join(
                bytes(256) + b"t" * 256
                if i == 0
                else b"t" * 256 + bytes(256)
                if i == 4
                else b"t" * 512
                for i in range(5)
                if i in sectors
            )
            or len(sectors) < 5
        )
        seen.add(sectors)
    assert len(seen) > 10
    assert tuple(range(5)) not in seen or len(seen) > 1


def test_a_change_that_had_not_ended_is_not_covered_by_a_sync() -> None:
    log = Log(Store())
    log.events += [
        Wrote(0, b"1" * 512),
        Wrote(512, b"2" * 512),
        Synced(frozenset({1})),
        Wrote(1024, b"3" * 512),
    ]
    first, second = log.epochs()
    assert list(first.changes) == [0, 1]
    assert list(second.changes) == [1, 3]
    assert second.build(Cut(4, (), {}, "")).read(0, 2000).strip(b"\0") == b"1" * 512
    assert min(cut.at for cut in second.cuts(random.Random(0))) == 3


def test_states_are_judged_again_after_a_later_flush() -> None:
    log = Log(Store())
    log.events += [Wrote(0, b"1"), Wrote(1, b"2"), Mark("f", flushed=True), Wrote(2, b"3")]
    (epoch,) = log.epochs()
    assert {cut.at for cut in epoch.cuts(random.Random(0)) if cut.kept == (0,)} == {1, 3}
    assert {cut.at for cut in epoch.cuts(random.Random(0)) if cut.kept == (0, 3)} == {4}


def test_model_knows_old_and_new_and_no_third_value() -> None:
    model = Model(Store(4096))
    disk = Store(4096)

    def ask(number: int, op: Op, offset: int = 0, length: int = 0) -> None:
        request = Request(number, op, offset, length)
        model.issued(request)
        if op is not Op.FLUSH:
            request.apply(disk)
        model.acknowledged(request, disk.read(offset, length))
        assert not model.wrong_now(disk)
        assert not model.wrong_after_cut(disk)

    ask(1, Op.WRITE, 0, 1024)
    assert not model.wrong_after_cut(Store(4096))
    ask(2, Op.FLUSH)
    (lost, _) = model.wrong_after_cut(Store(4096))
    assert "sector 0" in lost
    assert "holds zeros, legal: write 1" in lost
    ask(3, Op.WRITE, 0, 512)
    ask(4, Op.WRITE, 0, 512)
    for number in (1, 3, 4):
        state = disk.copy()
        state.write(0, pattern(number, 0))
        assert not model.wrong_after_cut(state)
    for bad in (pattern(5, 0), pattern(3, 1), pattern(3, 0)[:256] + pattern(4, 0)[256:]):
        state = disk.copy()
        state.write(0, bad)
        assert len(model.wrong_after_cut(state)) == 1
    ask(5, Op.DISCARD, 0, 1024)
    ask(6, Op.FLUSH)
    assert not model.wrong_after_cut(Store(4096))
    assert model.wrong_after_cut(Store(4000)) == ["4000 bytes read of 4096"]


def test_model_keeps_a_failed_write_possible_until_something_else_is_flushed() -> None:
    model = Model(Store(512))
    write, again = Request(1, Op.WRITE, 0, 512), Request(3, Op.WRITE, 0, 512)
    model.issued(write)  # and it fails
    model.issued(Request(2, Op.FLUSH))
    model.acknowledged(Request(2, Op.FLUSH))
    for number in (0, 1):
        assert not model.wrong_after_cut(Store.of(pattern(number, 0)))
    model.issued(again)
    model.acknowledged(again)
    model.issued(Request(4, Op.FLUSH))
    model.acknowledged(Request(4, Op.FLUSH))
    assert not model.wrong_after_cut(Store.of(pattern(3, 0)))
    for number in (0, 1):
        assert model.wrong_after_cut(Store.of(pattern(number, 0)))


def test_model_keeps_one_durable_write_and_not_those_before_it() -> None:
    model = Model(Store(1024))
    first, second = Request(1, Op.WRITE, 0, 1024), Request(2, Op.WRITE, 0, 512)
    model.issued(first)
    model.acknowledged(first)
    model.issued(second)
    model.acknowledged(second, durable=True)
    for rest in (0, 1):
        assert not model.wrong_after_cut(Store.of(pattern(2, 0) + pattern(rest, 1)))
        assert model.wrong_after_cut(Store.of(pattern(1, 0) + pattern(rest, 1)))
    model.issued(Request(3, Op.FLUSH))
    model.acknowledged(Request(3, Op.FLUSH))
    assert not model.wrong_after_cut(Store.of(pattern(2, 0) + pattern(1, 1)))
    assert len(model.wrong_after_cut(Store.of(pattern(1, 0) + pattern(0, 1)))) == 2


def test_model_keeps_what_was_in_flight_when_the_flush_was_asked() -> None:
    model = Model(Store(512))
    write, flush = Request(1, Op.WRITE, 0, 512), Request(2, Op.FLUSH)
    model.issued(write)
    model.issued(flush)
    model.acknowledged(write)
    model.acknowledged(flush)
    assert not model.wrong_after_cut(Store(512))
    assert not model.wrong_after_cut(Store.of(pattern(1, 0)))


# A judge that finds nothing proves nothing: these writers are broken on purpose.


def without_barriers(plan: Plan, files: Sequence[HostFile]) -> None:
    hostfile.execute(Plan(*(step for step in plan if step is not Barrier)), files)


def half_of_the_writes(plan: Plan, files: Sequence[HostFile]) -> None:
    """The last write of every plan is forgotten."""
    writes = [step for step in plan if isinstance(step, Write)]
    hostfile.execute(Plan(*(step for step in plan if step not in writes[-1:])), files)


@pytest.mark.parametrize("broken", [without_barriers, half_of_the_writes])
@pytest.mark.parametrize("name", ["vdi", "vhdx", "qcow2-4k", "qcow2-parent"])
def test_judge_finds_a_broken_writer(broken: object, name: str, folder: Path) -> None:
    case = CASE[name]
    sound = make(case, folder)
    made = Made(case, sound.store, sound.parent, sound.content, execute=broken)  # type: ignore[arg-type]
    with pytest.raises((pytest.fail.Exception, AssertionError, OSError)):
        campaign(made, folder)


def campaign(made: Made, folder: Path) -> None:
    for seed in range(4):
        recorded = record(made, seed)
        judge = Judge(made, seed, folder)
        replay = recorded.history.replay()
        rng = random.Random(seed)
        for epoch, cut in points(recorded, rng, 300):
            judge.place = epoch.describe(cut)
            judge.judge(epoch.build(cut), replay.advance(cut.at), rng, again=False)


# The checkers against qemu's.

WRONG, LEAKED = 2, 3  # exit codes of qemu-img check


def test_checkers_agree_with_qemu_on_sound_images(folder: Path) -> None:
    for case in CASES:
        made = make(case, folder)
        found = made.check(made.store, made.store)
        assert not found.wrong, case
        assert not found.leaked, case
        if case.checked:
            run(["qemu-img", "check", "-f", case.format, made.save(made.store, folder)])


def change(store: Store, offset: int, code: str, update: Callable[[int], int]) -> None:
    """Replace one number of the file."""
    (value,) = struct.unpack(code, store.read(offset, struct.calcsize(code)))
    store.write(offset, struct.pack(code, update(value)))


def written(name: str, folder: Path) -> tuple[Made, Store]:
    """An image whose first two clusters hold data, and are the first two in the file."""
    made = make(CASE[name], folder)
    file = SimulatedFile(made.store.copy())
    with made.open(file) as disk:
        disk.pwrite(0, patterns(1, 0, 2 * made.case.cluster))
    return made, file.store


def l2_table(store: Store) -> int:
    (l1,) = struct.unpack(">Q", store.read(40, 8))
    (entry,) = struct.unpack(">Q", store.read(l1, 8))
    return int(entry) & OFFSET


def counts(store: Store) -> int:
    (table,) = struct.unpack(">Q", store.read(48, 8))
    (block,) = struct.unpack(">Q", store.read(table, 8))
    return int(block)


@pytest.mark.parametrize(
    "damage", ["count too low", "counted, not mapped", "one place twice", "COPIED"]
)
def test_qcow2_checker_agrees_with_qemu_on_damage(damage: str, folder: Path) -> None:
    made, store = written("qcow2-4k", folder)
    assert not made.check(store, store).wrong
    table = l2_table(store)
    (entry,) = struct.unpack(">Q", store.read(table, 8))
    count_at = counts(store) + 2 * ((entry & OFFSET) // made.case.cluster)
    if damage == "count too low":
        change(store, count_at, ">H", lambda count: count - 1)
    elif damage == "counted, not mapped":
        change(store, table + 8, ">Q", lambda _: 0)
    elif damage == "one place twice":
        change(store, table + 8, ">Q", lambda _: entry)
    else:
        change(store, table, ">Q", lambda entry: entry & ~COPIED)
    found = made.check(store, store)
    expected = LEAKED if damage == "counted, not mapped" else WRONG
    run(["qemu-img", "check", "-f", "qcow2", made.save(store, folder)], (expected,))
    assert bool(found.wrong) == (expected == WRONG)
    assert bool(found.leaked) == (damage in ("counted, not mapped", "one place twice"))


@pytest.mark.parametrize("damage", ["one place twice", "count too low", "past the end"])
def test_vdi_checker_agrees_with_qemu_on_damage(damage: str, folder: Path) -> None:
    made, store = written("vdi", folder)
    (table,) = struct.unpack("<I", store.read(0x154, 4))
    assert not made.check(store, store).wrong
    if damage == "one place twice":
        change(store, table, "<I", lambda entry: entry ^ 1)
    elif damage == "count too low":
        change(store, 0x184, "<I", lambda count: count - 1)
    else:
        change(store, table, "<I", lambda entry: entry + 20)
    assert made.check(store, store).wrong
    if damage != "past the end":  # qemu compares with the number of blocks only
        run(["qemu-img", "check", "-f", "vdi", made.save(store, folder)], (WRONG,))


@pytest.mark.parametrize(
    "damage",
    ["one place twice", "in the metadata", "past the end", "no tail", "no head", "header", "leak"],
)
def test_vhd_checker_finds_damage(damage: str, folder: Path) -> None:
    made, store = written("vhd-exact", folder)
    (first, second) = struct.unpack(">II", store.read(1536, 8))
    assert 0xFFFFFFFF not in (first, second)
    assert not made.check(store, store).wrong
    end = store.size - 512
    if damage == "leak":
        tail = store.read(end, 512)
        store.write(end + 512, tail)
        assert made.check(store, store).leaked
        return
    wrong = {
        "one place twice": (1536, second),
        "in the metadata": (1536, 2),
        "past the end": (1536, end // 512),
        "no tail": (end, 0),
        "no head": (0, 0),
        "header": (512 + 100, 7),
    }
    offset, value = wrong[damage]
    change(store, offset, ">I", lambda _: value)
    assert made.check(store, store).wrong


@pytest.mark.parametrize("damage", ["one place twice", "in the metadata", "past the end", "state"])
def test_vhdx_checker_finds_damage(damage: str, folder: Path) -> None:
    made, store = written("vhdx", folder)
    assert not made.check(store, store).wrong
    bat = dict(vhdx_regions(store))[VHDX_BAT][0]
    (second,) = struct.unpack("<Q", store.read(bat + 8, 8))
    wrong = {
        "one place twice": second,
        "in the metadata": 1 << 20 | 6,
        "past the end": 1 << 40 | 6,
        "state": second & ~7 | 5,
    }
    change(store, bat, "<Q", lambda _: wrong[damage])
    assert made.check(store, store).wrong
