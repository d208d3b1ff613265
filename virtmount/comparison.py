"""Whether two images hold the same disk: `virtmount compare`."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from virtmount.copying import Report, Run, in_order, open_source, pieces, quiet, union
from virtmount.image import DEFAULTS, Options
from virtmount.upkeep import Progress


@dataclass(frozen=True, slots=True)
class Comparison:
    """`offset`: of the first byte that differs, None where the disks are the same.

    Of disks of different sizes the longer one is the same if the rest of it is zeros.
    """

    offset: int | None
    sizes: tuple[int, int]

    @property
    def same(self) -> bool:
        return self.offset is None

    def to_dict(self) -> dict[str, object]:
        return {"same": self.same, "offset": self.offset, "sizes": list(self.sizes)}


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    first_format: str | None = None,
    second_format: str | None = None,
    parent_format: str | None = None,
    force: bool = False,
    options: Options = DEFAULTS,
    report: Report = quiet,
) -> Comparison:
    """Compare what two images read as; both are locked and only read."""
    with (
        open_source(
            first, first_format, parent_format=parent_format, force=force, options=options
        ) as a,
        open_source(
            second, second_format, parent_format=parent_format, force=force, options=options
        ) as b,
    ):

        def different(run: Run) -> tuple[Run, int | None]:
            return run, first_difference(run.start, a.read(run), b.read(run))

        total = sum(run.length for run in union(a.content.runs(), b.content.runs()))
        done = 0
        wanted = pieces(union(a.content.runs(), b.content.runs()))
        with contextlib.closing(in_order(different, wanted)) as parts:
            for run, offset in parts:
                if offset is not None:
                    return Comparison(offset, (a.size, b.size))
                done += run.length
                report(Progress(done, total))
        return Comparison(None, (a.size, b.size))


def first_difference(start: int, a: bytes, b: bytes) -> int | None:
    """Where two equally long pieces, which begin at byte `start`, differ first."""
    if a == b:
        return None
    low, high = 0, len(a)  # a[:low] is the same, a[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return start + low
