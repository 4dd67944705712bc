from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.data.markup import articles, paragraphs

REST = "and this sentence goes on until it is long enough to be taken for a paragraph of prose."


def cleaned(markup):
    return paragraphs(markup, shortest=20)


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("'''Bold''' and ''slanted'' words", "Bold and slanted words"),
        ("A [[link]] and a [[page|named link]]", "A link and a named link"),
        ("A [[File:x.jpg|thumb|with a [[link]] inside]] picture", "A picture"),
        ("A [http://x.org web page] word", "A web page word"),
        ("A note<ref name=x>Book, p. 3</ref> and another<ref name=x/>", "A note and another"),
        ("Outer {{a|{{b|c}}|d}} template", "Outer template"),
        ("Some {{convert|5|km|mi}} and {{lang|fr|mot}}", "Some 5 km and mot"),
        ("Half {{frac|1|2}} ({{IPA|x}}; ) empty", "Half 1/2 empty"),
        ("Non&nbsp;breaking &amp; entity <br /> tag", "Non breaking & entity tag"),
        ("Hidden <!-- a\ncomment --> comment", "Hidden comment"),
    ],
)
def test_markup_becomes_words(markup, prose):
    assert cleaned(f"{markup} {REST}") == [f"{prose} {REST}"]


@pytest.mark.parametrize(
    "markup",
    [
        f"== Heading ==\n* item {REST}\n# item {REST}\n: indented {REST}",
        f"{{| class=x\n| cell {REST}\n{{|\n| inner\n|}}\n|}}",
        f"The value <math>x^2</math> {REST}",
        f"An {{{{open template {REST}",
        f"A bracket (lost {REST}",
        "No end mark and also a heading without a sentence in it",
        "Short one.",
    ],
)
def test_what_is_no_prose_is_left_out(markup):
    assert cleaned(markup) == []


def test_closing_sections_end_the_article():
    assert cleaned(f"First {REST}\n\n== History ==\nSecond {REST}\n== References ==\nThird {REST}") == [
        f"First {REST}",
        f"Second {REST}",
    ]


@settings(deadline=None)
@given(st.text(alphabet="[]{}|'=<>ref/ (a.\n", max_size=200))
def test_any_markup_ends_and_leaves_no_brackets_of_markup(markup):
    for paragraph in paragraphs(markup, shortest=1):
        assert "\n" not in paragraph
        assert not any(mark in paragraph for mark in ("[[", "]]", "{{", "}}", "{|"))


def test_redirects_and_other_name_spaces_are_no_articles():
    def page(title, name_space, text, extra=""):
        body = f"<revision><text>{text}</text></revision>"
        return f"<page><title>{title}</title><ns>{name_space}</ns>{extra}{body}</page>"

    pages = [
        page("Good", 0, "words"),
        page("Talk:Good", 1, "words"),
        page("Moved", 0, "#REDIRECT [[Good]]"),
        page("Also moved", 0, "words", '<redirect title="Good"/>'),
        page("Empty", 0, ""),
    ]
    dump = f'<mediawiki xmlns="http://x.org/export-0.10/">{"".join(pages)}</mediawiki>'
    assert list(articles(io.BytesIO(dump.encode()))) == [("Good", "words"), ("Empty", "")]
