"""Run a command in a virtual machine: see `python3 -m tests.vm --help`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from . import kernels
from .machine import COMMAND, DIED, TIMEOUT, Disk, run
from .programs import MissingProgram

DESCRIPTION = """\
Run COMMAND under a Debian kernel in QEMU, over this machine's root file system.
The guest may write anywhere; what it writes is gone afterwards.  The exit status is
the command's, 124 after the timeout, 125 if the machine died.
"""
TAIL = 40  # lines of the kernel log that are shown after a failure


def main() -> int:
    """Do as the command line says; return the exit status."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _fetch() if options.fetch else _run(options)
    except (kernels.KernelError, MissingProgram, ValueError) as error:
        print(f"vm: {error}", file=sys.stderr)
        return DIED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python3 -m tests.vm",
        usage="%(prog)s [OPTION]... -- COMMAND [ARGUMENT]...\n       %(prog)s --fetch",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--kernel", default="newest", metavar="NAME", help="oldest, newest or a version (newest)")
    add("--memory", default="2G", metavar="SIZE", help="the guest's memory (2G)")
    add("--cpus", type=int, default=2, metavar="N", help="virtual CPUs (2)")
    add("--icount", action="store_true", help="count instructions, not time; one CPU")
    add(
        *("--disk", "-d"),
        action="append",
        default=[],
        metavar="SIZE[:NAME][:fast]",
        help="an empty disk /dev/scratch/NAME (disk0, disk1 ...); fast: in memory",
    )
    add(
        *("--share", "-s"),
        action="append",
        default=[],
        metavar="DIR",
        help="a folder whose writes reach the host",
    )
    add("--timeout", type=float, default=TIMEOUT, metavar="S", help=f"seconds ({TIMEOUT:g})")
    add("--cwd", metavar="DIR", help="where to run the command (the current directory)")
    add(
        *("--env", "-e"),
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable for the command, which gets none of yours",
    )
    add("--dmesg", metavar="FILE", help="write the kernel's messages to a file")
    add("--fetch", action="store_true", help="bring the cached kernels up to date, run nothing")
    add("command", nargs="*", metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _fetch() -> int:
    for name, kernel in zip(kernels.NAMES, kernels.fetch(), strict=True):
        print(f"{name} {kernel.version}")
    return 0


def _run(options: argparse.Namespace) -> int:
    if not options.command:
        raise ValueError("no command; see --help")
    variables = [text.partition("=") for text in options.env]
    if not all(equals for _, equals, _ in variables):
        raise ValueError("--env wants NAME=VALUE")
    result = run(
        options.command,
        kernel=options.kernel,
        memory=options.memory,
        cpus=options.cpus,
        icount=options.icount,
        disks=[Disk.parse(text, number) for number, text in enumerate(options.disk)],
        shares=options.share,
        timeout=options.timeout,
        cwd=options.cwd,
        env={name: value for name, _, value in variables},
        echo=_echo,
    )
    if options.dmesg:
        Path(options.dmesg).write_text(result.log)
    if result.status:
        lines = result.log.splitlines()
        if not result.problem:  # what the command had to do with
            lines = lines[next((n for n, line in enumerate(lines) if COMMAND in line), -1) + 1 :]
        for line in lines[-TAIL:]:
            print(f"vm: kernel: {line}", file=sys.stderr)
    if result.problem:
        print(f"vm: {result.problem}", file=sys.stderr)
    return result.status


def _echo(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
