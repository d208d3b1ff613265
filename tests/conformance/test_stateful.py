"""Any sequence of requests, detaches and kills against a dictionary of sectors.

VIRTMOUNT_EXAMPLES sets how many sequences are tried per image and engine.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.conformance.cases import KIB, MIB, Case, build, one, qcow2, raw, vhdx
from tests.conformance.conftest import check_sound, convert, copy
from tests.conformance.disks import Disk, Open
from tests.formats.make_vhd import Block, Spec
from tests.formats.test_vdi import FREE
from tests.formats.test_vdi import make as make_vdi
from virtmount.chain import open_chain

SECTOR = 512
EXAMPLES = int(os.environ.get("VIRTMOUNT_EXAMPLES", "20"))

CASES = (
    one("qcow2", qcow2(200 * KIB + 512, 4 * KIB, zeroed=True, compressed=True)),
    one("qcow2-512", qcow2(60 * KIB, 512)),
    one("qcow2-on-raw", qcow2(200 * KIB, 4 * KIB, zeroed=True), raw(120 * KIB)),
    one(
        "qcow2-on-qcow2",
        qcow2(400 * KIB, 64 * KIB, compressed=True),
        qcow2(300 * KIB, 4 * KIB, zeroed=True, compressed=True),
    ),
    one("vhdx", vhdx(4 * MIB, MIB)),
    one("raw", raw(200 * KIB)),
)


def build_vdi(folder: Path) -> Path:
    """Small blocks, which qemu-img cannot make; it cannot read them either."""
    make_vdi(folder / "0.vdi", [3, FREE, 1, FREE, 0, *[FREE] * 30, 2], block_size=4 * KIB)
    return folder / "0.vdi"


class Sessions(RuleBasedStateMachine):
    """`now` is what every sector holds; `legal` what it may hold instead after a kill."""

    template: ClassVar[Path]
    format: ClassVar[str]
    readable: ClassVar[bool]  # by qemu-img
    opener: ClassVar[Open]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.generations = itertools.count()
        self.disk: Disk | None = None
        self.killed = False

    @initialize()
    def start(self) -> None:
        self.path = self.folder / self.template.name
        for file in self.template.parent.iterdir():
            if file.is_file():
                copy(file, self.folder / file.name)
        chain = open_chain(self.path, self.format, writable=True)
        caps = chain.top.caps
        self.cluster = chain.top.cluster_size
        self.discards = caps.discard and (caps.zero_hides_parent or len(chain.images) == 1)
        chain.close()
        self.disk = self.open()
        content = self.disk.pread(0, self.disk.size)
        self.now = {at: content[at : at + SECTOR] for at in range(0, len(content), SECTOR)}
        self.legal: dict[int, set[bytes]] = {}

    def open(self) -> Disk:
        return type(self).opener(self.path, self.format, True)

    def put(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), SECTOR):
            sector = offset + at
            self.legal.setdefault(sector, set()).add(self.now[sector])
            self.now[sector] = data[at : at + SECTOR]

    def range(self, start: int, length: int) -> tuple[int, int]:
        """Sectors that the numbers stand for, inside the disk."""
        count = len(self.now)
        start %= count
        return start * SECTOR, min(length, count - start) * SECTOR

    # Several requests a step: else most sequences are mostly attaching and detaching.
    places = st.integers(0, 1 << 16)
    lengths = st.one_of(st.integers(1, 8), st.integers(1, 200))
    requests = st.tuples(
        st.sampled_from(("write", "write", "write", "write_zeroes", "discard", "flush", "read")),
        places,
        lengths,
    )

    @rule(requests=st.lists(requests, min_size=3, max_size=12))
    def some_requests(self, requests: list[tuple[str, int, int]]) -> None:
        for name, start, length in requests:
            getattr(self, name)(*self.range(start, length))

    @rule(requests=st.lists(requests, min_size=3, max_size=12), place=places)
    def some_requests_close_together(
        self, requests: list[tuple[str, int, int]], place: int
    ) -> None:
        for name, start, length in requests:
            getattr(self, name)(*self.range(place + start % 32, length))

    def write(self, offset: int, length: int) -> None:
        data = b"".join(
            next(self.generations).to_bytes(8, "little") * (SECTOR // 8)
            for _ in range(length // SECTOR)
        )
        assert self.disk
        self.disk.pwrite(offset, data)
        self.put(offset, data)

    def write_zeroes(self, offset: int, length: int) -> None:
        assert self.disk
        self.disk.write_zeroes(offset, length)
        self.put(offset, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        size = len(self.now) * SECTOR
        end = offset + length
        first = -(-offset // self.cluster) * self.cluster
        last = end if end == size else end // self.cluster * self.cluster
        assert self.disk
        self.disk.discard(offset, length)
        if self.discards and first < last:
            self.put(first, bytes(last - first))

    def read(self, offset: int, length: int) -> None:
        assert self.disk
        assert self.disk.pread(offset, length) == self.expected(offset, length)

    def flush(self, offset: int, length: int) -> None:
        assert self.disk
        self.disk.flush()
        self.legal.clear()

    def expected(self, offset: int, length: int) -> bytes:
        return b"".join(self.now[at] for at in range(offset, offset + length, SECTOR))

    @rule()
    def detach_and_attach(self) -> None:
        assert self.disk
        self.disk.close()
        self.legal.clear()
        self.disk = self.open()
        self.check_all()

    @rule()
    def kill(self) -> None:
        """Go on with copies of the files as they are now, without an orderly end."""
        self.killed = True
        assert self.disk
        saved = {file: file.read_bytes() for file in self.folder.iterdir() if file.is_file()}
        self.disk.close()
        for file, content in saved.items():
            file.write_bytes(content)
        self.disk = self.open()
        content = self.disk.pread(0, len(self.now) * SECTOR)
        for at in self.now:
            found = content[at : at + SECTOR]
            if found != self.now[at]:
                assert found in self.legal.get(at, ()), f"sector at {at}"
                self.now[at] = found
        self.legal.clear()

    def check_all(self) -> None:
        assert self.disk
        size = len(self.now) * SECTOR
        assert self.disk.pread(0, size) == self.expected(0, size)

    def check_valid(self) -> None:
        if not self.readable:
            return
        check_sound(self.path, self.format, killed=self.killed)
        assert convert(self.path, self.format) == self.expected(0, len(self.now) * SECTOR)

    def teardown(self) -> None:
        try:
            if self.disk:
                self.check_all()
                self.disk.close()
                self.check_valid()
        finally:
            shutil.rmtree(self.folder)


def try_sequences(template: Path, format: str, opener: Open, *, readable: bool) -> None:
    machine = type(
        "Sessions",
        (Sessions,),
        {
            "template": template,
            "format": format,
            "opener": staticmethod(opener),
            "readable": readable,
        },
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=12,
            deadline=None,
            derandomize="VIRTMOUNT_EXAMPLES" not in os.environ,
        ),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_sequence(case: Case, opener: Open, tmp_path: Path) -> None:
    try_sequences(build(case, tmp_path), case.top.format, opener, readable=True)


def test_any_sequence_on_a_vdi_with_small_blocks(opener: Open, tmp_path: Path) -> None:
    try_sequences(build_vdi(tmp_path), "vdi", opener, readable=False)


def test_any_sequence_on_a_vhd_with_partly_present_blocks(opener: Open, tmp_path: Path) -> None:
    blocks = {
        9: Block(b"\1" * 4096),
        2: Block(b"\2" * 1024, [range(2)]),
        30: Block(bytes(1024) + b"\3" * 2048, [range(2, 6)]),
    }
    path = Spec(40 * 4096, blocks, block=4096).write(tmp_path / "image")
    try_sequences(path, "vpc", opener, readable=True)
