"""HTML pages that load nothing from anywhere, and cells of Markdown tables."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "media-src data:"
)
"""Content security policy of a page: what is in it, and no request."""


def html_page(title: str, body: str, script: str, data: str = "") -> str:
    """Returns a page that loads nothing: its style sheet and script are in it.

    Args:
        script: file of ASSETS.
        data: elements before the script.
    """
    style, code = ((ASSETS / name).read_text(encoding="ascii") for name in ("page.css", script))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n{body}\n{data}"
        f"<script>\n{code}</script>\n</body>\n</html>\n"
    )


def html_table(
    caption: str, heads: Sequence[str], rows: Iterable[str], *, sortable: bool = False,
    left: int = 1,
) -> str:  # fmt: skip
    """Returns a table in a frame that scrolls sideways.

    Args:
        rows: `tr` elements.
        left: number of the first columns, which are texts.
    """
    kind = ' class="sortable"' if sortable else ""
    first = "".join(f'<th scope="col"{" class=left" if place < left else ""}>{escape(head)}</th>'
                    for place, head in enumerate(heads))  # fmt: skip
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table{kind}><caption>{escape(caption)}</caption><thead><tr>{first}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def markdown_text(name: str) -> str:
    """Returns a name for a cell of a Markdown table."""
    return " ".join(name.split()).replace("|", "\\|")
