"""The C tests beside this file, compiled with the engine under sanitizers, and run.

The engine is an archive: a test that includes one of its files, to stand in for the kernel there,
takes the place of that member.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parent.parent / "native"
SANITIZERS = ("address,undefined", "thread")
FLAGS = ["-std=gnu11", "-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-I", str(NATIVE)]

LIBRARIES = ["-luring", "-lcrypto", "-lpthread"]

Build = Callable[[Path, Path], None]  # source, program


@pytest.fixture(scope="session", params=SANITIZERS)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("engine")
    gcc = ["gcc", *FLAGS, f"-fsanitize={request.param}"]

    def compile_one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        subprocess.run([*gcc, "-c", "-o", made, source], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted(NATIVE.glob("*.c"))))
    archive = folder / "engine.a"
    subprocess.run(["ar", "rcs", archive, *objects], check=True)

    def link(source: Path, program: Path) -> None:
        subprocess.run([*gcc, "-o", program, source, archive, *LIBRARIES], check=True)

    return link


@pytest.mark.parametrize("source", sorted(path.name for path in HERE.glob("test_*.c")))
def test_c_program_passes_under_sanitizer(source: str, build: Build, tmp_path: Path) -> None:
    program = tmp_path / "program"
    build(HERE / source, program)
    done = subprocess.run([program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
