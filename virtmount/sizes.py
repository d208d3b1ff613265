"""Sizes and options as people write them on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from virtmount.errors import Unsupported
from virtmount.image import Image

MAX_SIZE = (1 << 63) - (1 << 20)  # of a disk: offsets are signed 64-bit numbers
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,10})?)([kmgtpe]?)(?:i?b)?", re.IGNORECASE)
_UNITS = " kmgtpe"


def parse_size(text: str) -> int:
    """Bytes in a size like 512, 64k, 1.5G, 10GiB; units are powers of 1024.  ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"no size: {text!r}; like 512, 64K, 1.5G")
    unit = _UNITS.index(match[2].lower() or " ")
    # Not a float: 8191.9P has more digits than one.
    size = int(Fraction(match[1]) * 1024**unit)
    if size > MAX_SIZE:
        raise ValueError(f"{text}: the largest disk has {MAX_SIZE} bytes")
    return size


def parse_options(texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE,NAME=VALUE of `-o`, given once or more; a comma in a value is written twice.

    A name alone means on.  ValueError for an empty name, or one that comes twice.
    """
    options: dict[str, str] = {}
    for text in texts:
        for part in text.replace(",,", "\0").split(","):
            name, equals, value = part.replace("\0", ",").partition("=")
            name = name.strip()
            if not name:
                raise ValueError(f"no option: {text!r}; like NAME=VALUE,NAME=VALUE")
            if name in options:
                raise ValueError(f"{name} is given twice")
            options[name] = value if equals else "on"
    return options


def complete_options(driver: type[Image], given: Mapping[str, str]) -> dict[str, str]:
    """Every option that create() of the driver knows: as given, or its default."""
    for name in given:
        if name not in driver.choices:
            known = ", ".join(driver.choices) or "none"
            text = f"{driver.name} has no such option, know {known}"
            raise Unsupported(f"-o {name}", "", text)
    return {name: given.get(name, choice.default) for name, choice in driver.choices.items()}
