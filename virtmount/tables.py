"""Tables for people and JSON for programs, from the same columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TextIO, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """`value` is shown as str(); None as a dash."""

    name: str
    meaning: str
    value: Callable[[T], object]
    right: bool = False


def select(columns: Sequence[Column[T]], names: str) -> list[Column[T]]:
    """The columns of a list like NAME,SIZE, in its order; ValueError names an unknown one."""
    known = {column.name: column for column in columns}
    chosen = []
    for name in names.split(","):
        column = known.get(name.strip().upper())
        if column is None:
            raise ValueError(f"no column {name!r}, know {','.join(known)}")
        chosen.append(column)
    return chosen


def table(rows: Iterable[T], columns: Sequence[Column[T]], *, headings: bool = True) -> str:
    """Lines with every column as wide as its longest cell; control characters are shown as ?."""
    lines = [[_cell(column.value(row)) for column in columns] for row in rows]
    if headings:
        lines.insert(0, [column.name for column in columns])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        text.append(" ".join(cells).rstrip() + "\n")
    return "".join(text)


def card(rows: Iterable[tuple[str, object]]) -> str:
    """Lines `name  value`; those without a value are left out."""
    shown = [(name, _cell(value)) for name, value in rows if value not in (None, "", [], ())]
    width = max((len(name) for name, _ in shown), default=0)
    return "".join(f"{name.ljust(width)}  {value}\n" for name, value in shown)


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    # A file's name may hold anything: it must not move the cursor or fail in print().
    return "".join(char if char.isprintable() else "?" for char in str(value))


def size(value: int) -> str:
    """As lsblk: 512, 100M, 1.5G; the next unit from 1024 on, one decimal below 10."""
    amount, unit = float(value), ""
    for larger in "KMGTPE":
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    text = f"{amount:.1f}" if amount < 100 else f"{amount:.0f}"
    return text.removesuffix(".0") + unit


def write_json(value: Any, out: TextIO) -> None:
    json.dump(value, out, indent=2)
    out.write("\n")
