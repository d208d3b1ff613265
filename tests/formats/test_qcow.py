"""QCOW, version 1: what is peculiar to it.  What all formats have in common is in conformance."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.formats import luks_images
from tests.formats.qcow2_images import number, patch, run, u32, u64
from tests.reference import Reference
from virtmount.errors import Corrupt, Denied, NotAnImage, Unsupported, VirtmountError
from virtmount.formats.qcow import QCOW
from virtmount.formats.raw import Raw
from virtmount.hostfile import HostFile, execute
from virtmount.image import DEFAULTS, Image, Match, Options
from virtmount.plan import Plan
from virtmount.upkeep import Finding, New, Repair, Severity

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB + 3 * 512 + 100
ROUND = MIB + 4 * 512  # with the last sector


def qemu_io(path: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", "qcow", *words, path)
    assert "failed" not in said, said


def raw_of(path: Path) -> bytes:
    raw = path.with_name(path.name + ".oracle")
    run("qemu-img", "convert", "-f", "qcow", "-O", "raw", path, raw)
    return raw.read_bytes()


def content_of(path: Path, options: Options = DEFAULTS) -> bytes:
    with HostFile(path) as file, Reference([QCOW(file, options)]) as disk:
        return disk.pread(0, disk.size)


def create(path: Path, size: int, parent: Path | None = None, **options: str) -> Path:
    """With our own driver."""
    path.touch()
    with HostFile(path, writable=True) as file:
        above: Image | None = None
        if parent:
            above = Raw(HostFile(parent))
        new = New(
            [file],
            path.name,
            size,
            {name: options.get(name, choice.default) for name, choice in QCOW.choices.items()},
            lambda name: 0,
            parent=above,
            parent_name=parent.name if parent else "",
        )
        execute(QCOW.create(new), [file])
        if above:
            above.files[0].close()
    return path


def findings(path: Path, repair: Repair = Repair.NOTHING) -> list[Finding]:
    found = []
    with HostFile(path, writable=repair is not Repair.NOTHING) as file:
        for item in QCOW.check(file, DEFAULTS, repair):
            if isinstance(item, Finding):
                found.append(item)
            elif isinstance(item, Plan):
                execute(item, [file])
    return found


def scattered(path: Path, seed: int = 0) -> Path:
    """Made and written by qemu, in shuffled order, some of it compressed."""
    run("qemu-img", "create", "-q", "-f", "qcow", path, str(ROUND))
    rng = random.Random(seed)
    places = rng.sample(range(ROUND // 4096 - 4), 30)
    qemu_io(
        path,
        *(
            f"write -q {'-c ' * (i % 4 == 0)}-P {i + 1} {at * 4096} 4096"
            for i, at in enumerate(places)
        ),
    )
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return scattered(tmp_path / "a.qcow")


def l1_at(path: Path) -> int:
    return number(path, 40)


def l2_at(path: Path) -> int:
    return number(path, l1_at(path))


def entries(path: Path, *, packed: bool = False) -> list[int]:
    """Where the entries in use lie."""
    at = l2_at(path)
    found = [i for i in range(at, at + 4096, 8) if number(path, i)]
    return [i for i in found if number(path, i) >> 63 == packed]


def test_probe() -> None:
    assert QCOW.probe(b"QFI\xfb\0\0\0\1", b"", 48) is Match.SURE
    assert QCOW.probe(b"QFI\xfb\0\0\0\2", b"", 48) is Match.NO
    assert QCOW.probe(b"", b"", 0) is Match.NO


def test_reads_what_qemu_wrote(image: Path) -> None:
    assert content_of(image) == raw_of(image)
    assert entries(image, packed=True)
    assert findings(image) == []


def test_a_table_past_the_end_of_a_new_image_is_zeros(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow"
    run("qemu-img", "create", "-q", "-f", "qcow", path, "64M")
    with open(path, "r+b") as made:
        made.truncate(l1_at(path) + 8)  # as older ones did
    with HostFile(path, writable=True) as file, Reference([QCOW(file)]) as disk:
        assert disk.pread(50 * MIB, 512) == bytes(512)
        disk.pwrite(50 * MIB, b"here")
    assert raw_of(path)[50 * MIB : 50 * MIB + 5] == b"here\0"
    assert not [f for f in findings(path) if f.severity is not Severity.NOTE]


def test_qemu_reads_what_we_wrote(image: Path) -> None:
    rng = random.Random(3)
    with HostFile(image, writable=True) as file, Reference([QCOW(file)]) as disk:
        expected = bytearray(disk.pread(0, ROUND))
        for i in range(60):
            at = rng.randrange(ROUND - 9000)
            data = rng.randbytes(rng.choice((1, 512, 4096, 9000)))
            if i % 7 == 6:
                disk.discard(at, 40000 if at + 40000 < ROUND else 0)
                expected = bytearray(disk.pread(0, ROUND))
                continue
            disk.pwrite(at, data)
            expected[at : at + len(data)] = data
        disk.flush()
    assert content_of(image) == expected
    assert raw_of(image) == expected
    assert not [finding for finding in findings(image) if finding.severity is not Severity.NOTE]


def test_what_is_discarded_is_used_again(image: Path) -> None:
    with HostFile(image, writable=True) as file, Reference([QCOW(file)]) as disk:
        for i in range(20):
            disk.pwrite(600 * KIB, b"x" * 300 * KIB)
            disk.flush()
            if not i:
                size = image.stat().st_size
            disk.discard(600 * KIB, 300 * KIB)
        disk.flush()
    assert image.stat().st_size <= size
    assert raw_of(image)[600 * KIB : 900 * KIB] == bytes(300 * KIB)


@pytest.mark.parametrize("cluster", ["512", "4K", "64K"])
def test_copies_on_write_where_qemu_does_not(tmp_path: Path, cluster: str) -> None:
    """qemu's driver would make the rest of a larger cluster zeros."""
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(ROUND))
    path = create(tmp_path / "a.qcow", ROUND, base, cluster_size=cluster)
    expected = bytearray(base.read_bytes())
    with (
        HostFile(path, writable=True) as file,
        HostFile(base) as below,
        Reference([QCOW(file), Raw(below)]) as disk,
    ):
        assert disk.pread(0, ROUND) == expected
        for at in (0, 70 * KIB + 100, ROUND - 9):
            disk.pwrite(at, b"123456789")
            expected[at : at + 9] = b"123456789"
        disk.discard(0, 128 * KIB)
        assert disk.pread(0, ROUND) == expected, "no entry hides the parent's data"
    run("qemu-img", "rebase", "-u", "-F", "raw", "-b", "base.raw", path, allowed=(0, 1))
    assert raw_of(path) == expected


