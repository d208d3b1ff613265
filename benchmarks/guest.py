"""The guest's side of benchmarks.compare: makes images, attaches them, runs fio, writes JSON."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.workloads import (
    CHAIN,
    CHAIN_LAYERS,
    SUBJECTS,
    WORKLOADS,
    Workload,
    applies,
)

IMAGES = Path("/mnt")
SUFFIX = {
    "raw": "img",
    "qcow2": "qcow2",
    "vhdx": "vhdx",
    "vdi": "vdi",
    "vhd": "vhd",
    "vmdk": "vmdk",
    CHAIN: "qcow2",
}
QEMU_NAMES = {"vhd": "vpc", CHAIN: "qcow2"}
OUR_NAMES = {CHAIN: "qcow2"}
# Without it qemu rounds the size of a VHD up to whole cylinders.
OPTIONS = {"vhd": ("-o", "force_size=on")}
CHUNK = 1 << 20


def sh(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def create(path: Path, kind: str, size: int) -> None:
    path.unlink(missing_ok=True)
    if kind == "raw":
        sh("truncate", "-s", str(size), str(path))
    else:
        name, options = QEMU_NAMES.get(kind, kind), OPTIONS.get(kind, ())
        sh("qemu-img", "create", "-q", "-f", name, *options, str(path), str(size))


def fill(path: Path, kind: str, size: int) -> None:
    """Write the whole image in 1 MiB pieces out of order, so that nothing lies in sequence."""
    order = list(range(0, size, CHUNK))
    random.Random(1).shuffle(order)
    if kind != CHAIN:
        write(path, QEMU_NAMES.get(kind, kind), order)
        return
    for layer in range(CHAIN_LAYERS):
        below = path.with_suffix(f".{layer - 1}")
        here = path if layer == CHAIN_LAYERS - 1 else path.with_suffix(f".{layer}")
        backing = ("-b", str(below), "-F", "qcow2") if layer else ()
        sh("qemu-img", "create", "-q", "-f", "qcow2", *backing, str(here), str(size))
        write(here, "qcow2", order[layer::CHAIN_LAYERS])


def write(path: Path, format: str, order: list[int]) -> None:
    commands = "".join(f"write -q -P {at >> 20 & 255} {at} {CHUNK}\n" for at in order)
    subprocess.run(
        ["qemu-io", "-n", "-f", format, str(path)],
        input=commands,
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
    )


class Servers:
    """Attached devices; each attach returns the path and a way to detach."""

    def __init__(self, cache: str) -> None:
        self.cache = cache
        self.nbd = 0

    def attach(self, server: str, kind: str, path: Path) -> tuple[str, Callable[[], None]]:
        if server == "losetup":
            direct = "on" if self.cache == "none" else "off"
            device = sh("losetup", "-f", "--show", f"--direct-io={direct}", str(path))
            return device, lambda: void(sh("losetup", "-d", device))
        if server == "virtmount":
            command = [sys.executable, "-m", "virtmount.cli"]
            device = sh(
                *command, "attach", "--transport", "ublk", "--format", OUR_NAMES.get(kind, kind),
                "--cache", self.cache, str(path),
            )  # fmt: skip
            return device, lambda: void(sh(*command, "detach", device))
        device = f"/dev/nbd{self.nbd}"
        self.nbd += 1
        sh(
            "qemu-nbd", "-c", device, "-f", QEMU_NAMES.get(kind, kind), f"--cache={self.cache}",
            "--aio=io_uring", "--discard=unmap", str(path),
        )  # fmt: skip
        sysfs = Path("/sys/block") / device.removeprefix("/dev/") / "size"
        while sysfs.read_text().strip() == "0":  # qemu-nbd -c returns before the kernel is ready
            time.sleep(0.05)
        return device, lambda: void(sh("qemu-nbd", "-d", device))


def void(_: str) -> None:
    """A detach has no result."""


def fio(device: str, workload: Workload, seconds: float, ios: int) -> float:
    """IOPS over `seconds`, or over `ios` requests where that is not 0.

    A fresh workload is timed over the whole device, the final flush included.
    """
    command = [
        "fio", "--name=b", f"--filename={device}", f"--rw={workload.rw}", f"--bs={workload.bs}",
        f"--iodepth={workload.depth}", "--ioengine=io_uring", "--direct=1", "--output-format=json",
        "--randrepeat=1", "--allow_mounted_write=0",
    ]  # fmt: skip
    if workload.fresh:
        command += ["--end_fsync=1"]
    elif ios:
        command += [f"--number_ios={ios}"]
    else:
        command += ["--time_based", f"--runtime={seconds}", "--ramp_time=0.3"]
    report = json.loads(sh(*command))["jobs"][0]
    side = report["read"] if "read" in workload.rw else report["write"]
    if workload.fresh:
        return float(side["total_ios"] / (report["job_runtime"] / 1000))
    return float(side["iops"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--cache", default="none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--ios", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="images on tmpfs")
    parser.add_argument("--only", default="", help="subjects, with commas between them")
    arguments = parser.parse_args()
    subjects = arguments.only.split(",") if arguments.only else SUBJECTS
    size = arguments.size << 20
    for module in ("nbd", "ublk_drv", "loop", "xfs"):
        sh("modprobe", module)
    if arguments.memory:
        sh("mount", "-t", "tmpfs", "-o", "size=90%", "images", str(IMAGES))
    else:
        sh("mkfs.xfs", "-q", "/dev/scratch/images")
        sh("mount", "/dev/scratch/images", str(IMAGES))
    servers = Servers(arguments.cache)
    attached = {}
    for subject in subjects:
        server, _, kind = subject.partition("/")
        path = IMAGES / f"{server}-{kind}.{SUFFIX[kind]}"
        if kind != CHAIN:
            create(path, kind, size)
        fill(path, kind, size)
        attached[subject] = servers.attach(server, kind, path)[0]
        print(f"{subject}: {attached[subject]}", file=sys.stderr, flush=True)
    results: dict[str, dict[str, list[float]]] = {
        name: {subject: [] for subject in subjects if applies(subject, workload)}
        for name, workload in WORKLOADS.items()
    }
    for number in range(arguments.rounds):
        for name, workload in WORKLOADS.items():
            for subject in results[name]:
                server, _, kind = subject.partition("/")
                if workload.fresh:
                    path = IMAGES / f"fresh.{SUFFIX[kind]}"
                    create(path, kind, size // 2)
                    device, detach = servers.attach(server, kind, path)
                    value = fio(device, workload, arguments.seconds, arguments.ios)
                    detach()
                else:
                    value = fio(attached[subject], workload, arguments.seconds, arguments.ios)
                results[name][subject].append(value)
                print(
                    f"round {number + 1}: {name}: {subject}: {value:.0f}",
                    file=sys.stderr,
                    flush=True,
                )
    arguments.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
