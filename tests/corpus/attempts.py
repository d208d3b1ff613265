"""Open hostile images in a process of its own that has little memory and time, and judge it.

    python -m tests.corpus.attempts BASES FOLDER < cases > verdicts

reads one case a line (JSON: kind and name) and answers each with one line.  What may happen: the
image opens, or a VirtmountError says what is wrong with it; a request gives bytes or an OSError.
What may not: anything else in any thread, more than CPU seconds or GROWTH bytes of memory, a file
opened outside of the case's folder, a changed byte of a file that is only read, other guest data
changed by a write.  The image is also checked, up to so many findings, to which the same applies;
mending.py repairs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import hashlib
import itertools
import json
import logging
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import virtmount
from tests.corpus import bases, flips, mutations
from tests.corpus.bases import KIB, MIB
from tests.corpus.mutations import Case
from virtmount import formats
from virtmount.errors import VirtmountError
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS
from virtmount.plan import Plan
from virtmount.upkeep import Repair

CPU = 3.0  # seconds for one opening with its reads and writes
CHECK_CPU = 5.0  # ... for a check, or for FINDINGS of one
GROWTH = 256 * MIB
ADDRESS_SPACE = 1 << 30
WALL = 100  # seconds for each of these, then the process gives up; the machine may be busy
WHOLE = 16 * MIB  # disks up to this size are read whole, of larger ones only parts
CHUNK = 64 * KIB
MAPPED, EXTENTS = 1 << 40, 1000  # disks up to this size are mapped, and so far
PAGE = 4096
ZEROS = bytes(MIB)
FINDINGS = 2000  # of a check
EIO = 5
FORBIDDEN_EVENTS = ("socket.", "subprocess.", "os.exec", "os.system", "os.spawn", "os.posix_spawn")


@dataclass
class Verdict:
    """What one opening came to."""

    name: str
    writable: bool
    error: str = ""  # of opening; empty if it opened
    kind: str = ""  # of that error
    reads: dict[int, str] = field(default_factory=dict)  # chunk -> "bytes", or an errno
    wrong: list[str] = field(default_factory=list)  # what may not happen
    differs: list[int] = field(default_factory=list)  # chunks that are not what the base says
    extents: int = 0  # of its map
    cpu: float = 0.0
    growth: int = 0


class Watch:
    """Hears of everything in the process that must not happen during an attempt."""

    def __init__(self) -> None:
        self._folder = ""
        self.heard: list[str] = []
        sys.addaudithook(self._audit)
        threading.excepthook = lambda args: self.heard.append(f"thread: {args.exc_value!r}")
        sys.unraisablehook = lambda args: self.heard.append(f"unraisable: {args.exc_value!r}")
        handler = logging.Handler()
        handler.emit = self._logged  # type: ignore[method-assign]
        log = logging.getLogger("virtmount")
        log.addHandler(handler)
        log.propagate = False

    @contextlib.contextmanager
    def over(self, folder: Path) -> Iterator[list[str]]:
        self.heard = []
        self._folder = f"{folder}{os.sep}"
        try:
            yield self.heard
        finally:
            self._folder = ""

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._folder:
            return
        if event == "open":
            path = args[0]
            if isinstance(path, int):
                return
            # As it is: what a link leads to was looked at before.
            if not os.path.abspath(os.fsdecode(path)).startswith(self._folder):
                self.heard.append(f"opened {path!r}")
        elif event.startswith(FORBIDDEN_EVENTS):
            self.heard.append(f"{event} {args!r:.200}")

    def _logged(self, record: logging.LogRecord) -> None:
        """The Pager turns exceptions into EIO: fine, if they were made for that."""
        args = record.args if isinstance(record.args, tuple) else ()
        for arg in args:
            if isinstance(arg, BaseException) and not isinstance(arg, VirtmountError | OSError):
                self.heard.append(f"logged {record.getMessage()}")


class Meter:
    """CPU time and memory since the last reset."""

    def reset(self) -> None:
        # 5: the peak of the resident size begins anew (proc(5), clear_refs).
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self._before = self._peak()
        self._cpu = time.process_time()

    def read(self) -> tuple[float, int]:
        return time.process_time() - self._cpu, self._peak() - self._before

    @staticmethod
    def _peak() -> int:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * KIB
        raise RuntimeError("no VmHWM in /proc/self/status")


def fingerprint(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and contents of every regular file in a folder; sparse ones quickly."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        digest = hashlib.blake2b(digest_size=16)
        fd = os.open(path, os.O_RDONLY)
        try:
            size, at = os.fstat(fd).st_size, 0
            while at < size:
                try:
                    at = os.lseek(fd, at, os.SEEK_DATA)
                except OSError:
                    break
                end = os.lseek(fd, at, os.SEEK_HOLE)
                while at < end:
                    part = os.pread(fd, min(MIB, end - at), at)
                    if not part:
                        break
                    # Zeros that are there and a hole are the same.
                    for low in range(0, len(part) if part != ZEROS[: len(part)] else 0, PAGE):
                        page = part[low : low + PAGE]
                        if page != ZEROS[: len(page)]:
                            digest.update((at + low).to_bytes(8, "little") + page)
                    at += len(part)
        finally:
            os.close(fd)
        found[str(path)] = (size, digest.hexdigest())
    return found


def places(size: int, step: int) -> list[tuple[int, int]]:
    """What is read of a disk of this size: all of it, or its ends and some of what is between."""
    if size <= WHOLE:
        return [(at, min(step, size - at)) for at in range(0, size, step)]
    starts = set(range(0, 2 * MIB, CHUNK))
    starts |= {(1 << bit) // CHUNK * CHUNK for bit in range(21, 63) if 1 << bit < size}
    starts |= {(size - 1) // CHUNK * CHUNK, size // 2 // CHUNK * CHUNK}
    return [(at, min(CHUNK, size - at)) for at in sorted(starts)]


def read_all(disk: virtmount.OpenDisk, step: int) -> dict[int, bytes | int]:
    """Chunk -> bytes or errno."""
    found: dict[int, bytes | int] = {}
    if disk.size <= WHOLE:
        with contextlib.suppress(OSError):
            whole = disk.pread(0, disk.size)
            return {at: whole[at : at + length] for at, length in places(disk.size, step)}
    for at, length in places(disk.size, step):
        try:
            found[at] = disk.pread(at, length)
        except OSError as error:
            found[at] = error.errno or -1
    return found


class Session:
    """The requests of one writable opening, and what must be read afterwards.

    What was written and not flushed, and what failed, may be there or not: it is not looked at.
    """

    def __init__(self, disk: virtmount.OpenDisk, before: dict[int, bytes | int], step: int) -> None:
        self.disk = disk
        self._lengths = dict(places(disk.size, step))
        self.expected: dict[int, bytes | int | None] = dict(before)
        self._pending: set[int] = set()

    def carry_out(self) -> None:
        chunks = list(self.expected)
        wanted = list(dict.fromkeys((*chunks[:9], *chunks[20:22], *chunks[64:68], *chunks[-2:])))
        for i, at in enumerate(wanted):
            if i % 3 == 0:
                self._write(at, bytes([0xC0 + i]) * 512)
        self._flush()
        for at in chunks[3:6]:
            self._zero(at)
        for i, at in enumerate(wanted):
            if i % 3 == 1:
                self._write(at, bytes([0x80 + i]) * 512)
        self._flush()

    def give_up(self) -> None:
        """What was not flushed may be lost."""
        self.expected.update(dict.fromkeys(self._pending))

    def _flush(self) -> None:
        if self._try(self.disk.flush):
            self._pending.clear()

    def _write(self, at: int, data: bytes) -> None:
        data = data[: self._lengths[at]]
        old = self.expected[at]
        if not self._try(lambda: self.disk.pwrite(at, data)) or not isinstance(old, bytes):
            self.expected[at] = None  # or the rest of it could not be read before
        else:
            self.expected[at] = data + old[len(data) :]
        self._pending.add(at)

    def _zero(self, at: int) -> None:
        done = self._try(lambda: self.disk.write_zeroes(at, self._lengths[at]))
        self.expected[at] = bytes(self._lengths[at]) if done else None
        self._pending.add(at)

    @staticmethod
    def _try(act: Callable[[], object]) -> bool:
        try:
            act()
        except OSError:
            return False
        return True


class Attempt:
    """One case, opened once to read it and once more to write to it."""

    def __init__(self, folder: Path, case: Case, watch: Watch, meter: Meter) -> None:
        self.case, self.watch, self.meter = case, watch, meter
        self.folder = folder
        self.path = folder / case.file_name

    def read(self) -> Verdict:
        verdict = Verdict(self.case.name, writable=False)
        before = fingerprint(self.folder)
        with self._judged(verdict), self._opened(verdict, writable=False) as disk:
            if disk:
                self._note(verdict, read_all(disk, self.case.step))
        look = Verdict(self.case.name, writable=False)
        with self._judged(look, openings=2), contextlib.suppress(VirtmountError):
            size = virtmount.inspect(self.path, self.case.format).size
            if size <= MAPPED:
                mapped = virtmount.map_extents(self.path, self.case.format)
                verdict.extents = len(list(itertools.islice(mapped, EXTENTS)))
                del mapped  # closes the files
        verdict.wrong += (f"info and map: {text}" for text in look.wrong)
        if fingerprint(self.folder) != before:
            verdict.wrong.append("the files were changed by reading")
        return verdict

    def write(self) -> Verdict:
        verdict = Verdict(self.case.name, writable=True)
        before = fingerprint(self.folder)
        session: Session | None = None
        mine = {str(self.path)}
        with self._judged(verdict), self._opened(verdict, writable=True) as disk:
            if disk:
                # Extents and data files belong to the image.
                mine |= {str(file.path) for file in disk.image.files}
                content = read_all(disk, self.case.step)
                self._note(verdict, content)
                session = Session(disk, content, self.case.step)
                session.carry_out()
                session.give_up()
        after = fingerprint(self.folder)
        if session is None:
            if after != before:
                verdict.wrong.append("the files were changed, though it was refused")
            return verdict
        if {**before, **dict.fromkeys(mine)} != {**after, **dict.fromkeys(mine)}:
            verdict.wrong.append("another file was changed by writing")
        again = Verdict(self.case.name, writable=False)
        with self._judged(again), self._opened(again, writable=False) as disk:
            if disk:
                self._compare(verdict, session, read_all(disk, self.case.step))
        if again.error:
            verdict.wrong.append(f"after writing: {again.error}")
        verdict.wrong += again.wrong
        return verdict

    def check(self) -> Verdict:
        """A check that repairs nothing."""
        verdict = Verdict(self.case.name, writable=False)
        before = fingerprint(self.folder)
        with self._judged(verdict, CHECK_CPU / CPU):
            self._checked(verdict)
        if fingerprint(self.folder) != before:
            verdict.wrong.append("the files were changed by a check")
        verdict.wrong = [f"check: {text}" for text in verdict.wrong]
        return verdict

    def _checked(self, verdict: Verdict) -> None:
        try:
            with HostFile(self.path) as file:
                format = self.case.format
                driver = formats.load(format) if format else formats.probe(file)
                if driver.checks:
                    items = driver.check(file, DEFAULTS, Repair.NOTHING)
                    for item in itertools.islice(items, FINDINGS):
                        if isinstance(item, Plan) and len(item):
                            verdict.wrong.append(f"a plan: {item!r:.100}")
                    items.close()  # type: ignore[attr-defined]
        except (VirtmountError, OSError) as error:
            verdict.error, verdict.kind = str(error), type(error).__name__

    def _compare(self, verdict: Verdict, session: Session, found: dict[int, bytes | int]) -> None:
        if self.case.loose:
            return
        for at, expected in session.expected.items():
            if expected is not None and found.get(at) != expected:
                text = f"after writing, guest byte {at} on is {found.get(at)!r:.40}"
                verdict.wrong.append(f"{text}, not {expected!r:.40}")

    def _note(self, verdict: Verdict, content: dict[int, bytes | int]) -> None:
        guest = self.case.guest
        for at, data in content.items():
            if isinstance(data, int):
                verdict.reads[at] = str(data)
            elif guest is not None and data[: len(guest) - at] != guest[at : at + len(data)]:
                verdict.differs.append(at)

    @contextlib.contextmanager
    def _opened(self, verdict: Verdict, *, writable: bool) -> Iterator[virtmount.OpenDisk | None]:
        try:
            disk = virtmount.open(self.path, self.case.format, writable=writable)
        except VirtmountError as error:
            verdict.error, verdict.kind = str(error), type(error).__name__
            yield None
            return
        try:
            yield disk
        finally:
            try:
                disk.close()
            except (OSError, VirtmountError) as error:
                if not writable:
                    verdict.wrong.append(f"close: {error!r}")

    @contextlib.contextmanager
    def _judged(self, verdict: Verdict, openings: float = 1) -> Iterator[None]:
        descriptors = set(os.listdir("/proc/self/fd"))
        self.meter.reset()
        with self.watch.over(self.folder) as heard:
            try:
                yield
            except BaseException as error:
                verdict.wrong.append(f"raised {error!r:.300} {_trail(error)}")
        verdict.cpu, verdict.growth = self.meter.read()
        verdict.wrong += dict.fromkeys(heard)
        if verdict.cpu > CPU * openings:
            verdict.wrong.append(f"{verdict.cpu:.2f} s of CPU time, at most {CPU * openings}")
        if verdict.growth > GROWTH:
            verdict.wrong.append(f"{verdict.growth // MIB} MiB of memory, at most {GROWTH // MIB}")
        if left := set(os.listdir("/proc/self/fd")) - descriptors:
            verdict.wrong.append(f"file descriptors were left open: {left}")


def _trail(error: BaseException) -> str:
    places, frame = [], error.__traceback__
    while frame:
        code = frame.tb_frame.f_code
        places.append(f"{Path(code.co_filename).name}:{frame.tb_lineno}")
        frame = frame.tb_next
    return " > ".join(places[-4:])


def patience() -> None:
    """Begin to wait anew."""
    faulthandler.dump_traceback_later(WALL, exit=True)


def main() -> None:
    base_folder, folder = Path(sys.argv[1]), Path(sys.argv[2])
    loaded = {name: bases.load(base_folder, name) for name in bases.makers()}
    known = mutations.all_by_name()
    # Whatever is imported at first use is opened here, not under the watch.
    for name in formats.TABLE:
        formats.load(name)
    # One process at a time: several bases have a parent of one name, and each makes its own.
    alone = os.open(base_folder, os.O_RDONLY)
    fcntl.flock(alone, fcntl.LOCK_EX)
    for base in loaded.values():
        if beside := bases.makers()[base.name].beside:
            beside(base.path)
        with contextlib.suppress(VirtmountError), virtmount.open(base.path, base.format) as disk:
            disk.pread(0, 4096)
        with contextlib.suppress(VirtmountError):
            virtmount.inspect(base.path, base.format)
            list(virtmount.map_extents(base.path, base.format))
    os.close(alone)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    watch, meter = Watch(), Meter()
    for number, line in enumerate(sys.stdin):
        wanted = json.loads(line)
        patience()
        place = folder / str(number)
        place.mkdir(parents=True)
        if wanted["kind"] == "flip":
            case = flips.case(wanted["name"], loaded)
        else:
            case = known[wanted["name"]].case(loaded)
        case.make(place)
        attempt = Attempt(place, case, watch, meter)
        verdict = attempt.read()
        patience()
        verdict.wrong += attempt.check().wrong
        verdicts = [asdict(verdict)]
        print(json.dumps({"name": case.name, "started": "write"}), flush=True)
        if wanted.get("keep"):
            case.copy(place)
        patience()
        verdicts.append(asdict(attempt.write()))
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"name": case.name, "verdicts": verdicts, "path": str(attempt.path)}))
        sys.stdout.flush()
        if not wanted.get("keep") or verdicts[1]["error"]:
            shutil.rmtree(place)
            place.with_name(place.name + mutations.BEFORE).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
