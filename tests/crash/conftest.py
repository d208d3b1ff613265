"""Where the states of the crash tests are written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where the machine has such a place: the files are many and large."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="virtmount-crash-", dir=memory) as name:
        yield Path(name)
