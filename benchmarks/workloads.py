"""What is measured: fio workloads and the servers and formats they run on."""

from __future__ import annotations

from typing import NamedTuple


class Workload(NamedTuple):
    """fio's rw, bs and iodepth.  fresh: on an empty image each time, over its whole size once."""

    rw: str
    bs: str
    depth: int
    fresh: bool = False


WORKLOADS = {
    "4k random read, depth 1": Workload("randread", "4k", 1),
    "4k random read, depth 32": Workload("randread", "4k", 32),
    "4k random write, depth 1": Workload("randwrite", "4k", 1),
    "4k random write, depth 32": Workload("randwrite", "4k", 32),
    "128k sequential read, depth 8": Workload("read", "128k", 8),
    "128k sequential write, depth 8": Workload("write", "128k", 8),
    "allocating 64k sequential write, depth 16": Workload("write", "64k", 16, fresh=True),
    "allocating 4k random write, depth 32": Workload("randwrite", "4k", 32, fresh=True),
}

# server/format.  A format's images have every cluster allocated, out of order.  The chain is ten
# QCOW2 images deep, each holding a tenth of the disk here and there; it is read only.
CHAIN = "qcow2-chain"
CHAIN_LAYERS = 10
SUBJECTS = (
    "losetup/raw",
    "virtmount/raw",
    "virtmount/qcow2",
    "qemu-nbd/qcow2",
    "virtmount/vhdx",
    "qemu-nbd/vhdx",
    "virtmount/vdi",
    "qemu-nbd/vdi",
    "virtmount/vhd",
    "qemu-nbd/vhd",
    "virtmount/vmdk",
    "qemu-nbd/vmdk",
    f"virtmount/{CHAIN}",
    f"qemu-nbd/{CHAIN}",
)


def applies(subject: str, workload: Workload) -> bool:
    """Whether a subject takes part: a write to the chain would make it shorter."""
    return "read" in workload.rw or not subject.endswith(CHAIN)
