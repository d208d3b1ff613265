"""Builds virtmount._engine from native/*.c; engine.h is its only declaration (the CDEF part)."""

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in HERE.glob("*.c"))

header = (HERE / "engine.h").read_text()
match = re.search(r"/\* CDEF \*/(.*)/\* END CDEF \*/", header, re.DOTALL)
assert match, "engine.h has lost its CDEF marks"

ffibuilder = FFI()
ffibuilder.cdef(match.group(1))
ffibuilder.set_source(
    "virtmount._engine",
    '#include "engine.h"\n',
    sources=SOURCES,
    include_dirs=["native"],
    depends=["native/engine.h", "native/internal.h"],
    libraries=["uring", "crypto"],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(ROOT), verbose=True)
