"""A disk: a chain of images with everything that the engine has to be told about it.

What the engine calls a unit is the smallest piece in which any image of the chain can differ
from the next one.  A flat parent differs nowhere, so it asks for nothing.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from typing import NamedTuple

from virtmount.engine import Config, Engine, Flag
from virtmount.errors import Unsupported
from virtmount.hostfile import HostFile
from virtmount.image import Chain, Image

SECTOR = 512
MAX_REQUEST = 1 << 20  # bytes; of one piece of a request in the engine
LEAF_UNITS = 4096  # 32 KiB of map, filled by one question
MAX_LEAVES = 1 << 25  # 256 MiB of pointers: 64 TiB in units of 512 bytes
MAX_FILES = 255
DIRECT_ALIGN = 4096
CACHE_MODES = ("writeback", "none", "writethrough")

log = logging.getLogger(__name__)


class DiskFile(NamedTuple):
    """One host file of the chain; its place in the list is the engine's number for it."""

    file: HostFile
    direct_fd: int
    owned: bool  # the top image's


class Disk:
    """What gets attached.  Owns the chain: close() closes its files.

    The top image's files come first, so their numbers are those of the driver.
    """

    def __init__(self, chain: Chain, *, cache: str = "writeback") -> None:
        if cache not in CACHE_MODES:
            raise ValueError(f"cache mode {cache!r}, know {', '.join(CACHE_MODES)}")
        self.chain = chain
        self.cache = cache
        self.files: list[DiskFile] = []
        image = chain.top
        self.writable = image.files[0].writable and image.caps.write
        self.sector_size = image.sector_size
        self.size = round_up(image.size, image.sector_size)
        # A flat image holds every byte: whatever parent it names is never asked.
        self.layers = chain.images if image.flat is None else [image]
        self.flat = image.flat
        self._check()
        try:
            for layer in self.layers:
                self._add_files(layer)
        except BaseException:
            self._close_direct()
            raise

    @property
    def image(self) -> Image:
        return self.chain.top

    def close(self) -> None:
        """Close all files; harmless when repeated.  No engine may use them any more."""
        self._close_direct()
        self.chain.close()

    def _close_direct(self) -> None:
        for entry in self.files:
            if entry.direct_fd >= 0:
                os.close(entry.direct_fd)
        self.files = []

    @property
    def direct(self) -> bool:
        """Whether data passes by the host's page cache, in at least one file."""
        return any(entry.direct_fd >= 0 for entry in self.files)

    @property
    def unit(self) -> int:
        """Bytes that one map entry describes."""
        top = self.layers[0]
        unit = min(top.grain, top.cluster_size)
        for layer in self.layers[1:]:
            if layer.flat is None:
                unit = min(unit, layer.grain, layer.cluster_size)
            # What a shorter parent has behind its end is not the disk's, so no unit may
            # reach across it.
            size = round_up(layer.size, SECTOR)
            if 0 < size < self.size:
                unit = min(unit, size & -size)
        return unit

    def config(self) -> Config:
        unit, cluster = self.unit, self.image.cluster_size
        leaf_units = max(LEAF_UNITS, cluster // unit, power_of_two(MAX_REQUEST // unit + 1))
        flags = Flag(0)
        if not self.writable:
            flags |= Flag.READ_ONLY
        if self.cache == "writethrough":
            flags |= Flag.WRITETHROUGH
        if self.can_discard:
            flags |= Flag.CAN_ZERO | Flag.CAN_DISCARD
        if self.flat is not None:
            flags |= Flag.FLAT
        identity = self.image.identity_file
        if identity is not None:
            flags |= Flag.IDENTITY
        return Config(
            size=self.size,
            unit_shift=unit.bit_length() - 1,
            cluster_shift=cluster.bit_length() - 1,
            leaf_units=leaf_units,
            sector_size=self.sector_size,
            flags=flags,
            flat_offset=self.flat or 0,
            flat_file=self.image.flat_file,
            identity_file=identity or 0,
        )

    @property
    def encrypted(self) -> bool:
        """Whether any layer's data must pass through memory to be decrypted."""
        return any(layer.cipher is not None for layer in self.layers)

    @property
    def can_discard(self) -> bool:
        """Whether whole clusters can be made to read as zeros by giving them back."""
        caps = self.image.caps
        alone = len(self.layers) == 1
        return self.writable and caps.discard and (alone or caps.zero_hides_parent)

    def create_engine(self) -> Engine:
        engine = Engine(self.config())
        try:
            for number, entry in enumerate(self.files):
                given = engine.add_file(
                    entry.file.fd,
                    direct_fd=entry.direct_fd,
                    direct_align=DIRECT_ALIGN,
                    owned=entry.owned,
                )
                assert given == number
            if self.image.zones:  # the top image's file numbers are the engine's
                engine.set_zones(self.image.zones)
            for number, layer in enumerate(self.layers):
                if layer.cipher is not None:
                    for file in self.numbers(number):
                        engine.set_cipher(file, layer.cipher)
        except BaseException:
            engine.close()
            raise
        return engine

    def numbers(self, layer: int) -> list[int]:
        """The engine's number of each file of a layer, by the driver's number."""
        first = sum(len(image.files) for image in self.layers[:layer])
        return list(range(first, first + len(self.layers[layer].files)))

    def _check(self) -> None:
        file = self.image.files[0]
        if self.size <= 0:
            raise Unsupported(file, "", "a disk of 0 bytes")
        if file.writable and not self.writable:
            text = f"{self.image.name} {self.image.variant}".rstrip() + " cannot be written"
            raise Unsupported(file, "", text, hint="--read-only")
        if sum(len(layer.files) for layer in self.layers) > MAX_FILES:
            raise Unsupported(file, "", f"more than {MAX_FILES} host files")
        for layer in self.layers:
            for name, value in (("cluster size", layer.cluster_size), ("grain", layer.grain)):
                if value < SECTOR or value & (value - 1):
                    raise Unsupported(layer.files[0], "", f"{name} {value}")
            if layer.flat is not None and layer.flat % SECTOR:
                raise Unsupported(layer.files[0], "", f"data from byte {layer.flat}")
        most = MAX_LEAVES * self.config().leaf_units * self.unit
        if self.flat is None and self.size > most:
            text = f"{self.size} bytes, mapped in pieces of {self.unit}: the most is {most}"
            raise Unsupported(file, "", text)

    def _add_files(self, layer: Image) -> None:
        direct = self.cache == "none" and _aligned(layer)
        for file in layer.files:
            fd = open_direct(file) if direct else -1
            self.files.append(DiskFile(file, fd, layer is self.image))
        if self.cache == "none" and not direct:
            log.info("%s: data is not aligned to %d, cached", layer.files[0], DIRECT_ALIGN)


def _aligned(layer: Image) -> bool:
    layout = layer.layout
    return (
        layer.cluster_size % DIRECT_ALIGN == 0
        and (layer.flat is None or layer.flat % DIRECT_ALIGN == 0)
        and (layout is None or layout.bias % DIRECT_ALIGN == 0)
    )


def open_direct(file: HostFile) -> int:
    """A second descriptor of the file with O_DIRECT, or -1 where the host cannot.

    Asking is not enough: some file systems accept the flag and fail at the first read.
    """
    flags = (os.O_RDWR if file.writable else os.O_RDONLY) | os.O_DIRECT | os.O_CLOEXEC
    try:
        # By the descriptor: the path may lead elsewhere by now.
        fd = os.open(f"/proc/self/fd/{file.fd}", flags)
    except OSError as error:
        log.info("%s: no direct I/O (%s), cached", file, error.strerror)
        return -1
    try:
        with mmap.mmap(-1, DIRECT_ALIGN) as page:
            os.preadv(fd, [page], 0)
    except OSError as error:
        os.close(fd)
        if error.errno != errno.EINVAL:
            raise
        log.info("%s: no direct I/O (%s), cached", file, error.strerror)
        return -1
    return fd


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()
