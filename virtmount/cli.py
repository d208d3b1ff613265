"""The command line: verbs that parse, call, and print.

Standard output carries the answer alone: a device's path, a table, JSON.  Everything else goes to
standard error.  Modules are loaded by the verb that needs them, so that --version and --help are
quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from virtmount import __version__, cli_change, cli_look
from virtmount.cli_common import (
    EXIT_CODES,
    JSON_VERSION,
    Parser,
    common,
    complain,
    complain_usage,
    existing,
    format_options,
    json_option,
    opening,
    print_path,
    quiet_pipe,
    say,
)
from virtmount.errors import VirtmountError

if TYPE_CHECKING:
    from virtmount.api import ImageInfo
    from virtmount.state import Record
    from virtmount.tables import Column

ATTACH_EXAMPLES = """\
examples:
  virtmount attach disk.vhdx                 prints /dev/vhdx0; partitions are /dev/vhdx0p1 …
  virtmount attach --read-only disk.qcow2
  mount "$(virtmount attach disk.vdi)p1" /mnt
"""
DETACH_EXAMPLES = """\
examples:
  virtmount detach /dev/vhdx0
  virtmount detach disk.vhdx
  virtmount detach --all
"""
LIST_EXAMPLES = """\
examples:
  virtmount list
  virtmount list -n -o DEVICE,IMAGE
  virtmount list --json | jq -r '.disks[].path'
"""
INFO_EXAMPLES = """\
examples:
  virtmount info disk.qcow2
  virtmount info /dev/qcow0
