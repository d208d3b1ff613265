"""The C tests beside this file, compiled with the engine under sanitizers, and run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parent.parent / "native"
SANITIZERS = ("address,undefined", "thread")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("source", sorted(path.name for path in HERE.glob("test_*.c")))
def test_c_program_passes_under_sanitizer(source: str, sanitizer: str, tmp_path: Path) -> None:
    program = tmp_path / "program"
    subprocess.run(
        ["gcc", "-std=gnu11", "-g", "-O1", f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer"]
        + ["-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror"]
        + ["-I", str(NATIVE), "-o", str(program), str(HERE / source)]
        + [str(path) for path in sorted(NATIVE.glob("*.c"))]
        + ["-luring", "-lpthread"],
        check=True,
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
