"""What can go wrong, one class per thing that a caller would do differently.

    VirtmountError            exit 1   anything below; never raised itself
    ├── NotAnImage            exit 3   no image of the asked format, or of any
    │   └── Corrupt           exit 8   a field contradicts the file or another field
    ├── Denied                exit 4   more privilege is needed
    ├── Busy                  exit 5   somebody else holds the image or the device
    ├── Unsupported           exit 6   a feature that this version does not know
    ├── NoTransport           exit 7   this kernel cannot serve the disk; the hint says why
    ├── NeedsRecovery         exit 8   a log or dirty flag must be dealt with before writing
    ├── ParentMissing         exit 9   the file that the image is based on is not there, or changed
    └── NotAttached           exit 10  no attached disk of that name

Host errors stay OSError with their errno, all the way to the request.  Usage errors exit 2.
"""

from __future__ import annotations


class VirtmountError(Exception):
    """An error for the person at the prompt: file, place, found against expected, next step.

    `file` is anything whose str() names a file, `place` a field or byte offset in it (may be
    empty), `text` what was found and what was expected, `hint` the command that helps, if any.
    """

    exit_code = 1

    def __init__(self, file: object, place: str, text: str, *, hint: str | None = None) -> None:
        self.file = str(file)
        self.place = place
        self.text = text
        self.hint = hint
        super().__init__(": ".join(part for part in (self.file, place, text) if part))


class NotAnImage(VirtmountError):
    exit_code = 3


class Corrupt(NotAnImage):
    exit_code = 8


class Denied(VirtmountError):
    exit_code = 4


class Busy(VirtmountError):
    exit_code = 5


class Unsupported(VirtmountError):
    exit_code = 6


class NoTransport(VirtmountError):
    exit_code = 7


class NeedsRecovery(VirtmountError):
    exit_code = 8


class ParentMissing(VirtmountError):
    exit_code = 9


class NotAttached(VirtmountError):
    exit_code = 10