"""
MAP_EXAMPLES = """\
examples:
  virtmount map disk.vhdx
  virtmount map --json disk.vhdx             the field names of qemu-img map --output=json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command `virtmount`; returns its exit code."""
    return _main(_parser(), argv)


def vdiskload(argv: Sequence[str] | None = None) -> int:
    """The command `vdiskload FILE`, which is `virtmount attach FILE`."""
    parser = Parser("vdiskload", description="Attach a disk image as a block device.")
    _describe_attach(parser)
    return _main(parser, argv)


def _main(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    options = parser.parse_args(argv)
    try:
        return quiet_pipe(lambda: int(options.verb(options) or 0))
    except (VirtmountError, OSError, KeyboardInterrupt) as error:
        if options.debug:
            import traceback

            traceback.print_exc()
        return complain(error)


# Options


def _parser() -> Parser:
    parser = Parser(
        "virtmount",
        description="Attach disk images as block devices; make, convert, check and change them.",
        epilog="virtmount VERB --help tells more.\n\n" + EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"virtmount {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, purpose: str) -> Parser:
        return verbs.add_parser(name, help=purpose.lower(), description=f"{purpose}.")

    _describe_attach(verb("attach", "Attach an image as a block device"))
    _describe_detach(verb("detach", "Flush an attached disk and take it away"))
    _describe_list(verb("list", "List attached disks"))
    _describe_info(verb("info", "Describe an image, without attaching it"))
    _describe_map(verb("map", "Show where the disk's bytes lie in the image"))
    cli_change.describe_create(verb("create", "Make an empty image"))
    cli_change.describe_convert(verb("convert", "Write the disk of an image into a new one"))
    cli_look.describe_check(verb("check", "Look for damage in an image, and mend it"))
    cli_change.describe_resize(verb("resize", "Give the disk in an image another size"))
    cli_look.describe_compare(verb("compare", "Say whether two images hold the same disk"))
    cli_look.describe_cat(verb("cat", "Write a disk's bytes to standard output"))
    cli_look.describe_snapshot(verb("snapshot", "List the internal snapshots of an image"))
    cli_change.describe_commit(verb("commit", "Write what a child image holds into its parent"))
    cli_change.describe_rebase(verb("rebase", "Give a differencing image another parent"))
    _describe_doctor(verb("doctor", "Say what this machine lacks, and the command that mends it"))
    return parser


def _describe_attach(parser: Parser) -> None:
    add = parser.add_argument
    add("image", metavar="IMAGE", help="file or block device that holds the image")
    image = parser.add_argument_group("the image")
    image.add_argument(
        *("--read-only", "-r"), action="store_true", help="write nothing, not even a dirty flag"
    )
    image.add_argument(
        "--overlay",
        metavar="DIR",
        help="writes go to a file without a name and are thrown away at detach; --overlay=DIR: "
        "the file lies in DIR (default: $TMPDIR or /var/tmp)",
    )
    parser.alone["--overlay"] = ""
    format_options(image)
    device = parser.add_argument_group("the device")
    device.add_argument(
        *("--name", "-N"),
        metavar="NAME",
        help="/dev/NAME (default: the format's letters and a number, /dev/vhdx0)",
    )
    device.add_argument(
        *("--cache", "-c"),
        choices=("writeback", "none", "writethrough"),
        default="writeback",
        help="writeback: a flush makes writes durable (default); none: the same, past the host's "
        "page cache; writethrough: every write is durable",
    )
    device.add_argument(
        *("--transport", "-t"),
        choices=("auto", "ublk", "fuse", "loop"),
        default="auto",
        help="auto (default): loop for flat images, else ublk, else fuse under loop",
    )
    device.add_argument(
        "--foreground", action="store_true", help="serve from this process until Ctrl-C"
    )
    common(parser, attach, ATTACH_EXAMPLES)


def _describe_detach(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="*", metavar="DEVICE|IMAGE|NAME", help="as attach was told or has answered"
    )
    parser.add_argument("--all", "-a", action="store_true", help="everything that is attached")
    parser.add_argument(
        "--force",
        action="store_true",
        help="although it is in use: its users then see I/O errors and may lose data",
    )
    common(parser, detach, DETACH_EXAMPLES)


def _describe_list(parser: argparse.ArgumentParser) -> None:
    columns = "".join(f"  {column.name:<10}{column.meaning}\n" for column in _columns())
    parser.add_argument(
        *("--output", "-o"),
        metavar="COLUMNS",
        default="NAME,DEVICE,FORMAT,SIZE,RO,TRANSPORT,IMAGE",
        help="like NAME,SIZE (default: %(default)s)",
    )
    parser.add_argument("--noheadings", "-n", action="store_true", help="no line of headings")
    parser.add_argument("--bytes", "-b", action="store_true", help="sizes in bytes")
    json_option(parser)
    common(parser, list_, f"columns:\n{columns}\n{LIST_EXAMPLES}")


def _describe_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="IMAGE|DEVICE", help="an image, or an attached disk")
    format_options(parser.add_argument_group("the image"))
    json_option(parser)
    common(parser, info, INFO_EXAMPLES)


def _describe_map(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="IMAGE|DEVICE", help="an image, or an attached disk")
    format_options(parser.add_argument_group("the image"))
    json_option(parser)
    common(parser, map_, MAP_EXAMPLES)


def _describe_doctor(parser: argparse.ArgumentParser) -> None:
    json_option(parser)
    common(parser, doctor, "")


# Verbs


def attach(options: argparse.Namespace) -> int:
    from virtmount import attachment

    if options.read_only and options.overlay is not None:
        return complain_usage("attach", "--overlay is for writing, --read-only against it")
    told = opening(options)
    order = attachment.Order(
        image=os.path.abspath(options.image),
        read_only=options.read_only,
        format=options.format,
        transport=options.transport,
        cache=options.cache,
        name=options.name,
        allow_outside=options.allow_outside,
        parent_format=options.parent_format,
        snapshot=options.snapshot,
        search_path=told["options"].search_path,
        size_from=options.size_from,
        force=options.force,
        overlay=_overlay(options.overlay),
    )
    if options.foreground:
        _serve_here(order, told["options"].passphrase)
    else:
        _show_attached(attachment.attach_as(order, told["options"].passphrase))
    return 0


def _overlay(folder: str | None) -> str | None:
    from virtmount import overlay

    return None if folder is None else os.path.abspath(folder or overlay.folder())


def _serve_here(order: Any, passphrase: Callable[[], bytes] | None) -> None:
    import logging

    from virtmount import daemon
    from virtmount.attachment import Attachment, refuse_without_root

    refuse_without_root()
    logging.basicConfig(level=logging.INFO, format="virtmount: %(message)s", stream=sys.stderr)
    daemon.run(
        order, lambda record: _show_attached(Attachment(record)), passphrase=passphrase, stay=True
    )


def _show_attached(disk: Any) -> None:
    print_path(disk.path)
    if sys.stderr.isatty():
        from virtmount.tables import size

        record = disk.record
        mode = "read-only" if record.read_only else "read-write"
        if record.overlay:
            mode = "writes are thrown away"
        say(f"{record.format} {record.variant}, {size(record.size)}, {mode}, {record.transport}")
        for path, length in disk.partition_sizes():
            say(f"  {path}  {size(length)}")
        first = next(iter(disk.partitions), disk.path)
        say(f"mount {'-o ro ' if record.read_only else ''}{first} /mnt")
        say(f"virtmount detach {disk.path}")


def detach(options: argparse.Namespace) -> int:
    from virtmount import attachment, state

    if bool(options.what) == options.all:
        return complain_usage("detach", "say what, or --all")
    attachment.refuse_without_root()
    status = 0
    for what in [record.name for record in state.records()] if options.all else options.what:
        try:
            for record in state.find(what):
                if word := attachment.detach(record, force=options.force):
                    say(f"virtmount: {word}")
        except (VirtmountError, OSError) as error:
            if options.debug:
                raise
            code = complain(error)  # and go on with the others
            status = status or code
    return status


def list_(options: argparse.Namespace) -> int:
    from virtmount import state, tables

    try:
        chosen = tables.select(_columns(in_bytes=options.bytes), options.output)
    except ValueError as error:
        return complain_usage("list", f"--output: {error}")
    records = state.records()
    if options.json:
        disks = [_public(record) for record in records]
        tables.write_json({"version": JSON_VERSION, "disks": disks}, sys.stdout)
    elif records:
        sys.stdout.write(tables.table(records, chosen, headings=not options.noheadings))
    return 0


def _columns(*, in_bytes: bool = False) -> list[Column[Record]]:
    import time

    from virtmount import tables
    from virtmount.tables import Column

    def size(record: Record) -> object:
        return record.size if in_bytes else tables.size(record.size)

    def since(record: Record) -> object:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.since))

    return [
        Column("NAME", "the disk is /dev/NAME", lambda record: record.name),
        Column("DEVICE", "the kernel's node", lambda record: record.device),
        Column("FORMAT", "of the image", lambda record: record.format),
        Column("VARIANT", "of the format", lambda record: record.variant),
        Column("SIZE", "of the disk", size, right=True),
        Column("RO", "1: read-only", lambda record: int(record.read_only), right=True),
        Column("TRANSPORT", "ublk, fuse or loop", lambda record: record.transport),
        Column("CACHE", "writeback, none or writethrough", lambda record: record.cache),
        Column("STATE", "attached, or on the way; dead: its process was killed", _state),
        Column("PID", "of the serving process", lambda record: record.pid or None, right=True),
        Column("SINCE", "when it was attached", since),
        Column("PARTS", "how many partitions", lambda record: len(_partitions(record)), right=True),
        Column("OVERLAY", "where writes go that are thrown away", lambda record: record.overlay),
        Column("PARENTS", "images that it is based on", lambda record: ":".join(record.parents)),
        Column("IMAGE", "the file", lambda record: record.image),
    ]


def _state(record: Record) -> str:
    from virtmount import state

    return record.state if record.state == state.FAILED or record.is_alive() else "dead"


def _partitions(record: Record) -> list[str]:
    from virtmount.attachment import Attachment

    return Attachment(record).partitions if record.device else []


def _public(record: Record) -> dict[str, Any]:
    """The stable schema: what a record says, without what only we understand."""
    from dataclasses import asdict

    values = asdict(record)
    for private in ("file_id", "data_id", "started", "boot"):
        del values[private]
    values.update(path=record.path, state=_state(record), partitions=_partitions(record))
    return values


def info(options: argparse.Namespace) -> None:
    from virtmount import api, tables

    path, records = _image_of(options.what)
    found = api.inspect(
        path,
        options.format or _recorded_format(records),
        **opening(options),
    )
    if options.json:
        values = {"version": JSON_VERSION, **found.to_dict()}
        values["attached"] = [_public(record) for record in records]
        tables.write_json(values, sys.stdout)
    else:
        sys.stdout.write(tables.card(_info_rows(found, records)))


def _image_of(what: str) -> tuple[str, list[Record]]:
    """The image that a word means, and as what it is attached."""
    from virtmount import state
    from virtmount.errors import NotAttached

    try:
        records = state.find(what)
    except NotAttached:
        return existing(what), []
    return records[0].image, records


def _recorded_format(records: Sequence[Record]) -> str | None:
    return records[0].format or None if records else None


def _info_rows(found: ImageInfo, records: Sequence[Record]) -> Iterable[tuple[str, object]]:
    from virtmount.tables import size

    yield "image", found.path
    yield "format", f"{found.format} {found.variant}".strip()
    yield "disk", f"{size(found.size)} ({found.size} bytes)"
    yield "sectors", f"{found.sector_size} logical, {found.physical_sector_size} physical"
    yield "cluster", size(found.cluster_size)
    yield "file", f"{size(found.file_size)}, {size(found.allocated)} allocated"
    yield "identity", found.identity
    for number, parent in enumerate(found.parents):
        text = f"{parent.path} ({parent.format or 'format not recorded'})"
        yield "" if number else "parents", f"{text}: {parent.problem}" if parent.problem else text
    for name, value in found.details.items():
        yield name.replace("_", " "), value
    yield "state", found.state
    for record in records:
        words = f"{record.device}, {record.transport}, {_state(record)}"
        if record.overlay:
            words += f", overlay in {record.overlay}"
        yield "attached", f"{record.path} ({words})"


def map_(options: argparse.Namespace) -> None:
    from virtmount import api

    path, records = _image_of(options.what)
    extents = api.map_extents(
        path,
        options.format or _recorded_format(records),
        **opening(options),
    )
    if options.json:
        import json

        # One a line, as they come: a map may be long.
        separator = "["
        for extent in extents:
            sys.stdout.write(f"{separator} {json.dumps(extent.to_dict())}")
            separator = ",\n"
        sys.stdout.write("]\n" if separator != "[" else "[]\n")
        return
    for number, extent in enumerate(extents):
        if not number:  # not before: opening the image comes with the first extent, and may fail
            print(f"{'START':>16} {'LENGTH':>16} {'OFFSET':>16}  DEPTH KIND")
        offset = "-" if extent.offset is None else extent.offset
        kind = _kind(extent)
        print(f"{extent.start:>16} {extent.length:>16} {offset:>16}  {extent.depth:>5} {kind}")


def _kind(extent: Any) -> str:
    for word in ("invalid", "compressed", "data"):
        if getattr(extent, word):
            return word
    return "zero" if extent.present else "absent"


def doctor(options: argparse.Namespace) -> int:
    from virtmount import doctor as examination
    from virtmount import tables

    report = examination.examine()
    if options.json:
        tables.write_json({"version": JSON_VERSION, **report.to_dict()}, sys.stdout)
    else:
        words = {True: "ok", False: "missing", None: "-"}
        width = max(len(check.name) for check in report.checks)
        for check in report.checks:
            print(f"{words[check.ok]:<8} {check.name:<{width}}  {check.text}")
            if check.hint and not check.ok:
                print(f"{'':<8} {'':<{width}}  {check.hint}")
        able = [name for name, works in report.transports.items() if works]
        print(f"transports: {', '.join(able) or 'none'}")
    return 0 if report.usable else 7


if __name__ == "__main__":
    sys.exit(main())
