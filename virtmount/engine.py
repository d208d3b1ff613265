"""The typed face of the C engine: numbers and buffers in, results or OSError out.

Nothing is decided here.  native/engine.h says what each call does and from which thread it may
come.  Buffers are handed over without a copy, so they must stay alive and unchanged until the
call returns; every call lets other Python threads run meanwhile.
"""

from __future__ import annotations

import bisect
import enum
import errno
import functools
import importlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from virtmount.errors import NoTransport
from virtmount.image import Cipher, Dirty, Layout, Run, Span

FAULT_BATCH = 256
DIRTY_BATCH = 1 << 16
POOL_BATCH = 256

# Anything with the buffer protocol; collections.abc.Buffer comes with Python 3.12.
Buffer = bytes | bytearray | memoryview


@functools.cache
def native() -> Any:
    """The compiled module (`ffi`, `lib`), loaded at first use: drivers need no compiler."""
    try:
        _engine = importlib.import_module("virtmount._engine")
    except ImportError as error:
        raise NoTransport(
            "virtmount", "", f"the C engine is not built ({error})", hint="make build"
        ) from error
    return _engine


class FaultType(enum.IntEnum):
    FILL = 1
    INFLATE = 2
    REFILL = 3
    BEGIN = 4
    FLUSH = 5
    DISCARD = 6
    ZERO = 7
    FAILED = 8
    LOST = 9
    DEVICE = 10


class Flag(enum.IntFlag):
    READ_ONLY = 1
    WRITETHROUGH = 2
    CAN_ZERO = 4
    CAN_DISCARD = 8
    FLAT = 16
    IDENTITY = 32


class Op(enum.IntEnum):
    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 5


class IoFlag(enum.IntFlag):
    FUA = 1
    NOUNMAP = 2


NO_FLAGS = Flag(0)
CIPHER_MODES = {"xts": 1, "cbc": 2}  # enum vm_cipher_mode
NO_IO_FLAGS = IoFlag(0)


class UblkMode(enum.IntEnum):
    USER_COPY = 1
    AUTO_BUF = 2


class Fault(NamedTuple):
    """struct vm_fault."""

    id: int
    type: FaultType
    offset: int
    length: int
    arg: int


@dataclass(frozen=True, slots=True)
class Config:
    """struct vm_config."""

    size: int
    unit_shift: int
    cluster_shift: int
    leaf_units: int
    sector_size: int = 512
    flags: Flag = NO_FLAGS
    flat_offset: int = 0
    flat_file: int = 0
    identity_file: int = 0
    map_bytes: int = 0


