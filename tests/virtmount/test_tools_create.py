"""virtmount create, with qemu-img as the judge of what was made."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.virtmount.tools import FORMATS, KIB, MIB, names, qemu_img, qemu_info, virtmount
from virtmount import api, cli, formats, sizes, staging
from virtmount.chain import open_chain
from virtmount.creation import create
from virtmount.errors import Busy, ParentMissing, Unsupported, VirtmountError
from virtmount.formats.raw import Raw
from virtmount.image import Image
from virtmount.plan import Extend, Plan, Write
from virtmount.upkeep import New

CHILDREN = tuple(
    name for name in FORMATS if formats.load(name).rebase is not Image.rebase and name != "raw"
)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_made_and_empty(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"disk.{formats.load(form).suffixes[0]}"
    made = create(path, 20 * MIB)
    assert (made.format, made.size, made.sector_size) == (form, 20 * MIB, 512)
    assert names(tmp_path) == {path.name}
    if form == "vhd":  # qemu rounds what it does not know to be exact; the driver's tests say more
        assert qemu_info(path, form)["virtual-size"] >= 20 * MIB
    else:
        assert qemu_info(path, form)["virtual-size"] == 20 * MIB
    with api.open(path, form, writable=True) as disk:
        assert disk.pread(0, disk.size) == bytes(20 * MIB)
        disk.pwrite(7 * MIB, b"written")
    with api.open(path) as disk:
        assert disk.pread(7 * MIB, 7) == b"written"
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~umask())


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("form", CHILDREN)
def test_child_reads_as_its_parent(tmp_path: Path, form: str) -> None:
    parent, folder = tmp_path / f"base.{form}", tmp_path / "below"
    folder.mkdir()
    create(parent, 3 * MIB + 512, form)
    with api.open(parent, writable=True) as disk:
        disk.pwrite(MIB, b"the parent's")
    child = tmp_path / f"child.{form}"
    made = create(child, format=form, parent=parent)
    assert made.size == 3 * MIB + 512
    assert [entry.path for entry in made.parents] == [str(parent)]
    with api.open(child, writable=True) as disk:
        assert disk.pread(MIB, 12) == b"the parent's"
        disk.pwrite(MIB, b"THE")
    with api.open(child) as disk:
        assert disk.pread(MIB, 12) == b"THE parent's"
    with api.open(parent) as disk:
        assert disk.pread(MIB, 12) == b"the parent's"


@pytest.mark.parametrize("form", CHILDREN)
def test_parent_is_recorded_as_seen_from_the_child(tmp_path: Path, form: str) -> None:
    """From a folder of its own, through the command line, then moved as a whole."""
    (tmp_path / "a" / "deep").mkdir(parents=True)
    parent, child = tmp_path / "a" / "deep" / f"base.{form}", tmp_path / "a" / f"child.{form}"
    create(parent, MIB, form)
    virtmount("create", "-b", parent, "-F", form, child)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = api.inspect(tmp_path / "b" / f"child.{form}", options=None)
    if form == "vdi":  # no path in the file: only the folders beside are searched
        assert moved.parents[0].problem
    else:
        assert [entry.path for entry in moved.parents] == [
            str(tmp_path / "b" / "deep" / f"base.{form}")
        ]


def test_raw_has_no_parents(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    create(base, MIB)
    with pytest.raises(Unsupported, match="a raw image has none"):
        create(tmp_path / "child.img", parent=base)
    assert names(tmp_path) == {"base.img"}


def test_missing_parent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        create(tmp_path / "child.vdi", parent=tmp_path / "none")
    assert names(tmp_path) == set()


def test_sizes_are_rounded_up_to_sectors(tmp_path: Path) -> None:
    assert create(tmp_path / "a.img", 1).size == 512
    with pytest.raises(Unsupported, match="a disk of 0 bytes"):
        create(tmp_path / "b.img", 0)
    with pytest.raises(Unsupported, match="sectors of 1024 bytes"):
        create(tmp_path / "b.img", MIB, sector_size=1024)
    with pytest.raises(Unsupported, match="records none"):
        create(tmp_path / "b.img", MIB, sector_size=4096)
    with pytest.raises(VirtmountError, match="say its size"):
        create(tmp_path / "b.img")
    assert names(tmp_path) == {"a.img"}


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"precious")
    with pytest.raises(VirtmountError, match="exists already") as caught:
        create(path, MIB)
    assert "--overwrite" in (caught.value.hint or "")
    assert path.read_bytes() == b"precious"
    assert create(path, MIB, overwrite=True).size == MIB
    assert names(tmp_path) == {"disk.img"}


def test_no_image_in_use_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "disk.vdi"
    create(path, MIB)
    before = path.read_bytes()
    with api.open(path), pytest.raises(Busy):
        create(path, 2 * MIB, overwrite=True)
    assert path.read_bytes() == before
    assert names(tmp_path) == {"disk.vdi"}


def test_parent_is_not_replaced_by_its_child(tmp_path: Path) -> None:
    path = tmp_path / "disk.vdi"
    create(path, MIB)
    with pytest.raises(VirtmountError, match="read from"):
        create(path, parent=path, overwrite=True)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_only_files_are_replaced(tmp_path: Path, make: object) -> None:
    path = tmp_path / "disk.img"
    assert callable(make)
    make(path)
    with pytest.raises(VirtmountError, match="not a regular file"):
        create(path, MIB, overwrite=True)


def test_link_stays_and_what_it_leads_to_is_made(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "disk.img").symlink_to("there/real.img")
    create(tmp_path / "disk.img", MIB)
    assert (tmp_path / "disk.img").is_symlink()
    assert names(tmp_path / "there") == {"real.img"}


def test_somebody_else_was_quicker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that appears while ours is made is not replaced."""
    path = tmp_path / "disk.img"
    made = Raw.create

    def slow(new: New) -> Plan:
        path.write_bytes(b"theirs")
        return made(new)

    monkeypatch.setattr(Raw, "create", slow)
    with pytest.raises(VirtmountError, match="exists already"):
        create(path, MIB)
    assert path.read_bytes() == b"theirs"
    assert names(tmp_path) == {"disk.img"}


