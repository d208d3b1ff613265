"""New image files, which appear under their names when they are whole.

They are made in a folder of their own beside the place where they belong, under their final names,
so that an image of several files can be opened there; then they are moved, the one that the user
named last.  Whatever goes wrong before that leaves nothing but what was there before.  (Only where
an image of several files replaces another one, a power cut between two moves can mix them.)

Killed without a chance to tidy up, it leaves that folder, .NAME.….virtmount, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from virtmount.errors import VirtmountError
from virtmount.hostfile import HostFile, sync_all

MAX_FILES = 200  # of one image; the engine has room for 255 in a chain


class Staging:
    """A context manager.  What was not published at its end is gone."""

    def __init__(
        self, target: str | os.PathLike[str], *, overwrite: bool = False, never: Sequence[Path] = ()
    ) -> None:
        """`never`: files that must not be replaced, whatever their names: the sources."""
        # Through links: the file that the user meant is replaced, not the link to it.
        self.target = Path(os.path.realpath(target))
        self._overwrite = overwrite
        self._held: list[HostFile] = []  # locks on what will be replaced
        self._never = never
        self.files: list[HostFile] = []
        self.names: list[str] = []
        if not self.target.name:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(target))
        try:
            self._refuse_existing(self.target.name)
            self._folder = self._make_folder()
        except BaseException:
            self._release()
            raise
        try:
            self.add(self.target.name)
        except BaseException:
            self.discard()
            raise

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()
        if error is not None:
            self._name_target(error)

    def _name_target(self, error: BaseException) -> None:
        """Of the files in the folder, which is gone, say where they would have been."""
        here, there = f"{self._folder}{os.sep}", os.path.join(self.target.parent, "")
        if isinstance(error, VirtmountError):
            error.file = error.file.replace(here, there)
            error.args = tuple(
                part.replace(here, there) if isinstance(part, str) else part for part in error.args
            )
        elif isinstance(error, OSError):
            if isinstance(error.filename, str):
                error.filename = error.filename.replace(here, there)
            elif error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
                error.filename = str(self.target)  # only what is written needs room

    def _make_folder(self) -> Path:
        prefix = f".{self.target.name[:32]}."
        try:
            return Path(tempfile.mkdtemp(".virtmount", prefix, self.target.parent))
        except OSError as error:  # which names a folder that nobody has heard of
            raise OSError(error.errno, error.strerror, str(self.target.parent)) from error

    @property
    def path(self) -> Path:
        """Where the main file lies until it is published."""
        return self._folder / self.target.name

    def add(self, name: str) -> int:
        """Make another empty file, which will be called `name` beside the main one; its number."""
        if name in (".", "..") or os.path.basename(name) != name or not name:
            raise VirtmountError(self.target, "", f"cannot make {name!r}: no name in this folder")
        if len(self.files) >= MAX_FILES:
            raise VirtmountError(self.target, "", f"an image of more than {MAX_FILES} files")
        if self.files:
            self._refuse_existing(name)
        path = self._folder / name
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        self.files.append(HostFile(path, writable=True))
        self.names.append(name)
        return len(self.files) - 1

    def seal(self) -> None:
        """Make what was written durable and let go of the files: the new image can be opened."""
        sync_all(self.files)
        for file in self.files:
            file.close()

    def publish(self) -> None:
        """Give the files their names.  They have been sealed, and everything else is closed."""
        for path in self._folder.iterdir():  # and what the image's own driver did to them
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        moved: list[Path] = []
        try:
            for name in reversed(self.names):
                self._move(self._folder / name, self.target.parent / name)
                moved.append(self.target.parent / name)
        except BaseException:
            if not self._overwrite:  # else they are somebody's already
                for path in moved:
                    path.unlink()
            raise
        with contextlib.suppress(OSError):  # not all file systems can
            _sync_folder(self.target.parent)

    def _move(self, here: Path, there: Path) -> None:
        if self._overwrite:
            os.replace(here, there)
            return
        # rename(2) would replace what somebody else has made meanwhile; link(2) does not.
        try:
            os.link(here, there)
        except FileExistsError:
            raise _exists(there) from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            if os.path.lexists(there):
                raise _exists(there) from None
            os.rename(here, there)

    def discard(self) -> None:
        """Remove what is not published; harmless when repeated."""
        for file in self.files:
            file.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        for file in self._held:
            file.close()

    def _refuse_existing(self, name: str) -> None:
        path = self.target.parent / name
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return
        for source in self._never:
            if _same(source, path):
                raise VirtmountError(path, "", "is what is read from: not replaced")
        if not self._overwrite:
            raise _exists(path)
        if not stat.S_ISREG(status.st_mode):
            raise VirtmountError(path, "", "is not a regular file: not replaced")
        # Locked until it is replaced, so that it is nobody's disk.
        self._held.append(HostFile(path, writable=True))


def _same(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except FileNotFoundError:  # a link that leads nowhere
        return False


def _exists(path: Path) -> VirtmountError:
    return VirtmountError(path, "", "exists already", hint="--overwrite to replace it")


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
