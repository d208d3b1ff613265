"""The victim of test_kill.py: works on an image until it is killed.

Writes a line before each request and after each acknowledgement to its output, so that whoever
kills it knows what was promised until then.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterable

from tests.crash.workload import SECTOR, ZEROS, Mix, Request, perform, requests, striped
from virtmount import api

OUTPUT = 1
ROUNDS = 1000
EACH = 8
THREADS = 3


def say(what: str, asked: Request, seen: bytes | None = None) -> None:
    # One write of less than PIPE_BUF, but for discards, which run alone: lines do not mix.
    left = "" if seen is None else ",".join(map(str, left_by_discard(seen)))
    os.write(OUTPUT, f"{what} {asked.text} {left or '-'}\n".encode())


def left_by_discard(seen: bytes) -> list[int]:
    """The sectors that a discard has not zeroed, counted from its first."""
    return [i for i in range(len(seen) // SECTOR) if seen[i * SECTOR : (i + 1) * SECTOR] != ZEROS]


def work(disk: api.OpenDisk, list_: Iterable[Request]) -> None:
    for asked in list_:
        say("ask", asked)
        say("done", asked, perform(disk, asked))


def main(path: str, format_name: str, cluster: int, seed: str) -> None:
    rng = random.Random(seed)
    number = 1
    with api.open(path, format_name, writable=True) as disk:
        grain = disk.sector_size
        for _ in range(ROUNDS):
            lists = []
            for owner in range(THREADS):
                made = striped(rng, disk.size, grain, EACH, number, owner, THREADS)
                lists.append(list(made))
                number += EACH
            threads = [threading.Thread(target=work, args=(disk, list_)) for list_ in lists]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            work(disk, requests(rng, disk.size, cluster, EACH, Mix(discard=3), number, grain))
            number += EACH


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
