"""Power cuts over VMDKs of several files: a descriptor and its extents, one order of events.

Split sparse extents, each with tables and new grains of its own, and ESX's (COWD), whose tables are
made as they are needed and whose header says where free space begins.
"""

from __future__ import annotations

import random
import struct

import pytest

from tests.crash.checkers import check_vmdk
from tests.crash.simulate import SimulatedFile, Store
from tests.crash.test_data_file import Line, Pair, carry_out, demand
from tests.crash.workload import History, Mix, Model, requests
from tests.formats import make_vmdk
from tests.formats.make_vmdk import descriptor, pattern
from tests.reference import Reference
from virtmount.formats import vmdk_parts
from virtmount.formats.raw import Raw
from virtmount.formats.vmdk import VMDK
from virtmount.hostfile import HostFile
from virtmount.image import Image

KIB, MIB = 1 << 10, 1 << 20
GRAIN = 64 * KIB
CUTS = 60


class Extents(Pair):
    """A descriptor and its extents in memory, called 1, 2 and so on."""

    def images(self, monkeypatch: pytest.MonkeyPatch, *, writable: bool) -> list[Image]:
        files = [
            SimulatedFile(store, name=f"{number}", writable=writable, log=Line(self.events, number))  # type: ignore[arg-type]
            for number, store in enumerate(self.stores)
        ]

        def sibling(
            file: HostFile, place: str, name: str, *rest: object, **more: object
        ) -> HostFile:
            return files[int(name)]

        monkeypatch.setattr(vmdk_parts, "open_sibling", sibling)
        images: list[Image] = [VMDK(files[0])]
        if self.parent:
            images.append(Raw(SimulatedFile(self.parent, name="parent", writable=False)))
        return images

    def cut(self, base: list[Store], at: int, rng: random.Random) -> Extents:
        return Extents(super().cut(base, at, rng).stores, self.parent)

    def wrong(self) -> list[str]:
        """What may never be, whatever was cut."""
        found: list[str] = []
        for store in self.stores[1:]:
            cowd = store.read(0, 4) == b"COWD"
            found += check_cowd(store) if cowd else check_vmdk(store).wrong
        return found


def check_cowd(store: Store) -> list[str]:
    """Everything in the file, nothing twice, and all of it below the next free sector."""
    _, _, _, capacity, grain, directory, entries, free = struct.unpack("<4s7I", store.read(0, 32))
    found: list[str] = []
    used = set(range(directory + -(-entries * 4 // 512)))

    def use(sector: int, count: int, what: str) -> None:
        stretch = set(range(sector, sector + count))
        if used & stretch:
            found.append(f"{what} at sector {sector} overlaps something")
        if (sector + count) * 512 > store.size:
            found.append(f"{what} at sector {sector}, the file ends at {store.size}")
        if sector + count > free:
            found.append(f"{what} at sector {sector}, free space begins at {free}")
        used.update(stretch)

    for i, table in enumerate(
        struct.unpack(f"<{entries}I", store.read(directory * 512, entries * 4))
    ):
        if not table:
            continue
        use(table, 32, f"table {i}")
        for j, entry in enumerate(struct.unpack("<4096I", store.read(table * 512, 16384))):
            if entry and i * 4096 + j < capacity // grain:
                use(entry, grain, f"grain {i * 4096 + j}")
    return found


def split() -> tuple[list[bytes], int, int]:
    """Three extents; the first one's end is in the middle of nothing in particular."""
    sizes = [128 * 11, 128 * 16, 128 * 5]
    held = [{n: pattern(n + 50 * i, GRAIN) for n in (0, 2, 3)} for i in range(3)]
    lines = [f'RW {size} SPARSE "{i}"' for i, size in enumerate(sizes, 1)]
    files = [make_vmdk.sparse(size, content) for size, content in zip(sizes, held, strict=True)]
    return [descriptor(*lines), *files], sum(sizes) * 512, GRAIN


def cowd(parent: bool) -> tuple[list[bytes], int, int]:
    sectors = 3 * 4096
    more = ['parentFileNameHint="p"'] if parent else []
    line = f'RW {sectors} VMFSSPARSE "1"'
    text = descriptor(line, parent="12345678" if parent else "ffffffff", more=more)
    held = {n: pattern(n, 512) for n in (0, 1, 2, 77)}
    return [text, make_vmdk.cowd(sectors, held)], sectors * 512, 512


KINDS = {
    "split": (split, False),
    "cowd": (lambda: cowd(False), False),
    "cowd-child": (lambda: cowd(True), True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_power_cut(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    cut_and_judge(monkeypatch, kind, "")


def cut_and_judge(monkeypatch: pytest.MonkeyPatch, kind: str, seed: str) -> None:
    make, over_parent = KINDS[kind]
    rng = random.Random(kind + seed)
    raw, size, cluster = make()
    below = Store.of(rng.randbytes(size)) if over_parent else None
    before = [Store.of(data) for data in raw]
    pair = Extents([store.copy() for store in before], below)
    history = History(pair.read(monkeypatch))
    mix = Mix(largest=32 * KIB if cluster == 512 else 128 * KIB, zero=2, discard=2)
    with Reference(pair.images(monkeypatch, writable=True)) as disk:
        for request in requests(rng, size, cluster, 50, mix, 1, 512):
            carry_out(disk, request, pair, history)
    demand(history.model.wrong_now(pair.read(monkeypatch)), "closed")
    demand(pair.wrong(), "closed")
    replay = history.replay()
    moments = range(len(pair.events) + 1)
    for at in sorted(rng.sample(moments, min(CUTS, len(moments)))):
        left = pair.cut(before, at, rng)
        model = replay.advance(at)
        judge(left, model, mix, size, cluster, monkeypatch, rng, f"{kind}, cut before event {at}")


def judge(
    left: Extents,
    model: Model,
    mix: Mix,
    size: int,
    cluster: int,
    monkeypatch: pytest.MonkeyPatch,
    rng: random.Random,
    place: str,
) -> None:
    content = left.read(monkeypatch)
    demand(model.wrong_after_cut(content), place)
    demand(left.wrong(), place)
    on = History(content)
    with Reference(left.images(monkeypatch, writable=True)) as disk:
        for request in requests(rng, size, cluster, 8, mix, 2_000_000, 512):
            carry_out(disk, request, left, on)
    after = left.read(monkeypatch)
    demand(on.model.wrong_now(after), f"{place}, written on")
    demand(left.wrong(), f"{place}, written on")


def test_a_missing_barrier_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a parent, a mapping that is durable before its data shows neither old nor new."""
    plain = VMDK.commit

    def hasty(self: VMDK, dirty: object) -> object:
        plan = plain(self, dirty)  # type: ignore[arg-type]
        return type(plan)(*(step for step in plan.steps[1:]))

    monkeypatch.setattr(VMDK, "commit", hasty)
    with pytest.raises(AssertionError, match="cut before event"):
        cut_and_judge(monkeypatch, "cowd-child", " 7")


def test_a_free_sector_that_comes_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """ESX would write over what lies behind it."""
    from virtmount.formats.vmdk_cowd import CowdExtent

    monkeypatch.setattr(CowdExtent, "reserves_in_header", lambda self: False)
    with pytest.raises(AssertionError, match="free space begins"):
        cut_and_judge(monkeypatch, "cowd", "")
