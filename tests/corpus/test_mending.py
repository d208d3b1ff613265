"""Hostile images are checked and mended without making anything worse (mending.py says what).

Every run tries a part of the named mutations and some random changes; VIRTMOUNT_CORPUS=full tries
all mutations, VIRTMOUNT_FLIPS=5000 so many random changes of each format.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tests.corpus import bases, mutations
from tests.corpus.mending import checked

PART = 1 if mutations.PART == 1 else 40
COUNT = int(os.environ.get("VIRTMOUNT_FLIPS", "5"))
SEED = os.environ.get("VIRTMOUNT_SEED", "0")


def names(format: str) -> list[str]:
    known = [
        name
        for name, mutation in mutations.all_by_name().items()
        if bases.makers()[mutation.base].format == format
        if mutation.format is not None and not zlib.crc32(name.encode()) % PART
    ]
    return known + [f"{format}:{SEED}:{number}" for number in range(COUNT)]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("format", checked())
def test_mending(format: str, folder: Path, tmp_path: Path) -> None:
    asked = names(format)
    assert len(asked) > COUNT
    done = subprocess.run(
        [sys.executable, "-m", "tests.corpus.mending", str(folder), str(tmp_path)],
        input="".join(f"{name}\n" for name in asked),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(asked), (asked[len(answers)], done.stderr[-3000:])
    assert {answer["name"]: answer["wrong"] for answer in answers if answer["wrong"]} == {}
