"""DMG: every way of packing, laid out as Apple's tools do, read by qemu-img and 7-Zip as well."""

from __future__ import annotations

import random
import subprocess
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

import virtmount
from tests.formats import make_dmg
from tests.formats.make_dmg import (
    ADC,
    BZIP2,
    IGNORED,
    LZFSE,
    PLAIN,
    SECTOR,
    XZ,
    ZEROS,
    ZLIB,
    Chunk,
    Part,
    cut,
)
from tests.reference import Reference
from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats import dmg, probe
from virtmount.hostfile import HostFile
from virtmount.image import Kind, extents

KIB = 1 << 10
METHODS = {PLAIN: "UDRO", ADC: "UDCO", ZLIB: "UDZO", BZIP2: "UDBZ", LZFSE: "ULFO", XZ: "ULMO"}
SECTORS = 4200


def disk(seed: int = 1, sectors: int = SECTORS) -> bytearray:
    """Bytes of which some repeat, others do not."""
    random_ = random.Random(seed)
    content = bytearray()
    while len(content) < sectors * SECTOR:
        content += random_.randbytes(random_.randrange(1, 3000))
        content += bytes([random_.randrange(256)]) * random_.randrange(1, 9000)
    return content[: sectors * SECTOR]


def apple(content: bytearray, methods: Sequence[int], step: int = 512) -> list[Part]:
    """A GPT disk as hdiutil cuts it: the large partition begins at sector 40, chunks with it.

    What is to be zeros or ignored is emptied in `content`.
    """
    sectors = len(content) // SECTOR
    parts = [
        Part("Protective Master Boot Record (MBR : 0)", 0, 1, [Chunk(methods[0], 0, 1)]),
        Part("GPT Header (Primary GPT Header : 1)", 1, 1, [Chunk(methods[0], 1, 1)]),
        Part("GPT Partition Data (Primary GPT Table : 2)", 2, 32, [Chunk(methods[0], 2, 32)]),
        Part(" (Apple_Free : 3)", 34, 6, [Chunk(IGNORED, 34, 6)]),
        Part("disk image (Apple_HFS : 4)", 40, sectors - 73, cut(40, sectors - 73, step, methods)),
        Part("GPT Partition Data (Backup GPT Table : 5)", sectors - 33, 33),
    ]
    parts[5].chunks = [Chunk(methods[0], sectors - 33, 32), Chunk(methods[0], sectors - 1, 1)]
    for part in parts:
        for chunk in part.chunks:
            if chunk.method in (ZEROS, IGNORED):
                at, length = chunk.first * SECTOR, chunk.sectors * SECTOR
                content[at : at + length] = bytes(length)
    return parts


def read(path: Path) -> bytes:
    with virtmount.open(path) as opened:
        return opened.pread(0, opened.size)


def seven_zip(path: Path) -> bytes:
    done = subprocess.run(["7z", "e", "-so", "-tdmg", path], capture_output=True, check=True)
    return done.stdout


def qemu(path: Path) -> bytes:
    out = path.with_suffix(".raw")
    command = ["qemu-img", "convert", "-f", "dmg", "-O", "raw", path, out]
    subprocess.run(command, check=True, capture_output=True)
    return out.read_bytes()


@pytest.mark.parametrize("method", METHODS, ids=METHODS.get)
def test_every_way_of_packing(method: int, tmp_path: Path) -> None:
    content = disk()
    path = tmp_path / "disk.dmg"
    make_dmg.make(path, bytes(content), [Part("whole", 0, SECTORS, cut(0, SECTORS, 512, [method]))])
    assert seven_zip(path) == content
    if method in (PLAIN, ZLIB):  # the others are in a package of their own
        assert qemu(path) == content
    assert virtmount.inspect(path).variant == METHODS[method]
    assert read(path) == content


@pytest.mark.parametrize("step", [512, 2048, 100, 7])
def test_mixtures_cut_at_odd_sectors(step: int, tmp_path: Path) -> None:
    content = disk(step)
    methods = (ZLIB, PLAIN, ZEROS, BZIP2, XZ, IGNORED, LZFSE, ADC, PLAIN, ZLIB)
    parts = apple(content, methods, step)
    path = tmp_path / "disk.dmg"
    make_dmg.make(path, bytes(content), parts, fork=0 if step != 100 else 4096)
    assert seven_zip(path) == content
    with virtmount.open(path) as opened:
        assert opened.size == len(content)
        assert opened.pread(0, opened.size) == content
        random_ = random.Random(step)
        for _ in range(50):
            at = random_.randrange(len(content))
            length = random_.randrange(1, 200 * KIB)
            assert opened.pread(at, min(length, len(content) - at)) == content[at : at + length]


