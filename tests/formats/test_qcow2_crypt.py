"""Encrypted QCOW2 images: what qemu encrypts we read, what we encrypt qemu reads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import virtmount
from tests.formats import luks_images, qcow2_images
from tests.formats.qcow2_images import number, patch, u32, u64
from tests.reference import Reference
from virtmount.errors import Corrupt, Denied, Unsupported, VirtmountError
from virtmount.formats import luks
from virtmount.formats.qcow2 import QCOW2
from virtmount.hostfile import HostFile
from virtmount.image import Cipher, Dirty, Options
from virtmount.plan import Barrier

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB + 5 * 512
RIGHT = Options(passphrase=luks_images.SECRET.encode)

# Headers that we make, because it takes qemu ten seconds to make one.
HEADERS: dict[str, dict[str, Any]] = {
    "small": {"mode": "cbc-plain", "key_length": 16, "digest": "sha1"},
    "xts-128": {"mode": "xts-plain64", "key_length": 32, "digest": "sha512"},
    "essiv": {"mode": "cbc-essiv:sha256", "key_length": 32},
}
LEGACY: dict[str, tuple[str, ...]] = {
    "legacy": ("cluster_size=4k",),
    "legacy-v2": ("compat=0.10", "cluster_size=64k"),
}
VARIANTS = ("default", *HEADERS, *LEGACY)


def create(path: Path, name: str) -> Path:
    if name == "default":
        return luks_images.create(path, SIZE)
    if name in LEGACY:
        return luks_images.create(path, SIZE, *LEGACY[name], method="aes")
    header, _ = luks.make(luks_images.SECRET.encode(), iterations=1000, **HEADERS[name])
    return luks_images.create_with(path, SIZE, header)


@contextmanager
def opened(path: Path, options: Options = RIGHT, *, writable: bool = False) -> Iterator[Reference]:
    with HostFile(path, writable=writable) as file, Reference([QCOW2(file, options)]) as disk:
        yield disk


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One image of each variant, written by qemu in shuffled order."""
    folder = tmp_path_factory.mktemp("encrypted")
    paths = {}
    for name in VARIANTS:
        path = create(folder / f"{name}.qcow2", name)
        rng = random.Random(name)
        places = rng.sample(range(SIZE // 512 - 8), 20)
        luks_images.qemu_io(
            path,
            *(
                f"write -q -P {i + 1} {at * 512} {rng.randrange(1, 9) * 512}"
                for i, at in enumerate(places)
            ),
            "write -q -z 300k 70k",
        )
        paths[name] = path
    return paths


@pytest.mark.parametrize("name", VARIANTS)
def test_reads_what_qemu_wrote(made: dict[str, Path], name: str) -> None:
    with opened(made[name]) as disk:
        assert disk.pread(0, SIZE) == luks_images.raw_of(made[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_qemu_reads_what_we_wrote(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(made[name].read_bytes())
    rng = random.Random(name)
    with opened(path, writable=True) as disk:
        expected = bytearray(disk.pread(0, SIZE))
        for _ in range(30):
            at = rng.randrange(SIZE // 512 - 200) * 512
            data = rng.randbytes(rng.choice((512, 1536, 9 * KIB, 70 * KIB)))
            disk.pwrite(at, data)
            expected[at : at + len(data)] = data
        disk.discard(128 * KIB, 64 * KIB)
        expected[128 * KIB : 192 * KIB] = bytes(64 * KIB)
        disk.flush()
        assert disk.pread(0, SIZE) == expected
    assert luks_images.raw_of(path) == expected
    luks_images.check(path)


def test_nothing_of_the_guest_is_in_the_file(tmp_path: Path) -> None:
    path = luks_images.create(tmp_path / "a.qcow2", SIZE)
    with opened(path, writable=True) as disk:
        disk.pwrite(100 * KIB, b"plain words " * 1000)
    raw = path.read_bytes()
    assert b"plain words" not in raw
    # The rest of the cluster is encrypted zeros, not zeros.
    with HostFile(path) as file:
        image = QCOW2(file, RIGHT)
        leaf = image.leaf(0)
        assert leaf.table is not None
        host = number(path, leaf.table + 8) & 0x00FFFFFFFFFFFE00
    cluster = raw[host : host + 64 * KIB]
    assert len(cluster) == 64 * KIB
    assert cluster.count(0) < 1024


def test_the_passphrase_is_asked_for_once_and_only_where_needed(
    made: dict[str, Path], tmp_path: Path
) -> None:
    asked = []

    def passphrase() -> bytes:
        asked.append(1)
        return luks_images.SECRET.encode()

    with opened(made["default"], Options(passphrase=passphrase)):
        assert asked == [1]
    plain = qcow2_images.create(tmp_path / "plain.qcow2", SIZE)
    with opened(plain, Options(passphrase=passphrase)):
        assert asked == [1]


@pytest.mark.parametrize("name", ["default", "legacy"])
def test_no_passphrase(made: dict[str, Path], name: str) -> None:
    with pytest.raises(Denied, match="no passphrase") as caught, opened(made[name], Options()):
        pass
    assert caught.value.hint == "--passphrase-file FILE"
    # What describes it can do without.
    found = virtmount.inspect(made[name])
    assert found.details["encryption"]
    assert found.size > 0
    assert virtmount.snapshots(made[name]) == []


def test_the_wrong_passphrase(made: dict[str, Path]) -> None:
    wrong = Options(passphrase=lambda: b"geheim ")
    with pytest.raises(Denied, match="no key slot opens"), opened(made["default"], wrong):
        pass


def test_any_of_the_slots_opens(made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(made["default"].read_bytes())
    luks_images.add_slot(path, "second")
    with opened(path, Options(passphrase=lambda: b"second")) as disk:
        assert disk.pread(0, SIZE) == luks_images.raw_of(path)


@pytest.mark.parametrize("name", ["default", "essiv", "legacy"])
def test_the_engine_reads_and_writes_the_same(
    made: dict[str, Path], tmp_path: Path, name: str
) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(made[name].read_bytes())
    with virtmount.open(path, "qcow2", writable=True, options=RIGHT) as disk:
        expected = bytearray(luks_images.raw_of(made[name]))
        assert disk.pread(0, SIZE) == expected
        for at, length in ((0, 512), (200 * KIB, 80 * KIB), (700 * KIB + 512, 3 * 512)):
            disk.pwrite(at, b"\xa5" * length)
            expected[at : at + length] = b"\xa5" * length
        disk.flush()
        assert disk.pread(0, SIZE) == expected
    assert luks_images.raw_of(path) == expected


# Hostile headers


def luks_at(path: Path) -> int:
    """Where the LUKS header lies: the extension is the first of all."""
    raw = path.read_bytes()[:4096]
    at = raw.index(u32(0x0537BE77))
    return int.from_bytes(raw[at + 8 : at + 16], "big")


def extension_at(path: Path) -> int:
    return path.read_bytes()[:4096].index(u32(0x0537BE77)) + 8


@pytest.mark.parametrize(
    ("field", "value", "error", "complaint"),
    [
        (0, b"SKUL", Corrupt, "no LUKS signature"),
        (6, b"\0\2", Unsupported, "LUKS version 2, know 1"),
        (8, b"serpent\0", Unsupported, "cipher 'serpent', know aes"),
        (40, b"xts-benbi\0", Unsupported, "cipher mode 'xts-benbi'"),
        (40, b"ecb\0", Unsupported, "cipher mode 'ecb'"),
        (72, b"whirlpool\0", Unsupported, "hash 'whirlpool'"),
        (108, u32(48), Unsupported, "keys of 48 bytes"),
        (108, u32(1 << 30), Unsupported, "keys of 1073741824 bytes"),
        (164, u32(0xFFFFFFFF), Corrupt, "4294967295 iterations"),
        (164, u32(0), Corrupt, "0 iterations"),
        (208, u32(7), Corrupt, "key slot 0: state 0x7"),
        (212, u32(0xFFFFFFFF), Corrupt, "4294967295 iterations for key slot 0"),
        (248, u32(0xFFFFFF), Corrupt, "key slot 0: 256000 bytes at 8589934080"),
        (248, u32(0), Corrupt, "key slot 0: 256000 bytes at 0"),
        (252, u32(0), Corrupt, "0 stripes"),
        (252, u32(0xFFFFFFFF), Corrupt, "4294967295 stripes"),
        (208, u32(0xDEAD), Denied, "no key slot opens"),
    ],
)
def test_refuses_headers(
    made: dict[str, Path],
    tmp_path: Path,
    field: int,
    value: bytes,
    error: type[VirtmountError],
    complaint: str,
) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(made["default"].read_bytes())
    patch(path, luks_at(path) + field, value)
    with pytest.raises(error, match=complaint), opened(path):
        pass


@pytest.mark.parametrize(
    ("at", "value", "complaint"),
    [
        (0, u64(0), "not at a cluster of its own"),
        (0, u64(513), "not at a cluster of its own"),
        (0, u64(1 << 60), "the file ends at"),
        (8, u64(1 << 60), "the file ends at"),
        (8, u64(100), "LUKS header of 100 bytes"),
        (-8, u32(0x0537BE78), "no place of the LUKS header"),
    ],
)
def test_refuses_places(
    made: dict[str, Path], tmp_path: Path, at: int, value: bytes, complaint: str
) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(made["default"].read_bytes())
    patch(path, extension_at(path) + at, value)
    with pytest.raises(Corrupt, match=complaint), opened(path):
        pass


def test_refuses_unknown_methods(made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(made["default"].read_bytes())
    patch(path, 32, u32(3))
    with pytest.raises(Unsupported, match="encryption method 3"), opened(path):
        pass


def test_guest_data_in_the_luks_header_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(made["default"].read_bytes())
    with HostFile(path) as file:
        table = QCOW2(file, RIGHT).leaf(0).table
    assert table is not None
    patch(path, table, u64(1 << 63 | luks_at(path)))
    with opened(path) as disk, pytest.raises(OSError, match="no valid host offset"):
        disk.pread(0, 512)


# The header that we make


def test_the_header_that_we_make_opens(tmp_path: Path) -> None:
    raw, cipher = luks.make(b"geheim", iterations=1000)
    path = tmp_path / "header"
    path.write_bytes(bytes(512) + raw)
    with HostFile(path) as file:
        assert luks.unlock(file, 512, len(raw), RIGHT) == cipher
        with pytest.raises(Denied):
            luks.unlock(file, 512, len(raw), Options(passphrase=lambda: b"else"))


def test_qemu_opens_the_header_that_we_make(tmp_path: Path) -> None:
    """As a LUKS volume by itself, which is the same header with the data behind it."""
    raw, cipher = luks.make(b"geheim", iterations=1000)
    data = random.Random(1).randbytes(64 * KIB)
    path = tmp_path / "volume"
    path.write_bytes(raw + luks.crypt(cipher, encrypt=True)(0, data))
    assert luks_images.volume(path) == data


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(Cipher("xts", b"secret" * 6))


def test_encrypted_clusters_of_a_data_file_are_durable_before_they_are_mapped(
    made: dict[str, Path], tmp_path: Path
) -> None:
    """Else a power cut leaves noise in the rest of the cluster, where there were zeros."""
    data = tmp_path / "data"
    path = luks_images.create(
        tmp_path / "a.qcow2", SIZE, f"data_file={data}", "cluster_size=4k", method="aes"
    )
    data.write_bytes(bytes(SIZE // 4096 * 4096 + 4096))
    with HostFile(path, writable=True) as file:
        image = QCOW2(file, RIGHT)
        image.begin()
        plan = image.commit([Dirty(5, 5 * 4096, barrier=False)])
        assert plan.steps[0] is Barrier
        for other in image.files[1:]:
            other.close()


def test_the_work_of_all_slots_is_bounded(tmp_path: Path) -> None:
    raw, _ = luks.make(b"geheim", iterations=1000)
    header = bytearray(raw)
    for slot in range(8):
        at = 208 + 48 * slot
        header[at : at + 8] = u32(0x00AC71F3) + u32(luks.MAX_ITERATIONS)
        header[at + 40 : at + 48] = header[248:256]
    path = tmp_path / "header"
    path.write_bytes(header)
    with HostFile(path) as file, pytest.raises(Corrupt, match="67108864 in all"):
        luks.unlock(file, 0, len(raw), RIGHT)


# Images that we make


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two million rounds take a second, several times a test."""
    monkeypatch.setattr(luks, "NEW_ITERATIONS", 2000)


@pytest.mark.parametrize("settings", [{}, {"cluster_size": "512"}, {"extended_l2": "on"}])
def test_qemu_reads_and_writes_what_we_make(
    tmp_path: Path, quick: None, settings: dict[str, str]
) -> None:
    path = tmp_path / "a.qcow2"
    virtmount.create(path, SIZE, settings={"encryption": "luks", **settings}, options=RIGHT)
    luks_images.check(path)
    luks_images.qemu_io(path, "write -q -P 7 100k 50k")
    with opened(path, writable=True) as disk:
        assert disk.pread(100 * KIB, 50 * KIB) == b"\7" * 50 * KIB
        disk.pwrite(SIZE - 9, b"our words")
    expected = bytearray(SIZE)
    expected[100 * KIB : 150 * KIB] = b"\7" * 50 * KIB
    expected[-9:] = b"our words"
    assert luks_images.raw_of(path) == expected
    luks_images.check(path)
    assert virtmount.check(path, options=RIGHT).exit_code == 0
    with pytest.raises(Denied), opened(path, Options(passphrase=lambda: b"other")):
        pass


def test_converting_to_an_encrypted_image(tmp_path: Path, quick: None) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.qcow2"
    content = random.Random(9).randbytes(300 * KIB) + bytes(MIB - 300 * KIB)
    source.write_bytes(content)
    virtmount.convert(source, target, "qcow2", settings={"encryption": "luks"}, options=RIGHT)
    assert luks_images.raw_of(target) == content
    assert content[:512] not in target.read_bytes()


@pytest.mark.parametrize(
    ("settings", "options", "error", "complaint"),
    [
        ({"encryption": "aes"}, RIGHT, Unsupported, "encryption: 'aes': know off and luks"),
        ({"encryption": "luks"}, Options(), Denied, "no passphrase"),
        ({"encryption": "luks", "compat": "0.10"}, RIGHT, Unsupported, "version 2"),
        ({"encryption": "luks", "data_file": "d"}, RIGHT, Unsupported, "data files are not made"),
        (
            {"encryption": "luks", "preallocation": "metadata"},
            RIGHT,
            Unsupported,
            "does not read as zeros",
        ),
    ],
)
def test_refuses_to_make(
    tmp_path: Path,
    settings: dict[str, str],
    options: Options,
    error: type[VirtmountError],
    complaint: str,
) -> None:
    path = tmp_path / "a.qcow2"
    with pytest.raises(error, match=complaint):
        virtmount.create(path, MIB, settings=settings, options=options)
    assert not path.exists()


def test_compressed_clusters_are_not_encrypted_so_there_are_none(tmp_path: Path) -> None:
    source = tmp_path / "a.raw"
    source.write_bytes(bytes(MIB))
    with pytest.raises(Unsupported, match="compressed clusters are never encrypted"):
        virtmount.convert(
            source,
            tmp_path / "b.qcow2",
            "qcow2",
            settings={"encryption": "luks"},
            compress=True,
            options=RIGHT,
        )
