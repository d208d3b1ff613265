"""The formats, in the order in which they are probed.

Adding a format touches its own file, one line here, its test file and a corpus entry.
"""

from __future__ import annotations

from importlib import import_module

from virtmount.errors import NotAnImage, Unsupported
from virtmount.hostfile import HostFile
from virtmount.image import Image, Match

# name -> module:class.  Strong magics first, raw last: raw takes everything.
TABLE = {
    "qcow2": "virtmount.formats.qcow2:QCOW2",
    "vhdx": "virtmount.formats.vhdx:VHDX",
    "vdi": "virtmount.formats.vdi:VDI",
    "raw": "virtmount.formats.raw:Raw",
}
ALIASES = {"img": "raw"}

# Formats known by name only, so that they are refused by name and never served as raw.
# (offset, magic, name)
FOREIGN = (
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK (vmfsSparse)"),
    (0, (0xCAFEBABE).to_bytes(8, "little"), "VMDK (seSparse)"),
    (0, b"# Disk DescriptorFile", "VMDK (descriptor)"),
    (0, b"QFI\xfb\x00\x00\x00\x01", "QCOW (version 1)"),
    (0, b"QED\0", "QED"),
    (0, b"conectix", "VHD"),
    (-512, b"conectix", "VHD"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (-512, b"koly", "DMG"),
    (0, b"LUKS\xba\xbe", "LUKS"),
)
HEAD = 65536
TAIL = 1024


def load(name: str) -> type[Image]:
    """The driver of that name; Unsupported names the ones that there are."""
    name = ALIASES.get(name.lower(), name.lower())
    if name not in TABLE:
        raise Unsupported("--format", "", f"unknown format {name!r}, know {', '.join(TABLE)}")
    module, _, attribute = TABLE[name].partition(":")
    driver: type[Image] = getattr(import_module(module), attribute)
    return driver


def probe(file: HostFile) -> type[Image]:
    """The driver for an open file, by its content.

    Two sure matches are refused: then somebody wrote one image into another.  A format that is
    known by name only is refused by name.
    """
    size = file.size
    head = file.pread_padded(0, min(HEAD, size))
    tail = file.pread_padded(max(0, size - TAIL), min(TAIL, size))
    found: dict[Match, list[type[Image]]] = {match: [] for match in Match}
    for name in TABLE:
        driver = load(name)
        found[driver.probe(head, tail, size)].append(driver)
    sure = found[Match.SURE]
    if len(sure) > 1:
        names = " and ".join(driver.name for driver in sure)
        raise NotAnImage(file, "", f"looks like {names}", hint="say which with --format")
    if sure:
        return sure[0]
    for offset, magic, name in FOREIGN:
        at = tail[offset:] if offset < 0 else head[offset:]
        if at.startswith(magic):
            raise Unsupported(
                file, "", f"{name} images are not supported yet", hint="qemu-img convert -O qcow2"
            )
    if not found[Match.LIKELY]:
        raise NotAnImage(file, "", "no known format")
    return found[Match.LIKELY][0]
