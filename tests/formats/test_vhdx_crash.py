"""VHDX after a power cut, as qemu finds it: replayed by it, equal, and writable again.

tests/crash looks at every format and thousands of states, a few of them with qemu.  Here are the
moments at which the log changes shape, and qemu looks at each: the first entry, a new lap, a batch
of several entries, the application of somebody else's log, the end.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.crash.simulate import Cut, Epoch, Log, SimulatedFile, Store
from tests.formats import make_vhdx as mk
from tests.formats.make_vhdx import MIB, log_entry, make
from tests.reference import Reference
from virtmount import hostfile
from virtmount.formats.vhdx import VHDX
from virtmount.image import DEFAULTS, Dirty, Run
from virtmount.upkeep import Finding, Repair, Severity

SIZE = 24 * 1024 * MIB  # 48 BAT sectors
STATES = int(os.environ.get("VIRTMOUNT_CRASH_POINTS", "14"))  # per test; 0: all
UNTOUCHED = SIZE - 3 * MIB  # where the ones who write on write


SEVEN = b"seven".ljust(512)  # what block 7 holds from the start


class Disk:
    """A driver over a simulated file, its plans carried out, guest data written by hand."""

    def __init__(self, store: Store) -> None:
        self.log = Log(store)
        self.file = SimulatedFile(store.copy(), name="disk.vhdx", log=self.log)
        self.image = VHDX(self.file)
        self.first = 0  # cuts before this event are not tried
        # After so many events, at the latest, these blocks hold this; before: the one before.
        self.held: list[tuple[int, dict[int, bytes]]] = [(0, {7: SEVEN})]
        self.pool: list[int] = []

    def do(self, plan: hostfile.Plan) -> None:
        hostfile.execute(plan, [self.file])

    def write(self, *blocks: int) -> None:
        """Map blocks to new places with contents of their own, durably."""
        while len(self.pool) < len(blocks):
            reservation = self.image.reserve(len(blocks) - len(self.pool))
            self.do(reservation.plan)
            for run in reservation.runs:
                self.pool += (run.host_offset + i * MIB for i in range(run.count))
        dirty = []
        held = dict(self.held[-1][1])
        for block in sorted(blocks):
            host = self.pool.pop(0)
            held[block] = struct.pack("<Q", len(self.held) << 32 | block) * 64
            self.file.pwrite(host, held[block])
            dirty.append(Dirty(block, host, True))
        self.do(self.image.commit(dirty))
        self.held.append((len(self.log.events), held))

    def discard(self, block: int) -> None:
        self.do(self.image.discard(block, 1))
        held = {**self.held[-1][1]}
        held[block] = bytes(512)
        self.held.append((len(self.log.events), held))

    def end(self) -> None:
        self.image.release([Run(host, 1) for host in self.pool])
        self.do(self.image.end())

    def legal(self, at: int) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """What the blocks may hold after `at` events: this for certain, or that already."""
        done = [held for when, held in self.held if when <= at][-1]
        later = [held for when, held in self.held if when > at]
        return done, later[0] if later else done


def sampled(log: Log, first: int) -> list[tuple[Epoch, Cut]]:
    rng = random.Random(1)
    found = [
        (epoch, cut)
        for epoch in log.epochs()
        for cut in epoch.cuts(rng, torn_each=3)
        if cut.at >= first
    ]
    # Torn and odd subsets are many; what each step leaves by itself is always looked at.
    if STATES and len(found) > STATES:
        prefixes = [point for point in found if point[1].model == "prefix"]
        others = [point for point in found if point[1].model != "prefix"]
        rng.shuffle(prefixes)
        rng.shuffle(others)
        half = STATES // 2
        prefixes = prefixes[: max(half, STATES - len(others))]
        found = prefixes + others[: STATES - len(prefixes)]
    return found


def qemu_io(path: Path, *commands: str) -> str:
    args = [part for command in commands for part in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "vhdx", *args, path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Pattern verification failed" not in done.stdout, done.stdout
    return done.stdout


def ours(path: Path, blocks: Sequence[int]) -> dict[int, bytes]:
    """As we read it, without writing."""
    with hostfile.HostFile(path) as file:
        disk = Reference([VHDX(file)])
        return {block: disk.pread(block * MIB, 512) for block in blocks}


def damaged(path: Path) -> list[Finding]:
    """What our own check has against it.  A torn header and a pending log are no damage."""
    with hostfile.HostFile(path) as file:
        found = VHDX.check(file, DEFAULTS, Repair.NOTHING)
        return [f for f in found if isinstance(f, Finding) and f.severity is Severity.DAMAGE]


def judge(disk: Disk, folder: Path) -> int:
    """Look at sampled states of a disk's log, with qemu and with us."""
    states = sampled(disk.log, disk.first)
    blocks = sorted(disk.held[-1][1])
    path = folder / "cut.vhdx"
    for epoch, cut in states:
        epoch.build(cut).save(path)
        place = epoch.describe(cut)
        done, later = disk.legal(cut.at)
        found = ours(path, blocks)
        for block in blocks:
            legal = (done.get(block, bytes(512)), later.get(block, bytes(512)))
            assert found[block] in legal, f"block {block}\n{place}"
        assert damaged(path) == [], place
        # qemu replays, finds nothing to complain about, reads the same and writes.
        said = subprocess.run(
            ["qemu-img", "check", "-r", "all", path], capture_output=True, text=True, timeout=60
        )
        assert said.returncode == 0, f"{said.stdout}{said.stderr}\n{place}"
        assert "No errors were found" in said.stdout, f"{said.stdout}\n{place}"
        again = ours(path, blocks)
        for block in blocks:
            # Of a batch that was never acknowledged qemu may take other entries than we do.
            legal = (done.get(block, bytes(512)), later.get(block, bytes(512)))
            assert again[block] in legal, f"block {block} by qemu\n{place}"
        out = qemu_io(path, f"write -P 85 {UNTOUCHED} 512", f"read -P 85 {UNTOUCHED} 512")
        assert out.count("wrote") == 1, place
        # We write on after both.
        with hostfile.HostFile(path, writable=True) as file, Reference([VHDX(file)]) as mine:
            mine.pwrite(UNTOUCHED + MIB, b"\x66" * 512)
            mine.flush()
        qemu_io(
            path,
            f"read -P 85 {UNTOUCHED} 512",
            f"read -P 102 {UNTOUCHED + MIB} 512",
            f"write -P 119 {UNTOUCHED + 2 * MIB} 512",
        )
        assert ours(path, blocks) == again, place
    return len(states)


