"""Check hostile images and mend them, in a process with little memory, and judge what comes of it.

    python -m tests.corpus.mending BASES FOLDER < names > answers

reads one name a line, of a mutation or of a random change (flips.py), and answers each with a line
of JSON: the name and what is wrong.  What must hold: checking changes nothing; what is called sound
opens; what opened before it was mended opens afterwards and reads as it did; mending twice is
mending once; all that within bounds, with no file opened outside of the folder.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import virtmount
from tests.corpus import bases, flips, mutations
from tests.corpus.attempts import ADDRESS_SPACE, GROWTH, MIB, Meter, Watch, fingerprint
from tests.corpus.mutations import Case
from virtmount import formats
from virtmount.chain import Opener, close_image, open_chain
from virtmount.checking import CheckReport
from virtmount.copying import Source
from virtmount.errors import VirtmountError
from virtmount.image import Options
from virtmount.upkeep import Repair, Severity

CPU = 10.0  # seconds for a check, twice that for mending, which looks again
WALL = 120
MANY = 1000  # findings; each one that is mended waits for the disk
READ = 16 * MIB  # disks up to this size are read, in pieces of
PIECE = 64 << 10
Content = dict[int, bytes | None]  # None: EIO


class Trial:
    """One image."""

    def __init__(self, case: Case, folder: Path, watch: Watch, meter: Meter) -> None:
        self.case, self.folder, self.watch, self.meter = case, folder, watch, meter
        self.path = folder / case.file_name
        self.wrong: list[str] = []

    def run(self) -> list[str]:
        case = self.case
        before, files, was = self.opens(), fingerprint(self.folder), self.content()
        found = self.check(Repair.NOTHING)
        self.expect(fingerprint(self.folder) == files, "checking changed the files")
        if found is not None and not found.exit_code:
            self.expect(before or self.denied(found), "sound, but does not open")
        if found is not None and found.found.total() > MANY:
            return self.wrong  # mending is as long as the damage
        mended = self.check(Repair.ALL)
        if mended is None:
            return self.wrong
        self.expect(found is not None, "mended, though it could not be checked")
        after, now = self.opens(), self.content()
        self.expect(after or not before, "does not open any more")
        self.expect(
            after or bool(mended.exit_code) or self.denied(mended),
            "sound after mending, but does not open",
        )
        if was is not None and not case.loose:
            for at, data in was.items():
                if data is not None and (now or {}).get(at) != data:
                    self.wrong.append(f"guest byte {at} on reads otherwise after mending")
                    break
        again = self.check(Repair.ALL)
        if again is None:
            self.wrong.append("cannot be checked after mending")
        else:
            self.expect(again.exit_code == mended.exit_code, "mending again gives another answer")
            self.expect(
                not again.repaired or bool(mended.exit_code), "mending again mends once more"
            )
        return self.wrong

    def expect(self, holds: bool, text: str) -> None:
        if not holds:
            self.wrong.append(text)

    def denied(self, found: CheckReport) -> bool:
        """It may be sound: nobody may look, or has the passphrase."""
        return any(
            finding.severity is Severity.NOTE and ("outside" in text or "passphrase" in text)
            for finding in found.findings
            for text in [finding.text]
        )

    def opens(self) -> bool:
        """Alone, without its parents."""
        try:
            opener = Opener(self.path, options=Options(changing_parent=True))
            close_image(opener.open_top(self.case.format, writable=False))
        except VirtmountError:
            return False
        return True

    def content(self) -> Content | None:
        """What the disk reads as, if it is small and its parents are there."""
        try:
            source = Source(open_chain(self.path, self.case.format))
        except VirtmountError:
            return None
        found: Content = {}
        with source:
            for at in range(0, source.size if source.size <= READ else 0, PIECE):
                found[at] = None
                with contextlib.suppress(OSError):
                    found[at] = source.disk.pread(at, PIECE)
        return found

    def check(self, repair: Repair) -> CheckReport | None:
        """One check, with nothing wrong on the way but the image."""
        allowed = CPU if repair is Repair.NOTHING else 2 * CPU
        with self.judged(f"check, {repair.value}", allowed):
            try:
                return virtmount.check(self.path, self.case.format, repair=repair)
            except VirtmountError:
                return None
        return None

    @contextlib.contextmanager
    def judged(self, what: str, allowed: float) -> Iterator[None]:
        descriptors = set(os.listdir("/proc/self/fd"))
        self.meter.reset()
        with self.watch.over(self.folder) as heard:
            try:
                yield
            except Exception as error:
                self.wrong.append(f"{what}: raised {error!r:.300}")
        cpu, growth = self.meter.read()
        self.wrong += (f"{what}: {text}" for text in dict.fromkeys(heard))
        self.expect(cpu <= allowed, f"{what}: {cpu:.1f} s of CPU time, at most {allowed}")
        self.expect(growth <= GROWTH, f"{what}: {growth // MIB} MiB, at most {GROWTH // MIB}")
        left = set(os.listdir("/proc/self/fd")) - descriptors
        self.expect(not left, f"{what}: file descriptors were left open: {left}")


def main() -> None:
    base_folder, folder = Path(sys.argv[1]), Path(sys.argv[2])
    loaded = {name: bases.load(base_folder, name) for name in bases.makers()}
    known = mutations.all_by_name()
    # Whatever is imported at first use is opened here, not under the watch.
    for base in loaded.values():
        if beside := bases.makers()[base.name].beside:
            beside(base.path)
        with contextlib.suppress(VirtmountError):
            virtmount.check(base.path, base.format)
        with contextlib.suppress(VirtmountError), virtmount.open(base.path, base.format) as disk:
            disk.pread(0, 4096)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    watch, meter = Watch(), Meter()
    for number, line in enumerate(sys.stdin):
        name = line.rstrip("\n")
        faulthandler.dump_traceback_later(WALL, exit=True)
        case = known[name].case(loaded) if name in known else flips.case(name, loaded)
        place = folder / str(number)
        place.mkdir(parents=True)
        case.make(place)
        wrong = Trial(case, place, watch, meter).run()
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"name": name, "wrong": wrong}), flush=True)
        shutil.rmtree(place)


def checked() -> list[str]:
    """The formats that have a check, and hostile images."""
    return [form for form in bases.FORMATS if formats.load(form).checks]


if __name__ == "__main__":
    main()
