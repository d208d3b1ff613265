"""Records a workload, cuts it, and says what must hold of every state that a cut leaves."""

from __future__ import annotations

import random
import subprocess
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash.cases import Made, content_of, run
from tests.crash.simulate import Cut, Epoch, Log, SimulatedFile, Store
from tests.crash.workload import History, Mix, Model, Op, Request, perform, requests
from tests.reference import Reference
from virtmount import hostfile
from virtmount.formats import load
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Kind, extents
from virtmount.plan import Plan
from virtmount.upkeep import Repair

ON = Mix(largest=16 << 10, zero=2, discard=2)  # the workload after a cut
MOST_TOUCHED = 48  # clusters that are written after a cut


@dataclass
class Recorded:
    """A workload that was carried out, and everything that it did to its file."""

    made: Made
    log: Log
    history: History
    first: int  # cuts before this event are not tried
    closed: Store


def record(made: Made, seed: int) -> Recorded:
    case = made.case
    rng = random.Random(f"{case.name} {seed}")
    log = Log(made.store)
    file = SimulatedFile(made.store.copy(), name=case.name, log=log)
    history = History(made.content)
    with made.open(file) as disk:
        number = 1
        for i in range(case.warmup):
            place = i % 2 * case.cluster
            carry_out(disk, Request(number, Op.WRITE, place, case.sector), log, history)
            carry_out(disk, Request(number + 1, Op.FLUSH), log, history)
            carry_out(disk, Request(number + 2, Op.DISCARD, place, case.cluster), log, history)
            carry_out(disk, Request(number + 3, Op.FLUSH), log, history)
            number += 4
        first = len(log.events)
        for request in requests(
            rng, case.size, case.cluster, case.count, case.mix, number, case.sector
        ):
            carry_out(disk, request, log, history)
            if request.op is Op.FLUSH:
                assert not history.model.wrong_now(live(disk)), str(request)
        log.mark("close")
    log.mark("closed")
    return Recorded(made, log, history, first, file.store)


def carry_out(disk: Reference, request: Request, log: Log, history: History) -> None:
    history.issued(len(log.events), request)
    log.mark(str(request))
    seen = perform(disk, request)
    if request.op is Op.FLUSH:
        log.mark(f"{request.number}: flushed", flushed=True)
    history.acknowledged(len(log.events), request, seen)


def live(disk: Reference) -> Store:
    return Store.of(disk.pread(0, disk.size))


def points(recorded: Recorded, rng: random.Random, most: int) -> list[tuple[Epoch, Cut]]:
    """Cuts of the whole log, or `most` of them, in the order of their moments."""
    found = [
        (epoch, cut)
        for epoch in recorded.log.epochs()
        for cut in epoch.cuts(rng)
        if cut.at >= recorded.first
    ]
    if most and len(found) > most:
        found = rng.sample(found, most)
    return sorted(found, key=lambda point: point[1].at)


