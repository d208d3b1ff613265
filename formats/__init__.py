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
    "qcow": "virtmount.formats.qcow:QCOW",
    "vhdx": "virtmount.formats.vhdx:VHDX",
    "vhd": "virtmount.formats.vhd:VHD",
    "vdi": "virtmount.formats.vdi:VDI",
    "dmg": "virtmount.formats.dmg:DMG",
    "bochs": "virtmount.formats.bochs:Bochs",
    "cloop": "virtmount.formats.cloop:Cloop",
    "ewf": "virtmount.formats.ewf:EWF",
    "vmdk": "virtmount.formats.vmdk:VMDK",
    "ova": "virtmount.formats.ova:OVA",
    "qed": "virtmount.formats.qed:QED",
    "parallels": "virtmount.formats.parallels:Parallels",
    "raw": "virtmount.formats.raw:Raw",
}
ALIASES = {"img": "raw", "vpc": "vhd"}
RAW_NAMES = (".img", ".raw", ".dd", ".bin", ".iso")

# Known by name only, so that they are refused by name and never served as raw.
# (offset, from the end where negative; magic; name)
FOREIGN = (
    (0, b"sprs", "Apple sparse image"),
    (0, b"shdw", "Apple sparse image (ASIF)"),
    (0, (0xED26FF3A).to_bytes(4, "little"), "Android sparse"),
    (0, b"encrcdsa", "encrypted DMG"),
    (0, b"LVF\x09\x0d\x0a\xff\x00", "EWF (L01)"),
    (0, b"EVF2\x0d\x0a\x81\x00", "EWF (Ex01)"),
    (0, b"MSWIM\0\0\0", "WIM"),
)
PACKED = (
    (0, b"\x1f\x8b\x08", "gzip"),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"\x04\x22\x4d\x18", "lz4"),
    (0, b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    (0, b"PK\x03\x04", "ZIP"),
    *((0, b"BZh%d1AY&SY" % level, "bzip2") for level in range(1, 10)),
    (257, b"ustar", "tar or OVA"),
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

    Two formats that are both sure are refused: then somebody wrote one image into another.  What
    is known by name only is refused by name.  Raw is what is left.
    """
    size = file.size
    head = file.pread_padded(0, min(HEAD, size))
    tail = file.pread_padded(max(0, size - TAIL), min(TAIL, size))
    found: dict[Match, list[type[Image]]] = {match: [] for match in Match}
    for name in TABLE:
        driver = load(name)
        found[driver.probe(head, tail, size)].append(driver)
    sure = [driver.name for driver in found[Match.SURE]]
    if sure:
        # Only what stands at the very beginning counts against a driver that is sure: the rest of
        # its file may hold whatever the guest wrote.
        others = [name for at, magic, name in FOREIGN if at == 0 and head.startswith(magic)]
        if len(sure) + len(others) > 1:
            names = " and ".join(sure + others)
            raise NotAnImage(file, "", f"looks like {names}", hint="say which with --format")
        driver = found[Match.SURE][0]
        raw = "a device" if file.is_device else "named like a raw disk"
        if (file.is_device or file.path.suffix.lower() in RAW_NAMES) and (
            driver.probe(head, bytes(len(tail)), size) is not Match.SURE
        ):
            # The guest of a raw disk may have written it.
            text = f"{raw}, and ends like {driver.name}"
            raise NotAnImage(file, "", text, hint="say which with --format")
        return driver
    for magics, what, hint in (
        (FOREIGN, "images are not supported yet", "qemu-img convert -O qcow2"),
        (PACKED, "files have to be unpacked first", None),
    ):
        for at, magic, name in magics:
            if (tail[at:] if at < 0 else head[at:]).startswith(magic):
                raise Unsupported(file, "", f"{name} {what}", hint=hint)
    if not found[Match.LIKELY]:
        raise NotAnImage(file, "", "empty" if not size else "no known format")
    return found[Match.LIKELY][0]
