"""What is attached: one file NAME.json in /run/virtmount for each disk.

1. A record is written whole or not at all (written beside, then renamed), so readers need no lock.
2. Names are given out, and records of the dead removed, under one lock; it is an flock, which
   goes with its process.
3. A record is believed only while what it speaks of exists: the process of that number and start
   time, in this boot; or, where no process serves the disk, the kernel's device.
4. A record whose state is FAILED stays after its process, until somebody has read it.

VIRTMOUNT_RUN names another folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from virtmount.errors import Busy, Denied, NotAttached, VirtmountError

RUN = "/run/virtmount"
VERSION = 1  # of the record; another one is not understood
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,30}")
NUMBER_MAX = 10000

STARTING = "starting"
ATTACHED = "attached"
ENDING = "ending"
FAILED = "failed"


@dataclass(slots=True)
class Record:
    """One attached disk; the keys of the file and of `list --json`."""

    name: str
    image: str  # absolute path, as it was when attached
    device: str = ""  # the kernel's node
    format: str = ""
    variant: str = ""
    size: int = 0
    sector_size: int = 512
    read_only: bool = False
    transport: str = ""
    cache: str = ""
    state: str = STARTING
    pid: int = 0  # 0: the kernel serves it alone
    since: float = 0.0  # seconds since 1970
    parents: list[str] = field(default_factory=list)
    overlay: str = ""  # folder of the file that takes all writes
    features: dict[str, Any] = field(default_factory=dict)
    error: str = ""  # with FAILED: what went wrong
    file_id: str = ""  # device:inode of the image
    data_id: str = ""  # ... of the file that holds a flat image's bytes
    started: int = 0  # of the process, in clock ticks after the boot
    boot: str = ""

    @property
    def kernel_name(self) -> str:
        return os.path.basename(self.device)

    @property
    def path(self) -> str:
        """The node that people use."""
        return f"/dev/{self.name}"

    def is_alive(self) -> bool:
        """Whether what serves the disk is still there."""
        if self.boot != boot_id():
            return False
        if self.pid:
            return start_time(self.pid) == self.started
        return bool(self.device) and os.path.exists(f"/sys/block/{self.kernel_name}/loop")

    def stamp(self, pid: int) -> None:
        """Bind the record to a process, or with 0 to this boot alone."""
        self.pid = pid
        self.started = start_time(pid) if pid else 0
        self.boot = boot_id()

    def save(self) -> None:
        """Write the record; readers see the old one or the new one."""
        path = folder() / f"{self.name}.json"
        beside = path.with_name(f".{self.name}.{os.getpid()}")
        try:
            with open(beside, "w", opener=_private) as file:
                json.dump({"version": VERSION, **asdict(self)}, file, indent=1)
                file.write("\n")
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        for ending in (".json", ".log"):
            (folder() / f"{self.name}{ending}").unlink(missing_ok=True)

    @property
    def log(self) -> Path:
        return folder() / f"{self.name}.log"


def _private(path: str, flags: int) -> int:
    # Anybody may list what is attached; only root changes it.
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


def folder() -> Path:
    return Path(os.environ.get("VIRTMOUNT_RUN") or RUN)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Alone among those who give out names and remove records.  Not for a thread that holds it."""
    where = folder()
    try:
        where.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(where / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except PermissionError:
        raise Denied(
            where, "", "only root may attach and detach", hint="sudo virtmount …"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def records() -> list[Record]:
    """All records that can be read, alive or not, by name."""
    found = []
    for path in folder().glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(parse(path.read_text()))
    return sorted(found, key=lambda record: _natural(record.name))


def parse(text: str) -> Record:
    """A record from its file's text; ValueError if this version did not write it."""
    values = json.loads(text)
    if not isinstance(values, dict) or values.pop("version", None) != VERSION:
        raise ValueError(f"not a record of version {VERSION}")
    known = {item.name: item for item in fields(Record)}
    if unknown := set(values) - set(known):
        raise ValueError(f"unknown keys {', '.join(sorted(unknown))}")
    if not {"name", "image"} <= set(values):
        raise ValueError("no name or no image")
    sample = asdict(Record("", ""))
    for key, value in values.items():
        if not isinstance(value, (float, int) if key == "since" else type(sample[key])):
            raise ValueError(f"{key} is {value!r}")
    if not NAME.fullmatch(values["name"]):
        raise ValueError(f"name {values['name']!r}")
    return Record(**values)


def _natural(name: str) -> tuple[str, int]:
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or -1)


def split(found: list[Record]) -> tuple[list[Record], list[Record]]:
    """(those to believe, those whose process died without a word)."""
    alive: list[Record] = []
    dead: list[Record] = []
    for record in found:
        (alive if record.state == FAILED or record.is_alive() else dead).append(record)
    return alive, dead


def claim(record: Record, stem: str, wish: str | None, clear: Callable[[Record], None]) -> None:
    """Give the record a name that nobody else has, and write it.

    The name is `wish`, or `stem` with the first free number.  `clear` takes away what a dead
    record of the same name left in the system; it is called under the lock.  Busy where the wish
    is taken.
    """
    if wish is not None and not NAME.fullmatch(wish):
        raise VirtmountError("--name", "", f"{wish!r}: letters, digits, - and _, a letter first")
    with locked():
        alive, dead = split(records())
        for left in dead:
            clear(left)
            left.remove()
        taken = {other.name for other in alive}
        for name in [wish] if wish is not None else (f"{stem}{n}" for n in range(NUMBER_MAX)):
            # Somebody else's node is never replaced.
            if name not in taken and not os.path.lexists(f"/dev/{name}"):
                record.name = name
                record.save()
                return
    if wish is not None:
        raise Busy(f"/dev/{wish}", "", "that name is taken")
    raise Busy(stem, "", f"all {NUMBER_MAX} names are taken")


def now() -> float:
    return round(time.time(), 3)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> int:
    """When a process started, in clock ticks after the boot; -1 if it is not there or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    # The name in parentheses may hold anything.
    rest = text[text.rindex(")") + 2 :].split()
    return -1 if rest[0] in "ZX" else int(rest[19])


def file_id(path: str | os.PathLike[str]) -> str:
    """The same for every path to the same file."""
    found = os.stat(path)
    if stat.S_ISBLK(found.st_mode):
        return f"block:{found.st_rdev}"
    return f"{found.st_dev}:{found.st_ino}"


def find(what: str | os.PathLike[str]) -> list[Record]:
    """The records that a word of the user means: a name, a device, or an image.

    Only an image that is attached more than once gives more than one.  NotAttached otherwise.
    """
    text = os.fspath(what)
    found = records()
    for record in found:
        if text in (record.name, record.path, record.device):
            return [record]
    real = os.path.realpath(text)
    for record in found:
        if record.device and real == record.device:
            return [record]
    for record in found:
        # ublkb0p1 of ublkb0, vhdx0p1 of vhdx0
        for disk in filter(None, (record.device, record.path)):
            for path in (text, real):
                if re.fullmatch(re.escape(disk) + r"p\d+", path):
                    hint = f"virtmount detach {record.path}"
                    raise NotAttached(text, "", f"a partition of {record.path}", hint=hint)
    with contextlib.suppress(OSError):
        wanted = file_id(text)
        if same := [record for record in found if record.file_id == wanted]:
            return same
    if same := [record for record in found if record.image == os.path.abspath(text)]:
        return same
    raise NotAttached(text, "", "not attached", hint="virtmount list")
