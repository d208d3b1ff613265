"""virtmount check, compare, cat and snapshot."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.virtmount.tools import (
    FORMATS,
    MIB,
    QEMU,
    ROOT,
    names,
    qemu_img,
    sparse_content,
    virtmount,
)
from tests.virtmount.toy import Toy, make_toy
from virtmount import api, checking, cli, copying, formats
from virtmount.comparison import Comparison, compare, first_difference
from virtmount.conversion import convert
from virtmount.creation import create
from virtmount.errors import (
    Busy,
    Corrupt,
    Denied,
    NeedsRecovery,
    NotAnImage,
    Unsupported,
    VirtmountError,
)
from virtmount.hostfile import HostFile
from virtmount.image import Image, Options
from virtmount.info import snapshots
from virtmount.plan import Barrier, Plan, Write
from virtmount.streaming import cat
from virtmount.upkeep import Finding, Progress, Repair, Severity

Item = Finding | Plan | Progress


@pytest.fixture(autouse=True)
def no_descriptors_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before  # others may be collected meanwhile


# check


@pytest.mark.parametrize("form", [form for form in FORMATS if formats.load(form).checks])
def test_sound_images_of_every_format(tmp_path: Path, form: str) -> None:
    raw, image = tmp_path / "disk.img", tmp_path / f"disk.{form}"
    raw.write_bytes(sparse_content(5 * MIB))
    if form == "raw":
        convert(raw, image, form)
    else:
        qemu_img("convert", "-O", QEMU.get(form, form), raw, image)
    before = image.read_bytes()
    found = checking.check(image, form)
    assert image.read_bytes() == before
    for repair in (Repair.LEAKS, Repair.ALL):
        mended = checking.check(image, form, repair=repair)
        assert mended.exit_code == 0
        assert compare(raw, image, second_format=form).same
    # qemu's VHDX lack a flag: worth a note, no more.
    assert found.exit_code == 0
    assert {entry.severity for entry in found.findings} <= {Severity.NOTE}


class Checked(Toy):
    """A toy with faults: those whose byte in the file is not zero.  `leak` is mended by LEAKS."""

    checks: ClassVar[bool] = True
    PLACES: ClassVar[dict[int, Severity]] = {
        4050: Severity.LEAK,
        4051: Severity.DAMAGE,
        4052: Severity.DAMAGE,  # nothing mends it
        4053: Severity.NOTE,
    }

    @classmethod
    def check(cls, file: HostFile, options: Options, repair: Repair) -> Iterator[Item]:
        if file.pread(4054, 1) != b"\0":
            raise Corrupt(file, "byte 4054", "no way")
        for number, (at, severity) in enumerate(cls.PLACES.items()):
            yield Progress(number, len(cls.PLACES))
            if file.pread(at, 1) == b"\0":
                continue
            may = {Severity.LEAK: repair is not Repair.NOTHING}.get(severity, repair is Repair.ALL)
            mends = may and file.writable and severity is not Severity.NOTE and at != 4052
            yield Finding(severity, f"byte {at}", "a fault", repaired=mends)
            if mends:
                yield Plan(Write(at, b"\0"), Barrier)
                assert file.pread(at, 1) == b"\0"  # carried out before the next is asked for
        yield Progress(1, 1)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"toy": f"{__name__}:Checked", "raw": formats.TABLE["raw"]}
    monkeypatch.setattr(formats, "TABLE", table)


def faulty(path: Path, *places: int) -> Path:
    make_toy(path, MIB, {})
    with open(path, "r+b") as file:
        for place in places:
            file.seek(place)
            file.write(b"\1")
    return path


@pytest.mark.parametrize(
    ("places", "repair", "code", "left"),
    [
        ((), None, 0, ()),
        ((), "all", 0, ()),
        ((4053,), None, 0, (4053,)),
        ((4050,), None, 3, (4050,)),
        ((4050,), "leaks", 0, ()),
        ((4051,), None, 2, (4051,)),
        ((4051,), "leaks", 2, (4051,)),
        ((4051,), "all", 0, ()),
        ((4050, 4051), None, 2, (4050, 4051)),
        ((4050, 4051), "leaks", 2, (4051,)),
        ((4050, 4051), "all", 0, ()),
        ((4050, 4052), "all", 2, (4052,)),
        ((4050, 4054), "all", 1, (4050, 4054)),
    ],
)
def test_exit_codes_and_what_is_mended(
    tmp_path: Path,
    checked: None,
    capsys: pytest.CaptureFixture[str],
    places: tuple[int, ...],
    repair: str | None,
    code: int,
    left: tuple[int, ...],
) -> None:
    path = faulty(tmp_path / "disk.toy", *places)
    words = [] if repair is None else [f"--repair={repair}"]
    assert cli.main(["check", *words, str(path)]) == code
    data = path.read_bytes()
    assert tuple(at for at in range(4050, 4055) if data[at]) == left
    told = capsys.readouterr()
    assert ("sound" in told.out) == (code == 0)
    assert ("no way" in told.err) == (code == 1)
    if code != 1:
        assert told.out.count("a fault") == len(places)
        assert told.out.count("(repaired)") == len(places) - len(left)


def test_repair_alone_means_all(tmp_path: Path, checked: None) -> None:
    path = faulty(tmp_path / "disk.toy", 4050, 4051)
    assert cli.main(["check", "--repair", str(path)]) == 0
    assert path.read_bytes()[4050:4052] == b"\0\0"


def test_json(tmp_path: Path, checked: None, capsys: pytest.CaptureFixture[str]) -> None:
    path = faulty(tmp_path / "disk.toy", 4050, 4051, 4052)
    assert cli.main(["check", "--json", "--repair", str(path)]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["version"] == 1
    assert told["found"] == {"leak": 1, "damage": 2, "note": 0}
    assert told["left"] == {"leak": 0, "damage": 1, "note": 0}
    assert told["clean"] is False
    assert told["repaired"] == 2
    assert told["findings"][0] == {
        **{"severity": "leak", "place": "byte 4050", "text": "a fault", "repaired": True}
    }


def test_what_cannot_be_opened_is_not_sound(
    tmp_path: Path, checked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its own check says."""
    path = faulty(tmp_path / "disk.toy", 4051)
    for error, code, severity in (
        (Corrupt("x", "header+8", "no size"), 2, Severity.DAMAGE),
        (NotAnImage("x", "", "no size"), 2, Severity.DAMAGE),
        (NeedsRecovery("x", "", "a log"), 2, Severity.DAMAGE),
        (Denied("x", "", "encrypted"), 0, Severity.NOTE),
    ):

        def fail(self: Checked, file: HostFile, options: Options, error: Exception = error) -> None:
            assert options.changing_parent  # whose parents are not looked at
            raise error

        monkeypatch.setattr(Checked, "__init__", fail)
        found = checking.check(path, repair=Repair.ALL)
        assert found.exit_code == code
        assert found.findings[-1].severity is severity
        assert found.left[severity] == 1

    def refuse(self: Checked, file: HostFile, options: Options) -> None:
        raise Unsupported("x", "", "bit 7")

    monkeypatch.setattr(Checked, "__init__", refuse)
    with pytest.raises(checking.CannotCheck, match="bit 7"):
        checking.check(path)
    assert cli.main(["check", str(faulty(path, 4051))]) == 2  # that is sure


