"""Overlays: what is written is read, and none of it is left."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.virtmount.chains import make_chain
from virtmount import api, overlay
from virtmount.api import OpenDisk
from virtmount.chain import open_chain
from virtmount.disk import Disk
from virtmount.errors import Busy
from virtmount.image import Chain, Cipher
from virtmount.pager import Pager

KIB, MIB = 1 << 10, 1 << 20


def qemu_img(*words: object) -> str:
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def laid_over(
    path: Path, form: str, folder: Path, *, cipher: Cipher | None = None
) -> Iterator[OpenDisk]:
    chain = open_chain(path, form)
    if cipher:
        chain.top.cipher = cipher
    chain = overlay.lay_over(chain, folder)
    with OpenDisk(Pager(Disk(chain)).start()) as disk:
        yield disk


def exercise(disk: OpenDisk, model: bytearray, rng: random.Random, steps: int = 300) -> None:
    """Random requests; the disk and the model must read the same all the time."""
    size = len(model)
    for _ in range(steps):
        start = rng.randrange(size)
        length = min(rng.choice([1, 511, 512, 4096, 64 * KIB, 200_000]), size - start)
        match rng.choice("wwwrrzdf"):
            case "w":
                data = rng.randbytes(length)
                disk.pwrite(start, data)
                model[start : start + length] = data
            case "r":
                assert disk.pread(start, length) == model[start : start + length]
            case "z":
                disk.write_zeroes(start, length)
                model[start : start + length] = bytes(length)
            case "d":
                first = -(-start // (64 * KIB)) * 64 * KIB
                whole = (length // (64 * KIB)) * 64 * KIB
                if whole and first + whole <= size:
                    disk.discard(first, whole)
                    model[first : first + whole] = bytes(whole)
            case "f":
                disk.flush()
    assert disk.pread(0, size) == model


@pytest.mark.parametrize("encrypted", [False, True])
def test_random_requests_over_a_raw_image(tmp_path: Path, encrypted: bool) -> None:
    rng = random.Random(7)
    content = rng.randbytes(3 * MIB + 512)
    image = tmp_path / "disk.raw"
    image.write_bytes(content)
    (tmp_path / "below").mkdir()
    chain = open_chain(image, "raw")
    made = overlay.lay_over(chain, tmp_path / "below")
    if encrypted:
        made.top.cipher = Cipher("xts", bytes(range(64)))
    with OpenDisk(Pager(Disk(made)).start()) as disk:
        exercise(disk, bytearray(content), rng)
    assert image.read_bytes() == content


def test_over_a_compressed_image(tmp_path: Path) -> None:
    rng = random.Random(8)
    content = b"".join(bytes([rng.randrange(256)]) * 4096 for _ in range(700))
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(content)
    qemu_img("convert", "-c", "-O", "qcow2", raw, image)
    before = image.read_bytes()
    with laid_over(image, "qcow2", tmp_path) as disk:
        exercise(disk, bytearray(content), rng)
    assert image.read_bytes() == before
    with laid_over(image, "qcow2", tmp_path) as disk:
        assert disk.pread(0, len(content)) == content


@pytest.mark.parametrize("seed", range(4))
def test_over_chains_with_every_kind(tmp_path: Path, seed: int, toy_format: None) -> None:
    rng = random.Random(seed)
    path = make_chain(tmp_path, rng)
    with contextlib.closing(Pager(Disk(open_chain(path, "toy")))) as pager:
        content = bytearray(OpenDisk(pager.start()).pread(0, pager.disk.size))
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with laid_over(path, "toy", tmp_path) as disk:
        exercise(disk, content, rng, 100)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_file_has_no_name_and_takes_the_space(tmp_path: Path) -> None:
    image, folder = tmp_path / "disk.raw", tmp_path / "over"
    image.write_bytes(bytes(MIB))
    folder.mkdir()
    with laid_over(image, "raw", folder) as disk:
        disk.pwrite(0, b"x" * MIB)
        disk.flush()
        assert list(folder.iterdir()) == []
        fd = disk.image.files[0].fd
        assert os.fstat(fd).st_nlink == 0
        used = os.fstat(fd).st_blocks * 512
        assert MIB <= used < 2 * MIB
        disk.discard(0, MIB)
        assert os.fstat(fd).st_blocks * 512 < MIB // 2
        size = os.fstat(fd).st_size
        disk.pwrite(0, b"y" * MIB)
        disk.flush()
        assert os.fstat(fd).st_size <= size + 64 * MIB  # places are used again


def test_image_is_locked_read_only(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    with laid_over(image, "raw", tmp_path):
        with laid_over(image, "raw", tmp_path):
            pass  # two may share it: neither writes
        with pytest.raises(Busy):
            open_chain(image, "raw", writable=True)
    open_chain(image, "raw", writable=True).close()


def test_over_an_encrypted_image_nothing_is_in_plain_text(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    key = Cipher("xts", bytes(range(64)))
    with laid_over(image, "raw", tmp_path, cipher=key) as disk:
        disk.pwrite(0, b"secret!!" * 1000)
        assert disk.pread(0, 8000) == b"secret!!" * 1000
        disk.flush()
        fd = disk.image.files[0].fd
        assert b"secret!!" not in os.pread(fd, os.fstat(fd).st_size, 0)
        assert disk.image.cipher is not None
        assert disk.image.cipher.key != key.key


def test_nothing_is_left_open_when_the_folder_is_not_there(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    chain = open_chain(image, "raw")
    with pytest.raises(FileNotFoundError):
        overlay.lay_over(chain, tmp_path / "not there")
    assert chain.top.files[0].fd < 0


def test_places_come_back(tmp_path: Path) -> None:
    """Discarded and unused host clusters are handed out again, and read as zeros."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    chain: Chain = overlay.lay_over(open_chain(image, "raw"), tmp_path)
    with contextlib.closing(chain):
        top = chain.top
        first = top.reserve(3).runs
        top.release(first)
        again = top.reserve(3)
        assert sorted(run.host_offset for run in again.runs) == [
            first[0].host_offset + i * overlay.CLUSTER for i in range(3)
        ]
        assert len(again.plan) == 3  # emptied before


def test_open_with_an_overlay(tmp_path: Path) -> None:
    image, folder = tmp_path / "disk.raw", tmp_path / "over"
    image.write_bytes(b"old!" * MIB)
    image.chmod(0o444)
    folder.mkdir()
    with api.open(image, "raw", overlay=folder) as disk:
        assert disk.writable
        disk.pwrite(1000, b"new")
        assert disk.pread(996, 8) == b"old!new!"
        assert list(folder.iterdir()) == []
    assert image.read_bytes() == b"old!" * MIB
