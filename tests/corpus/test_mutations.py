"""Metadata is hostile: nothing in an image makes us read or write outside of it, or crash.

Every named mutation is opened to be read and to be written, in a process with little memory and
time (attempts.py says what may not happen), and has to come to the answer that it names.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import bases, mutations
from tests.corpus.judge import Answer, judge
from tests.corpus.mutations import Mutation

KNOWN = mutations.all_by_name()
ENOUGH = 40


@pytest.mark.parametrize("format", bases.FORMATS)
def test_every_driver_has_enough(format: str) -> None:
    names = [name for name, m in KNOWN.items() if bases.makers()[m.base].format == format]
    assert len(names) >= ENOUGH


@pytest.fixture(scope="module")
def answers(folder: Path, request: pytest.FixtureRequest) -> dict[str, Answer]:
    """Of all the mutations that this run asks for."""
    names = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.module is request.module
        and hasattr(item, "callspec")
        and "name" in item.callspec.params
    ]
    return judge(folder, "mutation", names, keep=True)


@pytest.mark.timeout(600)  # the first one waits for all
@pytest.mark.parametrize("name", KNOWN)
def test_hostile_image(name: str, answers: dict[str, Answer]) -> None:
    mutation, answer = KNOWN[name], answers[name]
    assert not answer.died, answer.died
    cluster = bases.makers()[mutation.base].cluster
    _check(mutation, answer.read, mutation.read, cluster)
    _check(mutation, answer.write, mutation.refused, cluster)
    if answer.path:
        folder = next(path for path in answer.path.parents if path.name.isdigit())
        before = folder.with_name(folder.name + mutations.BEFORE)
        if before.exists() and mutation.format is not None:
            _ask_qemu(mutation, before, answer.path)
        before.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _check(mutation: Mutation, verdict: dict[str, Any], pattern: str, cluster: int) -> None:
    assert not verdict["wrong"]
    error = verdict["error"]
    if pattern:
        assert re.search(pattern, error), error or "it opened"
        return
    assert not error
    failed = {int(at) // cluster for at in verdict["reads"]}
    assert set(verdict["reads"].values()) <= {"5"}
    if mutation.guest:
        assert failed == set(mutation.eio)
        assert not verdict["differs"]
    else:
        assert failed >= set(mutation.eio)


def _ask_qemu(mutation: Mutation, before: Path, after: Path) -> None:
    """The image must not be in worse order than it was, nor harm qemu-img."""
    format = bases.makers()[mutation.base].format
    format = bases.QEMU_NAMES.get(format, format)
    was, now = _damage(before, format), _damage(after, format)
    if was is not None and not mutation.loose:
        assert now is not None, "qemu-img does not open it any more"
        assert now <= was


def _damage(path: Path, format: str) -> int | None:
    """Errors that qemu-img finds; None if it does not open the image."""
    command = ["qemu-img", "check", "--output=json", "-f", format, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    assert done.returncode >= 0, done
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return None
    return int(found.get("corruptions", 0)) + int(found.get("check-errors", 0))
