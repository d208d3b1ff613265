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


def check_parallels(store: Store) -> Findings:
    """No cluster twice, all of them in the file, and each of them named.

    Source: qemu's docs/interop/parallels.
    """
    found = Findings()
    magic, _, _, _, sectors, count = struct.unpack_from("<16sIIIII", store.read(0, 36))
    in_use, data = struct.unpack_from("<II", store.read(44, 8))
    cluster = sectors * 512
    scale = cluster if magic == b"WithouFreSpacExt" else 512
    start = data * 512 or -(-(64 + 4 * count) // 512) * 512
    used: Counter[int] = Counter()
    for index, entry in enumerate(used_entries(store, 64, 4 * count, "<I")):
        if not entry:
            continue
        host = entry * scale
        used[host] += 1
        if host < start or host + cluster > store.size:
            found.wrong.append(f"entry {index} at {host:#x}, file ends at {store.size:#x}")
    found.wrong += [f"cluster at {host:#x}: {n} owners" for host, n in used.items() if n > 1]
    first = -(-start // scale) * scale
    found.leaked += [
        f"cluster at {host:#x}: nothing names it"
        for host in range(first, store.size, cluster)
        if host not in used
    ]
    if in_use:
        found.leaked.append("the image was not closed")
    return found
