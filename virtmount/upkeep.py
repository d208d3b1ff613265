"""What making, checking and changing a whole image speaks of: the second half of the contract.

The methods themselves are Image's (image.py); creation.py, checking.py, conversion.py … call
them.  Units are bytes.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from virtmount.hostfile import HostFile
from virtmount.plan import Plan

if TYPE_CHECKING:
    from virtmount.image import Image


class Choice(NamedTuple):
    """An option of create: `-o NAME=VALUE`."""

    default: str
    help: str  # one line; says the values


@dataclass(slots=True)
class New:
    """An image to be made.

    `files[0]` is open for writing and empty; `add(name)` makes another empty file beside it and
    returns its number.  The names in the image are those that the user will see: `name` is that of
    files[0] (which may still have a temporary one), and `add` takes the final one.  `options` has
    every Choice of the driver, as text.  `parent` is open read-only, `parent_name` what is to be
    recorded for it: a path relative to the new image's folder where both allow it, else absolute.
    `passphrase` is for an image that is to be encrypted; None: nobody was asked.
    """

    files: list[HostFile]
    name: str
    size: int
    options: Mapping[str, str]
    add: Callable[[str], int]
    sector_size: int = 512
    parent: Image | None = None
    parent_name: str = ""
    passphrase: Callable[[], bytes] | None = None


class Severity(enum.Enum):
    """How bad a finding is; what qemu-img check counts."""

    LEAK = "leak"  # space that nothing uses: harmless
    DAMAGE = "damage"  # reading or writing on may give or destroy wrong data
    NOTE = "note"  # legal, but worth knowing; does not count


class Finding(NamedTuple):
    """Something that is wrong in an image.  `repaired`: the plan that follows it mends it."""

    severity: Severity
    place: str  # field or byte offset
    text: str  # found against expected
    repaired: bool = False


class Progress(NamedTuple):
    """How far a long task has come."""

    done: int
    total: int


class Elsewhere(Plan):
    """A plan of check() for an image of several files: `files` by the numbers that it uses."""

    __slots__ = ("files",)

    def __init__(self, plan: Plan, files: Sequence[HostFile]) -> None:
        super().__init__(*plan.steps)
        self.files = files


class Repair(enum.Enum):
    """What a check may write."""

    NOTHING = "nothing"
    LEAKS = "leaks"  # only what gives space back
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An earlier state that lies in the image itself."""

    id: str
    name: str
    size: int  # of the guest disk then, bytes
    date: float  # seconds since 1970
    vm_state: int = 0  # bytes
    details: Mapping[str, int] = field(default_factory=dict)


class Packer(ABC):
    """Writes an image from front to back, compressed.

    encode() is pure, called from several threads, and lets other threads run; add() and end() are
    called in ascending order from one.  A cluster that is not added was never written.
    """

    cluster_size: int

    @abstractmethod
    def encode(self, data: bytes) -> bytes | None:
        """`cluster_size` guest bytes, compressed; None: not worth it, add() gets them raw."""

    @abstractmethod
    def add(self, cluster: int, data: bytes, packed: bool) -> Plan:
        """The next cluster: what encode() gave, or the guest's bytes (the last one cut short)."""

    @abstractmethod
    def end(self) -> Plan:
        """Tables and headers; afterwards the image is whole."""
