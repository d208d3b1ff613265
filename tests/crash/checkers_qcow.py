"""What must hold of a QCOW image, version 1, after any cut, read without the drivers."""

from __future__ import annotations

import struct
from collections import Counter

from tests.crash.checkers import Findings, used_entries
from tests.crash.simulate import Store


def check_qcow(store: Store) -> Findings:
    """No cluster twice, all of them in the file.

    Source: "The QCOW Image Format" (Mark McLoughlin), version 1.  What nothing names is used again
    by the next session: that is no leak.
    """
    found = Findings()
    size, bits, l2_bits, l1 = struct.unpack(">QBB6xQ", store.read(24, 24))
    cluster, table = 1 << bits, 8 << l2_bits
    entries = -(-size // (cluster << l2_bits))
    used: Counter[int] = Counter(range(-(-(l1 + entries * 8) // cluster)))
    packed: set[int] = set()
    for number, place in enumerate(used_entries(store, l1, entries * 8, ">Q")):
        if not place:
            continue
        if place + table > store.size:
            found.wrong.append(f"table {number} at {place:#x}, file ends at {store.size:#x}")
            continue
        used.update(range(place // cluster, -(-(place + table) // cluster)))
        for index, entry in enumerate(used_entries(store, place, table, ">Q")):
            if entry >> 63:
                start = entry & (1 << 63 - bits) - 1
                length = entry >> 63 - bits & cluster - 1
                packed.update(range(start // cluster, -(-(start + length) // cluster)))
                if start + length > store.size:
                    found.wrong.append(f"compressed {number}.{index}: {entry:#x}")
            elif entry:
                used[entry // cluster] += 1
                if entry % cluster or entry >= store.size:
                    found.wrong.append(f"entry {number}.{index}: {entry:#x}")
    used.update(packed)
    found.wrong += [f"cluster {index:#x}: {n} owners" for index, n in used.items() if n > 1]
    return found
