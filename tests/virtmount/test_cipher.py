"""Encrypted images, and images whose new clusters lie at their guest offset, through the engine.

The oracle is a model of the disk, and the host file decrypted by another library's binding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher as Aes
from cryptography.hazmat.primitives.ciphers import algorithms, modes

from tests.virtmount.test_pager import Served
from tests.virtmount.toy import INVALID, TABLE, Toy, make_toy
from virtmount import formats
from virtmount.engine import Config, Engine, Op
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Cipher, Options
from virtmount.plan import Barrier, Plan, Punch
from virtmount.siblings import open_sibling

KIB = 1 << 10
SIZE = 130 * KIB + 512
KEY = bytes(range(64))
PRESENT = 1 << 62  # so that offset 0 is told from ABSENT
OFFSET = PRESENT - 512


class Locked(Toy):
    cipher = Cipher("xts", KEY)

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        super().__init__(file, options)
        settings = dict(self.header["cipher"])
        self.cipher = Cipher(settings.pop("mode"), bytes.fromhex(settings.pop("key")), **settings)


class Beside(Toy):
    """Clusters in a second file."""

    identity_file = 1

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        super().__init__(file, options)
        assert self.layout is not None
        self.layout = dataclasses.replace(self.layout, mask=OFFSET, low=0)
        self.files.append(open_sibling(file, "data", "data", options))

    def leaf(self, index: int):  # type: ignore[no-untyped-def]
        leaf = super().leaf(index)
        return type(leaf)(table=leaf.table, data_file=1)

    def metadata(self):  # type: ignore[no-untyped-def]
        return ()

    def begin(self) -> Plan:
        return super().begin() + Plan(Punch(0, self.size, 1), Barrier)

    def entry(self, cluster: int, value: int):  # type: ignore[no-untyped-def]
        assert value in (1, cluster * self.cluster_size)  # ZERO, or where it belongs
        return super().entry(cluster, value if value == 1 else value | PRESENT)

    def discard(self, first: int, count: int) -> Plan:
        plan = super().discard(first, count)
        self.reused.clear()
        length = count * self.cluster_size
        return Plan(*(step for step in plan if not isinstance(step, Punch))) + Plan(
            Punch(first * self.cluster_size, length, 1)
        )


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "locked": f"{__name__}:Locked",
        "beside": f"{__name__}:Beside",
        "raw": formats.TABLE["raw"],
    }
    monkeypatch.setattr(formats, "TABLE", table)


def exercise(served: Served, rng: random.Random, model: bytearray) -> None:
    for _ in range(120):
        start = rng.randrange(0, SIZE, 512)
        length = min(rng.choice([512, 1024, 4096, 20 * KIB]), SIZE - start)
        match rng.choice("wwwwrrzdf"):
            case "w":
                data = rng.randbytes(length)
                served.engine.write(start, data)
                model[start : start + length] = data
            case "r":
                assert served.engine.read(start, length) == model[start : start + length]
            case "z":
                served.engine.io(Op.WRITE_ZEROES, start, length)
                model[start : start + length] = bytes(length)
            case "d":
                served.engine.io(Op.DISCARD, start, length)
                model[start : start + length] = served.engine.read(start, length)
            case "f":
                served.engine.io(Op.FLUSH)
    assert served.engine.read(0, SIZE) == model


def decrypted(cipher: Cipher, raw: bytes, host: int, guest: int) -> bytes:
    number = (guest if cipher.by_guest else host - cipher.origin) // 512
    result = b""
    for at in range(0, len(raw), 512):
        vector = (number + at // 512).to_bytes(8, "little") + bytes(8)
        if cipher.essiv:
            key = hashlib.sha256(cipher.key).digest()
            vector = Aes(algorithms.AES(key), modes.ECB()).encryptor().update(vector)
        mode = modes.XTS(vector) if cipher.mode == "xts" else modes.CBC(vector)
        result += Aes(algorithms.AES(cipher.key), mode).decryptor().update(raw[at : at + 512])
    return result


CIPHERS = [
    {"mode": "xts", "key": KEY.hex()},
    {"mode": "xts", "key": KEY[:32].hex(), "origin": 4096},
    {"mode": "cbc", "key": KEY[:16].hex(), "by_guest": True},
    {"mode": "cbc", "key": KEY[:32].hex(), "essiv": True},
]


@pytest.mark.parametrize("settings", CIPHERS, ids=str)
@pytest.mark.parametrize("parent", [False, True])
def test_encrypted_on_the_host_and_plain_in_the_guest(
    tmp_path: Path, settings: dict[str, object], parent: bool
) -> None:
    rng = random.Random(5)
    model = bytearray(rng.randbytes(SIZE - 40 * KIB) if parent else b"").ljust(SIZE, b"\0")
    header: dict[str, object] = {"cipher": settings}
    if parent:
        (tmp_path / "base").write_bytes(model[: SIZE - 40 * KIB])
        header |= {"parents": ["base"], "parent_format": "raw"}
    path = make_toy(tmp_path / "toy", SIZE, {}, cluster=8 * KIB, grain=8 * KIB, **header)
    with monkey_format("locked"), Served(path) as served:
        image: Locked = served.image  # type: ignore[assignment]
        exercise(served, rng, model)
    written = 0
    data = path.read_bytes()
    for cluster in range(image.clusters):
        entry = int.from_bytes(data[TABLE + cluster * 8 : TABLE + cluster * 8 + 8], "little")
        if entry <= INVALID:
            continue
        guest = cluster * 8 * KIB
        raw = data[entry : entry + 8 * KIB]
        wanted = bytes(model[guest : guest + 8 * KIB])
        assert decrypted(image.cipher, raw, entry, guest)[: len(wanted)] == wanted
        assert not any(wanted) or wanted[:512] != raw[:512]
        written += 1
    assert written > 5


@contextlib.contextmanager
def monkey_format(name: str) -> Iterator[None]:
    """The probe finds this driver."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "probe", lambda file: formats.load(name))
        yield


@pytest.mark.parametrize("seed", range(4))
def test_new_clusters_lie_at_their_guest_offset(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = make_toy(tmp_path / "toy", SIZE, {}, cluster=8 * KIB, grain=8 * KIB)
    (tmp_path / "data").write_bytes(b"left over" * 9999)
    model = bytearray(SIZE)
    with monkey_format("beside"), Served(path) as served:
        exercise(served, rng, model)
        assert served.engine.stats()["faults"]["refill"] == 0
    data = (tmp_path / "data").read_bytes().ljust(SIZE, b"\0")
    assert data[:SIZE] == model
    with monkey_format("beside"), Served(path, writable=False) as served:
        assert served.engine.read(0, SIZE) == model


@pytest.mark.parametrize(
    "cipher",
    [
        Cipher("xts", KEY[:16]),
        Cipher("cbc", KEY[:64]),
        Cipher("xts", bytes(64)),
        Cipher("cbc", b""),
    ],
)
def test_refuses_keys_that_the_mode_cannot_have(tmp_path: Path, cipher: Cipher) -> None:
    engine = Engine(Config(1 << 20, 16, 16, 4096))
    try:
        with open(tmp_path / "file", "w+b") as file:
            number = engine.add_file(file.fileno(), owned=True)
            with pytest.raises(OSError, match="Invalid argument"):
                engine.set_cipher(number, cipher)
    finally:
        engine.close()
