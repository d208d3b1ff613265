"""The parent of a VMDK: by name and CID (VMware, qemu), or by UUID (VirtualBox).

The descriptor's parentFileNameHint is a path of the machine on which the snapshot was made, so
its last component is tried beside the child as well.  VirtualBox keeps paths in its registry and
writes none; its child names the parent's UUID, and an image with that one is looked for near the
child.  Of the files looked at only descriptors are read, and nothing else is opened for it:
chain.py decides whether the parent may lie where it was found.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator

from virtmount.errors import Unsupported, VirtmountError
from virtmount.formats import vmdk_sparse
from virtmount.formats.vmdk_descriptor import (
    NO_PARENT,
    NO_UUID,
    Descriptor,
    decoded,
    looks_like_descriptor,
    parse,
)
from virtmount.hostfile import HostFile
from virtmount.image import Image, Options, ParentRef
from virtmount.siblings import folders

SUFFIX = ".vmdk"
SNAPSHOTS = "Snapshots"
MAX_ENTRIES = 16384  # names looked at in one folder
MAX_FILES = 1024  # descriptors read for one child
MAX_TEXT = 64 << 10
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def reference(file: HostFile, descriptor: Descriptor, options: Options) -> ParentRef | None:
    """What the descriptor says of a parent; None where it has none."""
    cid, identity = descriptor.parent_cid, descriptor.uuid("parent")
    if cid is None and identity is None:
        return None
    stamp = None if cid is None else f"{cid:08x}"
    encoding = descriptor.values.get("encoding", "UTF-8")
    hints = decoded(os.fsencode(descriptor.hint), encoding) if descriptor.hint else ()
    names = tuple(dict.fromkeys(name for hint in hints for name in local_names(hint)))
    if not names and not options.changing_parent:
        names = find(file, identity, cid, options)
        return ParentRef(names, "vmdk", identity, searched=True, stamp=stamp)
    return ParentRef(names, "vmdk", identity, stamp=stamp)


def local_names(hint: str) -> Iterator[str]:
    """A path as it is, and its last component; of a Windows path only that."""
    if not _WINDOWS.match(hint):
        yield hint
        base = os.path.basename(hint)
    else:
        base = re.split(r"[\\/]", hint)[-1]
    if base:
        yield base


def find(
    file: HostFile, identity: str | None, cid: int | None, options: Options
) -> tuple[str, ...]:
    """Names of images near the child that have the UUID or, without one, the CID."""
    found: list[str] = []
    own = os.fstat(file.fd)
    for name, path in itertools.islice(_candidates(file, options), MAX_FILES):
        try:
            with HostFile(path, lock=False) as candidate:
                status = os.fstat(candidate.fd)
                if (status.st_dev, status.st_ino) == (own.st_dev, own.st_ino):
                    continue
                descriptor = peek(candidate)
        except (OSError, VirtmountError):
            continue  # not ours to complain about
        if descriptor is None:
            continue
        right = descriptor.uuid("image") == identity if identity else descriptor.cid == cid
        if right and name not in found:
            found.append(name)
    return tuple(found)


def peek(file: HostFile) -> Descriptor | None:
    """The descriptor of a file, whatever is in its extents."""
    raw = file.pread_padded(0, min(file.size, MAX_TEXT))
    if raw.startswith(vmdk_sparse.MAGIC):
        raw = vmdk_sparse.SparseExtent(file, 0, 0).descriptor()
    return parse(file, "descriptor ", raw) if looks_like_descriptor(raw) else None


def _candidates(file: HostFile, options: Options) -> Iterator[tuple[str, str]]:
    places = [
        (name, os.path.join(folder, name))
        for folder in folders(file.path)
        for name in ("", SNAPSHOTS, os.pardir, os.path.join(os.pardir, SNAPSHOTS))
    ]
    places += [(os.path.abspath(folder),) * 2 for folder in options.search_path]
    for name, folder in places:
        try:
            with os.scandir(folder) as entries:
                found = sorted(
                    entry.name
                    for entry in itertools.islice(entries, MAX_ENTRIES)
                    # A device or a FIFO is not opened, not even to look at it.
                    if entry.name.lower().endswith(SUFFIX) and entry.is_file()
                )
        except OSError:
            continue
        for entry_name in found:
            yield os.path.join(name, entry_name), os.path.join(folder, entry_name)


def linkage(file: object, parent: Image | None, name: str) -> dict[str, str]:
    """The values that name a parent.  Only another VMDK can be one, and only one with a CID."""
    if parent is None:
        return {"parentCID": f"{NO_PARENT:08x}"}
    if parent.name != "vmdk":
        text = f"{name} is {parent.name}: the parent of a VMDK is a VMDK"
        raise Unsupported(file, "parent", text)
    if parent.stamp is None:
        raise Unsupported(file, "parent", f"{name} has no CID", hint="virtmount check --repair")
    if '"' in name or "\n" in name or "\r" in name:
        raise Unsupported(file, "parent", f"{name!r}: a descriptor cannot name such a file")
    values = {"parentCID": parent.stamp, "parentFileNameHint": name}
    if parent.identity:
        values["ddb.uuid.parent"] = parent.identity
    return values


def rebased(file: HostFile, descriptor: Descriptor, parent: Image | None, name: str) -> bytes:
    """The descriptor's text with another parent."""
    values = linkage(file, parent, name)
    # A key without a value has no place to put one; one that is not there stays away.
    if "ddb.uuid.parent" in descriptor.spans:
        values.setdefault("ddb.uuid.parent", NO_UUID)
    else:
        values.pop("ddb.uuid.parent", None)
    if parent is None and descriptor.hint:
        shorter = descriptor.without("parentfilenamehint")
        descriptor = parse(file, "descriptor ", shorter, descriptor.room)
    if "parentFileNameHint" in values and not descriptor.hint:
        if "parentfilenamehint" in descriptor.values:
            shorter = descriptor.without("parentfilenamehint")
            descriptor = parse(file, "descriptor ", shorter, descriptor.room)
        values["parentFileNameHint"] = f'"{name}"'
    new = descriptor.with_values(**values)
    if descriptor.room is not None and len(new) > descriptor.room:
        text = f"{len(new)} bytes of descriptor, there is room for {descriptor.room}"
        raise Unsupported(file, "descriptor", text)
    return new
