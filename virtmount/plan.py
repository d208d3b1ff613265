"""Metadata changes as data: what to write, and what must be durable before what.

A Plan is a sequence of steps.  Steps between two barriers may reach the disk in any order, wholly,
torn at 512 bytes, or not at all; a Barrier promises that everything before it is durable
(fdatasync).  The Pager executes plans; a test can stop one after any subset of the steps since
the last barrier and reopen what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Write:
    """Write `data` at byte `offset` of the image's file number `file`."""

    offset: int
    data: bytes
    file: int = 0


@dataclass(frozen=True, slots=True)
class Extend:
    """Make the file at least `size` bytes long; the new bytes read as zeros."""

    size: int
    file: int = 0


@dataclass(frozen=True, slots=True)
class Truncate:
    """Cut the file to `size` bytes.  Only what no mapping uses may be cut off."""

    size: int
    file: int = 0


@dataclass(frozen=True, slots=True)
class Punch:
    """Make `length` bytes at `offset` read as zeros, giving the space back if the host can.

    The Pager lets every host request in flight end first, so a cluster that an earlier step of
    the plan unmapped may be punched.
    """

    offset: int
    length: int
    file: int = 0


@dataclass(frozen=True, slots=True)
class _Barrier:
    def __repr__(self) -> str:
        return "Barrier"


Barrier = _Barrier()

Step = Write | Extend | Truncate | Punch | _Barrier


class Plan:
    """An immutable sequence of steps; `a + b` is a, then b, with no barrier in between."""

    __slots__ = ("steps",)

    def __init__(self, *steps: Step) -> None:
        self.steps = steps

    def __add__(self, other: Plan) -> Plan:
        return Plan(*self.steps, *other.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"Plan({', '.join(map(repr, self.steps))})"
