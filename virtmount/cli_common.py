"""What the verbs of the command line share: options, complaints, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from virtmount.image import Options
    from virtmount.upkeep import Progress

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
    """`alone` maps an option without a value to the value that it then has.

    argparse has nargs="?" for this, which takes the next word for the value: `--repair IMAGE`.
    """

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.alone: dict[str, str] = {}
        self.usage_code = 2

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        for i, word in enumerate(words):
            if word == "--":
                break
            if word in self.alone:
                words[i] = f"{word}={self.alone[word]}"
        found, rest = super().parse_known_args(words, namespace)
        # `SOURCE -O raw TARGET`: argparse takes all that may be missing for missing at SOURCE.
        for action in self._get_positional_actions():
            missing = action.nargs == "?" and getattr(found, action.dest, None) is None
            if missing and rest and not rest[0].startswith("-"):
                setattr(found, action.dest, self._get_values(action, [rest.pop(0)]))
        return found, rest

    def format_help(self) -> str:
        from virtmount import formats

        names = textwrap.fill(
            ", ".join(formats.TABLE), 72, initial_indent="  ", subsequent_indent="  "
        )
        text = super().format_help()
        for option in self.alone:  # its value, if any, comes behind "="
            text = re.sub(rf"({option}) ([^\s\]]+)", r"\1[=\2]", text)
        return f"{text}\nformats:\n{names}\n"

    def error(self, message: str) -> NoReturn:
        self.exit(self.usage_code, f"{self.prog}: {message}\nhint: {self.prog} --help\n")


def common(parser: argparse.ArgumentParser, verb: Callable[[Any], object], text: str) -> None:
    parser.add_argument("--debug", action="store_true", help="with a traceback, if it fails")
    parser.set_defaults(verb=verb)
    parser.epilog = f"{text}\n{EXIT_CODES}" if text else EXIT_CODES


def format_options(group: argparse._ArgumentGroup) -> None:
    """What may have to be said to open an image; opening() reads it."""
    add = group.add_argument
    add(
        *("--format", "-f"),
        metavar="FORMAT",
        help="by default the content decides",
    )
    parent_options(group)
    add("--snapshot", metavar="NAME", help="name or id of an internal snapshot, read-only")
    add(
        "--size-from",
        choices=("chs", "current"),
        help="of a VHD whose two sizes differ: the geometry's, or the current size",
    )


def parent_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--parent-format", metavar="FORMAT", help="of a parent whose child does not record it")
    search_options(group)
    add("--force", action="store_true", help="although the parent is another or was written since")


def search_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--allow-outside",
        action="store_true",
        help="follow parents out of the image's folder: only if you trust the image",
    )
    add(
        "--search-path",
        metavar="DIR",
        action="append",
        default=[],
        help="also look there for a parent that has no path in the image; may be repeated",
    )
    add("--passphrase-file", metavar="FILE", help="the passphrase is in FILE (default: asked for)")
    add("--passphrase-fd", metavar="N", type=int, help="... comes from descriptor N")


def opening(options: argparse.Namespace) -> dict[str, Any]:
    """Keywords for the functions that open an image and its parents."""
    return {
        "options": told(options),
        "parent_format": options.parent_format,
        "force": options.force,
    }


def told(options: argparse.Namespace) -> Options:
    """What a driver has to know, from format_options() or search_options()."""
    from virtmount.image import Options
    from virtmount.secret import passphrase

    return Options(
        allow_outside=options.allow_outside,
        search_path=tuple(map(os.path.abspath, options.search_path)),
        snapshot=getattr(options, "snapshot", None),
        size_from=getattr(options, "size_from", None),
        passphrase=passphrase(options.passphrase_file, options.passphrase_fd),
    )


def json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", "-J", action="store_true", help="for programs")


def existing(what: str) -> str:
    from virtmount.errors import NotAttached

    if not os.path.lexists(what) and "/" not in what:
        raise NotAttached(what, "", "neither a file nor an attached disk", hint="virtmount list")
    return what


def progress_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress", action="store_true", help="show it although standard error is no terminal"
    )


class ProgressLine:
    """How far a verb has come, on standard error; nothing where nobody would see it."""

    def __init__(self, *, wanted: bool) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = -1
        self._on = wanted or self._terminal

    def __call__(self, progress: Progress) -> None:
        percent = 100 * progress.done // progress.total if progress.total else 100
        if self._on and percent != self._shown:
            self._shown = percent
            ending = "\r" if self._terminal else "\n"
            print(f"{percent:>3} %", end=ending, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line empty for whatever comes next."""
        if self._terminal and self._shown >= 0:
            print("     ", end="\r", file=sys.stderr, flush=True)


@contextlib.contextmanager
def shown_progress(options: argparse.Namespace) -> Iterator[ProgressLine]:
    line = ProgressLine(wanted=options.progress)
    try:
        yield line
    finally:
        line.end()


@contextlib.contextmanager
def tidy_end() -> Iterator[None]:
    """A signal that ends the process undoes what was begun, as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
