"""Give cases to processes of attempts.py, and find out which case one of them died of."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKERS = 2
SILENCE = 240  # seconds without a word: attempts.py gives up before


@dataclass
class Answer:
    """What the two openings of a case came to."""

    read: dict[str, Any] = field(default_factory=dict)
    write: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None  # of the image that was written to
    died: str = ""  # the last words of a process that did not survive it


def judge(bases: Path, kind: str, names: Sequence[str], *, keep: bool = False) -> dict[str, Answer]:
    """The answer of every case.  With `keep` images that were written to stay where they are."""
    answers: dict[str, Answer] = {}
    threads = [
        threading.Thread(target=_share, args=(bases, kind, names[i::WORKERS], keep, answers))
        for i in range(WORKERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _share(
    bases: Path, kind: str, names: Sequence[str], keep: bool, answers: dict[str, Answer]
) -> None:
    left = list(names)
    while left:
        folder = Path(tempfile.mkdtemp(dir=bases))
        done = _work(bases, folder, kind, left, keep, answers)
        left = left[done:]


def _work(
    bases: Path,
    folder: Path,
    kind: str,
    names: Sequence[str],
    keep: bool,
    answers: dict[str, Answer],
) -> int:
    """How many of the names have an answer now; the last one may be that the process died."""
    questions = "".join(
        json.dumps({"kind": kind, "name": name, "keep": keep}) + "\n" for name in names
    )
    with (
        tempfile.TemporaryFile("w+") as asked,
        tempfile.TemporaryFile("w+", errors="replace") as said,
    ):
        asked.write(questions)
        asked.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.corpus.attempts", str(bases), str(folder)],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        done = 0
        try:
            while line := _line(process):
                heard = json.loads(line)
                if "verdicts" not in heard:
                    continue
                read, write = heard["verdicts"]
                answers[heard["name"]] = Answer(read, write, Path(heard["path"]))
                done += 1
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if done < len(names):
            said.seek(0)
            words = said.read()[-3000:]
            answers[names[done]] = Answer(died=f"exit status {process.returncode}: {words}")
            done += 1
    return done


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(SILENCE):
            return ""
    return process.stdout.readline()
