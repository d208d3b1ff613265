"""How much of the crash tests' space a run looks at: a seeded sample, unless the environment asks
for more.

    VIRTMOUNT_CRASH_POINTS    states per image and seed (0: all of them)
    VIRTMOUNT_CRASH_SEEDS     a number of workloads, or a range such as 100-163
    VIRTMOUNT_CRASH_FAILURES  how many N of "the Nth change fails" per image (0: until none fails)
    VIRTMOUNT_CRASH_KILLS     how often a process is killed per image

A night's campaign over one format, and the same under the real engine:

    VIRTMOUNT_CRASH_POINTS=0 VIRTMOUNT_CRASH_SEEDS=100-131 pytest tests/crash/test_plans.py -k vhdx
    VIRTMOUNT_CRASH_POINTS=500 VIRTMOUNT_CRASH_SEEDS=100-131 VIRTMOUNT_CRASH_FAILURES=0 \\
        VIRTMOUNT_CRASH_KILLS=300 pytest tests/crash/test_real_engine.py tests/crash/test_kill.py
"""

from __future__ import annotations

import os

POINTS = int(os.environ.get("VIRTMOUNT_CRASH_POINTS", "60"))
FAILURES = int(os.environ.get("VIRTMOUNT_CRASH_FAILURES", "6"))
KILLS = int(os.environ.get("VIRTMOUNT_CRASH_KILLS", "4"))
CAMPAIGN = any(name.startswith("VIRTMOUNT_CRASH_") for name in os.environ)
TIMEOUT = 7200 if CAMPAIGN else 300  # seconds a test


def seeds() -> list[int]:
    asked = os.environ.get("VIRTMOUNT_CRASH_SEEDS", "1")
    first, dash, last = asked.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else list(range(int(first)))
