"""The verbs that look at whole images: check, snapshot, compare, cat."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from virtmount.cli_common import (
    JSON_VERSION,
    Parser,
    common,
    complain,
    complain_usage,
    format_options,
    json_option,
    opening,
    progress_option,
    say,
    search_options,
    shown_progress,
    tidy_end,
    told,
)
from virtmount.errors import VirtmountError

if TYPE_CHECKING:
    from virtmount.checking import CheckReport
    from virtmount.tables import Column
    from virtmount.upkeep import Finding, Snapshot

DIFFERENT = 1
TROUBLE = 2  # and more: compare could not

CHECK_CODES = """\
exit codes of check:
  0   sound, or mended wholly            3   nothing worse than leaks
  1   could not be checked               63  this format cannot be checked
  2   damaged
"""
CHECK_EXAMPLES = f"""\
examples:
  virtmount check disk.qcow2
  virtmount check --repair disk.qcow2        mend everything that can be mended
  virtmount check --repair=leaks disk.qcow2  only give unused space back

{CHECK_CODES}"""
SNAPSHOT_EXAMPLES = """\
examples:
  virtmount snapshot disk.qcow2
  virtmount attach --snapshot before-update disk.qcow2
"""
COMPARE_EXAMPLES = """\
Exits with 0 if both disks read the same, 1 if not, 2 or more if that could not be found out.
A longer disk is the same as a shorter one if the rest of it is zeros, unless --strict.

examples:
  virtmount compare disk.vmdk disk.qcow2
"""
CAT_EXAMPLES = """\
examples:
  virtmount cat disk.vdi > disk.img
  virtmount cat --offset 1M --length 4K disk.vhdx | xxd
