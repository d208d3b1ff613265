"""Patches against a bytearray that is written to."""

from __future__ import annotations

import random

import pytest

from virtmount.patches import Patches

SIZE = 64


@pytest.mark.parametrize("seed", range(200))
def test_the_latest_patch_is_what_is_read(seed: int) -> None:
    rng = random.Random(seed)
    patches, expected = Patches(), bytearray(b"\xff" * SIZE)
    end = 0
    for _ in range(rng.randrange(12)):
        start = rng.randrange(SIZE)
        data = rng.randbytes(rng.randrange(SIZE - start + 1))
        if rng.random() < 0.4:
            data = bytes(len(data))
            patches.put_zeros(start, len(data))
        else:
            patches.put(start, data)
        expected[start : start + len(data)] = data
        end = max(end, start + len(data) if data else 0)
        low = rng.randrange(SIZE)
        high = rng.randrange(low, SIZE + 1)
        assert patches.applied(low, b"\xff" * (high - low)) == expected[low:high]
    assert patches.applied(0, b"\xff" * SIZE) == expected
    assert patches.end == end
    patches.clear()
    assert not patches
    assert patches.applied(0, b"\xff" * SIZE) == b"\xff" * SIZE


def test_zeros_cost_nothing() -> None:
    patches = Patches()
    patches.put_zeros(0, 1 << 47)
    patches.put(1 << 40, b"here")
    assert patches.applied((1 << 40) - 2, b"x" * 8) == b"\0\0here\0\0"
    assert patches.end == 1 << 47
