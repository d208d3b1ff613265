"""Cuts a plan short at every moment, for what is done to a whole image."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.crash.simulate import Log, SimulatedFile, Store
from virtmount.hostfile import HostFile


def cut_everywhere(
    before: Store,
    act: Callable[[HostFile], None],
    judge: Callable[[Store], None],
    *,
    least: int = 10,
) -> None:
    """`act` on an image, cut at every moment; what is left is judged, and acted on once more."""
    log = Log(before)
    act(SimulatedFile(before.copy(), name="image", log=log))
    random_ = random.Random(1)
    states = 0
    for epoch in log.epochs():
        for cut in epoch.cuts(random_):
            store = epoch.build(cut)
            judge(store)
            act(SimulatedFile(store.copy(), name="image"))
            states += 1
    assert states > least
