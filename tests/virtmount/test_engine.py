"""The typed face: numbers agree with engine.h, results become OSError, decode.c has a twin."""

from __future__ import annotations

import errno
import os
import sys
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtmount import engine
from virtmount.engine import (
    Config,
    Decoder,
    Engine,
    FaultType,
    Flag,
    IoFlag,
    Op,
    Ranges,
    UblkMode,
    native,
    ublk_control,
)
from virtmount.errors import NoTransport
from virtmount.image import Kind, Layout, Rule, Span, decode, last_place

MIB = 1 << 20
FLAT = Config(size=MIB, unit_shift=16, cluster_shift=16, leaf_units=16, flags=Flag.FLAT)


@pytest.mark.parametrize(
    ("enum", "prefix"),
    [
        (FaultType, "VM_FAULT_"),
        (Op, "VM_OP_"),
        (Flag, "VM_"),
        (IoFlag, "VM_IO_"),
        (UblkMode, "VM_UBLK_"),
        (Kind, "VM_"),
    ],
)
def test_numbers_are_those_of_the_header(enum: type, prefix: str) -> None:
    lib = native().lib
    for member in enum:  # type: ignore[attr-defined]
        assert getattr(lib, prefix + member.name) == member.value


def test_says_what_to_do_when_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "virtmount._engine", None)
    with pytest.raises(NoTransport, match="not built") as caught:
        native.__wrapped__()
    assert caught.value.hint == "make build"


def test_create_refuses_what_the_engine_cannot_serve() -> None:
    with pytest.raises(OSError, match="Invalid argument") as caught:
        Engine(Config(size=100, unit_shift=16, cluster_shift=16, leaf_units=4096))
    assert caught.value.errno == errno.EINVAL