class Judge:
    """Looks at one state after the other; the failure says how to see it again."""

    def __init__(self, made: Made, seed: int, folder: Path) -> None:
        self.made = made
        self.seed = seed
        self.folder = folder
        self.place = ""

    def demand(self, what: str, wrong: list[str]) -> None:
        if wrong:
            shown = "\n".join(f"  {line}" for line in wrong[:12])
            more = f"\n  … {len(wrong) - 12} more" if len(wrong) > 12 else ""
            pytest.fail(
                f"{self.made.case}, seed {self.seed}: {what}\n{shown}{more}\n{self.place}",
                pytrace=False,
            )

    def judge(self, store: Store, model: Model, rng: random.Random, again: bool) -> Store:
        """What must hold of one state; returns the image written on and closed.

        I1  it opens, read-only and for writing
        I2  sectors flushed and not written since are exact
        I3  other sectors hold an old or a new value, never a third
        I4  writing on succeeds, in place and into clusters never touched, and I2 and I3 hold
        I5  no metadata is corrupt; leaks are allowed
        I6  qemu reads the same, checks the same and can write on as well: see foreign()
        I7  an orderly close leaves no leaks but those that the cut had left
        """
        made = self.made
        content = self.read(store, "reading what the cut left")
        self.demand("I2, I3: read-only, after the cut", model.wrong_after_cut(content))
        at_cut = made.check(store, store)
        self.demand("I5: metadata after the cut", at_cut.wrong)

        log = Log(store)
        file = SimulatedFile(store.copy(), name=made.case.name, log=log)
        history = History(content)
        try:
            self.write_on(file, log, history, rng)
        except Exception as error:
            self.demand(
                "I1, I4: writing on", [repr(error), *traceback.format_tb(error.__traceback__)]
            )
        after = self.read(file.store, "reading after writing on")
        self.demand("I4: after writing on and closing", history.model.wrong_now(after))
        found = made.check(file.store, log.base)
        self.demand("I5: metadata after writing on and closing", found.wrong)
        leaked = [line for line in found.leaked if line not in at_cut.leaked]
        self.demand("I7: leaks after an orderly close", leaked)
        if again:
            self.cut_again(Recorded(made, log, history, 0, file.store), rng)
        return file.store

    def read(self, store: Store, what: str) -> Store:
        try:
            file = SimulatedFile(store, name=self.made.case.name, writable=False)
            return content_of(self.made.images(file))
        except Exception as error:
            self.demand(f"I1: {what}", [repr(error), *traceback.format_tb(error.__traceback__)])
            raise

    def write_on(self, file: SimulatedFile, log: Log, history: History, rng: random.Random) -> None:
        with self.made.open(file) as disk:
            number = 2_000_000
            for request in self.next_requests(disk, rng, number):
                carry_out(disk, request, log, history)
            wrong = history.model.wrong_now(live(disk))
            self.demand("I4: live, after writing on", wrong)
            unclosed = self.read(file.store, "reading after writing on, not closed")
            self.demand("I4: flushed, not closed", history.model.wrong_now(unclosed))
            self.demand("I5: flushed, not closed", self.made.check(file.store, log.base).wrong)

    def next_requests(self, disk: Reference, rng: random.Random, number: int) -> Iterator[Request]:
        """A write into clusters that hold nothing and into some that do; twice, with flushes."""
        case = self.made.case
        held: dict[int, bool] = {}  # of each cluster, whether any part of it is there
        for extent in extents(disk.top, 0, disk.size):
            cluster = extent.guest_offset // case.cluster * case.cluster
            is_data = extent.kind not in (Kind.ABSENT, Kind.ZERO)
            held[cluster] = held.get(cluster, False) or is_data
        absent = [cluster for cluster, is_data in held.items() if not is_data]
        present = [cluster for cluster, is_data in held.items() if is_data]
        rng.shuffle(absent)
        for offset in sorted(absent[:MOST_TOUCHED]) + rng.sample(present, min(4, len(present))):
            within = rng.randrange(0, case.cluster, case.sector)
            yield Request(number, Op.WRITE, offset + within, case.sector)
            number += 1
        yield Request(number, Op.FLUSH)
        yield from requests(rng, case.size, case.cluster, 12, ON, number + 1, case.sector)

    def foreign(self, store: Store, rng: random.Random) -> None:
        """I5 and I6 by qemu: its check, its reading, its writing on.  Three processes a state."""
        made, case = self.made, self.made.case
        content = self.read(store, "reading what the cut left")
        store = made.settled(store)
        path = made.save(store, self.folder)
        copy = self.folder / f"copy.{case.format}"
        store.save(copy)
        self.demand("I5: qemu-img check", qemu_check(case.format, copy))
        image = self.folder / "other.raw"
        self.demand("I6: qemu-img convert", self.compare(copy, image, History(content).model))
        if case.format == "vpc":
            cut_leaks(path)  # qemu takes what lies behind the last block for zeros
        if case.format == "parallels":
            return  # qemu does not write to one that was not closed
        held = {at // case.cluster for at in content.held()}
        free = [at for at in range(0, case.size, case.cluster) if at // case.cluster not in held]
        history = History(content)
        command = ["qemu-io", "-f", case.format]
        for i, at in enumerate(rng.sample(free, min(3, len(free)))):
            request = Request(3_000_000 + i, Op.WRITE, at, case.sector)
            data = self.folder / f"write{i}"
            data.write_bytes(request.data)
            command += ["-c", f"write -s {data} {request.offset} {request.length}"]
            history.issued(0, request)
            history.acknowledged(0, request)
        run([*command, str(path)])
        self.demand("I6: after qemu wrote on", self.compare(path, image, history.model))

    def compare(self, path: Path, image: Path, model: Model) -> list[str]:
        run(["qemu-img", "convert", "-q", "-f", self.made.case.format, "-O", "raw", path, image])
        return model.wrong_now(Store.load(image))

    def cut_again(self, recorded: Recorded, rng: random.Random) -> None:
        """R4: cuts while the first one is recovered from, and in what follows."""
        place = self.place
        found = points(recorded, rng, 0)
        early, late = found[:8], found[8:]
        late = sorted(rng.sample(late, min(4, len(late))), key=lambda point: point[1].at)
        replay = recorded.history.replay()
        for epoch, cut in early + late:
            self.place = f"{place}\nand then again:\n{epoch.describe(cut)}"
            self.judge(epoch.build(cut), replay.advance(cut.at), rng, again=False)
        self.place = place


def cut_leaks(path: Path) -> None:
    """What `check --repair` of leaks does."""
    with HostFile(path, writable=True) as file:
        for item in load("vhd").check(file, DEFAULTS, Repair.LEAKS):
            if isinstance(item, Plan):
                hostfile.execute(item, [file])


def qemu_check(format_name: str, path: Path) -> list[str]:
    """Complaints of qemu-img check that are not leaks."""
    if format_name in ("vpc", "qcow"):
        return []  # which it does not check
    command = ["qemu-img", "check", "-f", format_name, str(path)]
    if format_name == "vhdx":
        command += ["-r", "all"]  # a plain check refuses a log that has to be replayed
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if said.returncode in (0, 3):
        return []
    lines = [line for line in (said.stdout + said.stderr).splitlines() if "ERROR" in line]
    if format_name == "vdi" and lines and all("blocks mismatch" in line for line in lines):
        return []  # check_vdi() says whether the count is too low
    expected = ("not closed correctly", "space leaked")  # of an image that was being written
    known = [line for line in lines if any(text in line for text in expected)]
    if format_name == "parallels" and lines and known == lines:
        return []
    return [f"exit {said.returncode}", *lines, said.stdout, said.stderr]