"""


def describe_check(parser: Parser) -> None:
    parser.usage_code = 1  # 2 means damage
    parser.alone["--repair"] = "all"
    add = parser.add_argument
    add("image", metavar="IMAGE", help="the image; its parents are not looked at")
    add(
        "--repair",
        metavar="leaks|all",
        choices=("leaks", "all"),
        help="mend what can be mended; --repair=leaks: only give unused space back",
    )
    image = parser.add_argument_group("the image")
    image.add_argument(*("--format", "-f"), metavar="FORMAT", help="by default the content decides")
    search_options(image)
    progress_option(parser)
    json_option(parser)
    common(parser, check, CHECK_EXAMPLES)


def describe_snapshot(parser: Parser) -> None:
    add = parser.add_argument
    add("image", metavar="IMAGE", help="the image that holds them")
    add("--list", "-l", action="store_true", help="list them (the default)")
    format_options(parser.add_argument_group("the image"))
    json_option(parser)
    common(parser, snapshot, SNAPSHOT_EXAMPLES)


def describe_compare(parser: Parser) -> None:
    parser.usage_code = TROUBLE
    add = parser.add_argument
    add("first", metavar="IMAGE", help="one image")
    add("second", metavar="OTHER", help="and the other")
    add("--other-format", "-F", metavar="FORMAT", help="of OTHER (default: by the content)")
    add("--strict", "-s", action="store_true", help="disks of different sizes are different")
    format_options(parser.add_argument_group("the first image"))
    progress_option(parser)
    json_option(parser)
    common(parser, compare, COMPARE_EXAMPLES)


def describe_cat(parser: Parser) -> None:
    add = parser.add_argument
    add("image", metavar="IMAGE", help="the image that holds the disk")
    add("--offset", metavar="SIZE", default="0", help="where to begin (default: 0)")
    add("--length", metavar="SIZE", help="how much (default: all that follows)")
    format_options(parser.add_argument_group("the image"))
    progress_option(parser)
    common(parser, cat, CAT_EXAMPLES)


def check(options: argparse.Namespace) -> int:
    from virtmount import checking, tables
    from virtmount.upkeep import Repair

    repair = Repair(options.repair) if options.repair else Repair.NOTHING
    try:
        with tidy_end(), shown_progress(options) as progress:

            def tell(finding: Finding) -> None:
                if not options.json:
                    progress.end()
                    print(_finding(finding), flush=True)

            found = checking.check(
                options.image,
                options.format,
                repair=repair,
                options=told(options),
                tell=tell,
                report=progress,
            )
    except (VirtmountError, OSError) as error:
        if options.debug:
            raise
        complain(error)
        return error.exit_code if isinstance(error, checking.CannotCheck) else checking.FAILED
    if options.json:
        tables.write_json({"version": JSON_VERSION, **found.to_dict()}, sys.stdout)
    else:
        print(_summary(found))
    return found.exit_code


def _finding(finding: Finding) -> str:
    place = f"{finding.place}: " if finding.place else ""
    mended = " (repaired)" if finding.repaired else ""
    text = f"{finding.severity.value}: {place}{finding.text}{mended}"
    return "".join(char if char.isprintable() else "?" for char in text)


def _summary(found: CheckReport) -> str:
    from virtmount.upkeep import Severity

    damages, leaks = found.left[Severity.DAMAGE], found.left[Severity.LEAK]
    words = []
    if found.repaired:
        words.append(f"{found.repaired} repaired")
    if damages:
        words.append(f"damage in {damages} places")
    if leaks:
        words.append(f"leaks in {leaks} places")
    if not damages and not leaks:
        words.append("sound")
    return ", ".join(words)


def snapshot(options: argparse.Namespace) -> int:
    from virtmount import tables
    from virtmount.info import snapshots

    found = snapshots(options.image, options.format, options=told(options))
    if options.json:
        values = {"version": JSON_VERSION, "snapshots": [_plain(entry) for entry in found]}
        tables.write_json(values, sys.stdout)
    elif found:
        sys.stdout.write(tables.table(found, _columns()))
    return 0


def _plain(entry: Snapshot) -> dict[str, object]:
    return {
        "id": entry.id,
        "name": entry.name,
        "size": entry.size,
        "date": entry.date,
        "vm_state": entry.vm_state,
        "details": dict(entry.details),
    }


def _columns() -> list[Column[Snapshot]]:
    import time

    from virtmount import tables
    from virtmount.tables import Column

    def date(entry: Snapshot) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.date))

    return [
        Column("ID", "", lambda entry: entry.id, right=True),
        Column("NAME", "", lambda entry: entry.name),
        Column("SIZE", "", lambda entry: tables.size(entry.size), right=True),
        Column("DATE", "", date),
        Column("VM-STATE", "", lambda entry: tables.size(entry.vm_state), right=True),
    ]


def compare(options: argparse.Namespace) -> int:
    from virtmount import comparison, tables

    try:
        with tidy_end(), shown_progress(options) as progress:
            found = comparison.compare(
                options.first,
                options.second,
                first_format=options.format,
                second_format=options.other_format,
                report=progress,
                **opening(options),
            )
    except (VirtmountError, OSError) as error:
        if options.debug:
            raise
        return max(complain(error), TROUBLE)
    unequal = found.sizes[0] != found.sizes[1]
    same = found.same and not (options.strict and unequal)
    if options.json:
        values = {"version": JSON_VERSION, **found.to_dict(), "same": same}
        tables.write_json(values, sys.stdout)
    else:
        if unequal:
            say(f"the disks have {found.sizes[0]} and {found.sizes[1]} bytes")
        if found.offset is not None:
            print(f"different at offset {found.offset}")
        else:
            print("the same" if same else "different sizes")
    return 0 if same else DIFFERENT


def cat(options: argparse.Namespace) -> int:
    from virtmount import streaming
    from virtmount.sizes import parse_size

    try:
        offset = parse_size(options.offset)
        length = None if options.length is None else parse_size(options.length)
    except ValueError as error:
        return complain_usage("cat", str(error))
    if os.isatty(sys.stdout.fileno()):
        return complain_usage("cat", "a terminal cannot show a disk; send it to a file or a pipe")
    with tidy_end(), shown_progress(options) as progress:
        streaming.cat(
            options.image,
            sys.stdout.fileno(),
            options.format,
            offset=offset,
            length=length,
            report=progress,
            **opening(options),
        )
    return 0
