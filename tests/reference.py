"""The slow, obvious engine: one request at a time, no cache, every table read again each time.

It is the oracle of the C engine and of the drivers: what it does with an Image is what the
contract in virtmount/image.py asks for, in the plainest order.  All host writes go through the
HostFile methods pwrite, truncate, punch and sync of the image's files, so that a subclass of
HostFile records or fails each of them.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from virtmount import hostfile
from virtmount.formats.luks import crypt
from virtmount.hostfile import HostFile
from virtmount.image import Dirty, Extent, Image, Kind, Run, extents
from virtmount.plan import Plan

POOL = 4  # host clusters asked for at a time
ZERO_STEP = 1 << 20
SECTOR = 512  # what is encrypted at once
PADDING = 512  # a parent ends at its last sector


class Place(NamedTuple):
    """A host cluster that no table names yet."""

    host_offset: int
    file: int
    barrier: bool


class Reference:
    """A chain as one disk: the image itself first, then its parents, which are only read."""

    def __init__(
        self,
        images: Sequence[Image],
        *,
        files_execute: Callable[[Plan, Sequence[HostFile]], None] = hostfile.execute,
    ) -> None:
        self.images = list(images)
        self.top = self.images[0]
        self.size = round_up(self.top.size, self.top.sector_size)
        self._execute = files_execute
        self._metadata = [tuple(image.metadata()) for image in self.images]
        self._begun = False
        self._closed = False
        self._failed: OSError | None = None  # the first failure of a plan or sync
        # By zone: host offset, file, reused.
        self._pools: defaultdict[int, deque[tuple[int, int, bool]]] = defaultdict(deque)
        self._dirty: dict[int, Place] = {}  # guest cluster -> where it will be mapped

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Reading

    def pread(self, offset: int, length: int) -> bytes:
        self._check_range(offset, length)
        return self._read(0, offset, length)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, Extent]]:
        """(layer, extent) for every piece of the range, clipped to it, through all parents.

        What no layer holds is ZERO in the last layer that was asked.
        """
        yield from self._resolve(0, offset, length)

    def _read(self, layer: int, offset: int, length: int) -> bytes:
        return b"".join(
            self._read_extent(at, extent) for at, extent in self._resolve(layer, offset, length)
        )

    def _read_extent(self, layer: int, extent: Extent) -> bytes:
        image = self.images[layer]
        if extent.kind is Kind.ZERO:
            return bytes(extent.length)
        if extent.kind in (Kind.DATA, Kind.SHARED):
            return self._read_host(image, extent)
        if extent.kind is Kind.COMPRESSED:
            cluster, within = divmod(extent.guest_offset, image.cluster_size)
            data = image.inflate(cluster)
            assert len(data) == image.cluster_size
            return data[within : within + extent.length]
        assert extent.kind is Kind.INVALID
        raise OSError(errno.EIO, f"cluster at {extent.guest_offset} has no valid host offset")

    @staticmethod
    def _read_host(image: Image, extent: Extent) -> bytes:
        file, cipher = image.files[extent.file], image.cipher
        if cipher is None:
            return file.pread_padded(extent.host_offset, extent.length)
        skip = extent.host_offset % SECTOR
        start = extent.host_offset - skip
        raw = file.pread_padded(start, round_up(skip + extent.length, SECTOR))
        first = (extent.guest_offset - skip if cipher.by_guest else start - cipher.origin) // SECTOR
        return crypt(cipher, encrypt=False)(first, raw)[skip : skip + extent.length]

    def _write_host(self, file: int, host_offset: int, guest_offset: int, data: bytes) -> None:
        """Guest bytes of the top image; parts of a sector are read and written with the rest."""
        cipher = self.top.cipher
        if cipher is not None:
            skip, end = host_offset % SECTOR, -(host_offset + len(data)) % SECTOR
            whole = Extent(
                guest_offset - skip, skip + len(data) + end, Kind.DATA, host_offset - skip, file
            )
            if skip or end:
                old = self._read_host(self.top, whole)
                data = old[:skip] + data + old[len(old) - end :]
            host_offset -= skip
            first = whole.guest_offset if cipher.by_guest else host_offset - cipher.origin
            data = crypt(cipher, encrypt=True)(first // SECTOR, data)
        self.top.files[file].pwrite(host_offset, data)

    def _resolve(self, layer: int, offset: int, length: int) -> Iterator[tuple[int, Extent]]:
        if layer == len(self.images):
            yield layer - 1, Extent(offset, length, Kind.ZERO)
            return
        image = self.images[layer]
        end = round_up(image.size, image.sector_size if layer == 0 else PADDING)
        inside = max(0, min(offset + length, end) - offset)
        for extent in clipped(extents(image, offset, inside) if inside else (), offset, inside):
            yield from self._resolve_extent(layer, extent)
        if inside < length:  # a parent that is shorter than its child
            yield layer, Extent(offset + inside, length - inside, Kind.ZERO)

    def _resolve_extent(self, layer: int, extent: Extent) -> Iterator[tuple[int, Extent]]:
        image = self.images[layer]
        if layer == 0 and self._dirty:
            cluster, within = divmod(extent.guest_offset, image.cluster_size)
            assert within + extent.length <= image.cluster_size
            if cluster in self._dirty:
                host_offset, file, _ = self._dirty[cluster]
                yield (
                    0,
                    extent._replace(kind=Kind.DATA, host_offset=host_offset + within, file=file),
                )
                return
        if extent.kind is Kind.ABSENT:
            yield from self._resolve(layer + 1, extent.guest_offset, extent.length)
        elif extent.kind in (Kind.DATA, Kind.SHARED) and self._in_metadata(layer, extent):
            yield layer, extent._replace(kind=Kind.INVALID, host_offset=0)
        else:
            yield layer, extent

    def _in_metadata(self, layer: int, extent: Extent) -> bool:
        """Whether the whole host cluster of this extent touches the image's own metadata."""
        image = self.images[layer]
        start = extent.host_offset - extent.guest_offset % image.cluster_size
        return any(
            start < offset + length and offset < start + image.cluster_size
            for offset, length, file in self._metadata[layer]
            if file == extent.file
        )

    # Writing

    def pwrite(self, offset: int, data: bytes) -> None:
        self._check_range(offset, len(data))
        if not data:
            return
        self._begin()
        size = self.top.cluster_size
        at = 0
        while at < len(data):
            cluster, within = divmod(offset + at, size)
            part = data[at : at + size - within]
            self._write_cluster(cluster, within, part)
            at += len(part)

    def _write_cluster(self, cluster: int, within: int, data: bytes) -> None:
        size = self.top.cluster_size
        if cluster in self._dirty:
            place = self._dirty[cluster]
            at = cluster * size + within
            self._write_host(place.file, place.host_offset + within, at, data)
            return
        own = [
            extent._replace(kind=Kind.INVALID)
            if extent.kind in (Kind.DATA, Kind.SHARED) and self._in_metadata(0, extent)
            else extent
            for extent in extents(self.top, cluster * size, size)
        ]
        if any(extent.kind is Kind.INVALID for extent in own):
            raise OSError(errno.EIO, f"cluster {cluster} has no valid host offset")
        if len(own) == 1 and own[0].kind is Kind.DATA:
            at = cluster * size + within
            self._write_host(own[0].file, own[0].host_offset + within, at, data)
            return
        old = list(self._old(cluster))
        hides = any(extent.kind is not Kind.ZERO for _, extent in old)
        content = bytearray(b"".join(self._read_extent(layer, extent) for layer, extent in old))
        assert len(content) == size
        if self.top.identity_file is not None:
            host_offset, file, reused = cluster * size, self.top.identity_file, False
        else:
            host_offset, file, reused = self._take(cluster * size)
        try:
            if hides or self.top.cipher is not None:
                content[within : within + len(data)] = data
                self._write_host(file, host_offset, cluster * size, bytes(content))
            else:
                # The rest of a pool cluster reads as zeros already.
                self.top.files[file].pwrite(host_offset + within, data)
        except OSError:
            if self.top.identity_file is None:
                self.top.release([Run(host_offset, 1, file)])
            raise
        self._dirty[cluster] = Place(host_offset, file, hides or reused)

    def _old(self, cluster: int) -> Iterator[tuple[int, Extent]]:
        """What the whole of a top cluster holds now; zeros past the disk's end."""
        size = self.top.cluster_size
        start = cluster * size
        inside = min(size, self.size - start)
        yield from self._resolve(0, start, inside)
        if inside < size:
            yield 0, Extent(start + inside, size - inside, Kind.ZERO)

    def _take(self, guest_offset: int) -> tuple[int, int, bool]:
        """A host cluster that reads as zeros and belongs to nobody."""
        zones = self.top.zones
        pool = self._pools[bisect_right([end for end, _ in zones[:-1]], guest_offset)]
        if not pool:
            if zones:
                reservation = self.top.reserve_at(POOL, guest_offset)
            else:
                reservation = self.top.reserve(POOL)
            self._carry_out(reservation.plan)
            for run in reservation.runs:
                for i in range(run.count):
                    place = run.host_offset + i * self.top.cluster_size
                    pool.append((place, run.file, reservation.reused))
        return pool.popleft()

    def flush(self) -> None:
        """Everything written so far is durable when this returns."""
        self._check_open()
        if not self._begun:
            return
        self._commit()
        self._sync()

    def discard(self, offset: int, length: int) -> None:
        """Give whole clusters back where the image can; the rest of the range is left alone."""
        self._check_range(offset, length)
        if not self._can_zero():
            return
        first, last = self._whole_clusters(offset, length)
        if first < last:
            self._begin()
            self._discard(first, last - first)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeros: whole clusters given back where the image can."""
        self._check_range(offset, length)
        if not length:
            return
        self._begin()
        size = self.top.cluster_size
        first, last = self._whole_clusters(offset, length) if self._can_zero() else (0, 0)
        if first >= last:
            self._write_zeros(offset, length)
            return
        self._write_zeros(offset, first * size - offset)
        self._write_zeros(last * size, offset + length - last * size)
        self._discard(first, last - first)

    def _can_zero(self) -> bool:
        caps = self.top.caps
        return caps.discard and (caps.zero_hides_parent or len(self.images) == 1)

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """First and one past the last cluster wholly inside; the disk's last may be cut short."""
        size = self.top.cluster_size
        end = offset + length
        if end == self.size:
            end = round_up(end, size)
        return -(-offset // size), end // size

    def _write_zeros(self, offset: int, length: int) -> None:
        while length > 0:
            step = min(length, ZERO_STEP)
            self.pwrite(offset, bytes(step))
            offset += step
            length -= step

    def _discard(self, first: int, count: int) -> None:
        self._commit()
        self._carry_out(self.top.discard(first, count))

    def close(self) -> None:
        """An orderly detach.  The files stay open."""
        if self._closed:
            return
        if self._begun and not self._failed:
            self.flush()
            left = [place for pool in self._pools.values() for place in pool]
            self.top.release([Run(host_offset, 1, file) for host_offset, file, _ in left])
            self._pools.clear()
            self._carry_out(self.top.end())
            self._sync()
        self._closed = True

    def _begin(self) -> None:
        self._check_open()
        if not self.top.caps.write or not self.top.files[0].writable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if self._failed:
            raise OSError(self._failed.errno, "an earlier write of metadata failed")
        if not self._begun:
            self._carry_out(self.top.begin())
            self._begun = True

    def _commit(self) -> None:
        if not self._dirty:
            return
        dirty = [
            Dirty(cluster, place.host_offset, place.barrier)
            for cluster, place in sorted(self._dirty.items())
        ]
        self._carry_out(self.top.commit(dirty))
        self._dirty.clear()

    def _carry_out(self, plan: Plan) -> None:
        """A plan that fails leaves the image in an unknown state: it is never written again."""
        self._refuse_failed()
        try:
            self._execute(plan, self.top.files)
        except OSError as error:
            self._failed = error
            raise

    def _sync(self) -> None:
        self._refuse_failed()
        try:
            hostfile.sync_all(self.top.files)
        except OSError as error:
            self._failed = error
            raise

    def _refuse_failed(self) -> None:
        if self._failed:
            raise OSError(self._failed.errno, "an earlier write of metadata failed")

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the disk is closed")

    def _check_range(self, offset: int, length: int) -> None:
        self._check_open()
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset}: the disk has {self.size}")


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def clipped(pieces: Iterator[Extent] | tuple[()], offset: int, length: int) -> Iterator[Extent]:
    """Extents cut to the range; what lies outside of it is left out."""
    for extent in pieces:
        start = max(extent.guest_offset, offset)
        end = min(extent.guest_offset + extent.length, offset + length)
        if start >= end:
            continue
        host_offset = extent.host_offset
        if extent.kind in (Kind.DATA, Kind.SHARED):
            host_offset += start - extent.guest_offset
        yield extent._replace(guest_offset=start, length=end - start, host_offset=host_offset)
