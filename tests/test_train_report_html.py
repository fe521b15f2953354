"""The HTML of a report, read back by the standard library's parser."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from train.errors import ReportError
from train.markdown import markdown_code, markdown_table, markdown_text
from train.report_html import html_from_markdown, write_html

# What a browser fetches, follows or runs by itself.
FETCHING = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction", "xlink:href"}
SCRIPTED = {"script", "iframe", "object", "embed", "link", "base", "form"}


class Page(HTMLParser):
    """Tags, addresses, anchors and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.anchors: list[str] = []
        self.cells: list[str] = []
        self.style = ""
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in FETCHING:
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.anchors.append(value or "")
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["style"]:
            self.style += data
        if self.cells:
            self.cells[-1] += data.rstrip("\n")
        self.text += data


def assert_self_contained(page: Page) -> None:
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses), page.addresses
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.anchors)
    assert not SCRIPTED & set(page.tags)
    assert not page.handlers
    assert "url(" not in page.style
    assert "@import" not in page.style


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (3, 2), (200, 10, 10)).save(tmp_path / "a figure.png")
    return tmp_path


def test_picture_is_in_the_page_byte_for_byte(folder: Path) -> None:
    page = Page(html_from_markdown("# T\n\n![what is seen](<a figure.png>)\n", folder))
    assert_self_contained(page)
    (source,) = page.addresses
    head, _, data = source.partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == (folder / "a figure.png").read_bytes()


@pytest.mark.parametrize(
    "source", ["gone.png", "https://example.org/x.png", "//example.org/x.png", "/etc/hostname", "../secret.png"]
)
def test_picture_that_is_not_in_the_folder_is_an_error(folder: Path, source: str) -> None:
    (folder / "report").mkdir()
    (folder / "secret.png").write_bytes(b"x")
    with pytest.raises(ReportError, match=r"got no such file, wanted a picture in .*report: write the picture"):
        html_from_markdown(f"![x]({source})", folder / "report")


def test_file_that_is_no_picture_is_an_error(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")
    with pytest.raises(ReportError, match=r"picture 'notes.txt': got text/plain, wanted a picture"):
        html_from_markdown("![x](notes.txt)", folder)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>|x", "![i](https://example.org/i.png)", '"><img src=x>'])
def test_name_of_a_generator_is_text_whatever_it_holds(folder: Path, name: str) -> None:
    table = markdown_table(("set", "AP"), [(name, "99.0")])
    page = Page(html_from_markdown(f"# {markdown_text(name)}\n\n{table}\n\n- {markdown_code(name)}\n", folder))
    assert_self_contained(page)
    assert page.cells[:3] == ["set", "AP", name]
    assert "img" not in page.tags


def test_html_in_the_markdown_is_shown_and_not_obeyed(folder: Path) -> None:
    page = Page(
        html_from_markdown("# <b>T</b>\n\n<script>alert(1)</script>\n\na <img src='x' onerror='y'> b\n", folder)
    )
    assert_self_contained(page)
    assert "<script>alert(1)</script>" in page.text
    assert "a <img src='x' onerror='y'> b" in page.text


def test_contents_lead_to_every_section_and_repeated_titles_apart(folder: Path) -> None:
    html = html_from_markdown("# T\n\nintro\n\n## Over `all`\n\n### Same\n\n### Same\n\n#### Deep\n\n## ?\n", folder)
    page = Page(html)
    assert_self_contained(page)
    assert page.anchors == ["t", "over-all", "same", "same-2", "deep", "section"]
    assert page.addresses == ["#over-all", "#same", "#same-2", "#section"]
    assert html.index("<h1") < html.index("<nav") < html.index("intro")


def test_link_to_elsewhere_becomes_its_address_and_a_link_within_stays(folder: Path) -> None:
    text = "# T\n\n[paper](https://example.org/a?b=1&c) and <https://example.org> and [up](#t)\n"
    page = Page(html_from_markdown(text, folder))
    assert_self_contained(page)
    assert page.addresses == ["#t"]
    assert "paper (https://example.org/a?b=1&c) and https://example.org and up" in page.text


def test_table_can_be_scrolled_and_keeps_its_alignment(folder: Path) -> None:
    html = html_from_markdown(markdown_table(("set", "AP"), [("a", "1.0")]), folder)
    assert html.index('<div class="table" tabindex="0">') < html.index("<table>")
    assert '<td style="text-align:right">1.0</td>' in html


def test_page_is_written_beside_its_markdown(folder: Path) -> None:
    (folder / "evaluation.md").write_text("# Ünï <1>\n\n![x](a%20figure.png)\n", encoding="utf-8")
    path = write_html(folder / "evaluation.md")
    assert path == folder / "evaluation.html"
    html = path.read_text(encoding="utf-8")
    assert "<title>Ünï &lt;1&gt;</title>" in html
    assert_self_contained(Page(html))
    assert sorted(p.name for p in folder.iterdir()) == ["a figure.png", "evaluation.html", "evaluation.md"]
