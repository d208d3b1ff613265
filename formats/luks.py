"""LUKS version 1 headers, as they lie inside of encrypted images, and QCOW's older encryption.

Source: "LUKS On-Disk Format Specification" 1.2.3 (Clemens Fruhwirth), sections 2 to 4 and 6; qemu's
docs/interop/qcow2.rst, "Full disk encryption header pointer", for what counts as a sector there.
Tried in both directions with qemu-img 7.2.  Refused by name: other ciphers than AES, other modes
than XTS and CBC, LUKS version 2.

Only the header is dealt with here: the engine encrypts and decrypts guest data (image.py, Cipher).
A header may ask for any amount of work before it says no: iterations and lengths are bounded.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from construct import (
    Array,
    Bytes,
    Const,
    ConstructError,
    Int16ub,
    Int32ub,
    Struct,
)
from cryptography.hazmat.primitives.ciphers import Cipher as Aes
from cryptography.hazmat.primitives.ciphers import algorithms, modes

from virtmount.errors import Corrupt, Denied, Unsupported
from virtmount.hostfile import HostFile
from virtmount.image import Cipher, Options

MAGIC = b"LUKS\xba\xbe"
VERSION = 1
SLOTS = 8
ACTIVE, UNUSED = 0x00AC71F3, 0x0000DEAD

Slot = Struct(
    "active" / Int32ub,
    "iterations" / Int32ub,
    "salt" / Bytes(32),
    "material" / Int32ub,  # sectors from the header's start
    "stripes" / Int32ub,
)
Header = Struct(
    "magic" / Const(MAGIC),
    "version" / Int16ub,
    "cipher" / Bytes(32),  # text, ends with a zero byte
    "mode" / Bytes(32),
    "hash" / Bytes(32),
    "payload" / Int32ub,  # sectors; without a meaning inside of an image
    "key_length" / Int32ub,
    "digest" / Bytes(20),  # of the master key
    "digest_salt" / Bytes(32),
    "digest_iterations" / Int32ub,
    "uuid" / Bytes(40),
    "slots" / Array(SLOTS, Slot),
)
assert Header.sizeof() == 592
SLOTS_AT, SLOT_SIZE = 208, 48

SECTOR = 512
VECTOR = 16  # bytes of an AES block
MODES = {
    "xts-plain64": ("xts", False),
    "xts-plain": ("xts", False),
    "cbc-plain64": ("cbc", False),
    "cbc-plain": ("cbc", False),
    "cbc-essiv:sha256": ("cbc", True),
}
KEY_LENGTHS = {"xts": (32, 64), "cbc": (16, 24, 32)}
HASHES = ("sha1", "sha224", "sha256", "sha384", "sha512")
PLAIN_LIMIT = SECTOR << 32  # "plain" numbers sectors with 32 bits, "plain64" with 64

# 2 s of a fast machine are about 10 million iterations; a slow one takes seconds for them.
MAX_ITERATIONS = 1 << 24  # of a slot, and of the digest
MAX_WORK = 1 << 26  # iterations of all slots in use, with a digest each
MAX_STRIPES = 16384
STRIPES = 4000  # what everybody writes
LEGACY_KEY = 16  # bytes: the passphrase itself, cut or filled with zeros

Crypt = Callable[[int, bytes], bytes]  # number of the first sector, whole sectors


def legacy_aes(passphrase: bytes) -> Cipher:
    """QCOW's encryption method 1.  Nothing in the file says whether the passphrase is right."""
    return Cipher("cbc", passphrase[:LEGACY_KEY].ljust(LEGACY_KEY, b"\0"), by_guest=True)


def ask(file: HostFile, place: str, options: Options) -> bytes:
    if options.passphrase is None:
        raise Denied(file, place, "encrypted: no passphrase", hint="--passphrase-file FILE")
    return options.passphrase()


def unlock(file: HostFile, offset: int, length: int, options: Options) -> Cipher:
    """The cipher of the guest data, from the `length` bytes of LUKS header at `offset`.

    Raises Denied where no key slot opens with the passphrase.  Takes as long as the header's maker
    wanted it to take, 2 seconds as a rule.
    """
    header = _read(file, offset, length)
    passphrase = ask(file, f"byte {offset}", options)
    for slot in header.slots:
        key = header.open(passphrase, slot, file.pread_padded)
        if key is not None:
            return Cipher(header.mode, key, essiv=header.essiv)
    raise Denied(file, f"byte {offset}", "no key slot opens with this passphrase")


@dataclass(frozen=True, slots=True)
class _Slot:
    iterations: int
    salt: bytes
    offset: int  # of the key material in the file
    stripes: int


