"""Imports go one way (ARCHITECTURE.md): who may import what, by room and by file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path for room in ("virtmount", "formats", "ublk") for path in (ROOT / room).glob("*.py")
)
SPINE = {"errors", "plan", "image", "upkeep", "hostfile", "siblings"}
# Files that many stand on: everything of ours that they may import.
ALLOWED = {
    "virtmount.errors": set[str](),
    "virtmount.plan": set[str](),
    "virtmount.hostfile": {"errors", "patches", "plan"},
    "virtmount.patches": set[str](),
    "virtmount.upkeep": {"hostfile", "image", "plan"},  # image for types only
    "virtmount.image": {"errors", "hostfile", "plan", "upkeep"},
    "virtmount.siblings": {"errors", "hostfile", "image"},
    "virtmount.engine": {"errors", "image", "_engine"},
    "virtmount.disk": SPINE | {"engine"},
    "virtmount.fill": SPINE | {"engine", "disk"},
    "virtmount.pager": SPINE | {"engine", "disk", "fill"},
    "virtmount.chain": SPINE | {"formats"},
    "virtmount.overlay": SPINE | {"disk"},
    "virtmount.sizes": {"errors", "image"},
    "virtmount.staging": {"errors", "hostfile"},
    "virtmount.secret": {"errors"},
}
ROOMS = {"formats": SPINE | {"formats"}, "ublk": {"engine", "errors", "ublk", "transport"}}
# The verbs on whole images: only each other, and the command line, import them.
TOOLS = {"creation", "conversion", "checking", "resizing", "comparison", "streaming", "committing"}
TOOLS |= {"rebasing", "copying", "staging", "sizes"}
TOP = {"cli", "cli_common", "cli_change", "cli_look", "__main__"}  # nothing else imports these


def imported(path: Path) -> Iterator[str]:
    """First name below virtmount of every import, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("virtmount."))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_go_one_way(path: Path) -> None:
    room, names = path.parent.name, set(imported(path))
    known = {other.stem for other in FILES if other.parent.name == "virtmount"}
    names -= {name for name in names if name not in known | {"formats", "ublk", "_engine"}}
    allowed = ALLOWED.get(f"{room}.{path.stem}", ROOMS.get(room))
    if allowed is not None:
        assert names <= allowed
    if path.stem not in TOP:
        assert not names & TOP
        if path.stem not in TOOLS and path.name != "__init__.py":
            assert not names & TOOLS
