"""What single steps cost: calls into the engine, misses, commits.  pytest -q benchmarks

pytest-benchmark prints the table; nothing here passes or fails by time.
"""

from __future__ import annotations

import array
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import virtmount
from virtmount.formats.qcow2 import QCOW2
from virtmount.hostfile import HostFile
from virtmount.image import decode

SIZE = 4 << 30
CLUSTER = 65536


@pytest.fixture(params=["qcow2", "vhdx", "vdi"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"disk.{request.param}"
    create = ["qemu-img", "create", "-q", "-f", request.param, str(path), str(SIZE)]
    subprocess.run(create, check=True)
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[virtmount.OpenDisk]:
    with virtmount.open(image, writable=True) as disk:
        disk.pwrite(0, bytes(CLUSTER))
        disk.flush()
        yield disk


def test_read_4k_known_to_the_map(benchmark: BenchmarkFixture, disk: virtmount.OpenDisk) -> None:
    """From Python and back: two thread hand-overs around one host read."""
    benchmark(disk.pread, 0, 4096)


def test_write_4k_known_to_the_map(benchmark: BenchmarkFixture, disk: virtmount.OpenDisk) -> None:
    benchmark(disk.pwrite, 0, bytes(4096))


def test_flush_with_nothing_dirty(benchmark: BenchmarkFixture, disk: virtmount.OpenDisk) -> None:
    benchmark(disk.flush)


def test_write_to_a_new_cluster_and_flush(
    benchmark: BenchmarkFixture, disk: virtmount.OpenDisk
) -> None:
    """Allocation, commit plan and its barriers; another cluster each time."""
    clusters = iter(range(1 << 20, SIZE, 2 << 20))
    step = disk.image.cluster_size
    places = iter(range(step, SIZE, step)) if step > 1 << 20 else clusters

    def allocate() -> None:
        disk.pwrite(next(places), bytes(4096))
        disk.flush()

    benchmark.pedantic(allocate, rounds=50)


def test_first_read_of_a_leaf(benchmark: BenchmarkFixture, image: Path) -> None:
    """A miss: the fault, leaf(), the table's bytes, decode, fill; plus one read."""

    def opened() -> tuple[tuple[virtmount.OpenDisk], dict[str, object]]:
        return (virtmount.open(image),), {}

    def read(disk: virtmount.OpenDisk) -> None:
        disk.pread(0, 4096)
        disk.close()

    benchmark.pedantic(read, setup=opened, rounds=20)


def test_open_and_close(benchmark: BenchmarkFixture, image: Path) -> None:
    benchmark(lambda: virtmount.open(image).close())


def test_slow_decode_of_4096_entries(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """The Python twin of native/decode.c: what a leaf would cost without C."""
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1G"], check=True)
    with HostFile(path) as file:
        layout = QCOW2(file).layout
    assert layout
    raw = array.array("Q", [(i * CLUSTER | 1 << 63) for i in range(4096)])
    raw.byteswap()
    benchmark(lambda: list(decode(layout, raw.tobytes(), CLUSTER, 1 << 40)))
