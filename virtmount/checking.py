"""Whether an image is sound, and mending one that is not: `virtmount check`."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from virtmount import formats
from virtmount.chain import Opener, close_image
from virtmount.errors import Denied, NeedsRecovery, NotAnImage, Unsupported
from virtmount.hostfile import HostFile, execute, sync_all
from virtmount.image import DEFAULTS, Image, Options
from virtmount.plan import Barrier, Plan
from virtmount.upkeep import Elsewhere, Finding, Progress, Repair, Severity

MAX_FINDINGS = 1000  # that a Report keeps; all are counted

CLEAN, FAILED, DAMAGED, LEAKING, NO_CHECK = 0, 1, 2, 3, 63  # exit codes, as qemu-img check has them

Tell = Callable[[Finding], None]
Report = Callable[[Progress], None]


class CannotCheck(Unsupported):
    """The format, or this variant of it, has no check."""

    exit_code = NO_CHECK


@dataclass(slots=True)
class CheckReport:
    """What was found, and how many of each there still are: after a repair it is looked again."""

    path: str
    format: str
    findings: list[Finding] = field(default_factory=list)  # the first MAX_FINDINGS
    found: Counter[Severity] = field(default_factory=Counter)
    left: Counter[Severity] = field(default_factory=Counter)
    repaired: int = 0

    @property
    def damaged(self) -> bool:
        """Whether damage was found that was not mended."""
        return self.left[Severity.DAMAGE] > 0

    @property
    def exit_code(self) -> int:
        if self.damaged:
            return DAMAGED
        return LEAKING if self.left[Severity.LEAK] else CLEAN

    def to_dict(self) -> dict[str, object]:
        """Plain values, as for JSON."""
        return {
            "path": self.path,
            "format": self.format,
            "clean": not self.exit_code,
            "found": {severity.value: self.found[severity] for severity in Severity},
            "left": {severity.value: self.left[severity] for severity in Severity},
            "repaired": self.repaired,
            "findings": [
                {
                    "severity": finding.severity.value,
                    "place": finding.place,
                    "text": finding.text,
                    "repaired": finding.repaired,
                }
                for finding in self.findings
            ],
        }


def check(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    repair: Repair = Repair.NOTHING,
    options: Options = DEFAULTS,
    tell: Tell = lambda finding: None,
    report: Report = lambda progress: None,
) -> CheckReport:
    """Look at all metadata of one image; its parents are not opened.

    The image is locked; nothing is written without `repair`.  What is sound can also be opened.
    `tell` gets every finding as it is made.  CannotCheck where the format has no check.
    """
    with HostFile(path, writable=repair is not Repair.NOTHING) as file:
        driver = _driver(file, format)
        found = CheckReport(str(path), driver.name)

        def note(finding: Finding) -> None:
            found.found[finding.severity] += 1
            found.left[finding.severity] += not finding.repaired
            found.repaired += finding.repaired
            if len(found.findings) < MAX_FINDINGS:
                found.findings.append(finding)
            tell(finding)

        wrote = _look(driver, file, options, repair, note, report)
    if wrote:
        found.left.clear()
        with HostFile(path) as file:
            _look(
                *(driver, file, options, Repair.NOTHING),
                lambda finding: found.left.update([finding.severity]),
                report,
            )
    if not found.damaged and (refused := _refused(path, driver, options)) is not None:
        note(refused)
    return found


def _refused(path: str | os.PathLike[str], driver: type[Image], options: Options) -> Finding | None:
    """What opening the image says against it, whatever its check has said: it must open too."""
    opener = Opener(path, options=dataclasses.replace(options, changing_parent=True))
    try:
        close_image(opener.open_top(driver.name, writable=False))
    except (NotAnImage, NeedsRecovery) as error:
        return Finding(Severity.DAMAGE, error.place, error.text)
    except Denied as error:
        return Finding(Severity.NOTE, error.place, error.text)
    except Unsupported as error:
        # What the check has made of it may be wrong then.
        raise CannotCheck(error.file, error.place, error.text, hint=error.hint) from error
    return None


def _driver(file: HostFile, format: str | None) -> type[Image]:
    driver = formats.load(format) if format else formats.probe(file)
    if not driver.checks:
        text = f"{driver.name} images cannot be checked"
        raise CannotCheck(file, "", text)
    if not format and driver.name == "raw":
        # What is left of an image whose header was lost looks like this too.
        text = "not known by its content, and in a raw image nothing can be wrong"
        raise CannotCheck(file, "", text, hint="say --format")
    return driver


def _look(
    driver: type[Image],
    file: HostFile,
    options: Options,
    repair: Repair,
    note: Tell,
    report: Report,
) -> bool:
    """One check from its beginning to its end; whether anything was written."""
    wrote = False
    try:
        for item in driver.check(file, options, repair):
            if isinstance(item, Finding):
                note(item)
            elif isinstance(item, Progress):
                report(item)
            elif item.steps:
                wrote = True
                _carry_out(item, file)
    except Unsupported as error:
        raise CannotCheck(error.file, error.place, error.text, hint=error.hint) from error
    return wrote


def _carry_out(plan: Plan, file: HostFile) -> None:
    files = plan.files if isinstance(plan, Elsewhere) else [file]
    execute(plan, files)
    if plan.steps[-1] is not Barrier:
        sync_all(files)