def test_host_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(here: object, there: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    create(tmp_path / "disk.img", MIB)
    assert names(tmp_path) == {"disk.img"}


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(new: New) -> Plan:
        new.add("disk-s001.img")
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Raw, "create", fail)
    with pytest.raises(OSError, match="full"):
        create(tmp_path / "disk.img", MIB)
    assert names(tmp_path) == set()


def test_image_that_would_not_open_is_not_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Raw, "create", lambda new: Plan())
    with pytest.raises(VirtmountError, match="cannot be opened"):
        create(tmp_path / "disk.img", MIB)
    monkeypatch.setattr(Raw, "create", lambda new: Plan(Extend(512)))
    with pytest.raises(VirtmountError, match="holds 512 bytes of"):
        create(tmp_path / "disk.img", MIB)
    assert names(tmp_path) == set()


# Several files


class Pair(Raw):
    """A raw image with a second file beside."""

    @classmethod
    def create(cls, new: New) -> Plan:
        number = new.add("disk-2.img")
        assert number == 1
        return Plan(Extend(new.size), Write(0, b"second", 1))


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"raw": f"{__name__}:Pair"}
    monkeypatch.setattr(formats, "TABLE", table)
    monkeypatch.setattr(formats, "load", lambda name: Pair)


def test_main_file_comes_last(tmp_path: Path, pair: None, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    move = staging.Staging._move

    def watch(self: staging.Staging, here: Path, there: Path) -> None:
        moved.append(there.name)
        assert here.name == there.name
        move(self, here, there)

    monkeypatch.setattr(staging.Staging, "_move", watch)
    create(tmp_path / "disk.img", MIB, "raw")
    assert moved == ["disk-2.img", "disk.img"]
    assert (tmp_path / "disk-2.img").read_bytes() == b"second"


def test_main_file_that_cannot_be_moved_takes_the_others_along(
    tmp_path: Path, pair: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Pair.create

    def slow(new: New) -> Plan:
        (tmp_path / "disk.img").write_bytes(b"theirs")
        return made(new)

    monkeypatch.setattr(Pair, "create", slow)
    with pytest.raises(VirtmountError, match="exists already"):
        create(tmp_path / "disk.img", MIB, "raw")
    assert names(tmp_path) == {"disk.img"}
    assert (tmp_path / "disk.img").read_bytes() == b"theirs"


def test_second_file_is_not_replaced_either(tmp_path: Path, pair: None) -> None:
    (tmp_path / "disk-2.img").write_bytes(b"theirs")
    with pytest.raises(VirtmountError, match=r"disk-2.img: exists already"):
        create(tmp_path / "disk.img", MIB, "raw")
    assert names(tmp_path) == {"disk-2.img"}


def test_second_file_over_a_link_that_leads_nowhere(tmp_path: Path, pair: None) -> None:
    (tmp_path / "disk-2.img").symlink_to("nowhere")
    base = tmp_path / "base.img"
    base.write_bytes(b"x")
    with (
        staging.Staging(tmp_path / "disk.img", overwrite=True, never=[base]) as place,
        pytest.raises(VirtmountError, match="not a regular file"),
    ):
        place.add("disk-2.img")
    assert names(tmp_path) == {"disk-2.img", "base.img"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x"])
def test_file_names_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    with staging.Staging(tmp_path / "disk.img") as place, pytest.raises(VirtmountError):
        place.add(name)
    assert names(tmp_path) == set()


# Sizes and options


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("1k", KIB),
        ("1.5G", 3 << 29),
        ("10GiB", 10 << 30),
        ("10gb", 10 << 30),
        (" 2T ", 2 << 40),
        ("7E", 7 << 60),
        ("0.1K", 102),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert sizes.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1e9", "8E", "9" * 30, "1.", "0x10", "1 G"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|largest"):
        sizes.parse_size(text)


def test_options() -> None:
    assert sizes.parse_options(["a=1,b", "c=x,,y=z,d="]) == {
        **{"a": "1", "b": "on", "c": "x,y=z", "d": ""}
    }
    for wrong in (["a=1,"], ["=1"], [""], ["a=1,a=2"], ["a", "a"]):
        with pytest.raises(ValueError, match=r"no option|twice"):
            sizes.parse_options(wrong)


def test_unknown_option_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"-o colour: vdi has no such option, know .*block_size"):
        create(tmp_path / "disk.vdi", MIB, settings={"colour": "red"})
    assert names(tmp_path) == set()


@pytest.mark.parametrize("name", ["disk", "disk.xyz"])
def test_suffix_decides(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unsupported) as caught:
        create(tmp_path / name, MIB)
    assert "--format" in (caught.value.hint or "")
    assert create(tmp_path / name, MIB, "vdi").format == "vdi"


# The command line


def test_command(tmp_path: Path) -> None:
    path = tmp_path / "disk.vdi"
    done = virtmount("create", path, "64M", "--json")
    assert json.loads(done.stdout)["size"] == 64 * MIB
    qemu_img("check", path)
    done = virtmount("create", path, "64M", code=1)
    assert done.stdout == ""
    assert done.stderr.endswith("exists already\nhint: --overwrite to replace it\n")
    assert virtmount("create", "--overwrite", path, "65M").stdout == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x.img"], "say its size"),
        (["x.img", "big"], "no size"),
        ([], "say which file"),
        (["-o", "a=1,a=2", "x.vdi", "1M"], "twice"),
        (["-f", "floppy", "x.img", "1M"], "floppy"),
    ],
)
def test_wrong_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["create", *words]) != 0
    assert said in capsys.readouterr().err
    assert names(tmp_path) == set()


