"""Records of attached disks: whole or absent, believed only while true, names given once."""

import dataclasses
import json
import multiprocessing
import os
import subprocess

import pytest

from virtmount import state
from virtmount.errors import Busy, NotAttached, VirtmountError
from virtmount.state import Record


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("VIRTMOUNT_RUN", str(folder))
    return folder


def never(record):
    raise AssertionError(f"{record.name} is not dead")


def attached(name, image="/images/disk.vhdx", **values):
    record = Record(name, image, state=state.ATTACHED, **values)
    record.stamp(os.getpid())
    state.folder().mkdir(exist_ok=True)
    record.save()
    return record


def dead_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_record_comes_back_as_it_was_saved():
    record = attached("vhdx0", device="/dev/ublkb0", parents=["/a", "/b"], features={"depth": 128})
    assert state.records() == [record]


def test_names_sort_as_people_count():
    for name in ("vhdx10", "vdi0", "vhdx9", "data"):
        attached(name)
    assert [record.name for record in state.records()] == ["data", "vdi0", "vhdx9", "vhdx10"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "Expecting value"),
        ("[]", "not a record of version 1"),
        ("{", "Expecting property"),
        ('{"version": 2, "name": "vhdx0", "image": "/a"}', "not a record of version 1"),
        ('{"version": 1, "image": "/a"}', "no name or no image"),
        ('{"version": 1, "name": "../x", "image": "/a"}', "name '../x'"),
        ('{"version": 1, "name": "vhdx0", "image": "/a", "pid": "1"}', "pid is '1'"),
        ('{"version": 1, "name": "vhdx0", "image": "/a", "odd": 1}', "unknown keys odd"),
    ],
)
def test_file_that_is_no_record_is_passed_over(run, text, complaint):
    attached("vdi0")
    (run / "vhdx0.json").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        state.parse(text)
    assert [record.name for record in state.records()] == ["vdi0"]


def test_save_leaves_nothing_beside(run):
    attached("vhdx0").save()
    assert [path.name for path in run.iterdir()] == ["vhdx0.json"]
    assert json.loads((run / "vhdx0.json").read_text())["version"] == 1


def test_alive_while_the_process_of_that_start_time_runs():
    record = attached("vhdx0")
    assert record.is_alive()
    assert not dataclasses.replace(record, started=record.started + 1).is_alive()
    assert not dataclasses.replace(record, boot="another").is_alive()
    assert not dataclasses.replace(record, pid=dead_process()).is_alive()


def test_zombie_is_dead():
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert state.start_time(process.pid) == -1
    process.wait()


def test_disk_of_the_kernel_alone_lives_as_long_as_its_device():
    record = attached("raw0", device="/dev/loop-not-there")
    record.stamp(0)
    assert not record.is_alive()


def test_claim_takes_the_first_free_number():
    attached("vhdx0")
    attached("vhdx2")
    first, second = Record("", "/a"), Record("", "/b")
    for record in (first, second):
        record.stamp(os.getpid())
        state.claim(record, "vhdx", None, never)
    assert (first.name, second.name) == ("vhdx1", "vhdx3")


def test_claim_passes_over_names_that_are_in_dev():
    record = Record("", "/a")
    state.claim(record, "tty", None, never)  # /dev/tty0 … tty9 are the kernel's
    assert not os.path.lexists(record.path)


def test_claim_clears_after_the_dead_and_takes_their_name():
    left = attached("vhdx0")
    left.pid, left.started = dead_process(), 1
    left.save()
    left.log.write_text("last words\n")
    cleared = []
    record = Record("", "/b")
    state.claim(record, "vhdx", None, cleared.append)
    assert record.name == "vhdx0"
    assert cleared == [left]
    assert not record.log.exists()


def test_failed_record_is_kept_until_it_was_read():
    left = attached("vhdx0", error="flush: No space left on device")
    left.pid, left.started, left.state = dead_process(), 1, state.FAILED
    left.save()
    record = Record("", "/b")
    state.claim(record, "vhdx", None, never)
    assert record.name == "vhdx1"


def test_wish_that_is_taken_is_refused():
    attached("data")
    with pytest.raises(Busy, match="/dev/data: that name is taken"):
        state.claim(Record("", "/a"), "vhdx", "data", never)
    with pytest.raises(Busy, match="/dev/null: that name is taken"):
        state.claim(Record("", "/a"), "vhdx", "null", never)


@pytest.mark.parametrize("wish", ["", "1", "a/b", "..", "a b", "a" * 32, "-x"])
def test_wish_that_is_no_name_is_refused(wish):
    with pytest.raises(VirtmountError, match="--name"):
        state.claim(Record("", "/a"), "vhdx", wish, never)


def claim_some(barrier, results):
    barrier.wait()
    for _ in range(5):
        record = Record("", "/a")
        record.stamp(os.getppid())
        state.claim(record, "vhdx", None, never)
        results.put(record.name)


def test_racing_claims_never_share_a_name():
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(8), fork.Queue()
    processes = [fork.Process(target=claim_some, args=(barrier, results)) for _ in range(8)]
    for process in processes:
        process.start()
    names = [results.get(timeout=30) for _ in range(40)]
    for process in processes:
        process.join()
    assert sorted(names) == sorted(f"vhdx{n}" for n in range(40))


def test_found_by_name_node_device_and_image(tmp_path):
    image = tmp_path / "disk.vhdx"
    image.touch()
    (tmp_path / "link").symlink_to(image)
    os.link(image, tmp_path / "hard")
    record = attached("vhdx0", str(image), device="/dev/ublkb0", file_id=state.file_id(image))
    attached("vhdx1", device="/dev/ublkb1")
    for word in ("vhdx0", "/dev/vhdx0", "/dev/ublkb0", str(image), tmp_path / "link"):
        assert state.find(word) == [record]
    assert state.find(tmp_path / "hard") == [record]
    image.unlink()
    assert state.find(image) == [record]


def test_image_attached_twice_is_found_twice(tmp_path):
    image = tmp_path / "disk.vhdx"
    image.touch()
    both = [attached(f"vhdx{n}", str(image), file_id=state.file_id(image)) for n in range(2)]
    assert state.find(image) == both


@pytest.mark.parametrize("word", ["/dev/vhdx0p1", "/dev/ublkb0p12"])
def test_partition_is_not_the_disk(word):
    attached("vhdx0", device="/dev/ublkb0")
    with pytest.raises(NotAttached, match="a partition of /dev/vhdx0") as caught:
        state.find(word)
    assert caught.value.hint == "virtmount detach /dev/vhdx0"


@pytest.mark.parametrize("word", ["vhdx1", "/dev/ublkb00", "/dev/vhdx0x1", "nothing"])
def test_not_attached(word):
    attached("vhdx0", device="/dev/ublkb0")
    with pytest.raises(NotAttached, match="not attached"):
        state.find(word)
