"""What the verbs of the command line share: options, complaints, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

JSON_VERSION = 1  # of every object that --json prints; keys are added, never changed
INTERRUPTED = 130

EXIT_CODES = """\
exit codes:
  0   done                              6   a feature that is not supported
  1   failed; the host's error          7   this kernel cannot serve the disk
  2   wrong usage                       8   corrupt, or needs recovery first
  3   not an image                      9   a parent is missing or another one
  4   more privilege is needed          10  not attached
  5   busy: locked, mounted, or open"""


def complain(error: BaseException) -> int:
    """Say what went wrong and what to do next; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    text = str(error)
    if isinstance(error, OSError):
        what = error.strerror or str(error)
        text = f"{os.fspath(error.filename)}: {what}" if error.filename is not None else what
    say(f"virtmount: {text}")
    hint = getattr(error, "hint", None)
    if hint:
        say(f"hint: {hint}")
    return int(getattr(error, "exit_code", 1))


def say(text: str) -> None:
    """For people; a name that is no text (or that could move the cursor) is made printable."""
    shown = "".join(char if char.isprintable() else "?" for char in text)
    encoding = sys.stderr.encoding or "ascii"
    print(shown.encode(encoding, "replace").decode(encoding), file=sys.stderr, flush=True)


def print_path(path: str) -> None:
    """For programs: a path, byte for byte."""
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(path) + b"\n")
    sys.stdout.flush()


def quiet_pipe(verb: Callable[[], int]) -> int:
    """`virtmount map … | head` is not an error."""
    try:
        status = verb()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The interpreter flushes once more at its end.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def complain_usage(verb: str, text: str) -> int:
    say(f"virtmount {verb}: {text}")
    say(f"hint: virtmount {verb} --help")
    return 2


class Parser(argparse.ArgumentParser):
    def __init__(self, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nhint: {self.prog} --help\n")


def common(parser: argparse.ArgumentParser, verb: Callable[[Any], object], text: str) -> None:
    parser.add_argument("--debug", action="store_true", help="with a traceback, if it fails")
    parser.set_defaults(verb=verb)
    parser.epilog = f"{text}\n{EXIT_CODES}" if text else EXIT_CODES


def format_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        *("--format", "-f"),
        metavar="FORMAT",
        help="raw, qcow2, vhdx or vdi (default: by the content)",
    )
    group.add_argument(
        "--parent-format", metavar="FORMAT", help="of a parent whose child does not record it"
    )
    group.add_argument(
        "--allow-outside",
        action="store_true",
        help="follow parents out of the image's folder: only if you trust the image",
    )


def json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", "-J", action="store_true", help="for programs")


def existing(what: str) -> str:
    from virtmount.errors import NotAttached

    if not os.path.lexists(what) and "/" not in what:
        raise NotAttached(what, "", "neither a file nor an attached disk", hint="virtmount list")
    return what