@dataclass(frozen=True, slots=True)
class _Luks:
    """A header's fields, checked; only the slots that are in use."""

    mode: str
    essiv: bool
    hash: str
    key_length: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    slots: tuple[_Slot, ...]

    def derived(self, secret: bytes, salt: bytes, iterations: int, length: int) -> bytes:
        return hashlib.pbkdf2_hmac(self.hash, secret, salt, iterations, length)

    def open(
        self, passphrase: bytes, slot: _Slot, pread: Callable[[int, int], bytes]
    ) -> bytes | None:
        """The master key, if the passphrase opens this slot."""
        derived = self.derived(passphrase, slot.salt, slot.iterations, self.key_length)
        length = self.key_length * slot.stripes
        raw = pread(slot.offset, -(-length // SECTOR) * SECTOR)
        try:
            material = crypt(Cipher(self.mode, derived, essiv=self.essiv), encrypt=False)(0, raw)
        except ValueError:
            return None  # an XTS key whose halves are equal, which no passphrase gives
        key = merge(material[:length], self.key_length, self.hash)
        digest = self.derived(key, self.digest_salt, self.digest_iterations, len(self.digest))
        return key if hmac.compare_digest(digest, self.digest) else None


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("ascii", "replace")


def _read(file: HostFile, offset: int, length: int) -> _Luks:
    place = f"byte {offset}"
    if length < Header.sizeof() or offset + length > file.size:
        raise Corrupt(file, place, f"LUKS header of {length} bytes, the file ends at {file.size}")
    try:
        fields = Header.parse(file.pread(offset, Header.sizeof()))
    except ConstructError as error:
        raise Corrupt(file, place, "no LUKS signature") from error
    if fields.version != VERSION:
        raise Unsupported(file, f"byte {offset + 6}", f"LUKS version {fields.version}, know 1")
    name, mode, digest = _text(fields.cipher), _text(fields.mode), _text(fields.hash)
    if name != "aes":
        raise Unsupported(file, f"byte {offset + 8}", f"cipher {name!a}, know aes")
    if mode not in MODES:
        known = ", ".join(MODES)
        raise Unsupported(file, f"byte {offset + 40}", f"cipher mode {mode!a}, know {known}")
    if mode.endswith("-plain") and file.size > PLAIN_LIMIT:
        text = f"cipher mode {mode} in a file of {file.size} bytes, the most is {PLAIN_LIMIT}"
        raise Unsupported(file, f"byte {offset + 40}", text)
    if digest not in HASHES:
        text = f"hash {digest!a}, know {', '.join(HASHES)}"
        raise Unsupported(file, f"byte {offset + 72}", text)
    kind, essiv = MODES[mode]
    if fields.key_length not in KEY_LENGTHS[kind]:
        text = f"keys of {fields.key_length} bytes, know {KEY_LENGTHS[kind]} with {mode}"
        raise Unsupported(file, f"byte {offset + 108}", text)
    return _Luks(
        mode=kind,
        essiv=essiv,
        hash=digest,
        key_length=fields.key_length,
        digest=fields.digest,
        digest_salt=fields.digest_salt,
        digest_iterations=fields.digest_iterations,
        slots=_slots(file, offset, length, fields),
    )


def _slots(file: HostFile, offset: int, length: int, fields: Any) -> tuple[_Slot, ...]:
    found = []
    work = 0
    for number, slot in enumerate(fields.slots):
        at = offset + SLOTS_AT + number * SLOT_SIZE
        if slot.active == UNUSED:
            continue
        if slot.active != ACTIVE:
            raise Corrupt(file, f"byte {at}", f"key slot {number}: state {slot.active:#x}")
        if not 0 < slot.stripes <= MAX_STRIPES:
            text = f"key slot {number}: {slot.stripes} stripes, expected 1 to {MAX_STRIPES}"
            raise Corrupt(file, f"byte {at + 44}", text)
        start, needed = slot.material * SECTOR, fields.key_length * slot.stripes
        if start < Header.sizeof() or start + needed > length:
            text = f"key slot {number}: {needed} bytes at {start} of a header of {length}"
            raise Corrupt(file, f"byte {at + 40}", text)
        for iterations, place in (
            (slot.iterations, at + 4),
            (fields.digest_iterations, offset + 164),
        ):
            work += iterations
            if not 0 < iterations <= MAX_ITERATIONS or work > MAX_WORK:
                text = f"{iterations} iterations for key slot {number}, {work} until there"
                most = f"at most {MAX_ITERATIONS}, and {MAX_WORK} in all"
                raise Corrupt(file, f"byte {place}", f"{text}: {most}")
        found.append(_Slot(slot.iterations, slot.salt, offset + start, slot.stripes))
    return tuple(found)


# The anti-forensic splitter: section 2.4.


def merge(material: bytes, key_length: int, name: str) -> bytes:
    state = bytes(key_length)
    last = len(material) - key_length
    for at in range(0, last, key_length):
        state = _diffuse(_xor(state, material[at : at + key_length]), name)
    return _xor(state, material[last:])


def split(key: bytes, stripes: int, name: str, random: Callable[[int], bytes]) -> bytes:
    noise = random(len(key) * (stripes - 1))
    return noise + merge(noise + key, len(key), name)


def _xor(left: bytes, right: bytes) -> bytes:
    number = int.from_bytes(left, "big") ^ int.from_bytes(right, "big")
    return number.to_bytes(len(left), "big")


def _diffuse(data: bytes, name: str) -> bytes:
    step = hashlib.new(name).digest_size
    parts = []
    for number, at in enumerate(range(0, len(data), step)):
        part = data[at : at + step]
        parts.append(hashlib.new(name, number.to_bytes(4, "big") + part).digest()[: len(part)])
    return b"".join(parts)


# Sectors


def crypt(cipher: Cipher, *, encrypt: bool) -> Crypt:
    """The slow twin of native/cipher.c: (first sector, data) -> data.  ValueError: no such key."""
    vector = None
    if cipher.essiv:
        secret = hashlib.sha256(cipher.key).digest()
        # One block at a time: with single blocks ECB is AES itself.
        vector = Aes(algorithms.AES(secret), modes.ECB()).encryptor()

    def run(first: int, data: bytes) -> bytes:
        parts = []
        for number, at in enumerate(range(0, len(data), SECTOR), first):
            start = number.to_bytes(8, "little") + bytes(VECTOR - 8)
            if vector:
                start = vector.update(start)
            mode = modes.XTS(start) if cipher.mode == "xts" else modes.CBC(start)
            engine = Aes(algorithms.AES(cipher.key), mode)
            step = engine.encryptor() if encrypt else engine.decryptor()
            parts.append(step.update(data[at : at + SECTOR]) + step.finalize())
        return b"".join(parts)

    return run


# Making a header

MATERIAL_STEP = 504  # sectors from one slot's key material to the next: whole pages
FIRST_MATERIAL = 8  # sectors
NEW_LENGTH = (FIRST_MATERIAL + SLOTS * MATERIAL_STEP) * SECTOR
NEW_ITERATIONS = 2_000_000  # as many as others take for 2 s


def make(
    passphrase: bytes,
    *,
    mode: str = "xts-plain64",
    key_length: int = 64,  # bytes; two keys where the mode is XTS
    digest: str = "sha256",
    iterations: int,
    random: Callable[[int], bytes] = os.urandom,
) -> tuple[bytes, Cipher]:
    """A new header of NEW_LENGTH bytes with one key slot, and the cipher that it stands for."""
    kind, essiv = MODES[mode]
    key = random(key_length)
    slot_salt, digest_salt = random(32), random(32)
    derived = hashlib.pbkdf2_hmac(digest, passphrase, slot_salt, iterations, key_length)
    digest_iterations = max(1000, iterations // 8)
    material = split(key, STRIPES, digest, random)
    slots = [
        {
            "active": UNUSED if number else ACTIVE,
            "iterations": 0 if number else iterations,
            "salt": bytes(32) if number else slot_salt,
            "material": FIRST_MATERIAL + number * MATERIAL_STEP,
            "stripes": STRIPES,
        }
        for number in range(SLOTS)
    ]
    header = Header.build(
        {
            "version": VERSION,
            "cipher": b"aes".ljust(32, b"\0"),
            "mode": mode.encode().ljust(32, b"\0"),
            "hash": digest.encode().ljust(32, b"\0"),
            "payload": NEW_LENGTH // SECTOR,
            "key_length": key_length,
            "digest": hashlib.pbkdf2_hmac(digest, key, digest_salt, digest_iterations, 20),
            "digest_salt": digest_salt,
            "digest_iterations": digest_iterations,
            "uuid": str(uuid.UUID(bytes=random(16), version=4)).encode().ljust(40, b"\0"),
            "slots": slots,
        }
    )
    raw = bytearray(NEW_LENGTH)
    raw[: len(header)] = header
    at = FIRST_MATERIAL * SECTOR
    material = crypt(Cipher(kind, derived, essiv=essiv), encrypt=True)(0, material)
    raw[at : at + len(material)] = material
    return bytes(raw), Cipher(kind, key, essiv=essiv)