def check(result: int) -> int:
    """A result of the engine, or the OSError that it stands for."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


class Engine:
    """One vm_engine.  close() only after run() has returned, or was never called."""

    def __init__(self, config: Config) -> None:
        module = native()
        self._ffi, self._lib = module.ffi, module.lib
        c_config = self._ffi.new(
            "struct vm_config *",
            {
                "size": config.size,
                "flat_offset": config.flat_offset,
                "flat_file": config.flat_file,
                "identity_file": config.identity_file,
                "sector_size": config.sector_size,
                "unit_shift": config.unit_shift,
                "cluster_shift": config.cluster_shift,
                "leaf_units": config.leaf_units,
                "flags": int(config.flags),
                "map_bytes": config.map_bytes,
            },
        )
        ret = self._ffi.new("struct vm_engine **")
        check(self._lib.vm_engine_create(c_config, ret))
        self._engine = ret[0]
        self.config = config
        self._faults = self._ffi.new("struct vm_fault[]", FAULT_BATCH)
        self._dirty = self._ffi.new("struct vm_dirty[]", DIRTY_BATCH)
        self._null = self._ffi.NULL

    def close(self) -> None:
        """Free it; harmless when repeated.  No other call may come afterwards."""
        if self._engine:
            self._lib.vm_engine_destroy(self._engine)
            self._engine = self._null

    def add_file(self, fd: int, *, direct_fd: int = -1, direct_align: int = 0, owned: bool) -> int:
        return check(
            self._lib.vm_engine_add_file(self._engine, fd, direct_fd, direct_align, int(owned))
        )

    def set_cipher(self, file: int, cipher: Cipher) -> None:
        """Before run().  OSError EINVAL: no such mode or key."""
        if len(cipher.key) > 64:
            check(-errno.EINVAL)
        c_cipher = self._ffi.new(
            "struct vm_cipher *",
            {
                "mode": CIPHER_MODES[cipher.mode],
                "key_length": len(cipher.key),
                "essiv": cipher.essiv,
                "by_guest": cipher.by_guest,
                "origin": cipher.origin,
                "key": cipher.key,
            },
        )
        check(self._lib.vm_engine_set_cipher(self._engine, file, c_cipher))
        self._ffi.memmove(c_cipher.key, bytes(64), 64)

    def set_zones(self, zones: Sequence[tuple[int, int]]) -> None:
        """(end, file) of each zone of the disk; before run()."""
        ends = self._ffi.new("uint64_t[]", [end for end, _ in zones])
        files = self._ffi.new("uint32_t[]", [file for _, file in zones])
        check(self._lib.vm_engine_set_zones(self._engine, ends, files, len(zones)))

    def run(self) -> None:
        """The loop; returns after stop().  OSError: there is no io_uring."""
        check(self._lib.vm_engine_run(self._engine))

    def stop(self) -> None:
        self._lib.vm_engine_stop(self._engine)

    # Questions and answers

    def faults_wait(self, timeout_ms: int = -1) -> list[Fault]:
        """At least one fault, or none at timeout.  OSError ESHUTDOWN once the loop has ended."""
        faults = self._faults
        count = check(self._lib.vm_faults_wait(self._engine, faults, FAULT_BATCH, timeout_ms))
        return [_fault(faults[i]) for i in range(count)]

    def fill(self, fault_id: int, entries: Any, error: int = 0) -> None:
        """Answer FILL with an array of leaf_units 64-bit map entries, or None and -errno."""
        if entries is None:
            check(self._lib.vm_fill(self._engine, fault_id, self._null, 0, error))
            return
        pointer = self._ffi.from_buffer("uint64_t[]", entries)
        check(self._lib.vm_fill(self._engine, fault_id, pointer, len(entries), error))

    def inflated(self, fault_id: int, offset: int, data: Buffer, error: int = 0) -> None:
        pointer = self._ffi.from_buffer(data)
        check(self._lib.vm_inflated(self._engine, fault_id, offset, pointer, len(data), error))

    def pool_add(self, run: Run, *, reused: bool) -> None:
        check(
            self._lib.vm_pool_add(self._engine, run.file, run.host_offset, run.count, int(reused))
        )

    def answer(self, fault_id: int, error: int = 0) -> None:
        check(self._lib.vm_answer(self._engine, fault_id, error))

    def dirty_take(self) -> list[Dirty]:
        """New mappings, at most DIRTY_BATCH; unless there are none, dirty_done() must follow."""
        count = check(self._lib.vm_dirty_take(self._engine, self._dirty, DIRTY_BATCH))
        return [
            Dirty(row.cluster, row.host_offset, bool(row.barrier))
            for row in self._ffi.unpack(self._dirty, count)
        ]

    def dirty_done(self, error: int = 0) -> None:
        check(self._lib.vm_dirty_done(self._engine, error))

    def drain(self) -> None:
        check(self._lib.vm_drain(self._engine))

    def pool_take(self) -> list[Run]:
        """All runs of the pool; it is empty afterwards."""
        ranges = self._ffi.new("struct vm_range[]", POOL_BATCH)
        files = self._ffi.new("uint32_t[]", POOL_BATCH)
        runs: list[Run] = []
        while count := check(self._lib.vm_pool_take(self._engine, ranges, files, POOL_BATCH)):
            for i in range(count):
                clusters = ranges[i].length >> self.config.cluster_shift
                runs.append(Run(ranges[i].offset, clusters, files[i]))
        return runs

    def set_failed(self, error: int) -> None:
        check(self._lib.vm_set_failed(self._engine, error))

    # Requests

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer; offset and length are multiples of 512 inside the disk."""
        pointer = self._ffi.from_buffer(buffer, require_writable=True)
        self._io(Op.READ, offset, len(buffer), pointer, 0)

    def read(self, offset: int, length: int) -> bytes:
        # Not a bytearray: that would be zeroed first and then be copied all the same.
        data = _unzeroed(length)
        self._io(Op.READ, offset, length, data, 0)
        return bytes(self._ffi.buffer(data, length))

    def write(self, offset: int, data: Buffer, flags: IoFlag = NO_IO_FLAGS) -> None:
        self._io(Op.WRITE, offset, len(data), self._ffi.from_buffer(data), int(flags))

    def io(self, op: Op, offset: int = 0, length: int = 0, flags: IoFlag = NO_IO_FLAGS) -> None:
        """A request without data: FLUSH, DISCARD, WRITE_ZEROES."""
        self._io(op, offset, length, self._null, int(flags))

    def _io(self, op: Op, offset: int, length: int, data: Any, flags: int) -> None:
        if not self._engine:
            check(-errno.ESHUTDOWN)
        check(self._lib.vm_io(self._engine, op, offset, length, data, flags))

    def stats(self) -> dict[str, Any]:
        """struct vm_stats; `faults` is a dict by the fault's name, with `all`."""
        c_stats = self._ffi.new("struct vm_stats *")
        check(self._lib.vm_stats(self._engine, c_stats))
        result: dict[str, Any] = {}
        for name, _ in self._ffi.typeof("struct vm_stats").fields:
            if name == "faults":
                counts = list(c_stats.faults)
                result[name] = {kind.name.lower(): counts[kind] for kind in FaultType}
                result[name]["all"] = counts[0]
            elif name != "reserved":
                result[name] = getattr(c_stats, name)
        return result

    def ublk_serve(self, cdev_fd: int, depth: int, max_io: int, mode: UblkMode) -> None:
        """Serve queue 0; returns when START_DEV may follow.  The engine closes cdev_fd."""
        check(self._lib.vm_ublk_serve(self._engine, cdev_fd, depth, max_io, mode))


