"""Which tests may run beside each other: see `make test-host`."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For pytest-xdist: one worker has all that attaches devices, one all C programs.

    The first share the kernel's devices and their names, the second what they compile.
    """
    for item in items:
        if item.get_closest_marker("device"):
            item.add_marker(pytest.mark.xdist_group("device"))
        elif TESTS / "native" in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("native"))
