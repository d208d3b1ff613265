"""Random changes to the headers and tables of small images come to nothing worse than an error.

VIRTMOUNT_FLIPS=5000 tries so many of each format, VIRTMOUNT_SEED=7 others than those of every run.
A case is its name: pytest -k does not find it, but flips.case() makes it again.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.corpus import flips
from tests.corpus.judge import Answer, judge

COUNT = int(os.environ.get("VIRTMOUNT_FLIPS", "30"))
SEED = os.environ.get("VIRTMOUNT_SEED", "0")


def names(format: str) -> list[str]:
    return [f"{format}:{SEED}:{number}" for number in range(COUNT)]


@pytest.fixture(scope="module")
def answers(folder: Path, request: pytest.FixtureRequest) -> dict[str, Answer]:
    """Of all the formats that this run asks for."""
    formats = [
        str(item.callspec.params["format"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module
    ]
    return judge(folder, "flip", [name for format in formats for name in names(format)])


@pytest.mark.timeout(120 + COUNT * len(flips.FORMATS))  # the first one waits for all
@pytest.mark.parametrize("format", flips.FORMATS)
def test_random_changes(format: str, answers: dict[str, Answer]) -> None:
    wrong: dict[str, object] = {}
    for name in names(format):
        answer = answers[name]
        if answer.died:
            wrong[name] = answer.died
        elif found := [*answer.read["wrong"], *answer.write["wrong"]]:
            wrong[name] = found
    assert not wrong
    # Most of them must get past the first check, or nothing is tried.
    opened = sum(not answers[name].read["error"] for name in names(format))
    assert opened > COUNT // 10
