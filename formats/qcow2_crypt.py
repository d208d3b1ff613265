"""Which cipher the guest data of a QCOW2 image is encrypted with.

Source: qemu's docs/interop/qcow2.rst, "crypt_method" and "Full disk encryption header pointer".
Compressed clusters and all tables are never encrypted.  Used by qcow2.py only.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from virtmount.errors import Corrupt
from virtmount.formats import luks
from virtmount.hostfile import HostFile
from virtmount.image import Cipher, Options

AES, LUKS = 1, 2  # crypt_method
METHODS = {0: None, AES: "aes", LUKS: "luks"}
EXTENSION = 0x0537BE77
MAX_LENGTH = 64 << 20  # of a LUKS header

_PLACE = struct.Struct(">QQ")  # offset, length


def place(
    file: HostFile, method: int, extensions: Mapping[int, bytes], cluster: int
) -> tuple[int, int]:
    """Offset and length of the LUKS header; (0, 0) where there is none."""
    if method != LUKS:
        return 0, 0
    data = extensions.get(EXTENSION, b"")
    where = f"header extension {EXTENSION:#010x}"
    if len(data) < _PLACE.size:
        raise Corrupt(file, where, "LUKS encryption, but no place of the LUKS header")
    offset, length = _PLACE.unpack_from(data)
    if offset % cluster or not offset:
        raise Corrupt(file, where, f"LUKS header at {offset}, not at a cluster of its own")
    if length > MAX_LENGTH or offset + length > file.size:
        text = f"LUKS header at {offset}: {length} bytes, the file ends at {file.size}"
        raise Corrupt(file, where, text)
    return int(offset), int(length)


def cipher(file: HostFile, method: int, at: tuple[int, int], options: Options) -> Cipher | None:
    """Asks for the passphrase where there is encryption.  Denied if it is not the right one.

    None where nothing is encrypted, or nothing will be read.
    """
    if options.described:
        return None
    if method == AES:
        return luks.legacy_aes(luks.ask(file, "header+32", options))
    if method == LUKS:
        return luks.unlock(file, *at, options)
    return None