def _fault(c_fault: Any) -> Fault:
    return Fault(c_fault.id, FaultType(c_fault.type), c_fault.offset, c_fault.length, c_fault.arg)


@functools.cache
def _allocator() -> Any:
    return native().ffi.new_allocator(should_clear_after_alloc=False)


def _unzeroed(length: int) -> Any:
    return _allocator()("char[]", length)


def ublk_control(control_fd: int, command: int, payload: Buffer) -> int:
    """One control command; `payload` is a struct ublksrv_ctrl_cmd of 32 bytes.  Blocks."""
    module = native()
    pointer = module.ffi.from_buffer(payload)
    return check(module.lib.vm_ublk_control(control_fd, command, pointer))


# Decoding tables: what the Pager needs of native/decode.c.


class Ranges:
    """Sorted host ranges as a C array; overlapping and adjacent ones are merged.

    An image may have a million tables, so they are not kept as Python objects.
    """

    def __init__(self, spans: Iterable[Span], file: int = 0) -> None:
        """Those of `spans` that lie in file number `file`."""
        merged, late = _merge(span[:2] for span in spans if span.file == file)
        if late:
            pairs = zip(merged[::2], merged[1::2], strict=True)
            merged, late = _merge(sorted([*pairs, *late]))
        self._pairs = merged
        self.count = len(merged) // 2
        self.array = native().ffi.from_buffer("struct vm_range[]", merged)

    def touch(self, offset: int, length: int) -> bool:
        """Whether any of them touches [offset, offset + length)."""
        pairs = self._pairs
        i = bisect.bisect_right(
            range(self.count), offset, key=lambda i: pairs[2 * i] + pairs[2 * i + 1]
        )
        return i < self.count and pairs[2 * i] < offset + length


def _merge(ranges: Iterable[tuple[int, int]]) -> tuple[array[int], list[tuple[int, int]]]:
    """offset, length, offset … of those in order, merged, and a list of those out of order."""
    merged = array("Q")
    late = []
    start = end = -1
    for offset, length in ranges:
        if length <= 0:
            continue
        if offset > end:
            merged.append(offset)
            merged.append(length)
            start, end = offset, offset + length
        elif offset < start:
            late.append((offset, length))
        elif offset + length > end:
            end = offset + length
            merged[-1] = end - start
    return merged, late


class Decoder:
    """One layer's Layout as the C side wants it."""

    def __init__(self, layout: Layout, layer: int, unit: int, repeat: int) -> None:
        module = native()
        self._ffi, self._decode = module.ffi, module.lib.vm_decode
        self._layer, self._unit, self._repeat = layer, unit, repeat
        if len(layout.rules) > 5:
            raise ValueError(f"{len(layout.rules)} rules, the engine knows 5")
        self._layout = self._ffi.new(
            "struct vm_layout *",
            {
                "width": layout.width,
                "big_endian": layout.byteorder == "big",
                "mask": layout.mask,
                "scale": layout.scale,
                "bias": layout.bias,
                "low": layout.low,
                "align": layout.align,
                "rule_count": len(layout.rules),
                "rules": [
                    {"mask": rule.mask, "value": rule.value, "kind": int(rule.kind)}
                    for rule in layout.rules
                ],
            },
        )
        self._width = layout.width

    def decode(
        self,
        raw: bytes,
        entries: Any,
        at: int,
        count: int,
        *,
        source: int,
        skip: int,
        limit: int,
        forbidden: Ranges | None,
    ) -> int:
        """Fill entries[at : at + count] where they are still ABSENT; how many became PARTIAL."""
        if not 0 <= at <= at + count <= len(entries):
            raise ValueError(f"units {at}+{count} of {len(entries)}")
        pointer = self._ffi.from_buffer("uint64_t[]", entries)
        return check(
            self._decode(
                self._layout,
                self._ffi.from_buffer(raw),
                len(raw) // self._width,
                source,
                self._layer,
                self._unit,
                self._repeat,
                skip,
                limit,
                forbidden.array if forbidden else self._ffi.NULL,
                forbidden.count if forbidden else 0,
                pointer + at,
                count,
            )
        )
