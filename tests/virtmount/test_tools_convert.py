"""virtmount convert, with qemu-img as the judge of what was written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.virtmount import toy
from tests.virtmount.tools import (
    FORMATS,
    KIB,
    MIB,
    ROOT,
    names,
    qemu_img,
    qemu_same,
    sparse_content,
    virtmount,
)
from tests.virtmount.toy import make_toy
from virtmount import api, cli, copying, formats
from virtmount.conversion import convert
from virtmount.copying import Content, Run
from virtmount.creation import create
from virtmount.errors import Busy, Unsupported, VirtmountError
from virtmount.formats.raw import Raw
from virtmount.image import Image
from virtmount.plan import Extend, Plan, Write
from virtmount.sizes import parse_options
from virtmount.upkeep import New, Packer, Progress

SIZE = 9 * MIB + 512
CONTENT = sparse_content(SIZE)
PACKED = tuple(
    name
    for name in FORMATS
    if formats.load(name).packer.__func__ is not Image.packer.__func__  # type: ignore[attr-defined]
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.img"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(autouse=True)
def no_descriptors_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before  # others may be collected meanwhile


@pytest.mark.parametrize("form", FORMATS)
def test_there_and_back(tmp_path: Path, source: Path, form: str) -> None:
    """What we write qemu reads; what we wrote we read."""
    path, back = tmp_path / f"disk.{form}", tmp_path / "back.img"
    made = convert(source, path, form)
    assert (made.format, made.size) == (form, SIZE)
    qemu_same(path, form, source)
    convert(path, back, source_format=form)
    assert back.read_bytes() == CONTENT
    for image in (path, back):  # zeros take no space
        assert image.stat().st_blocks * 512 < SIZE
    assert source.read_bytes() == CONTENT


VARIANTS = [
    ("qcow2", "compat=0.10,cluster_size=4K"),
    ("qcow2", "extended_l2=on,preallocation=metadata"),
    ("qcow2", "data_file=disk.data"),
    ("qcow2", "data_file=disk.raw,data_file_raw=on"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=twoGbMaxExtentFlat"),
    ("vhdx", "subformat=fixed,block_size=1M"),
    ("vhd", "subformat=fixed"),
    ("vdi", "subformat=fixed"),
    ("vdi", "block_size=256K"),
]


@pytest.mark.parametrize(("form", "options"), VARIANTS)
def test_variants(tmp_path: Path, source: Path, form: str, options: str) -> None:
    """Also of several files, which lie beside each other in the end and know each other."""
    path, back = tmp_path / f"disk.{form}", tmp_path / "back.img"
    convert(source, path, form, settings=parse_options([options]))
    several = "data_file" in options or "Flat" in options or "twoGb" in options
    assert len(names(tmp_path)) == (2 if several else 1)
    if form != "vdi" or "block_size" not in options:  # qemu knows one block size
        qemu_same(path, form, source)
    convert(path, back, source_format=form)
    assert back.read_bytes() == CONTENT
    if options.endswith("data_file_raw=on"):
        assert (tmp_path / "disk.raw").read_bytes() == CONTENT
    with api.open(path, form, writable=True) as disk:
        disk.pwrite(MIB - 100, b"w" * 70_000)
    with api.open(path, form) as disk:
        assert disk.pread(MIB - 100, 70_000) == b"w" * 70_000


@pytest.mark.parametrize(
    ("form", "options"), [("qcow2", "data_file=disk.data"), ("vmdk", "subformat=monolithicFlat")]
)
def test_several_files_are_replaced_together(
    tmp_path: Path, source: Path, form: str, options: str
) -> None:
    path, settings = tmp_path / f"disk.{form}", parse_options([options])
    convert(source, path, form, settings=settings)
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(files) == 2
    with pytest.raises(VirtmountError, match="exists already"):
        convert(source, path, form, settings=settings)
    with pytest.raises(VirtmountError, match="read from"):
        convert(path, path, form, settings=settings, overwrite=True)
    path.unlink()
    with pytest.raises(VirtmountError, match="exists already"):
        convert(source, path, form, settings=settings)
    (tmp_path / "zeros.img").write_bytes(bytes(MIB))
    convert(tmp_path / "zeros.img", path, form, settings=settings, overwrite=True)
    with api.open(path, form) as disk:
        assert disk.pread(0, disk.size) == bytes(MIB)


@pytest.mark.parametrize("form", ["qcow2", "vhdx", "vdi", "vpc"])
@pytest.mark.parametrize("options", [[], ["-c"]])
def test_what_qemu_made(tmp_path: Path, source: Path, form: str, options: Sequence[str]) -> None:
    if options and form != "qcow2":
        return
    image, raw = tmp_path / "disk.image", tmp_path / "raw.img"
    exact = ["-o", "force_size=on"] if form == "vpc" else []
    qemu_img("convert", "-O", form, *exact, *options, source, image)
    before = image.read_bytes()
    convert(image, raw)
    assert raw.read_bytes() == CONTENT
    assert image.read_bytes() == before


def test_parents_are_read_through(tmp_path: Path, source: Path) -> None:
    base, child, flat = (tmp_path / name for name in ("base.vdi", "child.qcow2", "flat.vhd"))
    convert(source, base)
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "vdi", child)
    with api.open(child, writable=True) as disk:
        disk.pwrite(5 * MIB, b"the child's" * 1000)
    convert(child, flat)
    model = bytearray(CONTENT)
    model[5 * MIB : 5 * MIB + 11_000] = b"the child's" * 1000
    for other in (base, child):
        other.unlink()
    with api.open(flat) as disk:
        assert disk.pread(0, SIZE) == model


def test_snapshot(tmp_path: Path, source: Path) -> None:
    image, raw = tmp_path / "disk.qcow2", tmp_path / "then.img"
    qemu_img("convert", "-O", "qcow2", source, image)
    qemu_img("snapshot", "-c", "then", image)
    qemu_io(image, "write -P 9 0 2M")
    virtmount("convert", "--snapshot", "then", image, raw)
    assert raw.read_bytes() == CONTENT


def qemu_io(path: Path, command: str) -> None:
    subprocess.run(["qemu-io", "-c", command, str(path)], check=True, capture_output=True)


def test_encrypted(tmp_path: Path, source: Path) -> None:
    image, raw = tmp_path / "secret.qcow2", tmp_path / "plain.img"
    words = ("--object", "secret,id=s,data=geheim", "-o", "encrypt.format=aes,encrypt.key-secret=s")
    qemu_img("convert", "-O", "qcow2", *words, source, image)
    (tmp_path / "word").write_text("geheim\n")
    done = virtmount("convert", image, raw, code=4)
    assert "passphrase" in done.stderr
    virtmount("convert", "--passphrase-file", tmp_path / "word", image, raw)
    assert raw.read_bytes() == CONTENT
    virtmount("check", image)  # tables are not encrypted


def test_hole_stays_a_hole(tmp_path: Path) -> None:
    """A terabyte of nothing is not read."""
    path, target = tmp_path / "disk.img", tmp_path / "copy.vdi"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
        file.seek(700 << 30)
        file.write(b"here")
    seen: list[Progress] = []
    convert(path, target, report=seen.append)
    assert seen[-1].done == seen[-1].total <= MIB
    assert target.stat().st_blocks * 512 < 16 * MIB
    with api.open(target) as disk:
        assert disk.pread((700 << 30) - 2, 8) == b"\0\0here\0\0"


@pytest.mark.parametrize("size", [1, 511, 513, 4096, MIB, MIB + 1])
def test_any_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * size)
    convert(path, tmp_path / "disk.vdi")
    with api.open(tmp_path / "disk.vdi") as disk:
        assert disk.pread(0, disk.size) == b"x" * size + bytes(-size % 512)


def test_source_is_locked_and_never_the_target(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    (tmp_path / "link.img").symlink_to(path)
    os.link(path, tmp_path / "same.img")
    for target in ("disk.img", "link.img", "same.img"):
        with pytest.raises(VirtmountError, match="read from"):
            convert(path, tmp_path / target, overwrite=True)
    with api.open(path, "raw", writable=True), pytest.raises(Busy):
        convert(path, tmp_path / "other.img")
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == {"disk.img", "link.img", "same.img"}


def test_target_is_replaced_only_when_whole(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "disk.vdi"
    create(target, MIB)
    before = target.read_bytes()

    def fail(progress: Progress) -> None:
        assert target.read_bytes() == before
        if progress.done == progress.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, overwrite=True, report=fail)
    assert target.read_bytes() == before
    assert names(tmp_path) == {"disk.vdi"}
    convert(source, target, overwrite=True)
    qemu_same(target, "vdi", source)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def killed(self: object, progress: Progress) -> None:
        assert len(names(tmp_path)) == 1  # the hidden folder
        os.kill(os.getpid(), number)

    monkeypatch.setattr("virtmount.cli_common.ProgressLine.__call__", killed)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["convert", str(source), str(tmp_path / "disk.vdi")]) == 130
    assert names(tmp_path) == set()
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_in_the_middle_of_the_work(tmp_path: Path) -> None:
    """The real process, with its threads; compressing takes it much longer than we need."""
    image = tmp_path / "disk.img"
    image.write_bytes(b"".join(bytes([i % 251]) * 100 + os.urandom(924) for i in range(48 << 10)))
    words = [sys.executable, "-m", "virtmount", "convert", "--progress", "-c"]
    with subprocess.Popen(
        [*words, str(image), str(tmp_path / "disk.qcow2")],
        stderr=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        assert b"%" in process.stderr.readline()
        assert len(names(tmp_path)) == 2
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert b"100 %" not in rest
    assert b"Traceback" not in rest
    assert names(tmp_path) == {"disk.img"}


def test_host_that_has_no_room(tmp_path: Path, source: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB, 3 * MIB))

    done = virtmount("convert", source, tmp_path / "disk.vdi", code=1, preexec_fn=limit)
    assert "File too large" in done.stderr
    assert names(tmp_path) == set()


def test_unreadable_source_is_told_with_its_place(
    tmp_path: Path, toy_format: None, capsys: pytest.CaptureFixture[str]
) -> None:
    image = make_toy(tmp_path / "disk.toy", 3 * MIB, {600: toy.INVALID})
    assert cli.main(["convert", str(image), str(tmp_path / "copy.img")]) == 1
    told = capsys.readouterr().err
    assert f"{image}: guest bytes 2424832 to 2490367: Input/output error" in told
    assert names(tmp_path) == {"disk.toy"}


def test_driver_that_fails_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Raw, "create", lambda new: Plan(Extend(MIB)))
    with pytest.raises(OSError, match="the disk has"):
        convert(source, tmp_path / "disk.img")
    assert names(tmp_path) == set()


def test_formats_that_cannot(tmp_path: Path, source: Path) -> None:
    with pytest.raises(Unsupported, match="compressed images cannot be made"):
        convert(source, tmp_path / "disk.img", compress=True)
    assert names(tmp_path) == set()


def test_larger_sectors_are_not_lost_unasked(tmp_path: Path, toy_format: None) -> None:
    image = make_toy(tmp_path / "disk.toy", 8 * MIB, {3: b"three"}, sector_size=4096)
    with pytest.raises(Unsupported) as caught:
        convert(image, tmp_path / "disk.img")
    assert caught.value.hint == "--sector-size 512"
    assert names(tmp_path) == {"disk.toy"}
    assert convert(image, tmp_path / "disk.img", sector_size=512).size == 8 * MIB
    assert (tmp_path / "disk.img").read_bytes()[3 * 4096 :][:5] == b"three"


def test_larger_sectors_are_kept(tmp_path: Path) -> None:
    first, second, child = (tmp_path / name for name in ("a.vhdx", "b.vhdx", "c.vhdx"))
    create(first, 8 * MIB, sector_size=4096)
    with api.open(first, writable=True) as disk:
        disk.pwrite(5 * MIB, b"five")
    assert convert(first, second).sector_size == 4096
    assert create(child, parent=second).sector_size == 4096
    with api.open(child) as disk:
        assert disk.sector_size == 4096
        assert disk.pread(5 * MIB, 4) == b"five"


def test_command(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "disk.image"
    done = virtmount("convert", "--progress", "--json", "-O", "vdi", source, target)
    assert json.loads(done.stdout)["format"] == "vdi"
    assert done.stderr.split("\n")[-2] == "100 %"
    qemu_same(target, "vdi", source)
    virtmount("convert", source, code=2)
    virtmount("convert", "-o", "help", "-O", "vdi")


# Compressed


@pytest.mark.parametrize(
    ("form", "options"),
    [*((form, "") for form in PACKED), ("qcow2", "compression_type=zstd,cluster_size=256K")],
)
def test_compressed(tmp_path: Path, source: Path, form: str, options: str) -> None:
    path, back = tmp_path / f"disk.{form}", tmp_path / "back.img"
    content = b"".join(bytes([i % 251]) * 5000 for i in range(900)) + CONTENT
    long = tmp_path / "long.img"
    long.write_bytes(content + bytes(-len(content) % 512))
    settings = parse_options([options]) if options else {}
    convert(long, path, form, compress=True, settings=settings)
    qemu_same(path, form, long)
    assert path.stat().st_size < len(content) - 4 * MIB
    convert(path, back)
    assert back.read_bytes() == long.read_bytes()


class ToyPacker(Packer):
    """Writes a list of (cluster, packed, length, bytes), and checks the calls."""

    cluster_size = 64 * KIB

    def __init__(self, new: New) -> None:
        self.size, self.at, self.last = new.size, 0, -1
        self.threads: set[int] = set()
        self.main = threading.get_ident()

    def encode(self, data: bytes) -> bytes | None:
        assert len(data) == self.cluster_size
        self.threads.add(threading.get_ident())
        packed = zlib.compress(data, 1)
        return packed if len(packed) < len(data) else None

    def add(self, cluster: int, data: bytes, packed: bool) -> Plan:
        assert threading.get_ident() == self.main
        assert cluster > self.last
        self.last = cluster
        if not packed:
            assert len(data) == min(self.cluster_size, self.size - cluster * self.cluster_size)
        head = b"%08d%d%08d" % (cluster, packed, len(data))
        plan = Plan(Write(self.at, head + data))
        self.at += len(head) + len(data)
        return plan

    def end(self) -> Plan:
        assert self.main not in self.threads
        return Plan(Extend(max(self.at, self.size)))


def unpack(data: bytes, size: int) -> bytes:
    disk, at = bytearray(size), 0
    while data[at : at + 1].isdigit():
        cluster, packed, length = (
            int(data[at : at + 8]),
            data[at + 8] == 49,
            int(data[at + 9 : at + 17]),
        )
        entry = data[at + 17 : at + 17 + length]
        start = cluster * ToyPacker.cluster_size
        plain = (zlib.decompress(entry) if packed else entry)[: size - start]
        disk[start : start + len(plain)] = plain
        at += 17 + length
    return bytes(disk)


@pytest.mark.parametrize("cluster", [4 * KIB, 64 * KIB, 2 * MIB])
def test_packer_gets_every_cluster_once_and_in_order(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, cluster: int
) -> None:
    monkeypatch.setattr(ToyPacker, "cluster_size", cluster)
    monkeypatch.setattr(Raw, "packer", ToyPacker)
    convert(source, tmp_path / "packed.img", compress=True)
    assert unpack((tmp_path / "packed.img").read_bytes(), SIZE) == CONTENT


def test_failure_in_a_thread_is_the_callers(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ToyPacker, data: bytes) -> bytes:
        raise MemoryError

    monkeypatch.setattr(ToyPacker, "encode", fail)
    monkeypatch.setattr(Raw, "packer", ToyPacker)
    with pytest.raises(MemoryError):
        convert(source, tmp_path / "packed.img", compress=True)
    assert names(tmp_path) == set()


# The pieces


def test_content_is_bounded_and_errs_towards_data() -> None:
    huge = Content(1 << 62)
    huge.mark((1 << 61) + 5, 1)
    (run,) = huge.runs()
    assert run.start <= (1 << 61) + 5 < run.end
    assert len(huge._marks) <= copying.MAX_STRETCHES
    small = Content(100 * KIB + 512)
    small.mark(64 * KIB - 1, 2)
    assert list(small.runs()) == [Run(0, 100 * KIB + 512)]
    assert small.total == 100 * KIB + 512
    small = Content(192 * KIB)
    small.mark(128 * KIB, 64 * KIB)
    assert list(small.runs()) == [Run(128 * KIB, 64 * KIB)]
    assert list(Content(MIB).runs()) == []


def test_runs() -> None:
    a, b = [Run(0, 10), Run(20, 10), Run(50, 1)], [Run(5, 15), Run(40, 2)]
    assert list(copying.union(a, b)) == [Run(0, 30), Run(40, 2), Run(50, 1)]
    assert list(copying.union([], [])) == []
    assert list(copying.common(iter(a), iter(b))) == [Run(5, 5)]
    assert list(copying.common(iter(a), iter([Run(8, 100)]))) == [Run(8, 2), *a[1:]]
    assert list(copying.pieces([Run(3, 10)], 4)) == [Run(3, 1), Run(4, 4), Run(8, 4), Run(12, 1)]
    data = bytes(4096) + b"x" + bytes(4095) + bytes(4096) + b"yz"
    assert list(copying.solid(data)) == [Run(4096, 4096), Run(12288, 2)]
    assert list(copying.solid(bytes(9999))) == []


def test_in_order_keeps_the_order_and_the_bound() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        return item * item

    answers = copying.in_order(work, iter(range(100)), ahead=4)
    assert next(answers) == 0
    assert max(started) < 4
    assert list(answers) == [i * i for i in range(1, 100)]
