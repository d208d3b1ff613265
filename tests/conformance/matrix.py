"""Format x feature: what virtmount does, what it refuses by name, and what it cannot do yet.

README's tables are made from here (`python3 -m tests.conformance.matrix`), and test_matrix.py
holds every cell against the program.  "refuses": not meant to be, or senseless; "not yet": refused
as well, but missed.  "-": the format has no such thing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = (
    "<!-- matrix: made by python3 -m tests.conformance.matrix -->",
    "<!-- end of matrix -->",
)

YES, REFUSES, NOT_YET, NONE = "yes", "refuses", "not yet", "-"

FEATURES = (
    "read",
    "write",
    "create",
    "parents",
    "discard",
    "check",
    "resize",
    "rebase",
    "compress",
)
TITLES = {
    "raw": "raw (`.img`, block devices)",
    "qcow2": "QCOW2 (2, 3)",
    "qcow": "QCOW (1)",
    "vhdx": "VHDX",
    "vhd": "VHD",
    "vdi": "VDI",
    "vmdk": "VMDK",
    "ova": "OVA",
    "qed": "QED",
    "parallels": "Parallels",
    "dmg": "DMG",
    "bochs": "Bochs",
    "cloop": "cloop",
    "ewf": "EWF (E01)",
}


def row(text: str) -> dict[str, str]:
    """One word a feature: y(es), r(efuses), n(ot yet), -."""
    words = {"y": YES, "r": REFUSES, "n": NOT_YET, "-": NONE}
    return dict(zip(FEATURES, (words[letter] for letter in text.split()), strict=True))


#                       read write create parents discard check resize rebase compress
MATRIX = {
    "raw": row("         y   y     y      -       y       y     y      -      -"),
    "qcow2": row("       y   y     y      y       y       y     y      y      y"),
    "qcow": row("        y   y     y      y       y       y     y      y      -"),
    "vhdx": row("        y   y     y      y       y       y     y      y      -"),
    "vhd": row("         y   y     y      y       y       y     y      y      -"),
    "vdi": row("         y   y     y      y       y       y     y      y      -"),
    "vmdk": row("        y   y     y      y       y       y     y      y      y"),
    "ova": row("         y   r     r      -       -       r     r      -      -"),
    "qed": row("         y   y     y      y       y       y     y      y      -"),
    "parallels": row("   y   y     y      -       y       y     y      -      -"),
    "dmg": row("         y   r     r      -       -       r     r      -      -"),
    "bochs": row("       y   r     r      -       -       r     r      -      -"),
    "cloop": row("       y   r     r      -       -       r     r      -      -"),
    "ewf": row("         y   r     r      -       -       r     r      -      -"),
}


# Cases of the common suite, which reads and writes.
CASE = {
    "qcow2": "case:qcow2-v2 case:qcow2-512 case:qcow2-2M case:qcow2-refcount-1 "
    "case:qcow2-refcount-64",
    "qcow": "case:qcow case:qcow-on-raw",
    "vhdx": "case:vhdx-dynamic-1M case:vhdx-dynamic-8M case:vhdx-fixed",
    "vhd": "case:vhd-dynamic case:vhd-fixed",
    "vdi": "case:vdi-dynamic case:vdi-static",
    "qed": "case:qed case:qed-4k case:qed-on-raw",
}


class Variant(NamedTuple):
    """A kind of image that a format has.

    `proof`: cases of cases.py as case:NAME, or tests as FILE::NAME, below tests/.
    """

    format: str
    name: str
    read: str
    write: str
    proof: tuple[str, ...]


def where(file: str, word: str) -> str:
    """A test of `file`, or of the one that the word itself begins with."""
    return f"formats{word}" if word.startswith("/") else f"formats/{file}::{word}"


def proven(format: str, file: str, *rows: tuple[str, str, str, str]) -> tuple[Variant, ...]:
    """Rows (name, read, write, proof): tests of one file, or cases of the common suite."""
    return tuple(
        Variant(
            format,
            name,
            reads,
            writes,
            tuple(
                word if word.startswith("case:") else where(file, word) for word in proof.split()
            ),
        )
        for name, reads, writes, proof in rows
    )


VARIANTS: tuple[Variant, ...] = (
    *proven(
        "qcow2",
        "test_qcow2_features.py",
        ("clusters of 512 bytes to 2 MiB, counts of 1 to 64 bits", YES, YES, CASE["qcow2"]),
        ("zero and preallocated clusters", YES, YES, "case:qcow2-preallocated"),
        (
            "compressed clusters (zlib, zstd), rewritten on write",
            *(YES, YES),
            "case:qcow2-compressed case:qcow2-zstd",
        ),
        ("extended L2 entries", YES, YES, "case:qcow2-extended case:qcow2-extended-on-raw"),
        ("external data file", YES, YES, "case:qcow2-data-file case:qcow2-data-file-raw"),
        ("with internal snapshots", YES, YES, "case:qcow2-snapshots"),
        ("an internal snapshot (`--snapshot`)", YES, REFUSES, "test_each_snapshot_is_read"),
        ("lazy counts", YES, YES, "case:qcow2-lazy"),
        (
            "bitmaps: kept, marked as not followed",
            *(YES, YES),
            "test_bitmaps_that_follow_all_changes_are_marked_before_the_first_write",
        ),
    ),
    *proven(
        "qcow2",
        "test_qcow2_crypt.py",
        (
            "encrypted: LUKS, and the old AES",
            *(YES, YES),
            "test_reads_what_qemu_wrote test_qemu_reads_what_we_wrote",
        ),
    ),
    *proven(
        "qcow2",
        "test_qcow2.py",
        (
            "marked dirty or corrupt (mended by `check --repair`)",
            *(YES, REFUSES),
            "test_a_marked_image_is_read_but_not_written",
        ),
        (
            "unknown incompatible features",
            *(REFUSES, REFUSES),
            "test_an_unknown_feature_is_refused_by_the_name_that_the_image_gives_it",
        ),
    ),
    *proven(
        "qcow",
        "test_qcow.py",
        ("plain and compressed, over parents", YES, YES, CASE["qcow"]),
        ("encrypted (AES)", YES, REFUSES, "test_reads_what_qemu_encrypted"),
    ),
    *proven(
        "vhdx",
        "test_vhdx_parent.py",
        ("fixed and dynamic", YES, YES, CASE["vhdx"]),
        ("sectors of 4096 bytes", YES, YES, "/test_vhdx_write.py::test_sectors_of_4096_bytes"),
        (
            "blocks of 1 to 256 MiB",
            *(YES, YES),
            "/test_vhdx_create.py::test_the_smallest_and_the_largest",
        ),
        (
            "differencing, with partially present blocks",
            *(YES, YES),
            "test_sectors_of_the_child_hide_those_of_the_parent "
            "test_writing_to_a_partial_block_moves_it_and_makes_it_whole",
        ),
        (
            "a dirty log (replayed in memory, or before the first write)",
            *(YES, YES),
            "/test_vhdx_log.py::test_several_entries_from_the_tail_on",
        ),
        (
            "one header or region table torn, regions not marked as required",
            *(YES, YES),
            "/test_vhdx.py::test_one_region_table_is_enough "
            "/test_vhdx_check.py::test_finds_and_mends",
        ),
    ),
    *proven(
        "vhd",
        "test_vhd.py",
        ("fixed and dynamic, all block sizes", YES, YES, CASE["vhd"]),
        (
            "differencing, with sector bitmaps",
            *(YES, YES),
            "test_a_clear_bit_in_a_differencing_image_asks_the_parent "
            "test_writing_to_a_child_takes_whole_blocks_and_leaves_the_parent",
        ),
        (
            "one whole footer of the two, or a padded or short one",
            *(YES, YES),
            "test_a_dynamic_image_opens_from_any_whole_footer_and_says_which "
            "test_writing_mends_both_footers_first",
        ),
        ("no whole footer", REFUSES, REFUSES, "test_without_any_whole_footer_nothing_is_served"),
    ),
    *proven(
        "vdi",
        "test_vdi_chain.py",
        ("dynamic and fixed", YES, YES, CASE["vdi"]),
        (
            "differencing and undo, found by UUID",
            *(YES, YES),
            "test_undo_and_differencing_images_are_read_over_their_parent "
            "test_writing_copies_the_rest_of_the_block_from_the_parent",
        ),
    ),
    *proven(
        "vdi",
        "test_vdi_whole.py",
        ("blocks other than 1 MiB", YES, YES, "test_block_sizes"),
        (
            "extra data before each block",
            *(YES, YES),
            "test_extra_data_in_front_of_every_block_is_skipped",
        ),
        (
            "extra data that is no multiple of 512 bytes",
            *(YES, REFUSES),
            "test_extra_data_in_front_of_every_block_is_skipped",
        ),
        (
            "headers before version 1.1",
            *(YES, REFUSES),
            "test_a_header_before_1_1_is_read test_a_header_before_1_1_is_not_written",
        ),
    ),
    *proven(
        "vmdk",
        "test_vmdk.py",
        ("monolithicSparse, zeroed grains", YES, YES, "case:vmdk-sparse case:vmdk-zeroed"),
        ("monolithicFlat, vmfs flat and thin", YES, YES, "case:vmdk-flat"),
        (
            "twoGbMaxExtentSparse and -Flat",
            *(YES, YES),
            "case:vmdk-split-sparse case:vmdk-split-flat",
        ),
        ("delta links, chains of mixed kinds", YES, YES, "case:vmdk-on-vmdk"),
        (
            "vmfsSparse (COWD)",
            *(YES, YES),
            "test_cowd /test_vmdk_whole.py::test_the_taken_sectors_of_a_cowd_extent_are_counted",
        ),
        ("streamOptimized (made by `convert -c`)", YES, REFUSES, "test_stream_optimized"),
        ("seSparse", YES, REFUSES, "test_se_sparse"),
        (
            "ZERO, RDONLY and NOACCESS extents",
            *(YES, YES),
            "test_every_extent_keeps_its_place "
            "test_an_extent_without_access_fails_and_keeps_its_place "
            "/test_vmdk_whole.py::test_what_may_not_be_written_fails_alone",
        ),
    ),
    *proven(
        "parallels",
        "test_parallels.py",
        ("expanding, both magics", YES, YES, "case:parallels test_the_old_version_is_written"),
        (
            "clusters that are no power of two (VirtualBox)",
            *(YES, REFUSES),
            "test_an_image_made_by_virtualbox test_clusters_of_any_size_are_read",
        ),
        (
            "bundles with DiskDescriptor.xml",
            *(REFUSES, REFUSES),
            "test_a_bundle_is_refused_by_name",
        ),
    ),
    *proven(
        "qed", "test_qed.py", ("clusters and tables of all sizes, parents", YES, YES, CASE["qed"])
    ),
    *proven(
        "ova", "test_ova.py", ("one disk, compressed or not", YES, REFUSES, "test_the_disk_is_read")
    ),
    *proven(
        "dmg",
        "test_dmg.py",
        (
            "zlib, bzip2, LZMA, ADC, LZFSE (with the package `lzfse`), plain",
            *(YES, REFUSES),
            "test_every_way_of_packing test_lzfse_without_its_package",
        ),
        ("encrypted", REFUSES, REFUSES, "test_an_encrypted_one_is_refused_by_name"),
    ),
    *proven(
        "ewf",
        "test_ewf.py",
        ("E01, one segment or many", YES, REFUSES, "test_what_ewfacquire_writes"),
        ("Ex01", REFUSES, REFUSES, "test_version_2_is_refused_by_name"),
    ),
)


def tables() -> str:
    """Both tables, in Markdown."""
    lines = ["| format | " + " | ".join(FEATURES) + " |", "|---" * (len(FEATURES) + 1) + "|"]
    for format, cells in MATRIX.items():
        lines.append("| " + " | ".join((TITLES[format], *cells.values())) + " |")
    lines += ["", "| format | variant | read | write |", "|---|---|---|---|"]
    for variant in VARIANTS:
        title = TITLES[variant.format]
        lines.append(f"| {title} | {variant.name} | {variant.read} | {variant.write} |")
    return "\n".join(lines)


def readme(text: str) -> str:
    """README's text with the tables of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main() -> int:
    """Write the tables into README.md."""
    README.write_text(readme(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
