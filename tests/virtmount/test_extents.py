"""The map of random chains, sector by sector, against the slow reference."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from tests.reference import Reference
from tests.virtmount.chains import make_chain
from virtmount import extents
from virtmount.chain import open_chain
from virtmount.extents import Mapped
from virtmount.image import Kind

pytestmark = pytest.mark.usefixtures("toy_format")
SECTOR = 512


@pytest.mark.parametrize("seed", range(30))
def test_the_map_is_what_the_reference_resolves(tmp_path: Path, seed: int) -> None:
    chain = open_chain(make_chain(tmp_path, random.Random(seed)))
    mapped = list(extents.mapped(chain))
    expected: dict[int, tuple[int, Kind, int, int]] = {}
    with Reference(chain.images) as oracle:
        for layer, extent in oracle.extents(0, oracle.size):
            for at in range(0, extent.length, SECTOR):
                host = extent.host_offset + at if extent.kind in extents.HAS_OFFSET else -1
                expected[extent.guest_offset + at] = (layer, extent.kind, host, extent.file)
        end = 0
        for item in mapped:
            assert item.start == end
            end += item.length
            for at in range(0, item.length, SECTOR):
                layer, kind, host, file = expected.pop(item.start + at)
                assert item.zero == (kind is Kind.ZERO) or chain.images[layer].flat is not None
                assert item.compressed == (kind is Kind.COMPRESSED)
                assert item.invalid == (kind is Kind.INVALID)
                if item.offset is not None:
                    assert (item.offset + at, item.file) == (host, file)
                if item.present:
                    assert item.depth == layer
                assert (item.offset is None) == (kind not in extents.HAS_OFFSET)
        assert not expected
    assert not any(second.continues(first) for first, second in pairwise(mapped))
    chain.close()


@pytest.mark.parametrize(
    ("change", "merges"),
    [
        ({}, True),
        ({"offset": 4096}, False),
        ({"offset": None}, False),
        ({"depth": 1}, False),
        ({"zero": True}, False),
        ({"start": 1024, "offset": 1024}, False),
        ({"file": 1}, False),
    ],
)
def test_only_what_belongs_together_is_merged(change: dict[str, int], merges: bool) -> None:
    first = Mapped(0, 512, 0, True, False, True, offset=0)
    second = Mapped(512, 512, 0, True, False, True, offset=512)._replace(**change)  # type: ignore[arg-type]
    assert second.continues(first) is merges
