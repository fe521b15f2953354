"""Names and tables in Markdown, read back by a Markdown parser."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from train.markdown import decimal, markdown_code, markdown_table, markdown_text

NAMES = [
    "stable_diffusion_1",
    "_a_ and *b*",
    "<script>alert(1)</script>",
    "a|b",
    r"a\|b",
    "![x](https://example.org/x.png)",
    "[x](https://example.org)",
    "&lt;`code`",
    "100.0 [90.0, 100.0]",
]


def text_of(markdown: str) -> list[str]:
    """What a reader sees of each inline part; markup of any kind would be a token of another type."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    children = [token.children for token in tokens if token.type == "inline"]
    assert {child.type for part in children for child in part} == {"text"}
    return ["".join(child.content for child in part) for part in children]


@pytest.mark.parametrize("name", NAMES)
def test_name_is_shown_as_it_is_written(name: str) -> None:
    assert text_of(markdown_text(name)) == [name]
    assert text_of(markdown_table(("set", "AP"), [(name, "1.0")])) == ["set", "AP", name, "1.0"]


def test_name_with_a_line_break_stays_in_its_row() -> None:
    assert text_of(markdown_table(("set", "AP"), [("a\nb", "1.0")])) == ["set", "AP", "a b", "1.0"]


def test_usual_names_need_no_backslash() -> None:
    assert markdown_text("glid3xl pixel_shuffle 1.5 [1.0, 2.0]") == "glid3xl pixel_shuffle 1.5 [1.0, 2.0]"


@pytest.mark.parametrize("path", ["runs/one", "a`b", "``", "a\nb"])
def test_code_span_holds_any_path(path: str) -> None:
    (paragraph,) = (t for t in MarkdownIt("commonmark").parse(markdown_code(path)) if t.type == "inline")
    assert [(child.type, child.content) for child in paragraph.children] == [("code_inline", path.replace("\n", " "))]


@pytest.mark.parametrize(("value", "text"), [(None, "n/a"), (0.126, "0.13"), (-1.0, "-1.00")])
def test_numbers_have_two_decimals(value: float | None, text: str) -> None:
    assert decimal(value) == text
