"""What must hold of QED and Parallels images after any cut, read without the drivers."""

from __future__ import annotations

import struct
from collections import Counter

from tests.crash.checkers import Findings, used_entries
from tests.crash.simulate import Store


def check_qed(store: Store) -> Findings:
    """No cluster twice, all of them in the file, and each of them named.

    Source: qemu's docs/interop/qed_spec.
    """
    found = Findings()
    cluster, table_size, header = struct.unpack_from("<III", store.read(4, 12))
    features, _, _, l1 = struct.unpack_from("<QQQQ", store.read(16, 32))
    table = cluster * table_size
    used: Counter[int] = Counter(range(header))
    used.update(range(l1 // cluster, (l1 + table) // cluster))
    for number, place in enumerate(used_entries(store, l1, table, "<Q")):
        if not place:
            continue
        if place % cluster or place + table > store.size:
            found.wrong.append(f"table {number} at {place:#x}, file ends at {store.size:#x}")
            continue
        used.update(range(place // cluster, (place + table) // cluster))
        for index, entry in enumerate(used_entries(store, place, table, "<Q")):
            if entry < 2:
                continue
            used[entry // cluster] += 1
            if entry % cluster or entry + cluster > store.size:
                found.wrong.append(f"entry {number}.{index}: {entry:#x}")
    found.wrong += [f"cluster {index:#x}: {n} owners" for index, n in used.items() if n > 1]
    clusters = -(-store.size // cluster)
    unused = [index for index in range(clusters) if index not in used]
    found.leaked += [f"cluster {index:#x}: nothing names it" for index in unused]
    if features & 2:
        found.leaked.append("the image was not closed")
    return found
