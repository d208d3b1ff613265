"""What a QCOW2 header says in words: the parent, its format, header extensions, features.

Source: qemu's docs/interop/qcow2.rst, "Header extensions", "Feature name table".  Used by
qcow2_create.py and qcow2_change.py.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping

from virtmount.errors import Unsupported
from virtmount.formats.qcow2_header import (
    BACKING_FORMAT,
    COMPRESSION,
    CORRUPT,
    DATA_FILE,
    DIRTY,
    END_OF_EXTENSIONS,
    EXTENDED_L2,
    EXTENSION,
    MAX_NAME,
)
from virtmount.image import Image

# Ours -> qemu's, where they differ.
QEMU_NAMES = {"vhd": "vpc"}
INCOMPATIBLE, COMPATIBLE, AUTOCLEAR = range(3)
FEATURES = b"".join(
    struct.pack(">BB46s", kind, bit, text.encode())
    for kind, bit, text in (
        (INCOMPATIBLE, DIRTY, "dirty bit"),
        (INCOMPATIBLE, CORRUPT, "corrupt bit"),
        (INCOMPATIBLE, DATA_FILE, "external data file"),
        (INCOMPATIBLE, COMPRESSION, "compression type"),
        (INCOMPATIBLE, EXTENDED_L2, "extended L2 entries"),
        (COMPATIBLE, 0, "lazy refcounts"),
        (AUTOCLEAR, 0, "bitmaps"),
        (AUTOCLEAR, 1, "raw external data"),
    )
)


def extension_area(extensions: Mapping[int, bytes]) -> bytes:
    """All of them, each padded to 8 bytes, and their end."""
    parts = [
        EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)
        for kind, data in extensions.items()
    ]
    return b"".join(parts) + EXTENSION.pack(END_OF_EXTENSIONS, 0)


def backing(file: object, parent: Image, name: str) -> tuple[bytes, dict[int, bytes]]:
    """The parent's name as it is recorded, and the extension that says its format."""
    encoded = os.fsencode(name)
    if not 0 < len(encoded) <= MAX_NAME:
        raise Unsupported(file, "parent", f"a name of {len(encoded)} bytes, the most is {MAX_NAME}")
    format = QEMU_NAMES.get(parent.name, parent.name)
    return encoded, {BACKING_FORMAT: format.encode()}
