"""What opening a 64 TiB image costs: seconds and resident memory.  python3 -m benchmarks.large

The QCOW2 image has a full first-level table (131072 second-level tables, all there); the VHDX has
1 MiB blocks, so a block table of 512 MiB.  Each is opened for writing in a fresh process, then one
cluster is read and one written at the end of the disk.
"""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZE = 64 << 40
CLUSTER = 65536


def full_qcow2(path: Path) -> None:
    """Let every first-level entry name a table of its own; sparse, so all of them are empty."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE)], check=True)
    with path.open("r+b") as file:
        header = file.read(64)
        entries, table, counts_table = struct.unpack(">IQQ", header[36:56])
        first = -(-path.stat().st_size // CLUSTER)  # cluster number of the first new table
        blocks = first + entries  # and of the first new refcount block
        per_block = CLUSTER // 2
        total = blocks + -(-(blocks + 64) // per_block)
        file.seek(table)
        offsets = ((first + i) * CLUSTER | 1 << 63 for i in range(entries))
        file.write(struct.pack(f">{entries}Q", *offsets))
        for number, start in enumerate(range(0, total, per_block)):
            used = min(per_block, total - start)
            file.seek((blocks + number) * CLUSTER)
            file.write(struct.pack(f">{used}H", *[1] * used).ljust(CLUSTER, b"\0"))
            file.seek(counts_table + number * 8)
            file.write(struct.pack(">Q", (blocks + number) * CLUSTER))


def vhdx(path: Path) -> None:
    options = ["-o", "block_size=1M,subformat=dynamic"]
    create = ["qemu-img", "create", "-q", "-f", "vhdx", *options, str(path), str(SIZE)]
    subprocess.run(create, check=True)


def measure(path: str) -> dict[str, float]:
    import virtmount

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    disk = virtmount.open(path, writable=True)
    opened = time.perf_counter()
    disk.pread(SIZE - CLUSTER, 4096)
    disk.pwrite(SIZE - CLUSTER, b"x" * 4096)
    disk.flush()
    used = time.perf_counter()
    disk.close()
    return {
        "open_seconds": opened - start,
        "first_use_seconds": used - opened,
        "close_seconds": time.perf_counter() - used,
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "of_it_interpreter_and_imports": before << 10,
    }


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    print("| image | open (s) | first use (s) | close (s) | resident (MB) | before (MB) |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("qcow2, full L1", full_qcow2), ("vhdx, 1 MiB blocks", vhdx)):
            path = Path(folder) / "disk"
            make(path)
            command = [sys.executable, "-m", "benchmarks.large", str(path)]
            got = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(
                f"| {name} | {got['open_seconds']:.2f} | {got['first_use_seconds']:.2f} "
                f"| {got['close_seconds']:.2f} | {got['resident_bytes'] / 1e6:.0f} "
                f"| {got['of_it_interpreter_and_imports'] / 1e6:.0f} |"
            )
            path.unlink()


if __name__ == "__main__":
    main()
