"""Power cuts over a QCOW2 image with an external data file: two files, one order of events.

What lasts of either since the last barrier is any subset, and neither knows of the other.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from tests.crash.cases import content_of
from tests.crash.checkers import check_qcow2
from tests.crash.simulate import Event, Mark, SimulatedFile, Store, Synced
from tests.crash.workload import History, Mix, Model, Op, Request, perform, requests
from tests.reference import Reference
from virtmount.formats import qcow2
from virtmount.formats.qcow2 import QCOW2
from virtmount.formats.raw import Raw
from virtmount.hostfile import HostFile
from virtmount.image import Image

KIB, MIB = 1 << 10, 1 << 20
SIZE = 3 * MIB
CUTS = 60
MIX = Mix(largest=64 * KIB, zero=2, discard=2)


class Line:
    """The events of both files in their order, as one of them adds to it."""

    def __init__(self, shared: list[tuple[int, Event]], number: int) -> None:
        self.shared, self.number = shared, number
        self.events = self

    def append(self, event: Event) -> None:
        self.shared.append((self.number, event))


class Pair:
    """An image and its data file in memory."""

    def __init__(self, stores: list[Store], parent: Store | None) -> None:
        self.stores, self.parent = stores, parent
        self.events: list[tuple[int, Event]] = []

    def images(self, monkeypatch: pytest.MonkeyPatch, *, writable: bool) -> list[Image]:
        image, data = (
            SimulatedFile(store, name=f"{number}", writable=writable, log=Line(self.events, number))  # type: ignore[arg-type]
            for number, store in enumerate(self.stores)
        )

        def sibling(file: HostFile, *rest: object) -> HostFile:
            return data

        monkeypatch.setattr(qcow2, "open_sibling", sibling)
        images: list[Image] = [QCOW2(image)]
        if self.parent:
            images.append(Raw(SimulatedFile(self.parent, name="parent", writable=False)))
        return images

    def cut(self, base: list[Store], at: int, rng: random.Random) -> Pair:
        """What a power cut before event `at` may leave."""
        stores = []
        for number, store in enumerate(base):
            left = store.copy()
            own = [(i, e) for i, (n, e) in enumerate(self.events[:at]) if n == number]
            synced = max((i for i, e in own if isinstance(e, Synced)), default=-1)
            likely = rng.choice((0.0, 0.3, 0.7, 1.0))
            for i, event in own:
                if isinstance(event, Synced | Mark):
                    continue
                if i < synced or rng.random() < likely:
                    event.apply(left)
            stores.append(left)
        return Pair(stores, self.parent)

    def read(self, monkeypatch: pytest.MonkeyPatch) -> Store:
        return content_of(self.images(monkeypatch, writable=False))


@pytest.mark.parametrize(
    ("options", "parent"),
    [
        ("", False),
        ("", True),
        ("data_file_raw=on", False),
        ("extended_l2=on", False),
        ("extended_l2=on", True),
    ],
)
def test_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, parent: bool
) -> None:
    rng = random.Random(f"{options} {parent}")
    monkeypatch.chdir(tmp_path)
    base = rng.randbytes(SIZE)
    Path("parent").write_bytes(base)
    words = ["-F", "raw", "-b", "parent"] if parent else []
    every = ",".join(filter(None, ("data_file=data", options)))
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", every, *words, "image", str(SIZE)]
    subprocess.run(create, check=True)
    fill = ["qemu-io", "-c", "write -q -P 7 100k 300k", "-c", "write -q -P 8 2M 70k", "image"]
    subprocess.run(fill, check=True)
    below = Store.of(base) if parent else None
    before = [Store.load("image"), Store.load("data")]
    if "raw" not in options:
        before[1].write(MIB, b"\xee" * (64 * KIB))  # stale, and must not come back
    pair = Pair([store.copy() for store in before], below)
    history = History(pair.read(monkeypatch))
    with Reference(pair.images(monkeypatch, writable=True)) as disk:
        for request in requests(rng, SIZE, 64 * KIB, 50, MIX, 1, 512):
            carry_out(disk, request, pair, history)
    demand(history.model.wrong_now(pair.read(monkeypatch)), "closed")
    replay = history.replay()
    for at in sorted(rng.choices(range(len(pair.events) + 1), k=CUTS)):
        left = pair.cut(before, at, rng)
        judge(left, replay.advance(at), monkeypatch, rng, f"{options}, cut before event {at}")


def judge(
    left: Pair, model: Model, monkeypatch: pytest.MonkeyPatch, rng: random.Random, place: str
) -> None:
    content = left.read(monkeypatch)
    demand(model.wrong_after_cut(content), place)
    demand(check_qcow2(left.stores[0]).wrong, place)
    on = History(content)
    with Reference(left.images(monkeypatch, writable=True)) as disk:
        for request in requests(rng, SIZE, 64 * KIB, 6, MIX, 2_000_000, 512):
            carry_out(disk, request, left, on)
    after = left.read(monkeypatch)
    demand(on.model.wrong_now(after), f"{place}, written on")
    demand(check_qcow2(left.stores[0]).wrong, f"{place}, written on")


def carry_out(disk: Reference, request: Request, pair: Pair, history: History) -> None:
    history.issued(len(pair.events), request)
    seen = perform(disk, request)
    pair.events.append((2, Mark(str(request), flushed=request.op is Op.FLUSH)))
    history.acknowledged(len(pair.events), request, seen)


def demand(wrong: list[str], place: str) -> None:
    assert not wrong, (place, wrong[:5])


def test_a_missing_barrier_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a parent, a mapping that is durable before its data shows neither old nor new."""
    plain = QCOW2.commit

    def hasty(self: QCOW2, dirty: object) -> object:
        plan = plain(self, dirty)  # type: ignore[arg-type]
        return type(plan)(*(step for step in plan.steps[1:]))

    monkeypatch.setattr(QCOW2, "commit", hasty)
    with pytest.raises(AssertionError, match="cut before event"):
        test_power_cut(tmp_path, monkeypatch, "", True)
