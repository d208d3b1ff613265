"""Programs of the machine that are needed here, and the packages to get them from."""

from __future__ import annotations

import os
import shutil

SBIN = "/usr/sbin:/sbin"  # not on every user's PATH


class MissingProgram(Exception):
    """A program that is needed is not installed."""


def program(name: str, package: str) -> str:
    """Return the path of a program, or raise MissingProgram naming its package."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}")
    if path is None:
        raise MissingProgram(f"{name} is missing: apt install {package}")
    return path
