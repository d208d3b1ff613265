"""Tables and cards: widths, missing values, names that are no text."""

from __future__ import annotations

import pytest

from virtmount.tables import Column, card, select, size, table

COLUMNS: list[Column[dict[str, object]]] = [
    Column("NAME", "", lambda row: row.get("name")),
    Column("SIZE", "", lambda row: row.get("size"), right=True),
    Column("IMAGE", "", lambda row: row.get("image")),
]


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    rows = [{"name": "vhdx0", "size": 5, "image": "/a"}, {"name": "x", "size": 1234}]
    assert table(rows, COLUMNS) == "NAME  SIZE IMAGE\nvhdx0    5 /a\nx     1234 -\n"
    assert table(rows, COLUMNS, headings=False) == "vhdx0    5 /a\nx     1234 -\n"


def test_names_cannot_move_the_cursor() -> None:
    rows = [{"name": "a\x1b[2Jb\nc", "image": "/\udcff"}]
    assert table(rows, COLUMNS, headings=False) == "a?[2Jb?c - /?\n"


def test_selected_columns_come_in_the_order_asked_for() -> None:
    assert [column.name for column in select(COLUMNS, "image, NAME")] == ["IMAGE", "NAME"]
    with pytest.raises(ValueError, match="no column 'nam', know NAME,SIZE,IMAGE"):
        select(COLUMNS, "nam")


def test_card_leaves_out_what_is_not_known() -> None:
    assert card([("a", 1), ("long name", 0), ("b", None), ("c", "")]) == (
        "a          1\nlong name  0\n"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (512, "512"),
        (1023, "1023"),
        (1024, "1K"),
        (1536, "1.5K"),
        (99 << 20, "99M"),
        (1500 << 20, "1.5G"),
        (200 << 30, "200G"),
        (1 << 63, "8E"),
    ],
)
def test_size(value: int, text: str) -> None:
    assert size(value) == text
