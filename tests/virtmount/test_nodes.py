"""Names in /dev and users, over a made-up sysfs, /dev and /proc; device numbers are real (root)."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from virtmount import nodes
from virtmount.errors import Busy
from virtmount.nodes import Node, User


class System:
    """A made-up machine: devices in sys, nodes in dev, processes in proc."""

    def __init__(self, root: Path) -> None:
        self.sys, self.dev, self.proc = root / "sys", root / "dev", root / "proc"
        for folder in (self.sys, self.dev, self.proc):
            folder.mkdir()
        (self.proc / "self").mkdir()
        (self.proc / "self" / "mountinfo").write_text("")

    def device(self, name: str, minor: int, *, node: bool = True, size: int = 2048) -> Path:
        folder = self.sys / name
        folder.mkdir()
        (folder / "dev").write_text(f"7:{minor}\n")
        (folder / "size").write_text(f"{size}\n")
        (folder / "holders").mkdir()
        if node:
            self.node(name, minor)
        return folder

    def partition(self, disk: str, number: int, minor: int, *, node: bool = True) -> Path:
        folder = self.sys / disk / f"{disk}p{number}"
        folder.mkdir()
        (folder / "dev").write_text(f"259:{minor}\n")
        (folder / "size").write_text("16\n")
        (folder / "start").write_text(f"{number * 8}\n")
        (folder / "partition").write_text(f"{number}\n")
        (folder / "holders").mkdir()
        if node:
            self.node(folder.name, minor, major=259)
        return folder

    def node(self, name: str, minor: int, major: int = 7) -> None:
        os.mknod(self.dev / name, stat.S_IFBLK | 0o600, os.makedev(major, minor))

    def remove(self, name: str) -> None:
        """The kernel takes a device away; what is in /dev is not its business here."""
        folder = self.sys / name
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()

    def names(self) -> list[str]:
        return sorted(os.listdir(self.dev))

    def process(self, pid: int, mounts: str = "", namespace: str = "mnt:[1]") -> Path:
        folder = self.proc / str(pid)
        (folder / "fd").mkdir(parents=True)
        (folder / "ns").mkdir()
        os.symlink(namespace, folder / "ns" / "mnt")
        (folder / "mountinfo").write_text(mounts)
        (folder / "comm").write_text("prog\n")
        return folder


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    system = System(tmp_path)
    monkeypatch.setattr(nodes, "SYS", system.sys)
    monkeypatch.setattr(nodes, "DEV", system.dev)
    monkeypatch.setattr(nodes, "PROC", system.proc)
    return system


def test_partitions_are_listed_by_number(system: System) -> None:
    system.device("ublkb0", 1)
    for number in (10, 2, 1):
        system.partition("ublkb0", number, number)
    found = nodes.partitions("ublkb0")
    assert [node.number for node in found] == [1, 2, 10]
    assert found[1] == Node("ublkb0p2", 2, 259, 2, 16 * 512, 16 * 512)
    assert nodes.partitions("ublkb1") == []
    assert nodes.disk_node("ublkb1") is None


def test_links_come_and_go(system: System) -> None:
    system.device("loop3", 3)
    system.partition("loop3", 1, 1)
    system.partition("loop3", 5, 5)
    before = system.names()
    links = nodes.make_links("vdi0", "loop3")
    assert [Path(link).name for link in links] == ["vdi0", "vdi0p1", "vdi0p5"]
    assert os.readlink(links[0]) == "loop3"
    assert os.readlink(links[2]) == "loop3p5"
    assert nodes.make_links("vdi0", "loop3") == links
    nodes.remove_links("vdi0", "loop3")
    assert system.names() == before
    nodes.remove_links("vdi0", "loop3")


def test_links_follow_a_new_partition_table(system: System) -> None:
    system.device("ublkb0", 1)
    system.partition("ublkb0", 1, 1)
    nodes.make_links("vdi0", "ublkb0")
    system.remove("ublkb0/ublkb0p1")
    system.partition("ublkb0", 2, 2)
    assert [Path(link).name for link in nodes.make_links("vdi0", "ublkb0")] == ["vdi0", "vdi0p2"]
    assert "vdi0p1" not in system.names()


def test_missing_nodes_are_made_and_taken_back(system: System) -> None:
    system.device("ublkb0", 1, node=False)
    system.partition("ublkb0", 1, 7, node=False)
    nodes.make_links("vdi0", "ublkb0")
    assert os.stat(system.dev / "vdi0p1").st_rdev == os.makedev(259, 7)
    system.remove("ublkb0")
    nodes.remove_links("vdi0", "ublkb0")
    assert system.names() == []


def test_a_leftover_node_with_another_number_is_replaced(system: System) -> None:
    system.device("ublkb0", 1)
    system.node("ublkb0p1", 99, major=259)
    system.partition("ublkb0", 1, 7, node=False)
    nodes.make_links("vdi0", "ublkb0")
    assert os.stat(system.dev / "ublkb0p1").st_rdev == os.makedev(259, 7)


def test_a_loop_device_keeps_its_own_node(system: System) -> None:
    disk = system.device("loop3", 3)
    (disk / "loop").mkdir()
    system.partition("loop3", 1, 1)
    nodes.make_links("vdi0", "loop3")
    (disk / "loop").rmdir()
    system.remove("loop3/loop3p1")
    nodes.remove_links("vdi0", "loop3")
    assert system.names() == ["loop3"]


def test_nodes_of_a_device_that_is_in_use_stay(system: System) -> None:
    disk = system.device("loop3", 3)
    (disk / "loop").mkdir()
    system.partition("loop3", 1, 1)
    nodes.remove_links("vdi0", "loop3")
    assert system.names() == ["loop3", "loop3p1"]


@pytest.mark.parametrize("kind", ["file", "node", "other link", "foreign link"])
def test_what_is_not_ours_is_never_touched(system: System, kind: str) -> None:
    system.device("loop3", 3)
    system.partition("loop3", 1, 1)
    system.device("loop4", 4)
    taken = system.dev / "vdi0p1"
    if kind == "file":
        taken.write_text("mine")
    elif kind == "node":
        system.node("vdi0p1", 44)
    else:
        os.symlink("loop4" if kind == "other link" else "/home/me", taken)
    before = os.lstat(taken)
    with pytest.raises(Busy, match="vdi0p1: that name is taken"):
        nodes.make_links("vdi0", "loop3")
    assert "vdi0" not in system.names(), "what was made is undone"
    nodes.remove_links("vdi0", "loop3")
    after = os.lstat(taken)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_a_dangling_link_of_a_dead_disk_is_replaced(system: System) -> None:
    system.device("loop3", 3)
    os.symlink("ublkb7", system.dev / "vdi0")
    nodes.make_links("vdi0", "loop3")
    assert os.readlink(system.dev / "vdi0") == "loop3"


def test_links_of_names_that_begin_alike_stay(system: System) -> None:
    system.device("loop3", 3)
    system.partition("loop3", 1, 1)
    for name in ("a", "ap", "ap1x", "a0"):
        nodes.make_links(name, "loop3")
    nodes.remove_links("a", "loop3")
    assert {"ap", "app1", "ap1x", "ap1xp1", "a0", "a0p1"} <= set(system.names())
    assert not {"a", "ap1"} & set(system.names())


def test_waiting_ends_when_it_happens_and_when_it_does_not() -> None:
    happened = threading.Event()
    timer = threading.Timer(0.1, happened.set)
    timer.start()
    assert nodes.wait_until(happened.is_set, 10)
    timer.join()
    assert not nodes.wait_until(lambda: False, 0.05)
    assert nodes.wait_until(lambda: True, 0)


def test_waiting_without_the_right_to_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(socket, "socket", refuse)
    happened = threading.Event()
    timer = threading.Timer(0.05, happened.set)
    timer.start()
    assert nodes.wait_until(happened.is_set, 10)
    timer.join()


# Users

MOUNT = "36 35 {dev} / {point} rw,noatime master:1 - ext4 {source} rw\n"


def test_nobody(system: System) -> None:
    system.device("loop3", 3)
    system.process(100, MOUNT.format(dev="8:1", point="/home", source="/dev/sda1"))
    assert nodes.users("loop3") == []
    assert nodes.users("loop9") == []


def test_mounts_of_disk_and_partitions(system: System) -> None:
    system.device("loop3", 3)
    system.partition("loop3", 1, 1)
    (system.proc / "self" / "mountinfo").write_text(
        MOUNT.format(dev="7:3", point="/mnt/a\\040b", source="/dev/loop3")
        + MOUNT.format(dev="259:1", point="/mnt/c", source="/dev/loop3p1")
        + MOUNT.format(dev="259:2", point="/mnt/d", source="/dev/sdb")
        + MOUNT.format(dev="0:30", point="/proc", source="proc")
    )
    assert nodes.users("loop3") == [
        User("mount", "loop3", "/mnt/a b"),
        User("mount", "loop3p1", "/mnt/c"),
    ]


def test_mounts_in_other_namespaces_once_each(system: System) -> None:
    system.device("loop3", 3)
    (system.proc / "self" / "ns").mkdir()
    os.symlink("mnt:[1]", system.proc / "self" / "ns" / "mnt")
    ours = MOUNT.format(dev="7:3", point="/mnt", source="/dev/loop3")
    theirs = MOUNT.format(dev="7:3", point="/inner", source="/dev/loop3")
    (system.proc / "self" / "mountinfo").write_text(ours)
    system.process(100, ours, "mnt:[1]")
    system.process(200, ours + theirs, "mnt:[2]")
    system.process(201, ours + theirs, "mnt:[2]")
    found = nodes.users("loop3")
    assert found == [User("mount", "loop3", "/mnt"), User("mount", "loop3", "/inner", 200)] or (
        found == [User("mount", "loop3", "/mnt"), User("mount", "loop3", "/inner", 201)]
    )
    assert "in the mount namespace of process 20" in str(found[1])


def test_holders_swap_and_loops(system: System) -> None:
    disk = system.device("loop3", 3)
    part = system.partition("loop3", 1, 1)
    (disk / "holders" / "dm-0").mkdir()
    (part / "holders" / "md127").mkdir()
    mapper = system.sys / "dm-0" / "dm"
    mapper.mkdir(parents=True)
    (mapper / "name").write_text("secret\n")
    (system.proc / "swaps").write_text(
        f"Filename Type Size Used Priority\n{system.dev}/loop3p1 partition 1 0 -2\n"
    )
    above = system.sys / "loop4" / "loop"
    above.mkdir(parents=True)
    (above / "backing_file").write_text(f"{system.dev}/loop3\n")
    assert [str(user) for user in nodes.users("loop3")] == [
        "loop3p1 is used as swap",
        "loop3p1 is used by md127",
        "loop3 is used by dm-0 (secret)",
        "loop3 is used by loop4",
    ]


def test_open_descriptors_of_others(monkeypatch: pytest.MonkeyPatch, system: System) -> None:
    # Real ones: /proc/PID/fd links to a node under /dev and elsewhere.
    system.device("null", 3)
    process = system.process(100)
    os.symlink("/dev/null", process / "fd" / "3")  # no block device
    os.symlink("/home/hanging/file", process / "fd" / "4")
    own = system.process(os.getpid())
    os.symlink("/dev/null", own / "fd" / "3")
    assert nodes.users("null") == []
    user = User("open", "loop3", "fio", 17)
    assert str(user) == "loop3 is open in fio (process 17)"
