"""VMDKs for the crash tests that qemu-img does not make: changes to those that it does."""

from __future__ import annotations

from tests.crash.simulate import SimulatedFile, Store
from virtmount import hostfile
from virtmount.formats.vmdk import VMDK

TEXT, ROOM = 512, 20 * 512  # where qemu-img puts the descriptor


def child(store: Store) -> None:
    """A differencing image; which one its parent is, nobody asks here."""
    text = store.read(TEXT, ROOM)
    named = text.replace(b"parentCID=ffffffff", b'parentCID=12345678\nparentFileNameHint="p"')
    store.write(TEXT, named[:ROOM])


def without_tables(store: Store) -> None:
    """Grains of 4 KiB, tables of 128 entries, and none of them there yet."""
    store.write(20, (8).to_bytes(8, "little"))
    store.write(44, (128).to_bytes(4, "little"))
    for field in (48, 56):  # the second one lies further back
        at = int.from_bytes(store.read(field, 8), "little") * 512
        store.write(at, bytes(512))
    store.resize(at + 512)


def settled(store: Store) -> Store:
    """With tables whose copies agree: qemu reads the first ones only, we take what either has."""
    file = SimulatedFile(store.copy(), name="settled")
    image = VMDK(file)
    hostfile.execute(image.begin(), image.files)
    hostfile.execute(image.end(), image.files)
    return file.store
