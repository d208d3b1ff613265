from __future__ import annotations

import pytest

from tests.virtmount.toy import Toy
from virtmount import formats


@pytest.fixture
def toy_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy format is known, beside raw."""
    table = {"toy": f"{Toy.__module__}:Toy", "raw": formats.TABLE["raw"]}
    monkeypatch.setattr(formats, "TABLE", table)
