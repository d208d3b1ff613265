"""The Debian archive that this machine is set up with, through a private apt.

Lists, packages and keys live in one folder of ours; the system's apt is only
asked for its URI and keyring.  Signatures are always verified; bookworm's keyring
is enough, because newer releases are signed with its keys as well.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .programs import program

SUITES = ("trixie", "trixie-backports")
META = "linux-image-amd64"  # depends on the kernel of the day

SOURCES = Path("/etc/apt")
RETRIES = 3

_PINNED = re.compile(r"(linux-[^\s(]+) \(= ([^)\s]+)\)")


class ArchiveError(Exception):
    """The archive cannot be reached, or does not have what was asked for."""


@dataclass(frozen=True)
class Source:
    """Where packages come from and which keyring vouches for them."""

    uri: str
    keyring: str  # empty: apt's own trusted keys


def machine_source(sources: Path = SOURCES) -> Source:
    """Return the first source of the machine's own release, from its apt configuration."""
    codename = _codename()
    files = sorted(sources.glob("sources.list.d/*.sources"))
    lists = [sources / "sources.list", *sorted(sources.glob("sources.list.d/*.list"))]
    entries = [entry for file in files for entry in _deb822(file.read_text())]
    entries += [entry for file in lists if file.is_file() for entry in _one_line(file.read_text())]
    for uri, suites, keyring in entries:
        if {codename, "stable", "oldstable"} & set(suites):
            return Source(uri, keyring)
    raise ArchiveError(f"{sources}: no source of packages for {codename!r}")


def _codename() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    raise ArchiveError("/etc/os-release: no VERSION_CODENAME; is this Debian?")


def _deb822(text: str) -> Iterator[tuple[str, list[str], str]]:
    text = "".join(line for line in text.splitlines(True) if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"(?m)^([\w-]+):((?:.*)(?:\n[ \t]+.*)*)", stanza))
        uris = fields.get("URIs", "").split()
        signed = fields.get("Signed-By", "").strip()
        if uris and "deb" in fields.get("Types", "").split():
            # A key that is written out in the source is left to apt's own keys.
            yield uris[0], fields.get("Suites", "").split(), signed if signed[:1] == "/" else ""


def _one_line(text: str) -> Iterator[tuple[str, list[str], str]]:
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s", line + " ")
        if match:
            options, uri, suite = match.groups("")
            signed = re.search(r"signed-by=(\S+)", options, re.IGNORECASE)
            yield uri, [suite], signed[1] if signed else ""


class Archive:
    """A private apt under `folder`; one process at a time may use it."""

    def __init__(self, folder: Path, source: Source | None = None) -> None:
        self.folder = folder.absolute()
        self.source = source or machine_source()

    def update(self) -> None:
        """Fetch the package lists.  Raises ArchiveError if they are not all there and signed."""
        for name in ("state/lists/partial", "cache/archives/partial"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        signed = f"Signed-By: {self.source.keyring}\n" if self.source.keyring else ""
        (self.folder / "archive.sources").write_text(
            f"Types: deb\nURIs: {self.source.uri}\nSuites: {' '.join(SUITES)}\n"
            f"Components: main\nArchitectures: amd64\n{signed}"
        )
        try:
            self._apt("apt-get", "-o", "APT::Update::Error-Mode=any", "update")
        except ArchiveError as error:
            if "NO_PUBKEY" not in str(error):
                raise
            raise ArchiveError(f"{error}\nhint: upgrade debian-archive-keyring") from None

    def versions(self) -> dict[str, str]:
        """Return the kernels on offer: upstream version ("6.12.117") to package version."""
        found = {}
        for stanza in self._show(META):
            version = stanza["Version"]
            found[version.partition("-")[0]] = version
        return found

    def packages(self, version: str) -> list[str]:
        """Return `name=version` of the packages that make up the kernel of META's `version`.

        Those are what META depends on in exactly one version, and so on.
        """
        wanted, found = [(META, version)], {}
        while wanted:
            name, version = wanted.pop()
            if name in found:
                continue
            stanza = next((s for s in self._show(name) if s["Version"] == version), None)
            if stanza is None:
                raise ArchiveError(f"{name}: no version {version} in {', '.join(SUITES)}")
            found[name] = version
            wanted += _PINNED.findall(stanza.get("Depends", ""))
        return [f"{name}={version}" for name, version in found.items()]

    def download(self, packages: list[str], into: Path) -> list[Path]:
        """Download the packages, verified, into a folder; return the files."""
        into.mkdir(parents=True, exist_ok=True)
        self._apt("apt-get", "download", *packages, cwd=into)
        return sorted(into.glob("*.deb"))

    def _show(self, name: str) -> Iterator[dict[str, str]]:
        for stanza in self._apt("apt-cache", "show", name).split("\n\n"):
            fields = dict(re.findall(r"(?m)^([\w-]+): (.*)$", stanza))
            if fields.get("Package") == name:
                yield fields

    def _apt(self, *command: str | Path, cwd: Path | None = None) -> str:
        options = {
            "Dir::Etc::sourcelist": self.folder / "archive.sources",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State": self.folder / "state",
            "Dir::State::status": "/dev/null",  # nothing is installed
            "Dir::Cache": self.folder / "cache",
            "Acquire::Languages": "none",
            "Acquire::Retries": RETRIES,
            "Acquire::http::Timeout": 30,
            "APT::Architecture": "amd64",
            "APT::Get::List-Cleanup": "true",
        }
        if os.geteuid() == 0:
            options["APT::Sandbox::User"] = "root"  # _apt cannot enter root's home
        arguments = [arg for name, value in options.items() for arg in ("-o", f"{name}={value}")]
        run = subprocess.run(
            [program(str(command[0]), "apt"), *arguments, *command[1:]],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
        if run.returncode:
            shown = shlex.join(str(part) for part in command)
            raise ArchiveError(f"{shown}: {run.stderr.strip() or run.stdout.strip()}")
        return run.stdout