def test_the_reference_engine_and_qemu_agree(tmp_path: Path) -> None:
    content = disk()
    path = tmp_path / "disk.dmg"
    make_dmg.make(path, bytes(content), apple(content, (ZLIB, ZEROS, PLAIN, ZLIB, IGNORED)))
    assert qemu(path) == content
    with HostFile(path) as file, Reference([dmg.DMG(file)]) as reference:
        assert reference.pread(0, reference.size) == content


def test_what_lies_there_plain_is_read_where_it_lies(tmp_path: Path) -> None:
    content = disk()
    parts = [Part("whole", 0, SECTORS, cut(0, SECTORS, 512, (PLAIN, ZEROS, PLAIN, ZLIB)))]
    content[512 * SECTOR : 1024 * SECTOR] = bytes(512 * SECTOR)
    for at in range(512, SECTORS, 2048):
        content[at * SECTOR : (at + 512) * SECTOR] = bytes(len(content[at * SECTOR :][: 512 * 512]))
    path = tmp_path / "disk.dmg"
    make_dmg.make(path, bytes(content), parts, backwards=False)
    assert read(path) == content
    with HostFile(path) as file:
        image = dmg.DMG(file)
        kinds = [extent.kind for extent in extents(image, 0, image.size)]
        assert kinds[:4] == [Kind.DATA] * 4
        assert kinds[4:8] == [Kind.ZERO] * 4
        assert kinds[12:16] == [Kind.COMPRESSED] * 4
        # From the first packed chunk on nothing is at a multiple of 512 any more.
        assert set(kinds[16:20]) == {Kind.COMPRESSED}


def test_a_plain_part_of_4_gib(tmp_path: Path) -> None:
    """Longer than the entries of our tables."""
    sectors = (4 << 30) // SECTOR + 256
    path = tmp_path / "disk.dmg"
    row = make_dmg.struct.pack(">IIQQQQ", PLAIN, 0, 0, sectors, 0, sectors * SECTOR)
    table = make_dmg.table(0, sectors, 0, [row])
    xml = make_dmg.plist([table], ["whole"])
    with path.open("wb") as file:
        file.seek((4 << 30) + 17)
        file.write(b"here")
        file.seek(sectors * SECTOR)
        file.write(xml)
        file.write(make_dmg.trailer(0, sectors * SECTOR, sectors * SECTOR, len(xml), sectors))
    with virtmount.open(path) as opened:
        assert opened.pread((4 << 30) + 16, 6) == b"\0here\0"
        assert opened.pread((2 << 30) - 512, 1024) == bytes(1024)


