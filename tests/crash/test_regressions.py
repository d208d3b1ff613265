"""What the campaigns found, each reduced to the steps that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.cases import CASES, make
from tests.crash.judge import carry_out, live
from tests.crash.simulate import Log, SimulatedFile
from tests.crash.workload import History, Op, Request
from virtmount.hostfile import execute
from virtmount.image import Dirty, Kind, extents
from virtmount.plan import Plan

CASE = {case.name: case for case in CASES}


def test_qcow2_gives_no_data_a_place_that_was_a_table_at_open(folder: Path) -> None:
    """The engine asks for metadata() once, and then refuses data there for the whole session."""
    case = CASE["qcow2-512-rc64"]
    made = make(case, folder)
    file = SimulatedFile(made.store.copy())
    table = file.pread(48, 8)
    history = History(made.content)
    log = Log(made.store)
    with made.open(file) as disk:
        asked = list(disk.top.metadata())
        for number in range(1, 1000):
            carry_out(disk, Request(number, Op.WRITE, case.size - 512 * number, 512), log, history)
            if number % 50 == 0:
                carry_out(disk, Request(10_000 + number, Op.FLUSH), log, history)
        assert file.pread(48, 8) != table, "the refcount table has not moved"
        assert not history.model.wrong_now(live(disk))
        for extent in extents(disk.top, 0, disk.size):
            low, high = extent.host_offset, extent.host_offset + extent.length
            if extent.kind is Kind.DATA:
                assert not any(low < at + length and at < high for at, length, _ in asked), extent
    assert not made.check(file.store, made.store).leaked


@pytest.mark.parametrize("name", ["qcow2-4k", "qcow2-512-rc64", "qcow2-parent", "vdi", "vhdx"])
def test_a_reservation_whose_plan_failed_is_undone_by_its_release(name: str, folder: Path) -> None:
    """The Pager goes on after one, because a host that is full may have room again."""
    made = make(CASE[name], folder)
    steps = 1
    done = 0
    while done < steps:
        file = SimulatedFile(made.store.copy())
        image, *_ = made.images(file)
        execute(image.begin(), image.files)
        failed = image.reserve(3)
        steps = len(failed.plan)
        execute(Plan(*failed.plan.steps[:done]), image.files)
        image.release(failed.runs)
        again = image.reserve(3)
        execute(again.plan, image.files)
        place = again.runs[0].host_offset
        assert file.pread(place, image.cluster_size) == bytes(image.cluster_size)
        execute(image.commit([Dirty(1, place)]), image.files)
        found = made.check(file.store, made.store)
        assert not found.wrong, f"after {done} of {steps} steps"
        (extent,) = extents(image, image.cluster_size, image.cluster_size)
        assert extent.kind is Kind.DATA
        execute(image.end(), image.files)
        done += 1
