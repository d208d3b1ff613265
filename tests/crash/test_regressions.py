"""What the campaigns found, each reduced to the steps that it takes."""

from __future__ import annotations

from pathlib import Path

from tests.crash.cases import CASES, make
from tests.crash.simulate import SimulatedFile
from virtmount.hostfile import execute
from virtmount.image import Run

CASE = {case.name: case for case in CASES}


def test_qcow2_gives_no_data_a_place_that_was_a_table_at_open(folder: Path) -> None:
    """The engine asks for metadata() once, and then refuses data there for the whole session."""
    made = make(CASE["qcow2-512-rc64"], folder)
    file = SimulatedFile(made.store.copy())
    (image,) = made.images(file)
    asked = list(image.metadata())
    table = file.pread(48, 8)
    execute(image.begin(), image.files)
    runs: list[Run] = []
    while len(runs) < 900:
        reservation = image.reserve(1)
        execute(reservation.plan, image.files)
        runs += reservation.runs
    assert file.pread(48, 8) != table, "the refcount table has not moved"
    for run in runs:
        end = run.host_offset + run.count * image.cluster_size
        assert not any(run.host_offset < at + length and at < end for at, length in asked), run
    # The next session may use it.
    image.release(runs)
    execute(image.end(), image.files)
    assert not made.check(file.store, made.store).leaked