@pytest.fixture
def flat(tmp_path: Path) -> Iterator[Engine]:
    """An engine over a flat file of a known pattern, running."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(range(256)) * (MIB // 256))
    fd = os.open(path, os.O_RDWR)
    served = Engine(FLAT)
    assert served.add_file(fd, owned=True) == 0
    thread = threading.Thread(target=served.run)
    thread.start()
    yield served
    served.stop()
    thread.join()
    with pytest.raises(OSError, match=os.strerror(errno.ESHUTDOWN)):
        served.faults_wait()
    served.close()
    served.close()
    with pytest.raises(OSError, match=os.strerror(errno.ESHUTDOWN)):
        served.read(0, 512)
    os.close(fd)


def test_reads_into_bytes_and_buffers(flat: Engine) -> None:
    assert flat.read(512, 1024) == bytes(range(256)) * 4
    buffer = bytearray(2048)
    flat.read_into(0, memoryview(buffer)[512:1024])
    assert buffer == bytes(512) + bytes(range(256)) * 2 + bytes(1024)


@pytest.mark.parametrize(
    ("offset", "length"), [(1, 512), (0, 100), (MIB, 512), (MIB - 512, 1024), (1 << 62, 512)]
)
def test_what_is_not_inside_the_disk_or_not_aligned_is_refused(
    flat: Engine, offset: int, length: int
) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        flat.read(offset, length)


def test_the_first_write_asks_to_begin(flat: Engine) -> None:
    assert flat.faults_wait(0) == []
    writer = threading.Thread(target=flat.write, args=(0, b"x" * 512))
    writer.start()
    (fault,) = flat.faults_wait()
    assert fault.type is FaultType.BEGIN
    flat.answer(fault.id)
    writer.join()
    assert flat.read(0, 512) == b"x" * 512
    assert flat.stats()["faults"]["begin"] == 1


def test_an_error_answer_is_the_requests_errno(flat: Engine) -> None:
    errors: list[OSError] = []

    def write() -> None:
        try:
            flat.write(0, b"x" * 512)
        except OSError as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    (fault,) = flat.faults_wait()
    flat.answer(fault.id, -errno.ENOSPC)
    writer.join()
    assert [error.errno for error in errors] == [errno.ENOSPC]


def test_a_failed_engine_refuses_writes_and_still_reads(flat: Engine) -> None:
    flat.set_failed(-errno.EIO)
    for request in (lambda: flat.write(0, b"x" * 512), lambda: flat.io(Op.FLUSH)):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            request()
    assert flat.read(0, 512) == bytes(range(256)) * 2
    assert flat.stats()["failed"] == -errno.EIO


def test_control_commands_report_the_kernels_answer(tmp_path: Path) -> None:
    """A file knows no uring commands; what matters is that the errno comes back."""
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(OSError, match=r".+"):
        ublk_control(fd, 0xC0207504, bytes(32))
    os.close(fd)


# Ranges and decoding

ranges = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 30)), max_size=12)


@given(ranges, st.integers(0, 220), st.integers(1, 40))
def test_ranges_know_what_they_touch(pairs: list[tuple[int, int]], at: int, length: int) -> None:
    obvious = any(at < start + size and start < at + length for start, size in pairs if size)
    assert Ranges(Span(*pair) for pair in pairs).touch(at, length) is obvious


layouts = st.builds(
    Layout,
    width=st.sampled_from([4, 8]),
    byteorder=st.sampled_from(["little", "big"]),
    mask=st.sampled_from([0xFFFFFFFF, 0xFFFFFE00, 0x00FFFFFFFFFFFE00, 0xF0]),
    scale=st.sampled_from([1, 512, 4096, 1 << 40]),
    bias=st.sampled_from([0, 512, 4096, -512, 100]),
    rules=st.lists(
        st.builds(
            Rule,
            st.sampled_from([0xFF, 0xFFFFFFFF, 1, 3]),
            st.integers(0, 3),
            st.sampled_from([kind for kind in Kind if kind is not Kind.DATA]),
        ),
        max_size=5,
    ).map(tuple),
    low=st.sampled_from([0, 512, 65536]),
)
entries = st.lists(
    st.one_of(
        st.integers(0, 4), st.integers(0, (1 << 64) - 1), st.integers(0, 64).map(lambda n: n * 512)
    ),
    min_size=1,
    max_size=16,
)


@given(
    layouts,
    entries,
    st.sampled_from([1, 2, 8]),
    st.integers(0, 7),
    st.integers(1, 100),
    st.integers(1, 1 << 20),
    ranges,
)
def test_decode_is_the_twin_of_image_decode(
    layout: Layout,
    numbers: list[int],
    repeat: int,
    skip: int,
    units: int,
    file_size: int,
    forbidden: list[tuple[int, int]],
) -> None:
    unit, source, layer = 512, 7, 3
    skip %= repeat
    forbidden = [(start * 512, length * 512) for start, length in forbidden]
    order = "big" if layout.byteorder == "big" else "little"
    mask = (1 << 8 * layout.width) - 1
    raw = b"".join((n & mask).to_bytes(layout.width, order) for n in numbers)
    cluster = unit * repeat
    limit = last_place(layout, cluster, file_size)
    done = Ranges(Span(*pair) for pair in forbidden)

    expected: list[int] = []
    for kind, host in decode(layout, raw, cluster, file_size):
        if kind in (Kind.DATA, Kind.SHARED) and (host >= 1 << 59 or done.touch(host, cluster)):
            kind = Kind.INVALID
        for j in range(repeat):
            if kind in (Kind.DATA, Kind.SHARED):
                entry = int(kind) << 60 | source << 52 | (host + j * unit) >> 9
            else:
                entry = int(kind) << 60 | (layer << 52 if kind is Kind.COMPRESSED else 0)
            expected.append(entry)
    kept = 0x1 << 60  # an upper layer says ZERO for the third unit
    before = array("Q", [0, 0, kept][:units] + [0] * (units - 3))
    expected = (expected[skip:] + [0] * units)[:units]
    if units >= 3:
        expected[2] = kept

    got = array("Q", before)
    partial = Decoder(layout, layer, unit, repeat).decode(
        raw, got, 0, units, source=source, skip=skip, limit=limit, forbidden=done
    )
    assert list(got) == expected
    assert partial == sum(1 for entry in got if entry >> 60 == Kind.PARTIAL)


def test_decode_stays_inside_the_array() -> None:
    decoder = Decoder(Layout(width=8, byteorder="little", mask=-512 & ((1 << 64) - 1)), 0, 512, 1)
    with pytest.raises(ValueError, match=r"units 3\+2 of 4"):
        decoder.decode(
            bytes(16), array("Q", bytes(32)), 3, 2, source=0, skip=0, limit=1, forbidden=None
        )


def test_layouts_with_too_many_rules_are_refused() -> None:
    rules = (Rule(1, 1, Kind.ZERO),) * 6
    with pytest.raises(ValueError, match="6 rules"):
        Decoder(Layout(width=8, byteorder="little", mask=0, rules=rules), 0, 512, 1)


def test_native_is_loaded_once() -> None:
    assert engine.native() is native()
