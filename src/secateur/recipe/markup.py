"""The parts that every report page is made of: the page itself, tables, charts with their legends.

Everything that comes from a model, a text or a recipe is escaped; the page forbids itself to load anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

MANY_LINES = 4000  # rows of a table beyond which only the first ones are shown; report.json has all


def document(title: str, subtitle: str, sections: Iterable[str], footer: str) -> str:
    """Return a whole page that needs nothing else.

    Args:
        title: plain text.
        subtitle: HTML.
        sections: HTML; empty ones are left out.
        footer: HTML.
    """
    style = files("secateur.recipe").joinpath("report.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{escape(title)}</h1><p class="meta">{subtitle}</p></header>\n'
        + "\n".join(section for section in sections if section)
        + f"\n<footer>{footer}</footer>\n</main>\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int], kind: str = "") -> str:
    """Return a table, the columns in `numeric` to the right; `kind` is its class in the style sheet."""
    right = set(numeric)

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if place in right else ''}>{escape(cell)}</{tag}>" for place, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>"
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def details(words: str, head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Iterable[int]) -> str:
    """Return a table that is folded away under `words`, columns without any value left out."""
    shown = rows[:MANY_LINES]
    more = f"<p>and {len(rows) - len(shown)} more in <code>report.json</code></p>" if len(rows) > len(shown) else ""
    used = [place for place in range(len(head)) if any(row[place] not in ("", "-") for row in shown)]
    lines = table(
        [head[k] for k in used],
        [[row[k] for k in used] for row in shown],
        [used.index(k) for k in numeric if k in used],
        "details-table",
    )
    return f"<details><summary>{escape(words)}</summary>{lines}{more}</details>"


def chart(svg: str) -> str:
    """Return an SVG in a box that scrolls on narrow screens."""
    return f'<div class="chart">{svg}</div>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Return what the colours of a chart mean: `(class, words)` of each."""
    items = "".join(
        f'<span><svg viewBox="0 0 14 14"><circle class="{kind}" cx="7" cy="7" r="5"/></svg>{escape(words)}</span>'
        for kind, words in entries
    )
    return f'<p class="legend">{items}</p>'
