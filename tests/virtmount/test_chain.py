"""Which parents are opened, and which are refused before anything of them is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.virtmount.toy import make_toy
from virtmount.chain import MAX_DEPTH, open_chain
from virtmount.errors import (
    Busy,
    Corrupt,
    Denied,
    NotAnImage,
    ParentMissing,
    Unsupported,
    VirtmountError,
)
from virtmount.hostfile import HostFile
from virtmount.image import Options

pytestmark = pytest.mark.usefixtures("toy_format")
SIZE = 64 << 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The image's folder; what lies beside it in tmp_path is outside."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def child_of(folder: Path, *names: str, name: str = "child.toy", **header: object) -> Path:
    header.setdefault("parent_format", "toy")
    return make_toy(folder / name, SIZE, {}, parents=names, **header)


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def names_of(path: Path, **options: object) -> list[str]:
    chain = open_chain(path, **options)  # type: ignore[arg-type]
    try:
        return [image.files[0].path.name for image in chain.images]
    finally:
        chain.close()


def test_opens_parents_relative_to_each_child(folder: Path) -> None:
    (folder / "deep").mkdir()
    make_toy(folder / "base.toy", SIZE, {})
    child_of(folder / "deep", "../base.toy", name="middle.toy")
    top = child_of(folder, "deep/middle.toy")
    before = open_fds()
    assert names_of(top) == ["child.toy", "middle.toy", "base.toy"]
    assert open_fds() == before


def test_only_the_top_is_writable_and_everything_is_locked(folder: Path) -> None:
    base = make_toy(folder / "base.toy", SIZE, {})
    top = child_of(folder, "base.toy")
    chain = open_chain(top, writable=True)
    assert [image.files[0].writable for image in chain.images] == [True, False]
    with pytest.raises(Busy):
        HostFile(base, writable=True)
    with pytest.raises(Busy):
        HostFile(top)
    HostFile(base).close()  # a second child may read it
    chain.close()
    HostFile(base, writable=True).close()


def test_a_parent_that_is_being_written_is_refused(folder: Path) -> None:
    base = make_toy(folder / "base.toy", SIZE, {})
    top = child_of(folder, "base.toy")
    before = open_fds()
    with HostFile(base, writable=True), pytest.raises(Busy):
        open_chain(top)
    assert open_fds() == before


@pytest.mark.parametrize(
    "make",
    [
        lambda folder, outside: str(outside),
        lambda folder, outside: "../outside.toy",
        lambda folder, outside: "link.toy",
        lambda folder, outside: "linked/outside.toy",
        lambda folder, outside: "./../images/../outside.toy",
    ],
    ids=["absolute", "dotdot", "link", "linked folder", "winding"],
)
def test_a_parent_outside_needs_the_users_word(folder: Path, make: object) -> None:
    outside = make_toy(folder.parent / "outside.toy", SIZE, {})
    (folder / "link.toy").symlink_to(outside)
    (folder / "linked").symlink_to(folder.parent)
    top = child_of(folder, make(folder, outside))  # type: ignore[operator]
    before = open_fds()
    with pytest.raises(Denied, match="outside of the image's folder") as caught:
        open_chain(top)
    assert "--allow-outside" in str(caught.value.hint)
    assert open_fds() == before
    assert names_of(top, options=Options(allow_outside=True)) == ["child.toy", "outside.toy"]


def test_an_absolute_name_inside_the_folder_is_fine(folder: Path) -> None:
    base = make_toy(folder / "base.toy", SIZE, {})
    assert names_of(child_of(folder, str(base))) == ["child.toy", "base.toy"]
    assert names_of(child_of(folder, f"file:{base}")) == ["child.toy", "base.toy"]


def test_a_link_to_the_image_stands_for_its_folder_too(folder: Path) -> None:
    make_toy(folder / "base.toy", SIZE, {})
    top = child_of(folder, "base.toy")
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "vm.toy").symlink_to(top)
    assert names_of(elsewhere / "vm.toy") == ["vm.toy", "base.toy"]


def test_the_parents_folder_gives_no_new_rights(folder: Path) -> None:
    """Otherwise a parent allowed once could lead on to anything near it."""
    make_toy(folder.parent / "secret.toy", SIZE, {})
    (folder / "deep").mkdir()
    child_of(folder / "deep", "../../secret.toy", name="middle.toy")
    with pytest.raises(Denied):
        open_chain(child_of(folder, "deep/middle.toy"))


@pytest.mark.parametrize("allow", [False, True])
def test_a_fifo_as_parent_neither_opens_nor_hangs(folder: Path, allow: bool) -> None:
    os.mkfifo(folder / "fifo")
    with pytest.raises((Denied, NotAnImage), match="regular file"):
        open_chain(child_of(folder, "fifo"), options=Options(allow_outside=allow))


def test_a_device_as_parent_is_refused(folder: Path) -> None:
    with pytest.raises(Denied):
        open_chain(child_of(folder, "/dev/null"))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("", Corrupt),
        ("base\0.toy", Corrupt),
        ("x" * 5000, Corrupt),
        ("\udcff\ud800", Corrupt),
        ('json:{"driver": "raw"}', Unsupported),
        ("nbd://host/disk", Unsupported),
        ("missing.toy", ParentMissing),
        ("child.toy/base.toy", ParentMissing),
        ("/nowhere/base.toy", ParentMissing),
    ],
)
def test_refuses_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[VirtmountError]
) -> None:
    top = child_of(folder, "placeholder")
    from tests.virtmount import toy

    def ref(names: tuple[str, ...], *rest: str) -> object:
        return real((name,), *rest)

    real = toy.ParentRef
    monkeypatch.setattr(toy, "ParentRef", ref)
    before = open_fds()
    with pytest.raises(error):
        open_chain(top)
    assert open_fds() == before


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_chain_that_comes_back_is_refused(folder: Path, length: int) -> None:
    for i in range(length):
        child_of(folder, f"{(i + 1) % length}.toy", name=f"{i}.toy")
    with pytest.raises(Corrupt, match="comes back"):
        open_chain(folder / "0.toy", writable=True)


def test_a_hard_link_does_not_hide_the_circle(folder: Path) -> None:
    child_of(folder, "other.toy", name="one.toy")
    (folder / "other.toy").hardlink_to(folder / "one.toy")
    with pytest.raises(Corrupt, match="comes back"):
        open_chain(folder / "one.toy")


def test_a_chain_has_a_length_limit(folder: Path) -> None:
    make_toy(folder / "0.toy", SIZE, {})
    for i in range(1, MAX_DEPTH + 1):
        child_of(folder, f"{i - 1}.toy", name=f"{i}.toy")
    assert len(names_of(folder / f"{MAX_DEPTH - 1}.toy")) == MAX_DEPTH
    with pytest.raises(Unsupported, match="more than 64"):
        open_chain(folder / f"{MAX_DEPTH}.toy")


# The parent's format


def test_the_recorded_format_wins_over_the_content(folder: Path) -> None:
    make_toy(folder / "base.toy", SIZE, {})
    chain = open_chain(child_of(folder, "base.toy", parent_format="raw"))
    assert [image.name for image in chain.images] == ["toy", "raw"]
    chain.close()


def test_an_unknown_recorded_format_is_refused_by_name(folder: Path) -> None:
    make_toy(folder / "base.toy", SIZE, {})
    with pytest.raises(Unsupported, match="'luks' is not supported"):
        open_chain(child_of(folder, "base.toy", parent_format="luks"))


@pytest.mark.parametrize("recorded", ["host_device", "file", "RAW"])
def test_names_of_qemu_for_raw(folder: Path, recorded: str) -> None:
    (folder / "base.raw").write_bytes(b"x" * 4096)
    chain = open_chain(child_of(folder, "base.raw", parent_format=recorded))
    assert chain.images[1].name == "raw"
    chain.close()


def test_a_guess_is_enough_for_a_parent_without_further_files(folder: Path) -> None:
    make_toy(folder / "base.toy", SIZE, {})
    (folder / "base.raw").write_bytes(b"x" * 4096)
    assert names_of(child_of(folder, "base.toy", parent_format=None)) == ["child.toy", "base.toy"]
    assert names_of(child_of(folder, "base.raw", parent_format=None)) == ["child.toy", "base.raw"]


def test_the_guest_of_a_raw_parent_cannot_turn_it_into_a_chain(folder: Path) -> None:
    """The parent was raw until its guest wrote a header that names a file of the host."""
    make_toy(folder / "secret.toy", SIZE, {})
    child_of(folder, "secret.toy", name="base.img")
    top = child_of(folder, "base.img", parent_format=None)
    before = open_fds()
    with pytest.raises(Denied, match="names further files") as caught:
        open_chain(top)
    assert "--parent-format toy" in str(caught.value.hint)
    assert open_fds() == before
    assert names_of(top, parent_format="raw") == ["child.toy", "base.img"]
    assert names_of(top, parent_format="toy") == ["child.toy", "base.img", "secret.toy"]


# Is it the right parent?


def test_another_identity_is_refused(folder: Path) -> None:
    make_toy(folder / "base.toy", SIZE, {}, identity="b")
    before = open_fds()
    with pytest.raises(ParentMissing, match=r"base\.toy is b, expected a"):
        open_chain(child_of(folder, "base.toy", parent_identity="a"))
    assert open_fds() == before
    assert len(names_of(child_of(folder, "base.toy", parent_identity="b"))) == 2


def test_further_names_are_tried_until_one_fits(folder: Path) -> None:
    make_toy(folder / "wrong.toy", SIZE, {}, identity="b")
    make_toy(folder / "right.toy", SIZE, {}, identity="a")
    top = child_of(folder, "gone.toy", "wrong.toy", "right.toy", parent_identity="a")
    assert names_of(top) == ["child.toy", "right.toy"]


def test_other_sectors_are_refused(folder: Path) -> None:
    make_toy(folder / "base.toy", SIZE, {}, sector_size=4096)
    with pytest.raises(Unsupported, match="sectors of 4096 bytes"):
        open_chain(child_of(folder, "base.toy"))


def test_a_driver_that_raises_leaves_nothing_open(folder: Path) -> None:
    (folder / "base.toy").write_bytes(b"")
    before = open_fds()
    with pytest.raises(VirtmountError):
        open_chain(child_of(folder, "base.toy", parent_format="raw"))
    assert open_fds() == before
    with HostFile(folder / "child.toy", writable=True):
        pass