def test_a_small_cluster_is_the_default_over_a_parent(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(MIB))
    with HostFile(create(tmp_path / "a.qcow", MIB, base)) as file:
        assert QCOW(file).cluster_size == 512
    with HostFile(create(tmp_path / "b.qcow", MIB)) as file:
        assert QCOW(file).cluster_size == 4096


def test_holes_are_used_before_the_file_grows(image: Path) -> None:
    """Whatever a crash or another program left."""
    patch(image, entries(image)[2], u64(0))
    patch(image, entries(image)[5], u64(0))
    size = -(-image.stat().st_size // 4096) * 4096
    content = content_of(image)
    with HostFile(image, writable=True) as file, Reference([QCOW(file)]) as disk:
        place = next(at for at in range(0, ROUND, 4096) if not any(content[at : at + 4096]))
        disk.pwrite(place + 3, b"new")
    assert image.stat().st_size <= size
    assert raw_of(image) == content[: place + 3] + b"new" + content[place + 6 :]
    assert Severity.DAMAGE not in {finding.severity for finding in findings(image)}


# Encryption


def test_reads_what_qemu_encrypted(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow"
    secret = [*luks_images.OBJECT]
    options = "encrypt.format=aes,encrypt.key-secret=s"
    run("qemu-img", "create", "-q", *secret, "-f", "qcow", "-o", options, path, "1M")
    words = ["-c", "write -P 7 100k 50k", "-c", "write -P 8 1k 9k"]
    spec = luks_images.spec(path, "qcow")
    run("qemu-io", *secret, "--image-opts", *words, spec)
    right = Options(passphrase=luks_images.SECRET.encode)
    content = content_of(path, right)
    assert content == luks_images.raw_of(path, "qcow")
    assert content[100 * KIB : 150 * KIB] == b"\7" * 50 * KIB
    with pytest.raises(Denied, match="no passphrase"):
        content_of(path)
    with (
        HostFile(path, writable=True) as file,
        pytest.raises(Unsupported, match="writing to an encrypted image"),
    ):
        QCOW(file, right)


# Refused


@pytest.mark.parametrize(
    ("offset", "value", "error", "complaint"),
    [
        (0, b"QFI\xfc", NotAnImage, "header+0: no QCOW signature"),
        (4, u32(2), Unsupported, "header+4: version 2, know 1"),
        (8, u64(1 << 40) + u32(9), Corrupt, "header+8: parent's name at 1099511627776"),
        (8, u64(48) + u32(1 << 20), Corrupt, "header+16: parent's name of 1048576 bytes"),
        (24, u64(0), Corrupt, "header+24: a disk of 0 bytes"),
        (24, u64(1 << 63), Corrupt, "header+24: a disk of 9223372036854775808 bytes"),
        (24, u64(1 << 60), Unsupported, "header+24: an L1 table of 549755813888 entries"),
        (32, b"\x08", Corrupt, "header+32: cluster_bits 8, expected 9 to 16"),
        (32, b"\x11", Corrupt, "header+32: cluster_bits 17"),
        (33, b"\x05", Corrupt, "header+33: l2_bits 5, expected 6 to 13"),
        (33, b"\xff", Corrupt, "header+33: l2_bits 255"),
        (36, u32(2), Unsupported, "header+36: encryption method 2"),
        (40, u64(8), Corrupt, "header+40: L1 table at 8"),
        (40, u64(1 << 63), Corrupt, "header+40: L1 table at 9223372036854775808"),
    ],
)
def test_refuses(
    image: Path, offset: int, value: bytes, error: type[VirtmountError], complaint: str
) -> None:
    patch(image, offset, value)
    for writable in (False, True):
        with HostFile(image, writable=writable) as file, pytest.raises(error) as caught:
            QCOW(file)
        assert complaint in str(caught.value)


DAMAGE = {
    "a table past the end": lambda p: patch(p, l1_at(p), u64(1 << 40)),
    "a table in the header": lambda p: patch(p, l1_at(p), u64(8)),
    "data past the end": lambda p: patch(p, entries(p)[0], u64(1 << 40)),
    "data not at a cluster": lambda p: patch(p, entries(p)[0], u64(4096 + 512)),
    "data twice": lambda p: patch(p, entries(p)[0], u64(number(p, entries(p)[1]))),
    "data in its table": lambda p: patch(p, entries(p)[0], u64(l2_at(p) // 4096 * 4096)),
    "compressed data past the end": lambda p: patch(
        p, entries(p, packed=True)[0], u64(1 << 63 | 100 << 51 | 1 << 40)
    ),
    "compressed data of nothing": lambda p: patch(
        p, entries(p, packed=True)[0], u64(1 << 63 | 4096)
    ),
    "compressed data in a cluster": lambda p: patch(
        p, entries(p, packed=True)[0], u64(1 << 63 | 100 << 51 | number(p, entries(p)[0]))
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_not_written_to(image: Path, name: str) -> None:
    DAMAGE[name](image)
    before = image.read_bytes()
    found = findings(image)
    assert Severity.DAMAGE in {finding.severity for finding in found}
    assert not any(finding.repaired for finding in found)
    with HostFile(image, writable=True) as file, pytest.raises(Corrupt):
        QCOW(file)
    after = findings(image, Repair.ALL)
    assert [f for f in after if f.severity is Severity.DAMAGE and f.repaired] == []
    if "past the end" in name or "not at" in name or "of nothing" in name:
        assert image.read_bytes() == before, "what seems unused may be its own"


def test_what_nothing_uses_is_given_back(image: Path) -> None:
    size = -(-image.stat().st_size // 4096) * 4096
    gone = number(image, entries(image)[2])
    patch(image, entries(image)[2], u64(0))
    with open(image, "r+b") as file:
        file.truncate(size + MIB)
    content = content_of(image)
    found = findings(image)
    assert [finding.severity for finding in found] == [Severity.LEAK, Severity.NOTE]
    assert found[1].place == f"byte {gone}"
    assert findings(image, Repair.LEAKS)[0].repaired
    assert image.stat().st_size == size
    assert image.read_bytes()[gone : gone + 4096] == bytes(4096)
    assert content_of(image) == content
    assert [finding.severity for finding in findings(image)] == [Severity.NOTE]


# Making and changing


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (1, {}),
        (SIZE, {}),
        (5 << 30, {}),
        (64 * MIB, {"cluster_size": "64k"}),
        (SIZE, {"cluster_size": "512"}),
    ],
)
def test_qemu_reads_and_writes_a_new_image(
    tmp_path: Path, size: int, options: dict[str, str]
) -> None:
    path = create(tmp_path / "a.qcow", size, **options)
    assert findings(path) == []
    with HostFile(path) as file:
        assert QCOW(file).size == size
    last = max(0, size - 512) // 512 * 512
    if size >= 512:
        qemu_io(path, f"write -P 5 {last} 512")
        with HostFile(path) as file, Reference([QCOW(file)]) as disk:
            assert disk.pread(last, 512) == b"\5" * 512
    assert findings(path) == []


@pytest.mark.parametrize("value", ["256", "128K", "3K", "x", "0"])
def test_refuses_cluster_sizes(tmp_path: Path, value: str) -> None:
    with pytest.raises(Unsupported, match="know powers of two from 512 to 64K"):
        create(tmp_path / "a.qcow", MIB, cluster_size=value)


def test_refuses_sizes(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="the L1 table has at most"):
        create(tmp_path / "a.qcow", 1 << 60)


@pytest.mark.parametrize("size", [ROUND, 3 * MIB, 90 * MIB])
def test_growing(image: Path, size: int) -> None:
    content = raw_of(image)
    with HostFile(image, writable=True) as file:
        execute(QCOW(file).resize(size), [file])
    with HostFile(image, writable=True) as file, Reference([QCOW(file)]) as disk:
        assert disk.size == size
        assert disk.pread(0, ROUND) == content
        disk.pwrite(size - 512, b"z" * 512)
    assert raw_of(image)[size - 512 :] == b"z" * 512
    assert not [f for f in findings(image) if f.severity is not Severity.NOTE]


def test_not_smaller_and_not_over_a_parent(image: Path, tmp_path: Path) -> None:
    with HostFile(image, writable=True) as file, pytest.raises(Unsupported, match="smaller"):
        QCOW(file).resize(512)
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(MIB))
    path = create(tmp_path / "b.qcow", MIB, base)
    with HostFile(path, writable=True) as file, pytest.raises(Unsupported, match="parent's data"):
        QCOW(file).resize(2 * MIB)


def test_another_parent(tmp_path: Path) -> None:
    for name, byte in (("one.raw", b"1"), ("two-with-a-longer-name.raw", b"2")):
        (tmp_path / name).write_bytes(byte * MIB)
    path = create(tmp_path / "a.qcow", MIB, tmp_path / "one.raw")
    assert names(path) == ("one.raw",)
    with HostFile(path, writable=True) as file, HostFile(tmp_path / "one.raw") as below:
        execute(QCOW(file).rebase(Raw(below), "two-with-a-longer-name.raw"), [file])
    assert names(path) == ("two-with-a-longer-name.raw",)
    assert raw_of(path) == b"2" * MIB
    assert not findings(path)
    with HostFile(path, writable=True) as file:
        execute(QCOW(file).rebase(None, ""), [file])
    assert names(path) == ()
    assert raw_of(path) == bytes(MIB)


def names(path: Path) -> Sequence[str]:
    with HostFile(path) as file:
        parent = QCOW(file).parent
        return parent.names if parent else ()


def test_details(image: Path) -> None:
    with HostFile(image) as file:
        assert QCOW(file).details() == {
            "version": 1,
            "cluster_size": 4096,
            "l2_entries": 512,
            "encryption": None,
            "backing_file": None,
        }


def test_a_parent_is_no_url(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow", MIB)
    patch(path, 48, b"nbd:unix:/tmp/x")
    patch(path, 8, u64(48) + u32(15))
    patch(path, 40, u64(64))
    with HostFile(path) as file, pytest.raises(Unsupported, match="not a local file"):
        QCOW(file)


def test_a_killed_qemu_leaves_what_we_write_on(image: Path) -> None:
    words = ["-c", "write -P 9 500k 200k", "-c", "sigraise 9"]
    subprocess.run(["qemu-io", "-f", "qcow", *words, image], capture_output=True, check=False)
    content = raw_of(image)
    with HostFile(image, writable=True) as file, Reference([QCOW(file)]) as disk:
        assert disk.pread(0, ROUND) == content
        disk.pwrite(0, b"on")
    assert raw_of(image) == b"on" + content[2:]
