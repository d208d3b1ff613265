"""The verbs that make images or change whole ones: create, convert, resize, commit, rebase."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from virtmount.cli_common import (
    JSON_VERSION,
    Parser,
    common,
    complain_usage,
    format_options,
    json_option,
    opening,
    parent_options,
    progress_option,
    search_options,
    shown_progress,
    tidy_end,
)

CREATE_EXAMPLES = """\
examples:
  virtmount create disk.vdi 20G
  virtmount create -o help --format qcow2
  virtmount create -b base.qcow2 child.qcow2    a differencing image, as long as its parent
"""
CONVERT_EXAMPLES = """\
examples:
  virtmount convert disk.vmdk disk.qcow2
  virtmount convert -c disk.img disk.qcow2      compressed
"""
RESIZE_EXAMPLES = """\
examples:
  virtmount resize disk.vdi +10G
  virtmount resize --shrink disk.img 4G         partitions and file systems first
"""
COMMIT_EXAMPLES = """\
The image keeps its data; it can be used on, or be deleted.  Other images that are based on the
same parent are spoilt.

examples:
  virtmount commit child.qcow2
"""
REBASE_EXAMPLES = """\
examples:
  virtmount rebase -b base2.qcow2 child.qcow2   what differs is copied into the child first
  virtmount rebase -u -b /new/place/base.qcow2 child.qcow2
  virtmount rebase --no-parent child.qcow2      the child holds everything itself
