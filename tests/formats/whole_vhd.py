"""Making, checking and changing VHD images, in the plainest way: the plans of the driver alone."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from virtmount import hostfile
from virtmount.chain import Opener, close_image, open_chain
from virtmount.formats.vhd import VHD
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Image, Options
from virtmount.plan import Plan
from virtmount.upkeep import Finding, New, Repair


def create(
    path: Path,
    size: int | None = None,
    *,
    settings: Mapping[str, str] | None = None,
    parent: Path | None = None,
    sector_size: int = 512,
) -> None:
    """`parent` lies in the folder of `path` or below it."""
    options = {name: choice.default for name, choice in VHD.choices.items()} | {**(settings or {})}
    with contextlib.ExitStack() as stack:
        base: Image | None = None
        name = ""
        if parent is not None:
            chain = open_chain(parent)
            stack.callback(chain.close)
            base = chain.top
            size = base.size if size is None else size
            name = str(parent.relative_to(path.parent))
        assert size is not None
        path.touch()
        file = stack.enter_context(HostFile(path, writable=True))
        try:
            new = New([file], path.name, size, options, lambda _: 0, sector_size, base, name)
            hostfile.execute(VHD.create(new), [file])
        except BaseException:
            path.unlink()
            raise


def check(path: Path, repair: Repair = Repair.NOTHING) -> list[Finding]:
    """All findings; what can be mended has been."""
    found = []
    with HostFile(path, writable=repair is not Repair.NOTHING) as file:
        for item in VHD.check(file, DEFAULTS, repair):
            if isinstance(item, Finding):
                found.append(item)
            elif isinstance(item, Plan):
                assert repair is not Repair.NOTHING
                hostfile.execute(item, [file])
    return found


def resize(path: Path, size: int) -> int:
    """The size that the image has when it is opened again."""
    with HostFile(path, writable=True) as file:
        hostfile.execute(VHD(file).resize(size), [file])
    with HostFile(path) as file:
        return VHD(file).size


def rebase(path: Path, parent: Path | None) -> None:
    """Only what the child says about its parent."""
    image = Opener(path, options=Options(changing_parent=True)).open_top("vhd", writable=True)
    try:
        if parent is None:
            hostfile.execute(image.rebase(None, ""), image.files)
            return
        with contextlib.closing(open_chain(parent)) as chain:
            name = str(parent.relative_to(path.parent))
            hostfile.execute(image.rebase(chain.top, name), image.files)
    finally:
        close_image(image)
