"""Random changes to the headers and tables of small images come to nothing worse than an error.

VIRTMOUNT_FLIPS=5000 tries so many of each format, VIRTMOUNT_SEED=7 others than those of every run.
A case is its name: pytest -k does not find it, but flips.case() makes it again.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.corpus import flips
from tests.corpus.judge import judge

COUNT = int(os.environ.get("VIRTMOUNT_FLIPS", "100"))
SEED = os.environ.get("VIRTMOUNT_SEED", "0")


@pytest.mark.timeout(60 + COUNT)
@pytest.mark.parametrize("format", flips.FORMATS)
def test_random_changes(format: str, folder: Path) -> None:
    names = [f"{format}:{SEED}:{number}" for number in range(COUNT)]
    answers = judge(folder, "flip", names)
    wrong: dict[str, object] = {}
    for name in names:
        answer = answers[name]
        if answer.died:
            wrong[name] = answer.died
        elif found := [*answer.read["wrong"], *answer.write["wrong"]]:
            wrong[name] = found
    assert not wrong
    # Most of them must get past the first check, or nothing is tried.
    opened = sum(not answers[name].read["error"] for name in names)
    assert opened > len(names) // 10
