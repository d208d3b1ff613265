"""What `import virtmount` offers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import virtmount

ROOT = Path(__file__).resolve().parents[2]


def test_every_name_is_there() -> None:
    for name in virtmount.__all__:
        assert getattr(virtmount, name).__name__ == name
    assert sorted(virtmount._HOMES) == sorted(virtmount.__all__)


def test_no_module_hides_a_function() -> None:
    """Importing virtmount.create would make virtmount.create a module."""
    modules = {path.stem for path in (ROOT / "virtmount").glob("*.py")}
    assert not modules & set(virtmount.__all__)


def test_functions_are_functions_whatever_was_imported_before() -> None:
    program = (
        "import pkgutil, importlib, virtmount\n"
        "for module in pkgutil.iter_modules(virtmount.__path__):\n"
        "    if module.name != '__main__': importlib.import_module(f'virtmount.{module.name}')\n"
        "print([name for name in virtmount.__all__ if not callable(getattr(virtmount, name))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"
