from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus import bases


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base images."""
    made = tmp_path_factory.mktemp("bases")
    bases.make_all(made)
    return made
