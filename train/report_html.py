"""A Markdown report as one HTML file that holds its pictures and asks nothing of any server.

The Markdown is the only source: whatever section it has appears here, with a table of contents from its headings.
"""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererProtocol
from markdown_it.token import Token

from train.checkpoint import write_atomically
from train.errors import ReportError

# The browser itself refuses what is not in the file, should a report ever refer to it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --page: #fff; --quiet: #59636e; --line: #d1d9e0; --band: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --page: #0d1117; --quiet: #9198a1; --line: #3d444d; --band: #151b23; }
}
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1.05rem; margin-top: 1.75rem; }
p, li { max-width: 60rem; }
p:has(> img) { max-width: none; }
code { background: var(--band); border-radius: 3px; padding: .1em .3em; font-size: .9em; }
nav { background: var(--band); border: 1px solid var(--line); border-radius: 6px; padding: .5rem 1rem; }
nav ul { columns: 18rem; list-style: none; margin: .25rem 0; padding: 0; }
nav .level-3 { padding-left: 1.25rem; }
a { color: inherit; }
img { display: block; max-width: 100%; margin: 1rem auto; background: #fff; border-radius: 4px; }
.table { box-sizing: border-box; overflow-x: auto; width: fit-content; max-width: 100%; margin: 1rem 0;
  border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; background: var(--page); }
th { background: var(--band); vertical-align: bottom; white-space: normal; }
tr:last-child td { border-bottom: 0; }
tbody tr:hover td { background: var(--band); }
th:first-child, td:first-child { position: sticky; left: 0; border-right: 1px solid var(--line); text-align: left; }
@media print {
  :root { --ink: #000; --page: #fff; --quiet: #444; --line: #999; --band: #fff; }
  @page { size: A4 landscape; margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .table { overflow: visible; border: 0; }
  table { font-size: 7pt; }
  th, td { padding: 1pt 3pt; white-space: normal; }
  th:first-child, td:first-child { position: static; }
  h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; }
  img { max-height: 180mm; }
}
"""


class Heading(NamedTuple):
    """One entry of the table of contents."""

    level: int
    anchor: str
    text: str


def write_html(markdown: Path) -> Path:
    """Writes the HTML file beside a Markdown file, atomically, and returns its path.

    Raises:
        ReportError: as `html_from_markdown`.
    """
    path = markdown.with_suffix(".html")
    write_atomically(path, html_from_markdown(markdown.read_text(encoding="utf-8"), markdown.parent).encode())
    return path


def html_from_markdown(text: str, folder: Path) -> str:
    """One HTML document without scripts, whose pictures are data URIs.

    Args:
        text: Markdown with tables; HTML in it is shown as text, links to other documents as their address.
        folder: where the pictures lie that it refers to.

    Raises:
        ReportError: a picture is missing, is no picture, or lies outside of the folder.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", _table_open)
    parser.add_render_rule("table_close", _table_close)
    tokens = parser.parse(text)
    headings = _anchored(tokens)
    for token in tokens:
        if token.children:
            _inline_pictures(token.children, folder)
            token.children = list(_without_addresses(token.children))
    title = next((h.text for h in headings if h.level == 1), "Report")
    content = parser.renderer.render(tokens, parser.options, {})
    heading, end, rest = content.partition("</h1>\n")
    before, after = (heading + end, rest) if end else ("", content)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{before}{_contents(headings)}{after}</main>\n</body>\n</html>\n"
    )


def _contents(headings: Sequence[Heading]) -> str:
    items = [
        f'<li class="level-{h.level}"><a href="#{escape(h.anchor)}">{escape(h.text)}</a></li>'
        for h in headings
        if h.level in (2, 3)
    ]
    return "" if not items else '<nav aria-label="Contents">\n<ul>\n' + "\n".join(items) + "\n</ul>\n</nav>\n"


def _anchored(tokens: Sequence[Token]) -> list[Heading]:
    """The headings, each of which gets an id of its own."""
    headings: list[Heading] = []
    taken: set[str] = set()
    for opening, inline in pairwise(tokens):
        if opening.type != "heading_open":
            continue
        text = "".join(child.content for child in inline.children or ())
        stem = re.sub(r"\W+", "-", text.lower()).strip("-") or "section"
        numbered = (f"{stem}-{number}" for number in range(2, len(taken) + 3))
        anchor = stem if stem not in taken else next(name for name in numbered if name not in taken)
        taken.add(anchor)
        opening.attrSet("id", anchor)
        headings.append(Heading(int(opening.tag[1:]), anchor, text))
    return headings


def _inline_pictures(children: Sequence[Token], folder: Path) -> None:
    for token in children:
        if token.type == "image":
            token.attrSet("src", _data_uri(str(token.attrs["src"]), folder))


def _data_uri(source: str, folder: Path) -> str:
    path = folder / unquote(source)
    kind = mimetypes.guess_type(source)[0] or ""
    remedy = "write the picture before the report, or remove the reference"
    # An address such as https://... is a relative path that is not there.
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise ReportError(f"picture {source!r}", got="no such file", wanted=f"a picture in {folder}", remedy=remedy)
    if not kind.startswith("image/"):
        raise ReportError(f"picture {source!r}", got=kind or "an unknown kind", wanted="a picture", remedy=remedy)
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _without_addresses(children: Sequence[Token]) -> Iterator[Token]:
    """Links within the document stay; others become their text with the address behind it."""
    address: str | None = None
    for token in children:
        if token.type == "link_open" and not str(token.attrs["href"]).startswith("#"):
            # An address that stands for itself is not said twice.
            address = "" if token.info == "auto" else f" ({token.attrs['href']})"
            token.tag, token.attrs = "span", {}
        elif token.type == "link_close" and address is not None:
            yield Token("text", "", 0, content=address)
            token.tag, address = "span", None
        yield token


def _table_open(
    self: RendererProtocol, tokens: Sequence[Token], index: int, options: object, environment: object
) -> str:
    # Focusable, so that a wide table can be scrolled with the keyboard.
    return '<div class="table" tabindex="0">\n<table>\n'


def _table_close(
    self: RendererProtocol, tokens: Sequence[Token], index: int, options: object, environment: object
) -> str:
    return "</table>\n</div>\n"
