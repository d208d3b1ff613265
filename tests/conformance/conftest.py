"""Fixtures: one image of every case, its raw content as an independent program reads it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conformance.cases import CASES, Case, build, run
from tests.conformance.disks import ENGINES, Disk, Open
from virtmount.formats import load
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS
from virtmount.upkeep import Finding, Repair, Severity

CHECKED_BY_US = ("vpc", "qcow")


@dataclass
class Subject:
    """A copy of an image that a test may change, and what is in it."""

    case: Case
    path: Path
    content: bytearray  # what the disk has to hold; tests change it along with the disk
    _open: Open

    def open(self, *, writable: bool = False) -> Disk:
        return self._open(self.path, self.case.top.format, writable)

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def random(self) -> random.Random:
        return random.Random(self.case.name)

    def write(self, disk: Disk, offset: int, data: bytes) -> None:
        disk.pwrite(offset, data)
        self.content[offset : offset + len(data)] = data

    def expect(self, disk: Disk, offset: int, length: int) -> None:
        found = disk.pread(offset, length)
        assert len(found) == length
        wanted = self.content[offset : offset + length]
        if found != wanted:
            pytest.fail(difference(found, wanted, offset))

    def expect_all(self, disk: Disk) -> None:
        self.expect(disk, 0, self.size)

    def expect_valid(self) -> None:
        """The file as it is on disk now: no error, no leak, and the content that we expect."""
        format = self.case.top.format
        check_sound(self.path, format)
        found = convert(self.path, format)
        if found != self.content:
            pytest.fail(difference(found, self.content, 0))


def check_sound(path: Path, format: str, *, killed: bool = False) -> None:
    """No error, no leak: by qemu-img, or by ourselves where it does not check the format.

    `killed`: space that a killed writer had not used yet may be left by us, qemu-img sees none.
    """
    if format in CHECKED_BY_US:
        with HostFile(path) as file:
            found = list(load(format).check(file, DEFAULTS, Repair.NOTHING))
        findings = [item for item in found if isinstance(item, Finding)]
        allowed = (Severity.NOTE, Severity.LEAK) if killed else (Severity.NOTE,)
        wrong = [item for item in findings if item.severity not in allowed]
        assert not wrong, wrong
    elif format != "raw":
        run("qemu-img", "check", "-q", "-f", format, path)


def difference(found: bytes, wanted: bytes | bytearray, start: int) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} bytes, expected {len(wanted)}"
    wrong = [
        at for at in range(0, len(wanted), 512) if found[at : at + 512] != wanted[at : at + 512]
    ]
    first = wrong[0]
    return (
        f"{len(wrong)} sectors differ, the first at {start + first}: "
        f"{found[first : first + 8].hex()}, expected {wanted[first : first + 8].hex()}"
    )


def convert(path: Path, format: str) -> bytes:
    """The whole content of an image, read by qemu-img."""
    out = path.parent / "content.raw"
    run("qemu-img", "convert", "-f", format, "-O", "raw", path, out)
    content = out.read_bytes()
    out.unlink()
    return content


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[Path, bytes]]:
    """Makes each case once: path and content."""
    made: dict[str, tuple[Path, bytes]] = {}

    def get(case: Case) -> tuple[Path, bytes]:
        if case.name not in made:
            path = build(case, tmp_path_factory.mktemp(case.name))
            made[case.name] = path, convert(path, case.top.format)
        return made[case.name]

    return get


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    case: Case = request.param
    return case


@pytest.fixture(params=ENGINES)
def opener(request: pytest.FixtureRequest) -> Open:
    return ENGINES[request.param]


@pytest.fixture
def subject(
    case: Case,
    opener: Open,
    built: Callable[[Case], tuple[Path, bytes]],
    tmp_path: Path,
) -> Iterator[Subject]:
    path, content = built(case)
    for file in path.parent.iterdir():
        if file.is_file():
            copy(file, tmp_path / file.name)
    yield Subject(case, tmp_path / path.name, bytearray(content), opener)
    shutil.rmtree(tmp_path, ignore_errors=True)


def copy(source: Path, target: Path) -> None:
    """Copy a file with its holes."""
    with source.open("rb") as old, target.open("wb") as new:
        size = os.fstat(old.fileno()).st_size
        os.truncate(new.fileno(), size)
        at = 0
        while at < size:
            try:
                start = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError:
                break  # only a hole is left
            at = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            data = os.pread(old.fileno(), at - start, start)
            assert os.pwrite(new.fileno(), data, start) == len(data)