def empty(tmp_path: Path) -> Store:
    return Store.load(make(tmp_path / "made.vhdx", SIZE, {7: SEVEN}).path)


def first_entry(disk: Disk) -> None:
    disk.do(disk.image.begin())
    disk.write(1)
    disk.write(2, 600)
    disk.discard(7)
    disk.end()


def several_entries(disk: Disk) -> None:
    disk.do(disk.image.begin())
    disk.write(3, 700)
    disk.pool += [
        run.host_offset + i * MIB
        for reservation in [disk.image.reserve(80)]
        for run in reservation.runs
        for i in range(run.count)
    ]
    disk.file.truncate(max(disk.pool) + MIB)
    disk.file.sync()
    disk.first = len(disk.log.events)
    disk.write(*range(10, 23 * 1024, 600))
    disk.write(8)
    disk.end()


def new_lap(disk: Disk) -> None:
    disk.do(disk.image.begin())
    writer = disk.image.journal.writer
    disk.write(*range(100, 114))
    while writer._next + 3 * 8192 <= writer.length:
        disk.write(*range(20, 22))
    disk.first = len(disk.log.events)
    lap = writer.guid
    for block in range(60, 66):
        disk.write(block, 600 + block)
    assert writer.guid != lap
    disk.end()


def new_lap_with_a_batch(disk: Disk) -> None:
    disk.do(disk.image.begin())
    writer = disk.image.journal.writer
    while writer._next + 20 * 4096 <= writer.length:
        disk.write(*range(20, 22))
    disk.first = len(disk.log.events)
    lap = writer.guid
    disk.write(*range(10, 23 * 1024, 600))
    assert writer.guid != lap
    disk.write(5, 6)
    disk.end()


@pytest.mark.parametrize(
    "workload",
    [first_entry, several_entries, new_lap, new_lap_with_a_batch],
    ids=lambda f: f.__name__,
)
def test_qemu_after_a_cut(tmp_path: Path, workload: Callable[[Disk], None]) -> None:
    disk = Disk(empty(tmp_path))
    workload(disk)
    assert judge(disk, tmp_path) >= min(STATES or 1, 14)


def test_qemu_after_a_cut_while_somebody_elses_log_is_applied(tmp_path: Path) -> None:
    made = make(tmp_path / "made.vhdx", SIZE, {7: b"7" * MIB, 8: b"8" * MIB, 9: b"9" * MIB})
    blocks = {7: made.hosts[7], 8: made.hosts[8], 9: made.hosts[9]}
    for block in blocks:
        made.write(made.entry_offset(block), bytes(8))
    made.put_headers(mk.header(1, log_guid=mk.LOG_GUID), mk.header(2, log_guid=mk.LOG_GUID))
    # Two entries: the second undoes a part of the first, and zeroes what lies beside it.
    first = made.bat_sector({7: blocks[9] | mk.PRESENT, 8: blocks[8] | mk.PRESENT})
    second = made.bat_sector({7: blocks[7] | mk.PRESENT, 9: blocks[9] | mk.PRESENT})
    at = made.put_entry(0, log_entry(1, [first], flushed=made.end))
    made.put_entry(
        at, log_entry(2, [second, (made.bat + 4096, 8192)], flushed=made.end, last=made.end + MIB)
    )
    disk = Disk(Store.load(made.path))
    disk.held = [(0, {7: b"7" * 512, 8: bytes(512), 9: b"9" * 512})]
    disk.do(disk.image.begin())
    disk.write(1, 600)
    disk.end()
    assert judge(disk, tmp_path) >= min(STATES or 1, 14)


def test_a_cut_while_recovering_from_a_cut(tmp_path: Path) -> None:
    """R4: replayed twice is replayed."""
    disk = Disk(empty(tmp_path))
    disk.do(disk.image.begin())
    disk.write(1)
    disk.write(2, 600)
    disk.write(5)
    held = disk.held[-1][1]
    # All of the log is there, and none of what it changes in place since the last barrier.
    *_, epoch = disk.log.epochs()
    store = epoch.durable
    again = Disk(store)
    again.held = [(0, held)]
    assert again.image.details()["log"].startswith("to be replayed")
    again.do(again.image.begin())
    again.write(9)
    again.end()
    assert judge(again, tmp_path) >= min(STATES or 1, 14)


def test_killed_at_any_step(tmp_path: Path) -> None:
    """Without a power cut every step that was made is there, and so is a commit."""
    disk = Disk(empty(tmp_path))
    first_entry(disk)
    for at in range(len(disk.log.events) + 1):
        store = disk.log.base.copy()
        for event in disk.log.events[:at]:
            if hasattr(event, "apply"):
                event.apply(store)
        file = SimulatedFile(store, writable=False)
        image = Reference([VHDX(file)])
        done, later = disk.legal(at)
        for block in sorted(disk.held[-1][1]):
            legal = (done.get(block, bytes(512)), later.get(block, bytes(512)))
            assert image.pread(block * MIB, 512) in legal
