"""Named ways to make an image hostile, and what opening it must then come to.

A Mutation is a base image (bases.py), changes to it, and the answer: the pattern of an error that
names a field or a place, or that it opens.  What opens reads as its base does, but for the guest
clusters that must fail with EIO; `guest=False` where other bytes are right as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.corpus.bases import Base, makers, modules

Writes = Sequence[tuple[int, bytes]]  # offset, bytes
Edit = Callable[[Base], Writes]
Answer = str | tuple[str, str]
OPENS = ""  # instead of an error's pattern
MAX_COPY = 64 << 20
# What is asked for with VIRTMOUNT_CORPUS=full is as large as a hostile image may be; else a part.
FULL = os.environ.get("VIRTMOUNT_CORPUS") == "full"
PART = 1 if FULL else 4
BEFORE = ".before"
ANY = "."  # refused, whatever the words


@dataclass
class Case:
    """A mutation or a fuzzed image, ready to be made."""

    name: str
    format: str | None  # that is asked for; None: by content
    file_name: str
    step: int  # bytes that are read at a time
    guest: bytes | None  # what may be read
    loose: bool
    pieces: Sequence[tuple[int, bytes]]
    size: int
    beside: Callable[[Path], None] | None = None

    def make(self, folder: Path) -> None:
        """Write the image, sparse, and what belongs to it."""
        path = folder / self.file_name
        path.parent.mkdir(exist_ok=True)
        self._write(path)
        if self.beside:
            self.beside(path)

    def copy(self, folder: Path) -> None:
        """Keep the image as it was beside the folder, if it is small."""
        if self.size <= MAX_COPY:
            self._write(folder.with_name(folder.name + BEFORE))

    def _write(self, path: Path) -> None:
        with open(path, "wb") as file:
            for offset, data in self.pieces:
                file.seek(offset)
                file.write(data)
            file.truncate(self.size)


@dataclass(frozen=True)
class Mutation:
    name: str
    base: str
    edit: Edit
    read: str = OPENS
    write: str | None = None  # None: as for reading
    eio: tuple[int, ...] = ()  # guest clusters
    guest: bool = True
    loose: bool = False  # two guest clusters are one, or counts are wrong: writes show elsewhere
    size: int | None = None  # of the file; None: what it takes
    beside: Callable[[Path], None] | None = None
    format: str | None = "base"  # that is asked for; None: by content
    file_name: str = ""  # the base's

    @property
    def refused(self) -> str:
        """The answer when it is opened for writing."""
        return self.read if self.write is None else self.write

    def case(self, loaded: Mapping[str, Base]) -> Case:
        base, maker = loaded[self.base], makers()[self.base]
        writes = list(self.edit(base))
        size = self.size
        if size is None:
            size = max([base.size, *(offset + len(data) for offset, data in writes)])
        kept = [(offset, data[: size - offset]) for offset, data in base.pieces if offset < size]
        return Case(
            name=self.name,
            format=base.format if self.format == "base" else self.format,
            file_name=self.file_name or maker.file_name,
            step=base.cluster,
            guest=base.guest if self.guest else None,
            loose=self.loose,
            pieces=[*kept, *writes],
            size=size,
            beside=self.beside or maker.beside,
        )


def nothing(base: Base) -> Writes:
    return ()


def writing(*writes: tuple[int, bytes]) -> Edit:
    """The same, whatever the base."""
    return lambda base: writes


@dataclass(frozen=True)
class Field:
    """A number in a header, and the answer for each value that it is given.

    `answers` are for single values, else `otherwise` holds.  An answer is a pattern, OPENS, or a
    pair of them, for reading and for writing.
    """

    name: str
    offset: int
    width: int
    otherwise: Answer
    answers: Mapping[int, Answer]


def extremes(width: int) -> set[int]:
    """Of an unsigned number with so many bytes."""
    values = {0, 1, (1 << 8 * width) - 1, 1 << 8 * width - 1, (1 << 8 * width - 1) - 1}
    if width == 8:
        values |= {1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 32, (1 << 64) - 512, 1 << 62}
    return values


def grid(fields: Iterable[Field]) -> Iterator[tuple[Field, int, str, str]]:
    """Every field with every value: field, value, answers for reading and writing."""
    for field in fields:
        for value in sorted(extremes(field.width) | set(field.answers)):
            answer = field.answers.get(value, field.otherwise)
            read, write = answer if isinstance(answer, tuple) else (answer, answer)
            yield field, value, read, write


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda path: os.symlink(target, path.parent / name)


def all_by_name() -> dict[str, Mutation]:
    from tests.corpus import chains

    found: dict[str, Mutation] = {}
    for module in (*modules().values(), chains):
        for mutation in module.mutations():
            assert mutation.name not in found, mutation.name
            found[mutation.name] = mutation
    return found
