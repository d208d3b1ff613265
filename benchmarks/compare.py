"""virtmount against qemu-nbd and losetup, on the same files under the same kernel.

    python3 -m benchmarks.compare [--quick] [--kernel newest] [--cache none] [--out DIR]

Boots a virtual machine (tests.vm), attaches the same images with each server, runs fio on all of
them in turn, round after round, and prints medians and ratios as a table.  With --out DIR also
writes results.json, results.md and, where matplotlib is installed, results.png.

Only ratios within one run mean something: the machine is emulated and shared.  With --icount the
machine's clock counts instructions of its one processor and the images lie in memory, so that the
figures repeat on a busy machine; they tell what a request costs, and nothing of parallelism.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.workloads import SUBJECTS, WORKLOADS
from tests.vm.machine import run

COUNTED_IOS = 4000
ROOT = Path(__file__).resolve().parent.parent
BAR_COLOURS = {"virtmount": "#2a6f97", "qemu-nbd": "#c1666b", "losetup": "#7a7a7a"}

Results = dict[str, dict[str, list[float]]]  # workload -> subject -> IOPS by round


def show(text: bytes) -> None:
    sys.stderr.buffer.write(text)
    sys.stderr.flush()


def measure(arguments: argparse.Namespace, folder: Path) -> Results:
    """Run the guest's side and return what it wrote."""
    out = folder / "raw.json"
    command = [sys.executable, "-m", "benchmarks.guest", str(out)]
    command += ["--cache", arguments.cache, "--rounds", str(arguments.rounds)]
    command += ["--seconds", str(arguments.seconds), "--size", str(arguments.size)]
    command += ["--only", arguments.only]
    disks = [f"{max(24 * arguments.size, 1024)}M:images:fast"]
    if arguments.icount:
        command += ["--memory", "--ios", str(COUNTED_IOS)]
        disks = []
    result = run(
        command,
        kernel=arguments.kernel,
        memory="4G",
        icount=arguments.icount,
        disks=disks,
        shares=[folder],
        timeout=arguments.timeout,
        cwd=ROOT,
        echo=show,
    )
    if result.status:
        sys.exit(f"the guest failed ({result.status})")
    answer: Results = json.loads(out.read_text())
    return answer


def table(results: Results) -> str:
    """Medians in IOPS, and each subject's ratio to qemu-nbd on the same format and to raw."""
    lines = ["| workload | subject | IOPS (median) | spread | / qemu-nbd | / virtmount raw |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for workload, subjects in results.items():
        for subject, values in subjects.items():
            if not values:
                continue
            server, _, kind = subject.partition("/")
            peer = subjects.get(f"qemu-nbd/{kind}") if server != "qemu-nbd" else None
            raw = subjects.get("virtmount/raw") if subject != "virtmount/raw" else None
            spread = f"{min(values):.0f}–{max(values):.0f}"
            lines.append(
                f"| {workload} | {subject} | {statistics.median(values):.0f} | {spread} "
                f"| {ratio(values, peer)} | {ratio(values, raw)} |"
            )
    return "\n".join(lines)


def ratio(values: list[float], other: list[float] | None) -> str:
    """The median of the rounds' own ratios: both sides of a pair ran next to each other."""
    if not other:
        return ""
    return f"{statistics.median(a / b for a, b in zip(values, other, strict=False) if b):.2f}"


def plot(results: Results, path: Path) -> bool:
    """One panel a workload, bars by subject, whiskers from the slowest to the fastest round."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    columns = 3
    rows = -(-len(results) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.2 * rows))
    for panel, (workload, subjects) in zip(panels.flat, results.items(), strict=False):
        names = [name for name, values in subjects.items() if values]
        medians = [statistics.median(subjects[name]) for name in names]
        low = [median - min(subjects[name]) for name, median in zip(names, medians, strict=True)]
        high = [max(subjects[name]) - median for name, median in zip(names, medians, strict=True)]
        colours = [BAR_COLOURS[name.partition("/")[0]] for name in names]
        panel.barh(names, medians, xerr=[low, high], color=colours, error_kw={"lw": 0.8})
        panel.invert_yaxis()
        panel.set_title(workload, fontsize=10)
        panel.tick_params(labelsize=8)
        panel.set_xlabel("IOPS", fontsize=8)
    for panel in list(panels.flat)[len(results) :]:
        panel.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", default="newest", help="oldest, newest or a version")
    parser.add_argument("--cache", default="none", choices=("none", "writeback"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement")
    parser.add_argument("--size", type=int, default=256, help="MiB of one image")
    parser.add_argument("--timeout", type=int, default=5400)
    parser.add_argument("--icount", action="store_true", help="count instructions, not time")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it runs")
    parser.add_argument("--only", default="", help="subjects, as virtmount/vhd,qemu-nbd/vhd")
    parser.add_argument("--out", type=Path, help="folder for results.json, .md and .png")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.size = 1, 1.0, 64
    if arguments.icount:
        arguments.rounds, arguments.size = min(arguments.rounds, 2), 64
    print(
        f"{len(WORKLOADS)} workloads, {len(SUBJECTS)} subjects, {arguments.rounds} rounds, "
        f"kernel {arguments.kernel}, cache {arguments.cache}",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(arguments, Path(scratch))
    print(table(results))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(results, indent=1))
        (arguments.out / "results.md").write_text(table(results) + "\n")
        if not plot(results, arguments.out / "results.png"):
            print("no plot: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
