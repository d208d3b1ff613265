"""Every driver, fuzzed for a moment: fuzz.py says how to do it for longer.

VIRTMOUNT_FUZZ=60 gives each driver so many seconds.  A seed makes runs on equal machines alike.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus import bases

SECONDS = int(os.environ.get("VIRTMOUNT_FUZZ", "2"))
FEWEST = 10  # a target that does nothing but start is none


@pytest.mark.timeout(120 + SECONDS)
@pytest.mark.parametrize("format", bases.modules())
def test_nothing_is_found(format: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            # By a child of a shell: at its start a program counts the memory of who called it as
            # its own, and these tests may run in a process that once needed a lot.
            *("sh", "-c", '"$@"; exit $?', "sh"),
            *(sys.executable, "-m", "tests.corpus.fuzz", format),
            *("-seed=1", f"-max_total_time={SECONDS}", f"-artifact_prefix={tmp_path}/"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, said[-3000:]
    runs = re.search(r"Done (\d+) runs", said)
    assert runs, said[-3000:]
    assert int(runs[1]) > FEWEST
