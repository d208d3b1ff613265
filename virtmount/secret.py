"""Passphrases: from a file, a descriptor, or the person at the terminal.

Never from an argument or the environment, which others can see.
"""

from __future__ import annotations

import functools
import getpass
import os
import sys
from collections.abc import Callable

from virtmount.errors import VirtmountError

MAX_LENGTH = 64 << 10


def passphrase(file: str | None = None, fd: int | None = None) -> Callable[[], bytes] | None:
    """What gives the passphrase when it is called, the same one every time; None: nobody can.

    One newline at the end is not part of it.
    """
    if file is not None:
        return functools.cache(lambda: _from_file(file))
    if fd is not None:
        return functools.cache(lambda: _from_descriptor(fd))
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        return functools.cache(lambda: getpass.getpass("Passphrase: ").encode())
    return None


def _from_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return _cut(file.read(MAX_LENGTH + 1), path)


def _from_descriptor(fd: int) -> bytes:
    data = b""
    while part := os.read(fd, MAX_LENGTH):
        data += part
        if len(data) > MAX_LENGTH:
            break
    return _cut(data, f"descriptor {fd}")


def _cut(data: bytes, source: str) -> bytes:
    if len(data) > MAX_LENGTH:
        raise VirtmountError(source, "", f"a passphrase of more than {MAX_LENGTH} bytes")
    return data.removesuffix(b"\n")
