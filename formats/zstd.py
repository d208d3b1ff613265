"""zstd, with the system's libzstd.

Python has a decoder of its own only from 3.14 on, and every Debian has this library, because dpkg
needs it.  Source: zstd.h, "Simple API", "Streaming decompression"; both are stable since 1.4.
"""

from __future__ import annotations

import ctypes

LIBRARY = "libzstd.so.1"
WINDOW_LOG_MAX = 27  # the library's own default: a frame may ask for 128 MiB of memory
_WINDOW_LOG_MAX_PARAMETER = 100  # ZSTD_d_windowLogMax


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer: address, size, position."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("at", ctypes.c_size_t),
    )


class ZstdError(Exception):
    """What does not decompress, in the library's words."""


class Decompressor:
    """OSError where the library is missing."""

    def __init__(self) -> None:
        library = ctypes.CDLL(LIBRARY)
        self._create = library.ZSTD_createDCtx
        self._create.restype = ctypes.c_void_p
        self._free = library.ZSTD_freeDCtx
        self._free.argtypes = [ctypes.c_void_p]
        self._set = library.ZSTD_DCtx_setParameter
        self._set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        self._stream = library.ZSTD_decompressStream
        self._stream.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._stream.restype = ctypes.c_size_t
        self._is_error = library.ZSTD_isError
        self._is_error.argtypes = [ctypes.c_size_t]
        self._name = library.ZSTD_getErrorName
        self._name.argtypes = [ctypes.c_size_t]
        self._name.restype = ctypes.c_char_p

    def decompress(self, data: bytes, size: int) -> bytes:
        """`size` bytes, or fewer, from whole frames; what follows the last one is ignored."""
        result = ctypes.create_string_buffer(size)
        source = _Buffer(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p), len(data), 0)
        target = _Buffer(ctypes.addressof(result), size, 0)
        stream = self._create()
        if not stream:
            raise MemoryError
        try:
            self._set(stream, _WINDOW_LOG_MAX_PARAMETER, WINDOW_LOG_MAX)
            left = 1
            while target.at < size:
                before = source.at, target.at
                left = self._stream(stream, ctypes.byref(target), ctypes.byref(source))
                if self._is_error(left):
                    raise ZstdError(self._name(left).decode("ascii", "replace"))
                if (source.at, target.at) == before:
                    break
        finally:
            self._free(stream)
        if left:
            raise ZstdError(f"the frame does not end after {target.at} bytes")
        return result.raw[: target.at]


class Compressor:
    """OSError where the library is missing.  Several threads may compress at once."""

    LEVEL = 3  # the library's default

    def __init__(self) -> None:
        library = ctypes.CDLL(LIBRARY)
        self._bound = library.ZSTD_compressBound
        self._bound.argtypes = [ctypes.c_size_t]
        self._bound.restype = ctypes.c_size_t
        self._compress = library.ZSTD_compress
        self._compress.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_int,
        ]
        self._compress.restype = ctypes.c_size_t
        self._is_error = library.ZSTD_isError
        self._is_error.argtypes = [ctypes.c_size_t]

    def compress(self, data: bytes) -> bytes:
        """One frame."""
        target = ctypes.create_string_buffer(self._bound(len(data)))
        length = self._compress(target, len(target), data, len(data), self.LEVEL)
        if self._is_error(length):
            raise MemoryError("zstd")
        return target.raw[:length]