def test_a_chunk_is_unpacked_once_however_many_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = disk()
    path = tmp_path / "disk.dmg"
    make_dmg.make(path, bytes(content), [Part("whole", 0, SECTORS, cut(0, SECTORS, 512, [ZLIB]))])
    unpacked: Counter[int] = Counter()
    unpack = dmg.DMG.unpack

    def counted(self: dmg.DMG, chunk: dmg.Chunk) -> bytes:
        unpacked[chunk.start] += 1
        return unpack(self, chunk)

    monkeypatch.setattr(dmg.DMG, "unpack", counted)
    with HostFile(path) as file:
        image = dmg.DMG(file)
        clusters = range(-(-image.size // image.cluster_size))
        wrong: list[int] = []

        def work(seed: int) -> None:
            for cluster in random.Random(seed).sample(clusters, len(clusters)):
                at = cluster * image.cluster_size
                wanted = bytes(content[at : at + image.cluster_size])
                if image.inflate(cluster) != wanted.ljust(image.cluster_size, b"\0"):
                    wrong.append(cluster)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert set(unpacked.values()) == {1}


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = disk()
    path = tmp_path / "disk.dmg"
    make_dmg.make(path, bytes(content), [Part("whole", 0, SECTORS, cut(0, SECTORS, 64, [ZLIB]))])
    monkeypatch.setattr(dmg.DMG, "cache", 100 * KIB)
    with HostFile(path) as file:
        image = dmg.DMG(file)
        for cluster in range(image.size // image.cluster_size):
            image.inflate(cluster)
            assert sum(map(len, image._cached.values())) <= 100 * KIB


# Refused


def test_known_by_its_end(tmp_path: Path) -> None:
    """Also where it begins with a stream of bzip2 or xz, which alone would be a packed file."""
    for method in (BZIP2, XZ):
        path = tmp_path / "disk.dmg"
        make_dmg.make(path, bytes(51200), [Part("whole", 0, 100, [Chunk(method, 0, 100)])])
        assert path.read_bytes()[:3] in (b"BZh", b"\xfd7z")
        with HostFile(path) as file:
            assert probe(file) is dmg.DMG


def test_a_raw_disk_that_ends_like_one_is_not_guessed(tmp_path: Path) -> None:
    """The guest of disk.img can write a trailer into its last sector."""
    path = tmp_path / "disk.img"
    make_dmg.make(path, bytes(51200), [Part("whole", 0, 100, [Chunk(ZLIB, 0, 100)])])
    with HostFile(path) as file, pytest.raises(NotAnImage, match="named like a raw disk"):
        probe(file)


def test_not_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "disk.dmg"
    make_dmg.make(path, bytes(51200), [Part("whole", 0, 100, [Chunk(PLAIN, 0, 100)])])
    before = path.read_bytes()
    with pytest.raises(Unsupported, match="only read"):
        virtmount.open(path, writable=True)
    assert path.read_bytes() == before


def test_an_encrypted_one_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "disk.dmg").write_bytes(b"encrcdsa".ljust(8192, b"\0"))
    with pytest.raises(Unsupported, match="encrypted DMG"):
        virtmount.open(tmp_path / "disk.dmg")


def test_lzfse_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.dmg"
    make_dmg.make(path, bytes(51200), [Part("whole", 0, 100, [Chunk(LZFSE, 0, 100)])])
    monkeypatch.setattr(dmg, "_lzfse", lambda: None)
    with pytest.raises(Unsupported, match="needs the Python package lzfse"):
        virtmount.open(path)


@pytest.mark.parametrize("method", [ADC, ZLIB, BZIP2, LZFSE, XZ])
@pytest.mark.parametrize("damage", ["short", "long", "noise"])
def test_a_damaged_chunk_is_an_error_of_its_clusters_only(
    method: int, damage: str, tmp_path: Path
) -> None:
    content = disk(sectors=1024)
    packed = make_dmg.PACKERS[method](bytes(content[: 512 * SECTOR]))
    if damage == "short":
        packed = packed[: len(packed) // 2]
    elif damage == "long" and method != ADC and method != LZFSE:
        packed = make_dmg.PACKERS[method](bytes(content[: 600 * SECTOR]))
    else:
        packed = random.Random(1).randbytes(len(packed))
    good = make_dmg.PACKERS[method](bytes(content[512 * SECTOR :]))
    rows = [
        make_dmg.struct.pack(">IIQQQQ", method, 0, 0, 512, 0, len(packed)),
        make_dmg.struct.pack(">IIQQQQ", method, 0, 512, 512, len(packed), len(good)),
    ]
    path = tmp_path / "disk.dmg"
    table = make_dmg.table(0, 1024, 0, rows)
    make_dmg.write(path, packed + good, [table], ["whole"], bytes(content))
    with HostFile(path) as file:
        image = dmg.DMG(file)
        with pytest.raises(Corrupt, match=rf"chunk at 0, {METHODS[method]}"):
            image.inflate(0)
        assert image.inflate(4) == content[512 * SECTOR :][: 64 * KIB]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 300])
def test_adc_copies_that_reach_into_themselves(step: int) -> None:
    data = bytes(random.Random(step).randbytes(step)) * (4000 // step)
    assert dmg.unpack_adc(make_dmg.pack_adc(data), len(data)) == data


def test_adc_from_before_its_beginning() -> None:
    with pytest.raises(ValueError, match="before its beginning"):
        dmg.unpack_adc(b"\x80a\x40\x00\x09", 5)