def test_findings_are_counted_but_not_all_kept(
    tmp_path: Path, checked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def many(*arguments: object) -> Iterator[Item]:
        for at in range(5000):
            yield Finding(Severity.LEAK, str(at), "a leak")

    monkeypatch.setattr(Checked, "check", many)
    told: list[Finding] = []
    found = checking.check(faulty(tmp_path / "disk.toy"), "toy", tell=told.append)
    assert len(told) == found.found[Severity.LEAK] == found.left[Severity.LEAK] == 5000
    assert len(found.findings) == checking.MAX_FINDINGS


def test_checking_only_reads_and_locks(tmp_path: Path, checked: None) -> None:
    path = faulty(tmp_path / "disk.toy", 4050)
    path.chmod(0o444)
    assert checking.check(path).exit_code == 3
    with HostFile(path):
        assert checking.check(path).exit_code == 3
        with pytest.raises(Busy):
            checking.check(path, repair=Repair.ALL)
    with HostFile(path, writable=True), pytest.raises(Busy):
        checking.check(path)


def test_what_cannot_be_checked(
    tmp_path: Path, toy_format: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not Toy.checks
    path = make_toy(tmp_path / "disk.toy", MIB, {})
    assert cli.main(["check", str(path)]) == 63
    assert "cannot be checked" in capsys.readouterr().err
    assert cli.main(["check", str(tmp_path / "none")]) == 1
    (tmp_path / "empty").touch()
    assert cli.main(["check", str(tmp_path / "empty")]) == 1
    for words in ([], ["--repair=some", "x"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["check", *words])
        assert caught.value.code == 1
    assert Image.checks is False


def test_raw_ends_inside_a_sector(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 1000)
    found = checking.check(path, "raw", repair=Repair.ALL)
    assert found.exit_code == 0
    assert [finding.severity for finding in found.findings] == [Severity.NOTE]
    assert path.read_bytes() == b"x" * 1000


def test_what_looks_raw_is_not_called_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image without its header."""
    path = tmp_path / "disk.vdi"
    create(path, MIB)
    with open(path, "r+b") as file:
        file.write(bytes(512))
    assert cli.main(["check", str(path)]) == 63
    assert "say --format" in capsys.readouterr().err
    assert cli.main(["check", "-f", "vdi", str(path)]) == 1
    assert cli.main(["check", "-f", "raw", str(path)]) == 0


# compare


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same disk in several formats."""
    folder = tmp_path_factory.mktemp("images")
    paths = {form: folder / f"disk.{form}" for form in ("raw", "qcow2", "vdi", "vhdx")}
    paths["raw"].write_bytes(sparse_content(4 * MIB))
    for form, path in paths.items():
        if form != "raw":
            qemu_img("convert", "-O", form, paths["raw"], path)
    return paths


@pytest.mark.parametrize("form", ["qcow2", "vdi", "vhdx"])
def test_same_disks(images: dict[str, Path], form: str) -> None:
    assert compare(images["raw"], images[form]) == Comparison(None, (4 * MIB, 4 * MIB))
    assert compare(images[form], images["raw"], first_format=form, second_format="raw").same


@pytest.mark.parametrize("offset", [0, 511, 65536, MIB - 1, MIB, 4 * MIB - 1])
def test_first_difference_is_found(tmp_path: Path, images: dict[str, Path], offset: int) -> None:
    other = tmp_path / "other.img"
    data = bytearray(images["raw"].read_bytes())
    for place in {offset, min(offset + 3 * MIB, 4 * MIB - 1)}:
        data[place] ^= 0xFF
    other.write_bytes(data)
    assert compare(images["vdi"], other).offset == offset
    sector = offset // 512 * 512  # as precise as qemu-img is
    assert qemu_img("compare", images["vdi"], other, code=1).endswith(f"offset {sector}!\n")


def test_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, zeros, more = tmp_path / "short.img", tmp_path / "zeros.img", tmp_path / "more.img"
    short.write_bytes(b"x" * 1000)
    zeros.write_bytes(b"x" * 1000 + bytes(5 * MIB))
    more.write_bytes(b"x" * 1000 + bytes(3 * MIB) + b"y")
    assert compare(short, zeros).same
    assert compare(zeros, short) == Comparison(None, (-(-(5 * MIB + 1000) // 512) * 512, 1024))
    assert compare(short, more).offset == 3 * MIB + 1000
    assert cli.main(["compare", str(short), str(zeros)]) == 0
    assert cli.main(["compare", "--strict", str(short), str(zeros)]) == 1
    assert capsys.readouterr().out == "the same\ndifferent sizes\n"


def test_compare_command(
    tmp_path: Path, images: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    vdi, qcow2 = str(images["vdi"]), str(images["qcow2"])
    virtmount("compare", vdi, qcow2)
    assert cli.main(["compare", "--json", vdi, qcow2]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"version": 1, "same": True, "offset": None, "sizes": [4 * MIB, 4 * MIB]}
    (tmp_path / "other.img").write_bytes(b"z")
    assert cli.main(["compare", vdi, str(tmp_path / "other.img")]) == 1
    assert capsys.readouterr().out == "different at offset 0\n"
    # 1 would mean that they differ.
    assert cli.main(["compare", vdi, str(tmp_path / "none")]) == 2
    (tmp_path / "bad.vdi").write_bytes(b"\0" * 100)
    assert cli.main(["compare", "-F", "vdi", vdi, str(tmp_path / "bad.vdi")]) >= 2
    with pytest.raises(SystemExit) as caught:
        cli.main(["compare", vdi])
    assert caught.value.code == 2


def test_compare_takes_no_image_that_is_written(images: dict[str, Path]) -> None:
    with api.open(images["vdi"], writable=True), pytest.raises(Busy):
        compare(images["raw"], images["vdi"])


def test_difference_in_pieces() -> None:
    rng = random.Random(3)
    for _ in range(200):
        a = rng.randbytes(rng.randrange(1, 300))
        b = bytearray(a)
        places = sorted(rng.sample(range(len(a)), min(len(a), rng.randrange(3))))
        for place in places:
            b[place] ^= 1
        expected = 1000 + places[0] if places else None
        assert first_difference(1000, a, bytes(b)) == expected


# cat


def test_cat(images: dict[str, Path]) -> None:
    content = images["raw"].read_bytes()
    words = [sys.executable, "-m", "virtmount", "cat", str(images["qcow2"])]
    assert subprocess.run(words, capture_output=True, check=True, cwd=ROOT).stdout == content
    words += ["--offset", "1000", "--length", "1.5M"]
    done = subprocess.run(words, capture_output=True, check=True, cwd=ROOT)
    assert done.stdout == content[1000 : 1000 + 3 * MIB // 2]
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (4 * MIB, 0), (4 * MIB - 1, 1), (5, None), (4 * MIB, None)]
)
def test_cat_ranges(images: dict[str, Path], offset: int, length: int | None) -> None:
    read, write = os.pipe()
    content = images["raw"].read_bytes()
    expected = content[offset:] if length is None else content[offset : offset + length]
    with open(read, "rb") as pipe:
        child = os.fork() if len(expected) > 4096 else 0
        if child:
            os.close(write)
            data = pipe.read()
            assert os.waitpid(child, 0)[1] == 0
        else:
            code = 1
            try:
                cat(images["vdi"], write, offset=offset, length=length)
                code = 0
            finally:
                if len(expected) > 4096:
                    os._exit(code)
            os.close(write)
            data = pipe.read()
    assert data == expected


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, 4 * MIB + 1), (5 * MIB, 1), (3, -1)])
def test_cat_outside(images: dict[str, Path], offset: int, length: int) -> None:
    with pytest.raises(VirtmountError, match="the disk has 4194304"):
        cat(images["vdi"], -1, offset=offset, length=length)


def test_reader_of_cat_may_go(images: dict[str, Path]) -> None:
    words = f"{sys.executable} -m virtmount cat {images['raw']} | head -c 10 | wc -c"
    done = subprocess.run(words, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("10", "")


def test_cat_does_not_map_the_disk_first(images: dict[str, Path]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying.extents, "mapped", None)
        with open(os.devnull, "wb") as out:
            assert cat(images["vdi"], out.fileno()) == 4 * MIB


# snapshot


def test_snapshots_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", image, "8M")
    for name in ("first", "before update"):
        qemu_img("snapshot", "-c", name, image)
    assert [(entry.id, entry.name, entry.size) for entry in snapshots(image)] == [
        ("1", "first", 8 * MIB),
        ("2", "before update", 8 * MIB),
    ]
    assert cli.main(["snapshot", "-l", str(image)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ID", "NAME", "SIZE", "DATE", "VM-STATE"]
    assert [line.split()[:2] for line in lines[1:]] == [["1", "first"], ["2", "before"]]
    assert cli.main(["snapshot", "--json", str(image)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in told["snapshots"]] == ["first", "before update"]


def test_format_without_snapshots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create(tmp_path / "disk.vdi", MIB)
    assert cli.main(["snapshot", str(tmp_path / "disk.vdi")]) == 0
    assert capsys.readouterr().out == ""
    with pytest.raises(NotAnImage):
        snapshots(tmp_path / "disk.vdi", "qcow2")
    for name in ("disk.vdi", "disk.vmdk"):  # not the present state in its place
        if name != "disk.vdi":
            create(tmp_path / name, MIB, settings={"subformat": "monolithicFlat"})
        assert cli.main(["info", "--snapshot", "then", str(tmp_path / name)]) == 3
        assert "no snapshot 'then'" in capsys.readouterr().err
        (tmp_path / name).unlink()
    (tmp_path / "disk-flat.vmdk").unlink()
    create(tmp_path / "disk.vdi", MIB)
    assert names(tmp_path) == {"disk.vdi"}


@pytest.mark.parametrize(
    ("verb", "shown"), [("check", "[--repair[=leaks|all]]"), ("attach", "[--overlay[=DIR]]")]
)
def test_help_shows_a_value_that_may_be_left_out(
    capsys: pytest.CaptureFixture[str], verb: str, shown: str
) -> None:
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    text = capsys.readouterr().out
    assert shown in text
    assert f"  {shown[1:-1]} " in text
