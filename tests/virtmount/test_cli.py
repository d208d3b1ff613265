"""The command line: what is printed where, and with which exit code."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from virtmount import attachment, cli, doctor, errors, state
from virtmount.attachment import Attachment, Order
from virtmount.errors import Busy, VirtmountError
from virtmount.state import Record

ROOT = Path(__file__).resolve().parents[2]
VERBS = (
    *("attach", "detach", "list", "info", "map", "create", "convert", "check", "resize"),
    *("compare", "cat", "snapshot", "commit", "rebase", "doctor"),
)


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("VIRTMOUNT_RUN", str(folder))
    return folder


@pytest.fixture
def attached(tmp_path):
    """Makes records of this very process, which is certainly alive."""

    def make(name, image="", **values):
        image = image or str(tmp_path / "disk.vhdx")
        fields = {"device": f"/dev/fake-{name}", "format": "vhdx", "transport": "ublk"}
        record = Record(name, image, **{**fields, "state": state.ATTACHED, **values})
        record.stamp(os.getpid())
        record.save()
        return record

    return make


def qemu_img(*words):
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Errors


CODES = {
    "VirtmountError": 1,
    "NotAnImage": 3,
    "Denied": 4,
    "Busy": 5,
    "Unsupported": 6,
    "NoTransport": 7,
    "NeedsRecovery": 8,
    "Corrupt": 8,
    "ParentMissing": 9,
    "NotAttached": 10,
}


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_error_is_said_with_file_place_and_hint(monkeypatch, capsys, name, code):
    def fail(order, passphrase):
        raise getattr(errors, name)(order.image, "header 2", "not so", hint="try this")

    monkeypatch.setattr(attachment, "attach_as", fail)
    assert cli.main(["attach", "/images/disk.vhdx"]) == code
    out, complaint = capsys.readouterr()
    assert out == ""
    assert complaint == "virtmount: /images/disk.vhdx: header 2: not so\nhint: try this\n"


def test_every_class_of_error_has_its_code_in_the_help(capsys):
    known = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, VirtmountError)
    ]
    assert {kind.__name__ for kind in known} == set(CODES)
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f" {code} " in text for code in {0, 2, *CODES.values()})


def test_host_error_is_said_with_its_file(capsys, monkeypatch):
    monkeypatch.setattr(attachment, "attach_as", lambda order, passphrase: os.stat(order.image))
    assert cli.main(["attach", "/images/not there"]) == 1
    assert capsys.readouterr().err == "virtmount: /images/not there: No such file or directory\n"


def test_host_error_without_a_file(capsys, monkeypatch):
    def fail(order, passphrase):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(attachment, "attach_as", fail)
    assert cli.main(["attach", "x"]) == 1
    assert capsys.readouterr().err == "virtmount: No space left on device\n"


def test_traceback_only_when_asked_for(capsys, monkeypatch):
    def fail(order, passphrase):
        raise Busy("x", "", "busy")

    monkeypatch.setattr(attachment, "attach_as", fail)
    assert cli.main(["attach", "x"]) == 5
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main(["attach", "--debug", "x"]) == 5
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_no_error_message(capsys, monkeypatch):
    def fail(order, passphrase):
        raise KeyboardInterrupt

    monkeypatch.setattr(attachment, "attach_as", fail)
    assert cli.main(["attach", "x"]) == 130
    assert capsys.readouterr().err == ""


def test_names_in_messages_cannot_move_the_cursor(capsys, monkeypatch):
    def fail(order, passphrase):
        raise Busy("a\x1b[2J\nb\udcff", "", "busy")

    monkeypatch.setattr(attachment, "attach_as", fail)
    cli.main(["attach", "x"])
    assert capsys.readouterr().err == "virtmount: a?[2J?b?: busy\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["atach", "x"],
        ["attach"],
        ["attach", "x", "--cache", "no"],
        ["attach", "x", "--transport", "nbd"],
        ["attach", "--overlay", "--read-only", "x"],
        ["detach"],
        ["detach", "-a", "x"],
        ["list", "x"],
        ["list", "-o", "COLOUR"],
    ],
)
def test_wrong_usage(capsys, words):
    try:
        code = cli.main(words)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert "hint: virtmount" in capsys.readouterr().err


# attach


@pytest.fixture
def ordered(monkeypatch):
    """The orders that attach gave, in place of daemons."""
    orders = []

    def attach_as(order, passphrase):
        orders.append(order)
        return Attachment(Record("vhdx0", order.image, device="/dev/fake0", size=1 << 30))

    monkeypatch.setattr(attachment, "attach_as", attach_as)
    return orders


def test_attach_prints_the_device_and_nothing_else(capsys, ordered, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["attach", "disk.vhdx"]) == 0
    assert capsys.readouterr() == ("/dev/vhdx0\n", "")
    assert ordered == [Order(str(tmp_path / "disk.vhdx"))]


def test_options_of_attach_reach_the_daemon(ordered):
    words = ["-r", "-f", "raw", "-t", "fuse", "-c", "none", "-N", "data"]
    words += ["--allow-outside", "--parent-format", "qcow2", "/i"]
    assert cli.main(["attach", *words]) == 0
    assert ordered == [Order("/i", True, "raw", "fuse", "none", "data", True, "qcow2")]


def test_more_options_of_attach_reach_the_daemon(ordered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--snapshot", "s", "--search-path", "a", "--search-path", "/b", "--size-from", "chs"]
    assert cli.main(["attach", *words, "--force", "--overlay=over", "/i"]) == 0
    (order,) = ordered
    assert (order.snapshot, order.size_from, order.force) == ("s", "chs", True)
    assert order.search_path == (str(tmp_path / "a"), "/b")
    assert order.overlay == str(tmp_path / "over")


@pytest.mark.parametrize(
    ("words", "overlay"),
    [
        (["/i"], None),
        (["--overlay", "/i"], "/tmp/there"),
        (["/i", "--overlay"], "/tmp/there"),
        (["--overlay=/else", "/i"], "/else"),
    ],
)
def test_overlay_has_a_folder_only_after_an_equals_sign(ordered, monkeypatch, words, overlay):
    monkeypatch.setenv("TMPDIR", "/tmp/there")
    assert cli.main(["attach", *words]) == 0
    (order,) = ordered
    assert (order.image, order.overlay) == ("/i", overlay)


def test_vdiskload_is_attach(capsys, ordered):
    assert cli.vdiskload(["--read-only", "/images/disk.vdi"]) == 0
    assert capsys.readouterr().out == "/dev/vhdx0\n"
    assert ordered == [Order("/images/disk.vdi", read_only=True)]


def test_person_at_a_terminal_is_told_what_comes_next(capsys, ordered, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(Attachment, "partition_sizes", lambda self: [("/dev/vhdx0p1", 1 << 20)])
    assert cli.main(["attach", "/images/disk.vhdx"]) == 0
    out, talk = capsys.readouterr()
    assert out == "/dev/vhdx0\n"
    assert "/dev/vhdx0p1  1M" in talk
    assert "mount /dev/vhdx0p1 /mnt" in talk
    assert "virtmount detach /dev/vhdx0" in talk


# detach


def test_detach_goes_on_after_a_failure_and_returns_its_code(capsys, attached, monkeypatch):
    for n in range(3):
        attached(f"vhdx{n}", f"/images/{n}")
    done = []

    def detach(record, *, force):
        if record.name == "vhdx0":
            raise Busy(record.path, "", "mounted at /mnt", hint="umount /mnt")
        done.append((record.name, force))
        return "its process had been killed" if record.name == "vhdx2" else ""

    monkeypatch.setattr(attachment, "detach", detach)
    assert cli.main(["detach", "--force", "vhdx0", "/images/1", "nothing", "vhdx2"]) == 5
    assert done == [("vhdx1", True), ("vhdx2", True)]
    assert capsys.readouterr() == (
        "",
        "virtmount: /dev/vhdx0: mounted at /mnt\nhint: umount /mnt\n"
        "virtmount: nothing: not attached\nhint: virtmount list\n"
        "virtmount: its process had been killed\n",
    )


def test_detach_all(attached, monkeypatch):
    for n in range(3):
        attached(f"vhdx{n}")
    done = []
    monkeypatch.setattr(
        attachment, "detach", lambda record, *, force: done.append(record.name) or ""
    )
    assert cli.main(["detach", "--all"]) == 0
    assert done == ["vhdx0", "vhdx1", "vhdx2"]


def test_detach_of_what_is_not_attached(capsys):
    assert cli.main(["detach", "vhdx0"]) == 10
    assert capsys.readouterr().err == "virtmount: vhdx0: not attached\nhint: virtmount list\n"


def test_detach_needs_root(capsys, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main(["detach", "--all"]) == 4
    assert "sudo" in capsys.readouterr().err


# list


def test_list(capsys, attached):
    attached("vhdx0", "/images/a.vhdx", size=10 << 30)
    attached("qcow0", "/images/b.qcow2", size=512, format="qcow2", read_only=True)
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out == (
        "NAME  DEVICE          FORMAT SIZE RO TRANSPORT IMAGE\n"
        "qcow0 /dev/fake-qcow0 qcow2   512  1 ublk      /images/b.qcow2\n"
        "vhdx0 /dev/fake-vhdx0 vhdx    10G  0 ublk      /images/a.vhdx\n"
    )


def test_list_of_nothing_is_nothing(capsys):
    assert cli.main(["list"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"version": 1, "disks": []}


def test_list_of_chosen_columns(capsys, attached):
    attached("vhdx0", size=10 << 30)
    assert cli.main(["list", "-n", "-b", "-o", "size,name"]) == 0
    assert capsys.readouterr().out == "10737418240 vhdx0\n"
    assert cli.main(["list", "-o", "COLOUR"]) == 2
    assert "no column 'COLOUR', know NAME,DEVICE" in capsys.readouterr().err


def test_every_column_has_a_meaning_in_the_help(capsys, attached):
    attached("vhdx0")
    with pytest.raises(SystemExit):
        cli.main(["list", "--help"])
    text = capsys.readouterr().out
    for column in cli._columns():
        assert f"  {column.name} " in text
        assert column.meaning in text
        assert cli.main(["list", "-o", column.name]) == 0


KEYS = {
    *("name", "path", "device", "image", "format", "variant", "size", "sector_size"),
    *("read_only", "transport", "cache", "state", "pid", "since", "parents", "features"),
    *("error", "partitions", "overlay"),
}


def test_keys_of_the_json_are_stable(capsys, attached):
    attached("vhdx0", parents=["/a"], features={"mode": "auto_buf"})
    assert cli.main(["list", "--json"]) == 0
    (disk,) = json.loads(capsys.readouterr().out)["disks"]
    assert set(disk) == KEYS
    assert disk["path"] == "/dev/vhdx0"
    assert disk["state"] == "attached"
    assert disk["pid"] == os.getpid()


def test_disk_whose_process_was_killed_is_listed_as_dead(capsys, attached):
    record = attached("vhdx0")
    record.started += 1
    record.save()
    assert cli.main(["list", "-n", "-o", "STATE"]) == 0
    assert capsys.readouterr().out == "dead\n"


# info and map


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "10M")
    command = ["qemu-io", "-f", "qcow2", "-c", "write 1M 1M", "-c", "write -z 4M 64k", path]
    subprocess.run(command, check=True, capture_output=True)
    return path


def test_info_for_people(capsys, image):
    assert cli.main(["info", str(image)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", str(image)]
    assert any(line.split()[:2] == ["format", "qcow2"] for line in lines)
    assert any(line.split() == ["disk", "10M", "(10485760", "bytes)"] for line in lines)


def test_info_for_programs(capsys, image):
    assert cli.main(["info", "--json", str(image)]) == 0
    found = json.loads(capsys.readouterr().out)
    asked = json.loads(qemu_img("info", "--output=json", image))
    assert found["version"] == 1
    assert found["size"] == asked["virtual-size"]
    assert found["cluster_size"] == asked["cluster-size"]
    assert found["format"] == asked["format"]
    assert found["attached"] == []


def test_info_of_an_attached_disk_is_of_its_image(capsys, image, attached):
    record = attached("qcow0", str(image), format="qcow2")
    assert cli.main(["info", "--json", "/dev/qcow0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(image)
    assert [disk["name"] for disk in found["attached"]] == [record.name]


def test_info_tells_of_the_overlay(capsys, image, attached):
    attached("qcow0", str(image), format="qcow2", overlay="/var/tmp")
    assert cli.main(["info", "/dev/qcow0"]) == 0
    assert "attached, overlay in /var/tmp)" in capsys.readouterr().out
    assert cli.main(["list", "-n", "-o", "OVERLAY"]) == 0
    assert capsys.readouterr().out == "/var/tmp\n"


def test_info_of_nothing(capsys):
    assert cli.main(["info", "vhdx7"]) == 10
    assert "neither a file nor an attached disk" in capsys.readouterr().err
    assert cli.main(["info", "/images/none.vhdx"]) == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_map_for_programs_speaks_as_qemu_img_does(capsys, image):
    assert cli.main(["map", "--json", str(image)]) == 0
    found = json.loads(capsys.readouterr().out)
    asked = json.loads(qemu_img("map", "--output=json", "-f", "qcow2", image))
    keys = ("start", "length", "depth", "zero", "data", "present")
    assert [[extent[key] for key in keys] for extent in found] == [
        [extent[key] for key in keys] for extent in asked
    ]
    assert [extent.get("offset") for extent in found] == [extent.get("offset") for extent in asked]


def test_map_for_people(capsys, image):
    assert cli.main(["map", str(image)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["START", "LENGTH", "OFFSET", "DEPTH", "KIND"]
    assert [row[4] for row in rows[1:]] == ["absent", "data", "absent", "zero", "absent"]


def test_reader_that_has_seen_enough_is_no_error(image):
    command = f"{sys.executable} -m virtmount map {image} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env={**os.environ}
    )
    assert done.stderr == ""
    assert done.stdout in ("0\n", "1\n")


# The rest


@pytest.mark.parametrize(("usable", "code"), [(True, 0), (False, 7)])
def test_doctor(capsys, monkeypatch, usable, code):
    checks = [
        doctor.Check("root", True, "yes"),
        doctor.Check("ublk", usable, "kernel 6.1 has no ublk_drv", "boot a newer one"),
    ]
    transports = {"ublk": usable, "fuse": False, "loop": False}
    monkeypatch.setattr(doctor, "examine", lambda: doctor.Report(checks, transports))
    assert cli.main(["doctor"]) == code
    text = capsys.readouterr().out
    assert ("boot a newer one" in text) is not usable
    assert f"transports: {'ublk' if usable else 'none'}" in text
    assert cli.main(["doctor", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["transports"] == transports
    assert [set(check) for check in found["checks"]] == [{"name", "ok", "text", "hint"}] * 2


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(capsys, verb):
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes:" in text
    if verb != "doctor":
        assert f"examples:\n  virtmount {verb}" in text


def test_version_is_that_of_the_package_and_quick():
    program = (
        "import sys\nfrom virtmount.cli import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit:\n"
        "    print(sorted(set(sys.modules) & set(sys.argv[1:])))"
    )
    slow = ["construct", "cffi", "asyncio", "virtmount.engine", "virtmount.image"]
    done = subprocess.run(
        [sys.executable, "-c", program, *slow], capture_output=True, text=True, cwd=ROOT
    )
    version, loaded = done.stdout.splitlines()
    assert f'version = "{version.split()[1]}"' in (ROOT / "pyproject.toml").read_text()
    assert loaded == "[]"
