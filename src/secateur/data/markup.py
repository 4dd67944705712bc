"""Plain paragraphs out of wiki markup.

Encyclopaedia dumps carry templates, tables, links and footnotes between their sentences. A language model is to be
calibrated on the sentences, so this cleaner is strict instead of complete: what it cannot turn into running prose
(lists, headings, formulas, captions) it leaves out, and a paragraph that would be left with a hole is dropped whole.
"""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import IO

# Elements whose content is no prose. What stood inside goes with them.
_HIDDEN = "gallery|table|timeline|imagemap|source|syntaxhighlight|score|poem|blockquote|div|center|small|sup|sub"
# Elements that carry part of a sentence in another notation: the paragraph around them is unreadable without them.
_FORMULA = "math|chem|nowiki|code|pre|hiero"
_HOLE = "\x00"

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_NOTE = re.compile(r"<ref\b[^>]*?/>|<ref\b[^>]*>.*?</ref\s*>", re.DOTALL | re.IGNORECASE)
_FORMULA_ELEMENT = re.compile(rf"<({_FORMULA})\b[^>]*?(?:/>|>.*?</\1\s*>)", re.DOTALL | re.IGNORECASE)
_HIDDEN_ELEMENT = re.compile(rf"<({_HIDDEN})\b[^>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_WEB_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:|//)\S*\s*([^\]]*)\]")
_EMPHASIS = re.compile(r"'{2,}")
_BRACKETS = re.compile(r"\s*\(\s*[\s,;:/\u2013-]*\)")
_BRACKET_START = re.compile(r"\(\s*(?:[,;:]\s*)+")
_BRACKET_END = re.compile(r"(?:\s*[,;:])+\s*\)")
_BEFORE_MARK = re.compile(r"\s+([,.;:!?)])")
_SPACES = re.compile(r"[ \t\u00a0\u2009\u200a\u200b\u202f]+")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$")
_LAST_SECTIONS = {"see also", "references", "notes", "external links", "further reading", "bibliography", "footnotes"}
_KEPT_TEMPLATES = {"convert", "cvt", "lang", "nowrap", "nobr", "as of", "frac", "transl", "visible anchor", "sic"}
_SKIPPED_LINES = ("*", "#", ":", ";", "|", "!", "{", "}", "=", "<", "[[")


def articles(dump: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (title, markup) of every article in a MediaWiki XML export; redirects and other name spaces are left out.

    Args:
        dump: the XML export, opened for reading bytes.
    """
    for _, element in ElementTree.iterparse(dump):
        if _local(element.tag) != "page":
            continue
        fields = {_local(child.tag): child for child in element.iter()}
        text = fields["text"].text or "" if "text" in fields else ""
        if "redirect" not in fields and fields["ns"].text == "0" and not text.lstrip().lower().startswith("#redirect"):
            yield fields["title"].text or "", text
        element.clear()


def paragraphs(markup: str, *, shortest: int = 80) -> list[str]:
    """Return the running prose of one article, one string per paragraph.

    Args:
        markup: wiki text of the article.
        shortest: paragraphs with fewer characters are left out (captions, remains of lists).

    Returns:
        Paragraphs in their order, without line breaks, up to the first closing section (notes, references, links).
    """
    text = _COMMENT.sub("", markup)
    text = _NOTE.sub("", text)
    text = _FORMULA_ELEMENT.sub(_HOLE, text)
    text = _HIDDEN_ELEMENT.sub("", text)
    text = _inside_out(_TEMPLATE, text, _template)
    text = _inside_out(_TABLE, text, lambda _: "")
    text = _inside_out(_LINK, text, _link)
    text = _WEB_LINK.sub(r"\1", text)
    text = _EMPHASIS.sub("", _TAG.sub("", text))
    text = html.unescape(html.unescape(text))
    found = []
    for line in text.splitlines():
        heading = _HEADING.match(line)
        if heading and heading.group(1).lower() in _LAST_SECTIONS:
            break
        if heading or line.lstrip().startswith(_SKIPPED_LINES) or _HOLE in line:
            continue
        line = _tidy(line)
        if len(line) >= shortest and line.endswith((".", "!", "?", '."', ".)", "”")) and not _broken(line):
            found.append(line)
    return found


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _inside_out(pattern: re.Pattern[str], text: str, replace: object) -> str:
    """Replace innermost matches until none is left: templates, tables and links nest."""
    count = 1
    while count:
        text, count = pattern.subn(replace, text)  # type: ignore[call-overload]
    return text


def _template(match: re.Match[str]) -> str:
    """Return what a template shows, for the few that stand for words of a sentence."""
    name, *fields = [part.strip() for part in match.group(1).split("|")]
    name = name.lower()
    plain = [field for field in fields if "=" not in field]
    if name not in _KEPT_TEMPLATES or not plain:
        return ""
    if name in {"convert", "cvt"}:
        return " ".join(plain[:2])
    if name == "as of":
        return f"As of {plain[0]}"
    if name == "frac":
        return "/".join(plain)
    return plain[-1]


def _link(match: re.Match[str]) -> str:
    target, _, label = match.group(1).partition("|")
    if ":" in target and target.lstrip(":").split(":")[0].strip().lower() in {"file", "image", "category", "media"}:
        return ""
    return label.rpartition("|")[2] if label else target.lstrip(":")


def _tidy(line: str) -> str:
    line = _SPACES.sub(" ", line)
    line = _BRACKET_START.sub("(", line)
    line = _BRACKET_END.sub(")", line)
    line = _BRACKETS.sub("", line)
    return _BEFORE_MARK.sub(r"\1", line).strip()


def _broken(line: str) -> bool:
    """Say whether markup is left over or a bracket has lost its partner."""
    return any(mark in line for mark in ("{{", "}}", "[[", "]]", "{|", "|}", "||", "http:")) or (
        line.count("(") != line.count(")")
    )
