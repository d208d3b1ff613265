"""matrix.py says what virtmount does: every cell is tried, README has the same."""

from __future__ import annotations

import ast
import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

import virtmount
from tests.conformance import cases, matrix
from tests.conformance.matrix import MATRIX, NONE, NOT_YET, REFUSES, VARIANTS, YES
from tests.corpus import bases
from virtmount.chain import open_chain
from virtmount.errors import Unsupported
from virtmount.formats import TABLE, load
from virtmount.image import Image

TESTS = Path(__file__).resolve().parents[1]
MIB = 1 << 20
SIZE = 4 * MIB
MARK = b"in the guest" * 400

CELLS = [(format, feature, cell) for format, row in MATRIX.items() for feature, cell in row.items()]


def test_every_format_has_a_row() -> None:
    assert set(MATRIX) == set(TABLE) == set(matrix.TITLES)


@pytest.mark.parametrize(("format", "feature", "cell"), CELLS)
def test_cell(tmp_path: Path, format: str, feature: str, cell: str) -> None:
    driver = load(format)
    if cell == NONE:
        assert not claims(driver, feature)
        return
    refused = ""
    try:
        TRIALS[feature](format, tmp_path)
    except Unsupported as error:
        refused = str(error)
    assert cell in ((REFUSES, NOT_YET) if refused else (YES,)), refused


def claims(driver: type[Image], feature: str) -> bool:
    """Whether the driver has something of its own for a feature that the format has not."""
    own = {"check": "check", "rebase": "rebase", "compress": "packer", "resize": "resize"}
    name = own.get(feature)
    between = driver.__mro__[: driver.__mro__.index(Image)]
    return any(name in each.__dict__ for each in between)


def sample(format: str, folder: Path) -> Path:
    """An image with something in it: ours where it can be made, else a base of the corpus."""
    driver = load(format)
    suffix = driver.suffixes[0] if driver.suffixes else format
    if driver.creates:
        path = folder / f"sample.{suffix}"
        virtmount.create(path, SIZE, format)
        with virtmount.open(path, format, writable=True) as disk:
            disk.pwrite(MIB, MARK)
        return path
    maker = next(maker for maker in bases.makers().values() if maker.format == format)
    path = folder / (maker.file_name if maker.file_name != "image" else f"sample.{suffix}")
    maker.make(path)
    if maker.beside:
        maker.beside(path)
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def read(format: str, folder: Path) -> None:
    path = sample(format, folder)
    with virtmount.open(path) as disk:
        assert disk.image.name == format
        assert any(disk.pread(0, disk.size))


def write(format: str, folder: Path) -> None:
    path = sample(format, folder)
    before = hashes(folder)
    try:
        with virtmount.open(path, writable=True) as disk:
            disk.pwrite(disk.size - 4096, b"new")
    except Unsupported:
        assert hashes(folder) == before
        raise
    with virtmount.open(path) as disk:
        assert disk.pread(disk.size - 4096, 3) == b"new"


def create(format: str, folder: Path) -> None:
    path = folder / "made"
    try:
        virtmount.create(path, SIZE, format)
    except Unsupported:
        assert list(folder.iterdir()) == []
        raise
    with virtmount.open(path, format) as disk:
        assert disk.size == SIZE
        assert not any(disk.pread(0, SIZE))


def child(format: str, folder: Path) -> Path:
    parent = sample(format, folder)
    path = folder / f"child{parent.suffix}"
    virtmount.create(path, None, format, parent=parent, parent_format=format)
    return path


def parents(format: str, folder: Path) -> None:
    path = child(format, folder)
    with virtmount.open(path, format, writable=True) as disk:
        assert disk.pread(MIB, len(MARK)) == MARK
        disk.pwrite(MIB + 1, b"N")
    with virtmount.open(path) as disk:
        assert disk.pread(MIB, len(MARK)) == MARK[:1] + b"N" + MARK[2:]


def discard(format: str, folder: Path) -> None:
    path = sample(format, folder)
    with virtmount.open(path, format, writable=True) as disk:
        if not disk.image.caps.discard:
            raise Unsupported(path, "", "discard")
        disk.discard(0, SIZE)
        assert not any(disk.pread(0, SIZE))


def check(format: str, folder: Path) -> None:
    report = virtmount.check(sample(format, folder), format)
    assert report.exit_code == 0, report.findings


def resize(format: str, folder: Path) -> None:
    path = sample(format, folder)
    before = hashes(folder)
    try:
        virtmount.resize(path, 3 * SIZE, format)
    except Unsupported:
        assert hashes(folder) == before
        raise
    with virtmount.open(path, format) as disk:
        assert disk.size == 3 * SIZE
        assert disk.pread(MIB, len(MARK)) == MARK
        assert not any(disk.pread(SIZE, 2 * SIZE))


def rebase(format: str, folder: Path) -> None:
    path = child(format, folder)
    other = folder / f"other{path.suffix}"
    virtmount.create(other, SIZE, format)
    virtmount.rebase(path, other, format, new_format=format)
    with contextlib.closing(open_chain(path, format)) as chain:
        assert chain.images[1].files[0].path.name == other.name
    with virtmount.open(path, format) as disk:
        assert disk.pread(MIB, len(MARK)) == MARK


def compress(format: str, folder: Path) -> None:
    raw = folder / "plain.img"
    raw.write_bytes(bytes(MIB) + MARK + bytes(SIZE - MIB - len(MARK)))
    path = folder / f"packed.{format}"
    virtmount.convert(raw, path, format, source_format="raw", compress=True)
    with virtmount.open(path) as disk:
        assert disk.pread(0, SIZE) == raw.read_bytes()


TRIALS: dict[str, Callable[[str, Path], None]] = {
    "read": read,
    "write": write,
    "create": create,
    "parents": parents,
    "discard": discard,
    "check": check,
    "resize": resize,
    "rebase": rebase,
    "compress": compress,
}


def test_every_feature_is_tried() -> None:
    assert tuple(TRIALS) == matrix.FEATURES


@pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda variant: f"{variant.format} {variant.name}"
)
def test_variants_name_their_proof(variant: matrix.Variant) -> None:
    """A case of the common suite, which reads and writes, or a test that is really there."""
    known = {case.name: case for case in (*cases.CASES, *cases.WIDE)}
    assert variant.proof
    for proof in variant.proof:
        if proof.startswith("case:"):
            assert known[proof.removeprefix("case:")].top.format in (
                variant.format,
                bases.QEMU_NAMES.get(variant.format),
            )
            assert (variant.read, variant.write) == (YES, YES)
            continue
        file, _, name = proof.partition("::")
        names = {
            node.name
            for node in ast.walk(ast.parse((TESTS / file).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert name in names, f"{file} has no {name}"


def test_readme_has_these_tables() -> None:
    text = matrix.README.read_text()
    assert text == matrix.readme(text)
