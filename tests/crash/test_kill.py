"""SIGKILL: a process that works on an image is killed at random moments, several times over.

What it had acknowledged to have flushed must be there, the image must be valid, and the next one
goes on with it.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.budget import KILLS, TIMEOUT
from tests.crash.cases import CASES, Made, content_of, make
from tests.crash.judge import Judge
from tests.crash.simulate import SimulatedFile, Store
from tests.crash.workload import SECTOR, History, Request

MOST_LINES = 400  # that the victim may say before it is killed
NAMES = ("qcow2-64k", "qcow2-4k", "qcow2-parent", "vdi", "vhd", "vhdx", "vhdx-4096")

pytestmark = pytest.mark.timeout(TIMEOUT)


def read_history(said: str, base: Store) -> History:
    """What was asked and acknowledged, in order."""
    history = History(base)
    # A line is cut off where the victim died in the middle of it.
    for line in said[: said.rfind("\n") + 1].splitlines():
        what, text = line.split(" ", 1)
        text, left = text.rsplit(" ", 1)
        request = Request.parse(text)
        if what == "ask":
            history.issued(0, request)
            continue
        seen = bytearray(request.length)
        if left != "-":
            before = history.model.current.read(request.offset, request.length)
            for sector in map(int, left.split(",")):
                part = slice(sector * SECTOR, (sector + 1) * SECTOR)
                seen[part] = before[part]
        history.acknowledged(0, request, bytes(seen))
    return history


def kill(made: Made, path: Path, seed: str, lines: int) -> str:
    """Let a victim work, kill it after it has said `lines` lines; all that it said."""
    case = made.case
    command = [sys.executable, "-m", "tests.crash.killed"]
    command += [str(path), case.format, str(case.cluster), seed]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as victim:
        assert victim.stdout is not None
        said = []
        for line in victim.stdout:
            said.append(line)
            if len(said) == lines:
                victim.kill()
        assert len(said) >= lines, "it ended by itself"
        assert victim.wait() == -9
    return "".join(said)


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_moments(name: str, folder: Path) -> None:
    (case,) = (case for case in CASES if case.name == name)
    here = folder / name
    here.mkdir()
    made = make(case, here)
    path = made.save(made.store, here)
    content = made.content
    judge = Judge(made, 0, here)
    # Moments differ from run to run; the workload does not.
    moments = random.Random()
    for i in range(KILLS):
        lines = moments.randrange(1, MOST_LINES)
        said = kill(made, path, f"{name} {i}", lines)
        left = Store.load(path)
        history = read_history(said, content)
        tail = said.splitlines()[-12:]
        judge.place = "\n".join([f"kill {i} after {lines} lines:", *tail])
        judge.judge(left, history.model, moments, again=False)
        if case.foreign:
            judge.foreign(left, moments)
        # The next victim opens what this one left.
        made.save(left, here)
        content = content_of(made.images(SimulatedFile(left, writable=False)))
