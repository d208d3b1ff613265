"""Why rings that speak ublk are driven from C: what the PyPI wrapper `liburing` can and cannot do.

In a process of its own, because the wrapper's wheel of 2026.3.30 dies with SIGILL on processors
without AVX-512.
"""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

MAKES_A_RING = """
import liburing
ring = liburing.Ring()
liburing.io_uring_queue_init(2, ring, 0)
liburing.io_uring_queue_exit(ring)
"""
# A command's payload lies behind the first 48 bytes of an entry; no attribute of one reaches it.
HAS_NO_PAYLOAD = """
import liburing
ring = liburing.Ring()
liburing.io_uring_queue_init(2, ring, 0)
names = {name for name in dir(liburing.io_uring_get_sqe(ring)) if not name.startswith("_")}
assert names == {"fd", "flags", "ioprio", "len", "opcode", "personality", "user_data"}, names
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode == -signal.SIGILL:
        pytest.skip("the wheel of liburing needs a processor with AVX-512")
    assert done.returncode == 0, done.stdout + done.stderr


def test_wrapper_makes_a_ring() -> None:
    run(MAKES_A_RING)


def test_wrapper_has_no_way_to_fill_a_commands_payload() -> None:
    run(HAS_NO_PAYLOAD)
