"""Power cuts over the plans of the drivers, at every host write, through the reference engine.

What must hold after every cut is numbered in judge.py; how many are tried, in budget.py.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.crash.budget import POINTS, TIMEOUT, seeds
from tests.crash.cases import CASES, Made, make, run
from tests.crash.judge import Judge, points, record

FOREIGN = 6  # states per image and seed that other programs look at
AGAIN = 12  # every so many states the recovery is cut as well

pytestmark = pytest.mark.timeout(TIMEOUT)


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, folder: Path) -> Made:
    return make(request.param, folder)


@pytest.mark.parametrize("seed", seeds())
@pytest.mark.parametrize("made", CASES, indirect=True, ids=str)
def test_power_cut(made: Made, seed: int, folder: Path) -> None:
    case = made.case
    recorded = record(made, seed)
    rng = random.Random(f"{made.case.name} {seed} cuts")
    judge = Judge(made, seed, folder)
    judge.demand("I7: leaks without a cut", made.check(recorded.closed, made.store).leaked)
    replay = recorded.history.replay()
    found = points(recorded, rng, round(POINTS * case.share))
    asked = set(rng.sample(range(len(found)), min(FOREIGN, len(found))))
    for i, (epoch, cut) in enumerate(found):
        judge.place = epoch.describe(cut)
        store = epoch.build(cut)
        closed = judge.judge(store, replay.advance(cut.at), rng, again=i % AGAIN == 0)
        if i in asked and case.foreign:
            judge.foreign(store, rng)
        if i in asked and case.checked:
            leaks = made.check(closed, made.store).leaked
            path = made.save(closed, folder)
            run(["qemu-img", "check", "-f", case.format, path], (0, 3) if leaks else (0,))