@pytest.mark.parametrize("form", FORMATS)
def test_options_are_listed(capsys: pytest.CaptureFixture[str], form: str) -> None:
    assert cli.main(["create", "-f", form, "-o", "help"]) == 0
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines()] == list(formats.load(form).choices)


@pytest.fixture(autouse=True)
def no_descriptors_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before  # others may be collected meanwhile


def test_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["create", str(tmp_path / "none" / "disk.img"), "1M"]) == 1
    assert capsys.readouterr().err == f"virtmount: {tmp_path}/none: No such file or directory\n"


def test_errors_name_the_file_that_was_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "disk.img"
    assert cli.main(["create", str(tmp_path / "disk.vhd"), "3T"]) == 6
    assert capsys.readouterr().err.startswith(f"virtmount: {tmp_path}/disk.vhd: size: ")
    with pytest.raises(OSError, match=r"full|broken") as caught, staging.Staging(target) as new:
        raise OSError(errno.EIO, "broken", str(new.path))
    assert caught.value.filename == str(target)
    with pytest.raises(OSError, match=r"full|broken") as caught, staging.Staging(target):
        raise OSError(errno.ENOSPC, "full")
    assert caught.value.filename == str(target)
    with pytest.raises(OSError, match=r"full|broken") as caught, staging.Staging(target):
        raise OSError(errno.EIO, "broken")
    assert caught.value.filename is None  # may be the source's


def test_options_between_the_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["create", str(tmp_path / "a.img"), "-f", "vdi", "2M"]) == 0
    assert names(tmp_path) == {"a.img"}
    source, target = str(tmp_path / "a.img"), str(tmp_path / "b")
    assert cli.main(["convert", source, "-O", "raw", target]) == 0
    assert os.path.getsize(target) == 2 * MIB
    with pytest.raises(SystemExit):
        cli.main(["convert", source, "-O", "raw", target, "more"])
    assert "unrecognized arguments: more" in capsys.readouterr().err


def test_parent_of_parent_must_be_there(tmp_path: Path) -> None:
    base, middle = tmp_path / "base.vdi", tmp_path / "middle.vdi"
    create(base, MIB)
    create(middle, parent=base)
    base.unlink()
    with pytest.raises(ParentMissing):
        create(tmp_path / "child.vdi", parent=middle)
    assert names(tmp_path) == {"middle.vdi"}


def test_parents_are_locked_while_the_child_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base.vdi"
    create(base, MIB)
    with open_chain(base, writable=True).top.files[0], pytest.raises(Busy):
        create(tmp_path / "child.vdi", parent=base)
    assert names(tmp_path) == {"base.vdi"}
