"""Repairs of QCOW2 that are cut short at every moment.

Whatever is left reads the same, has no more damage than before, and is mended by another repair.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.cases import content_of
from tests.crash.simulate import SimulatedFile, Store
from tests.formats import test_qcow2_check as damage
from tests.formats.cuts import cut_everywhere
from virtmount import hostfile
from virtmount.errors import VirtmountError
from virtmount.formats.qcow2 import QCOW2
from virtmount.formats.qcow2_check import check
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS
from virtmount.plan import Plan
from virtmount.upkeep import Finding, Repair, Severity

# Flags are mended after the counts that they repeat: in between they are no worse than before.
FLAGS = "marked as the only reference"


def repair(file: HostFile) -> list[Finding]:
    found = []
    for item in check(file, DEFAULTS, Repair.ALL):
        if isinstance(item, Plan):
            hostfile.execute(item, [file])
            file.sync()
        elif isinstance(item, Finding):
            found.append(item)
    return found


def faults(store: Store, severity: Severity) -> list[str]:
    file = SimulatedFile(store, name="image", writable=False)
    return [
        f"{item.place}: {item.text}"
        for item in check(file, DEFAULTS, Repair.NOTHING)
        if isinstance(item, Finding) and item.severity is severity
    ]


def damages(store: Store) -> int:
    return sum(FLAGS not in fault for fault in faults(store, Severity.DAMAGE))


def content(store: Store) -> bytes | None:
    """What our driver reads; None where that is refused."""
    file = SimulatedFile(store, name="image", writable=False)
    try:
        held = content_of([QCOW2(file)])
    except (VirtmountError, AssertionError):
        return None
    return held.read(0, held.size)


def dirty(path: Path) -> None:
    path.unlink()
    damage.dirty(path)


def all_counts(path: Path) -> None:
    """Lowered and raised in one block, with flags that follow."""
    damage.patch(path, damage.block_at(path), b"\0\2" * 60 + b"\0\0" * 60)


DAMAGE: dict[str, Callable[[Path], None]] = {
    **{
        name: damage.DAMAGE[name]
        for name in (
            "count too low",
            "count too high",
            "no block",
            "block is the header",
            "refcount table past the end",
            "L2 entry twice",
            "data is a block",
            "compressed with COPIED",
        )
    },
    "all counts": all_counts,
    "dirty": dirty,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_repair_that_is_cut_short(tmp_path: Path, name: str) -> None:
    path = damage.make(tmp_path / "a.qcow2", "512", 192 * damage.KIB)
    damage.qemu_io(path, "write -q -P 3 20k 4k", "write -q -P 4 5k 3k")
    DAMAGE[name](path)
    before = Store.load(path)
    held, worst = content(before), damages(before)

    def act(file: HostFile) -> None:
        assert all(item.repaired for item in repair(file) if item.severity is not Severity.NOTE)
        assert isinstance(file, SimulatedFile)
        assert not faults(file.store, Severity.DAMAGE)
        assert not faults(file.store, Severity.LEAK)
        if held is not None:
            assert content(file.store) == held

    def judge(store: Store) -> None:
        assert damages(store) <= worst
        if held is not None:
            assert content(store) == held

    cut_everywhere(before, act, judge, least=2)
