"""Where a passphrase comes from, and how it reaches the daemon."""

from __future__ import annotations

import getpass
import os
import socket
import sys
import threading
from pathlib import Path

import pytest

from virtmount import attachment, daemon, secret
from virtmount.attachment import ASK, Order
from virtmount.errors import Denied, VirtmountError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (b"open sesame", b"open sesame"),
        (b"open sesame\n", b"open sesame"),
        (b"two\n\n", b"two\n"),
        (b"\xff\x00\n", b"\xff\x00"),
        (b"", b""),
    ],
)
def test_file_and_descriptor(tmp_path: Path, written: bytes, meant: bytes) -> None:
    (tmp_path / "pass").write_bytes(written)
    given = secret.passphrase(file=str(tmp_path / "pass"))
    assert given is not None
    assert given() == meant
    reader, writer = os.pipe()
    os.write(writer, written)
    os.close(writer)
    given = secret.passphrase(fd=reader)
    assert given is not None
    assert given() == given() == meant  # a descriptor can be read once, several images may ask
    os.close(reader)


def test_file_is_read_only_when_it_is_needed(tmp_path: Path) -> None:
    given = secret.passphrase(file=str(tmp_path / "none"))
    assert given is not None
    with pytest.raises(FileNotFoundError):
        given()


def test_no_file_of_any_length(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"x" * (secret.MAX_LENGTH + 2))
    given = secret.passphrase(file=str(tmp_path / "long"))
    assert given is not None
    with pytest.raises(VirtmountError, match="more than 65536 bytes"):
        given()
    given = secret.passphrase(file="/dev/zero")
    assert given is not None
    with pytest.raises(VirtmountError, match="more than 65536 bytes"):
        given()


def test_person_is_asked_once_and_only_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return "grün"

    monkeypatch.setattr(getpass, "getpass", ask)
    for terminal in (False, True):
        monkeypatch.setattr(sys, "stdin", Terminal(terminal))
        monkeypatch.setattr(sys, "stderr", Terminal(terminal))
        given = secret.passphrase()
        assert (given is not None) is terminal
        assert asked == []
    assert given is not None
    assert given() == given() == "grün".encode()
    assert asked == ["Passphrase: "]


class Terminal:
    def __init__(self, yes: bool) -> None:
        self._yes = yes

    def isatty(self) -> bool:
        return self._yes


# The way to the daemon

# Stands for the daemon: takes the order, asks, and reports what it was told as an error.
ASKER = """
import base64, json, os, socket, sys
if os.fork():
    os._exit(0)
with socket.socket(fileno=int(sys.argv[2])) as channel:
    stream = channel.makefile("rw")
    order = stream.readline()
    stream.write('{"ask": "passphrase"}\\n'); stream.flush()
    told = base64.b64decode(stream.readline()).hex()
    error = {"class": "Busy", "file": "told", "place": "", "text": told + order, "hint": None}
    stream.write(json.dumps({"error": error}) + "\\n"); stream.flush()
"""


def test_client_answers_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "_PROGRAM", ASKER)
    monkeypatch.setattr(attachment, "refuse_without_root", lambda: None)
    with pytest.raises(VirtmountError) as caught:
        attachment.attach_as(Order("/disk.qcow2"), lambda: b"\x01 word\n")
    assert caught.value.text.startswith(b"\x01 word\n".hex())
    assert "word" not in caught.value.text  # nor in the order
    with pytest.raises(Denied, match="no passphrase"):
        attachment.attach_as(Order("/disk.qcow2"))


def test_daemon_asks_its_client() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        got: list[bytes] = []
        thread = threading.Thread(target=lambda: got.append(daemon._ask(theirs)))
        thread.start()
        assert attachment._receive(ours) == ASK
        ours.sendall(attachment._told(Order("/disk"), lambda: b"\0secret\n"))
        thread.join(10)
        assert got == [b"\0secret\n"]


def test_daemon_whose_client_has_gone_tries_no_passphrase() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(Denied, match="nobody is there"):
            daemon._ask(theirs)
        ours.close()
