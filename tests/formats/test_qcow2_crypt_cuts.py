"""Power cuts of encrypted images: what was not flushed is old or new, and never noise."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import virtmount
from tests.crash.simulate import Log, SimulatedFile, Store
from tests.formats import luks_images
from tests.reference import Reference
from virtmount.formats import luks
from virtmount.formats.qcow2 import QCOW2
from virtmount.formats.qcow2_check import check
from virtmount.image import DEFAULTS, Options
from virtmount.upkeep import Finding, Repair, Severity

KIB = 1 << 10
SIZE, SECTOR = 96 * KIB, 512
RIGHT = Options(passphrase=luks_images.SECRET.encode)


def opened(store: Store, log: Log | None = None) -> Reference:
    file = SimulatedFile(store, name="image", writable=log is not None, log=log)
    return Reference([QCOW2(file, RIGHT)])


@pytest.mark.parametrize("cluster", ["4K", "512"])
def test_what_a_power_cut_leaves_is_no_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: str
) -> None:
    monkeypatch.setattr(luks, "NEW_ITERATIONS", 1)
    path = tmp_path / "a.qcow2"
    settings = {"encryption": "luks", "cluster_size": cluster}
    virtmount.create(path, SIZE, settings=settings, options=RIGHT)
    base = Store.load(path)
    log = Log(base)
    rng = random.Random(cluster)
    # Sector -> (event from which on it may be read, bytes), and the event of each flush.
    versions = {sector: [(0, bytes(SECTOR))] for sector in range(SIZE // SECTOR)}
    flushes = [0]
    with opened(base.copy(), log) as disk:
        for number in range(14):
            count = rng.choice((1, 3, 8, 20))
            first = rng.randrange(SIZE // SECTOR - count)
            started = len(log.events)
            if number % 5 == 4:
                disk.discard(first * SECTOR, count * SECTOR)
                data = disk.pread(first * SECTOR, count * SECTOR)
            else:
                data = rng.randbytes(count * SECTOR)
                disk.pwrite(first * SECTOR, data)
            for i in range(count):
                piece = data[i * SECTOR : (i + 1) * SECTOR]
                versions[first + i].append((started, piece))
            if number % 3 == 2:
                disk.flush()
                log.mark("flushed", flushed=True)
                flushes.append(len(log.events))
    states = 0
    for epoch in log.epochs():
        for cut in epoch.cuts(rng, torn_each=1, many=4):
            store = epoch.build(cut)
            flushed = max(at for at in flushes if at <= cut.at)
            content = opened(store).pread(0, SIZE)
            for sector, known in versions.items():
                kept = [i for i, (started, _) in enumerate(known) if started < flushed or not i]
                allowed = {piece for _, piece in known[kept[-1] :]}
                found = content[sector * SECTOR : (sector + 1) * SECTOR]
                assert found in allowed, (sector, epoch.describe(cut))
            file = SimulatedFile(store, name="image", writable=False)
            wrong = [
                item
                for item in check(file, DEFAULTS, Repair.NOTHING)
                if isinstance(item, Finding) and item.severity is Severity.DAMAGE
            ]
            assert not wrong, (wrong, epoch.describe(cut))
            states += 1
    assert states > 60
