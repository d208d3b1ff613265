"""The parent of a differencing VDI: an image somewhere near with the right UUID.

VirtualBox keeps the paths in its own registry; the file has two UUIDs, the parent's and that of
the parent's last modification.  So we look where VirtualBox puts such images: in the child's
folder, in `Snapshots` below it, in the folder above and its `Snapshots`, and where the user says
(Options.search_path).  Of every file that is called *.vdi there the header is read, 512 bytes, and
nothing is opened for it: chain.py decides whether the parent may lie where it was found.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections.abc import Iterator

from virtmount.errors import VirtmountError
from virtmount.formats import vdi_header
from virtmount.hostfile import HostFile
from virtmount.image import Options
from virtmount.siblings import folders

SUFFIX = ".vdi"
SNAPSHOTS = "Snapshots"
MAX_ENTRIES = 16384  # names looked at in one folder
MAX_HEADERS = 2048  # headers read for one child


def find(
    file: HostFile, parent: uuid.UUID, modification: uuid.UUID, options: Options
) -> tuple[str, ...]:
    """Names of the images whose UUID is `parent`, those in the right state first.

    Relative to the child's folder where it was the child's folder that led there, else absolute.
    """
    exact: list[str] = []
    others: list[str] = []
    seen: set[tuple[int, int]] = set()
    with contextlib.suppress(OSError):
        seen.add(_inode(os.fstat(file.fd)))
    candidates = _candidates(file, options)
    for name, path in itertools.islice(candidates, MAX_HEADERS):
        try:
            with HostFile(path, lock=False) as candidate:
                inode = _inode(os.fstat(candidate.fd))
                if inode in seen:
                    continue
                seen.add(inode)
                head = candidate.pread_padded(0, vdi_header.SECTOR)
            if not vdi_header.is_vdi(head):
                continue
            header = vdi_header.parse(head)
        except (OSError, VirtmountError):
            continue  # not ours to complain about
        if header.uuid == parent:
            right = modification in (vdi_header.NO_UUID, header.modification_uuid)
            (exact if right else others).append(name)
    return (*exact, *others)


def places(file: HostFile, options: Options) -> Iterator[tuple[str, str]]:
    """The folders in which to look: as they are named for the child, and as they are opened."""
    for folder in folders(file.path):
        for name in ("", SNAPSHOTS, os.pardir, os.path.join(os.pardir, SNAPSHOTS)):
            yield name, os.path.join(folder, name)
    for folder in options.search_path:
        path = os.path.abspath(folder)
        yield path, path


def _candidates(file: HostFile, options: Options) -> Iterator[tuple[str, str]]:
    for name, folder in places(file, options):
        try:
            with os.scandir(folder) as entries:
                found = sorted(
                    entry.name
                    for entry in itertools.islice(entries, MAX_ENTRIES)
                    if _is_candidate(entry)
                )
        except OSError:
            continue
        for entry_name in found:
            yield os.path.join(name, entry_name), os.path.join(folder, entry_name)


def _is_candidate(entry: os.DirEntry[str]) -> bool:
    """A device or a FIFO is not opened, not even to look at it."""
    try:
        return entry.name.lower().endswith(SUFFIX) and entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
