"""Files that an image names: extents, data files.

Such a name comes out of a file that a stranger may have written.  It leads only to regular files
in or below the folder of the image that the user named, links resolved, unless the user said
otherwise (Options.allow_outside); it is a local path, never a URL.  A parent is an image of its
own: chain.py opens those.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from virtmount.errors import Corrupt, Denied, NotAnImage, Unsupported
from virtmount.hostfile import HostFile
from virtmount.image import Options

MAX_NAME = 4096
NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def open_sibling(
    file: HostFile, place: str, name: str, options: Options, *, others: Sequence[HostFile] = ()
) -> HostFile:
    """The file that `file` calls `name` in its field `place`, opened as `file` was: for writing or
    not, locked or not.

    Raises Denied for one outside of the allowed folders, Corrupt for one of `others` or `file`
    itself, NotAnImage where there is none.
    """
    refuse_strange(file, place, name)
    for folder in folders(file.path):
        path = os.path.join(folder, name)
        try:
            real = os.path.realpath(path, strict=True)
            refuse_outside(file, place, real, options)
            for other in (file, *others):
                # Said here, before its own lock is in the way.
                if other.fd >= 0 and os.path.samestat(os.fstat(other.fd), os.stat(real)):
                    raise Corrupt(file, place, f"{name!r} is {other} itself")
            sibling = HostFile(real, writable=file.writable, lock=file.locked)
        except OSError as error:
            if error.errno not in NO_SUCH_FILE:
                raise
            continue
        try:
            # The path may have changed since it was looked at; what counts is what is open.
            refuse_outside(file, place, opened_path(sibling) or real, options)
            for other in (file, *others):
                if os.path.sameopenfile(other.fd, sibling.fd):
                    raise Corrupt(file, place, f"{name!r} is {other} itself")
        except BaseException:
            sibling.close()
            raise
        return sibling
    raise NotAnImage(file, place, f"not found: {name!r}")


def folders(path: Path) -> Iterator[str]:
    """Where a relative name may start: the folder as named, then, for a link, the real one."""
    named = os.path.dirname(os.path.abspath(path))
    yield named
    if path.is_symlink() and (real := os.path.dirname(os.path.realpath(path))) != named:
        yield real


def roots(path: Path) -> tuple[str, ...]:
    """The folders that files named by the image at `path` may lie in."""
    return tuple(dict.fromkeys(os.path.realpath(folder) for folder in folders(path)))


def refuse_outside(file: HostFile, place: str, real: str, options: Options) -> None:
    if options.allow_outside:
        return
    allowed = options.roots or roots(file.path)
    if not any(os.path.commonpath((root, real)) == root for root in allowed):
        raise Denied(
            file,
            place,
            f"{real} lies outside of the image's folder",
            hint="--allow-outside if you trust the image",
        )
    if not stat.S_ISREG(os.stat(real).st_mode):
        raise Denied(file, place, f"{real} is not a regular file")


def refuse_strange(file: HostFile, place: str, name: str) -> None:
    """Names that no local file can have."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        encoded = b""
    if not encoded or len(encoded) > MAX_NAME or b"\0" in encoded:
        raise Corrupt(file, place, f"no possible file name: {name[:64]!r}")
    if (match := _SCHEME.match(name)) and match[0] != "file:":
        raise Unsupported(
            file,
            place,
            f"{name[:64]!r} is not a local file",
            hint="qemu-img rebase -u -b ./FILE for one whose name is meant so",
        )


def opened_path(file: HostFile) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{file.fd}")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES):
            return None  # no /proc here
        raise
