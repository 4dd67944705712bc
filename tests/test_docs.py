"""What the pages say works: Python runs, commands and recipes parse, links lead somewhere.

Examples name the builtin model and text, which need the package index; here the tiny ones stand in for them.
"""

from __future__ import annotations

import inspect
import re
import shlex
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
WRITTEN = [page for page in PAGES if page.parent.name != "reference"]
STAND_INS = {"builtin:smollm2-135m": None, "builtin:wiki": "builtin:tiny"}  # None: the trained model of the tests

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return [text for tag, text in BLOCK.findall(page.read_text(encoding="utf-8")) if tag == language]


def having(language: str) -> pytest.MarkDecorator:
    """Run a test for every hand-written page that has blocks in a language."""
    found = [page for page in WRITTEN if blocks(page, language)]
    return pytest.mark.parametrize("page", found, ids=lambda page: page.relative_to(ROOT).as_posix())


def commands(page: Path) -> list[list[str]]:
    """Return the commands of a page as words, lines that go on joined."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def anchors(page: Path) -> set[str]:
    """Return what may follow `#` in a link to a page."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@having("python")
def test_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, trained_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.print", lambda *words, **more: None)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where pydantic looks up the names in annotations
    for number, text in enumerate(blocks(page, "python"), 1):
        for named, stand_in in STAND_INS.items():
            text = text.replace(named, stand_in or str(trained_folder))
        exec(compile(text, f"{page.name}, block {number}", "exec"), vars(module))


@having("bash")
def test_commands_of_a_page_are_understood(page, tmp_path, monkeypatch, capsys):
    import secateur.demo
    from secateur import cli
    from secateur.recipe import adapter_list, adapters, stages
    from secateur.recipe import compare as comparing
    from secateur.recipe import run as recipe_run
    from secateur.recipe import suggest as suggesting

    def accept(name: str, original):
        def call(*args, **kwargs):
            inspect.signature(original).bind(*args, **kwargs)
            return {"stage": name, "failed": 0}

        return call

    for name in ("prune", "tune", "finetune", "evaluate", "inspect", "export"):
        monkeypatch.setattr(stages, name, accept(name, getattr(stages, name)))
    for name in ("merge", "switch", "fuse", "export_lora_adapter"):
        monkeypatch.setattr(adapters, name, accept(name, getattr(adapters, name)))
    monkeypatch.setattr(adapter_list, "list_adapters", accept("adapters", adapter_list.list_adapters))
    monkeypatch.setattr(comparing, "compare", accept("compare", comparing.compare))
    monkeypatch.setattr(suggesting, "suggest", accept("suggest", suggesting.suggest))
    monkeypatch.setattr(recipe_run, "run", accept("run", recipe_run.run))
    monkeypatch.setattr(secateur.demo, "run", accept("demo", secateur.demo.run))
    monkeypatch.setattr(cli, "_show", lambda *result: None)
    monkeypatch.chdir(tmp_path)
    for text in blocks(page, "yaml"):
        Path(re.match(r"# (\S+\.yaml)\n", text)[1]).write_text(text)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page):
        if words[0] == "make":
            assert words[1] in targets
            continue
        assert words[0] == "secateur", f"`{words[0]}` is no command that a reader has"
        assert cli.main(words[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_example_recipes_are_valid_and_name_their_own_command(path, monkeypatch):
    from secateur.recipe.schema import Recipe

    recipe = Recipe.load(path)
    recipe.check()
    command = next(shlex.split(line[1:]) for line in path.read_text().splitlines() if "secateur run" in line)
    assert command[2] == path.relative_to(ROOT).as_posix()
    settings = [value for word, value in pairwise(command) if word == "--set"]
    recipe.override(settings).check()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} is not there"
        assert target.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_every_page_can_be_reached_from_the_readme():
    seen: set[Path] = set()
    open_pages = [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = (link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link)
        open_pages += [(page.parent / link).resolve() for link in links if link]
    assert set(PAGES) <= seen


def test_extras_that_pages_name_exist():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in WRITTEN:
        text = page.read_text(encoding="utf-8")
        named = {name for group in re.findall(r"\.\[([a-z,]+)\]", text) for name in group.split(",")}
        named |= set(re.findall(r"extra `([a-z]+)`", text))
        assert named <= known.keys(), page


def test_citation_file_agrees_with_the_package():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_every_method_of_the_shelf_has_its_citation():
    from secateur.methods.registry import REGISTRY

    papers = (ROOT / "docs" / "papers.md").read_text()
    for entry in REGISTRY:
        if entry.paper == "ours":
            continue
        number = re.search(r"\d{4}\.\d{5}", entry.paper)
        assert number is not None
        assert number[0] in papers, entry.name