"""


# What they understand


def describe_create(parser: Parser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", nargs="?", help="the image to be made")
    add("size", metavar="SIZE", nargs="?", help="of the disk, like 20G (default: the parent's)")
    add(
        *("--format", "-f"),
        metavar="FORMAT",
        help="by default the suffix of FILE decides",
    )
    _settings_options(parser)
    parent = parser.add_argument_group("the parent")
    parent.add_argument(
        *("--parent", "-b"), metavar="PARENT", help="the image that the new one is based on"
    )
    parent.add_argument(
        *("--parent-format", "-F"), metavar="FORMAT", help="of the parent (default: by the content)"
    )
    search_options(parent)
    parent.add_argument(
        "--force", action="store_true", help="although the parent's own parent has changed"
    )
    json_option(parser)
    common(parser, create, CREATE_EXAMPLES)


def _settings_options(parser: Parser) -> None:
    add = parser.add_argument
    add(
        *("--options", "-o"),
        metavar="NAME=VALUE,…",
        action="append",
        default=[],
        help="of the format; `-o help` lists them",
    )
    add(
        "--sector-size",
        metavar="BYTES",
        type=int,
        choices=(512, 4096),
        help="logical sectors, 512 or 4096 (default: those of the source or parent, else 512)",
    )
    add("--overwrite", action="store_true", help="replace a file that exists and is not in use")


def describe_convert(parser: Parser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="?", help="the image to be read, with its parents")
    add("target", metavar="TARGET", nargs="?", help="the image to be made")
    format_options(parser.add_argument_group("the source"))
    target = parser.add_argument_group("the target")
    target.add_argument(
        *("--to", "-O"),
        metavar="FORMAT",
        help="by default the suffix of TARGET decides",
    )
    target.add_argument("--compress", "-c", action="store_true", help="where the format can")
    _settings_options(parser)
    progress_option(parser)
    json_option(parser)
    common(parser, convert, CONVERT_EXAMPLES)


def describe_resize(parser: Parser) -> None:
    add = parser.add_argument
    add("image", metavar="IMAGE", help="the image that holds the disk")
    add("size", metavar="SIZE|+SIZE", help="the new size, or by how much it grows")
    add("--shrink", action="store_true", help="the end of the disk may be lost")
    format_options(parser.add_argument_group("the image"))
    json_option(parser)
    common(parser, resize, RESIZE_EXAMPLES)


def describe_commit(parser: Parser) -> None:
    parser.add_argument("image", metavar="CHILD", help="the image whose data goes into its parent")
    format_options(parser.add_argument_group("the image"))
    progress_option(parser)
    json_option(parser)
    common(parser, commit, COMMIT_EXAMPLES)


def describe_rebase(parser: Parser) -> None:
    add = parser.add_argument
    add("image", metavar="CHILD", help="the image that gets another parent")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--parent", "-b", metavar="PARENT", help="the new parent")
    group.add_argument("--no-parent", action="store_true", help="the child will stand alone")
    add(
        *("--new-format", "-F"),
        metavar="FORMAT",
        help="of the new parent (default: by the content)",
    )
    add(
        *("--unsafe", "-u"),
        action="store_true",
        help="copy nothing: only for a parent that was moved or is known to be the same",
    )
    image = parser.add_argument_group("the image")
    image.add_argument(*("--format", "-f"), metavar="FORMAT", help="by default the content decides")
    parent_options(image)
    progress_option(parser)
    json_option(parser)
    common(parser, rebase, REBASE_EXAMPLES)


# What they do


def create(options: argparse.Namespace) -> int:
    from virtmount import creation

    if "help" in options.options:
        return _list_settings(creation.driver_for(options.file or "", options.format))
    if options.file is None:
        return complain_usage("create", "say which file")
    try:
        settings, size = _settings(options), _size(options.size)
    except ValueError as error:
        return complain_usage("create", str(error))
    with tidy_end():
        made = creation.create(
            options.file,
            size,
            options.format,
            settings=settings,
            parent=options.parent,
            sector_size=options.sector_size,
            overwrite=options.overwrite,
            **opening(options),
        )
    return _show(made, options)


def _settings(options: argparse.Namespace) -> dict[str, str]:
    from virtmount.sizes import parse_options

    return parse_options(options.options)


def _size(text: str | None) -> int | None:
    from virtmount.sizes import parse_size

    return None if text is None else parse_size(text)


def _list_settings(driver: Any) -> int:
    width = max((len(name) for name in driver.choices), default=0)
    for name, choice in driver.choices.items():
        default = f" (default: {choice.default})" if choice.default else ""
        print(f"{name:<{width}}  {choice.help}{default}")
    return 0


def _show(image: Any, options: argparse.Namespace) -> int:
    """What is there now, for programs."""
    from virtmount import tables

    if options.json:
        tables.write_json({"version": JSON_VERSION, **image.to_dict()}, sys.stdout)
    return 0


def convert(options: argparse.Namespace) -> int:
    from virtmount import conversion
    from virtmount.creation import driver_for

    if "help" in options.options:
        return _list_settings(driver_for(options.target or "", options.to))
    if options.source is None or options.target is None:
        return complain_usage("convert", "say SOURCE and TARGET")
    try:
        settings = _settings(options)
    except ValueError as error:
        return complain_usage("convert", str(error))
    with tidy_end(), shown_progress(options) as progress:
        made = conversion.convert(
            options.source,
            options.target,
            options.to,
            source_format=options.format,
            settings=settings,
            compress=options.compress,
            sector_size=options.sector_size,
            overwrite=options.overwrite,
            report=progress,
            **opening(options),
        )
    return _show(made, options)


def resize(options: argparse.Namespace) -> int:
    from virtmount import resizing
    from virtmount.sizes import parse_size

    relative = options.size.startswith(("+", "-"))
    try:
        size = parse_size(options.size[1:] if relative else options.size)
    except ValueError as error:
        return complain_usage("resize", str(error))
    if options.size.startswith("-"):
        size = -size
    changed = resizing.resize(
        options.image,
        size,
        options.format,
        relative=relative,
        shrink=options.shrink,
        **opening(options),
    )
    return _show(changed, options)


def commit(options: argparse.Namespace) -> int:
    from virtmount import committing

    with tidy_end(), shown_progress(options) as progress:
        parent = committing.commit(
            options.image, options.format, report=progress, **opening(options)
        )
    return _show(parent, options)


def rebase(options: argparse.Namespace) -> int:
    from virtmount import rebasing

    with tidy_end(), shown_progress(options) as progress:
        changed = rebasing.rebase(
            options.image,
            None if options.no_parent else options.parent,
            options.format,
            new_format=options.new_format,
            unsafe=options.unsafe,
            report=progress,
            **opening(options),
        )
    return _show(changed, options)
