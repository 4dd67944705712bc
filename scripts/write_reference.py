"""Write the reference, docs/reference/*.md, and the tables inside other pages, from the code itself.

    python scripts/write_reference.py            write what has changed
    python scripts/write_reference.py --check    write nothing; exit with 1 and name the stale pages

The same code gives the same bytes. Modules are read as text, so that no model library is imported; only the registry,
the recipe schema, the command line and the tables of builtin texts and models are asked as objects, which are light.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from read_source import (
    constructor,
    docstring,
    documented,
    last_word,
    located,
    parsed,
    public_names,
    signature,
    spelled,
    values_of,
)

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = Path("docs/reference")


@dataclass(frozen=True)
class Part:
    """A module on a page: its path below the package, and the names to show (all public ones if there are none)."""

    module: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """One page of the reference made from modules."""

    title: str
    about: str
    parts: tuple[Part, ...]


MODULE_PAGES = {
    "api": Page(
        "Python API",
        "Names of `secateur` itself, below the module that each comes from. The command line and recipes call the same.",
        (
            Part("recipe/stages", ("load", "prune", "tune", "evaluate", "inspect", "export", "Result")),
            Part("recipe/adapters", ("merge", "switch", "fuse", "export_lora_adapter")),
            Part("recipe/adapter_list", ("list_adapters",)),
            Part("recipe/compare", ("compare",)),
            Part("recipe/suggest", ("suggest",)),
            Part("recipe/schema", ("Recipe",)),
            Part("core/pattern", ("NM", "Unstructured")),
            Part("methods/registry", ("methods",)),
        ),
    ),
    "core": Page(
        "Core: problems, patterns, contracts",
        "What a method file needs to know. Tensors only: nothing here has heard of a model.",
        tuple(
            Part(f"core/{name}")
            for name in (
                "problem",
                "pattern",
                "mask",
                "contracts",
                "method",
                "registry",
                "solve",
                "allocation",
                "progress",
                "errors",
            )
        ),
    ),
    "models": Page(
        "Models: blocks, linears, files",
        "One view of every decoder: its blocks, how they are called, their prunable matrices, and its files.",
        (
            *(Part(f"models/{name}") for name in ("blocks", "calls", "linears", "layout", "experts")),
            *(Part(f"models/{name}") for name in ("files", "save", "publish", "builtin", "fingerprint")),
        ),
    ),
    "data": Page(
        "Data: texts and calibration",
        "Text from a file, a data set or the package, and the token samples that are taken from it.",
        tuple(Part(f"data/{name}") for name in ("text", "builtin", "dataset", "calibration")),
    ),
    "engine": Page(
        "Engine: the block stream",
        "How a model is walked through, one block at a time, and how the walk is resumed.",
        tuple(
            Part(f"engine/{name}")
            for name in (
                "sweep",
                "shared",
                "probe",
                "planning",
                "backward",
                "lanes",
                "statistics",
                "stream",
                "activations",
                "budget",
                "memory",
                "journal",
            )
        ),
    ),
    "train": Page(
        "Train: adapters, masks, optimizers",
        "What adapters share, and training that keeps zeros.",
        (
            *(
                Part(f"train/{name}")
                for name in ("adapter_config", "adapter_linear", "adapter_model", "adapter_base", "masking", "trainer")
            ),
            Part("methods/adapters/s2ft", ("chosen",)),
            Part("methods/adapters/s2ft_exchange"),
        ),
    ),
    "evaluate": Page(
        "Evaluate: perplexity, tasks, samples",
        "Measuring a model.",
        tuple(Part(f"evaluate/{name}") for name in ("perplexity", "harness", "generate")),
    ),
    "export": Page(
        "Export: files and summaries",
        "The packed format, and what a model is like. Its layout is described in [formats](../formats.md).",
        tuple(Part(f"export/{name}") for name in ("bitmask", "packing", "container", "summary")),
    ),
}
OTHER_PAGES = {
    "cli": "Command line",
    "methods": "Methods",
    "recipe-keys": "Recipe keys",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the pages and return the exit code."""
    parser = argparse.ArgumentParser(description="Write the reference pages from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds README.md and docs")
    given = parser.parse_args(arguments)
    differing = stale(given.root)
    if given.check:
        for page in differing:
            sys.stdout.write(f"stale: {page.as_posix()}\n")
        if differing:
            sys.stdout.write("run `make docs` and commit the pages\n")
        return 1 if differing else 0
    write(given.root)
    for page in differing:
        sys.stdout.write(f"written: {page.as_posix()}\n")
    return 0


def stale(root: Path = ROOT) -> list[Path]:
    """Return the pages below `root` that differ from what the code says, paths relative to it."""
    wanted = pages(root)
    there = {path.relative_to(root) for path in (root / REFERENCE).glob("*.md")}
    old = [page for page, text in wanted.items() if _read(root / page) != text]
    return sorted([*old, *(there - wanted.keys())])


def write(root: Path = ROOT) -> None:
    """Write every page below `root`, and remove pages of the reference that the code has no more."""
    wanted = pages(root)
    (root / REFERENCE).mkdir(parents=True, exist_ok=True)
    for extra in {path.relative_to(root) for path in (root / REFERENCE).glob("*.md")} - wanted.keys():
        (root / extra).unlink()
    for page, text in wanted.items():
        (root / page).write_text(text, encoding="utf-8")


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Return `{path relative to the root: text}` of everything that is written."""
    found = {REFERENCE / f"{name}.md": module_page(page) for name, page in MODULE_PAGES.items()}
    found[REFERENCE / "cli.md"] = cli_page()
    found[REFERENCE / "methods.md"] = methods_page()
    found[REFERENCE / "recipe-keys.md"] = recipe_page()
    found[REFERENCE / "index.md"] = index_page()
    for page, tables in filled_tables().items():
        found[page] = filled(_read(root / page), tables, page)
    return found


# --- pages made from modules -----------------------------------------------------------------------------------------


def module_page(page: Page) -> str:
    """Return a page that shows public names of modules with their signatures and docstrings."""
    lines = [*_head(page.title), page.about, ""]
    for part in page.parts:
        tree = parsed(part.module)
        names = part.names or tuple(public_names(tree))
        dotted = "secateur." + part.module.replace("/", ".")
        lines += [f"## `{dotted}`", ""]
        if not part.names:
            lines += [*markdown(ast.get_docstring(tree) or ""), ""]
        for name in names:
            lines += entry(*located(part.module, name))
    return _joined(lines)


def entry(node: ast.FunctionDef | ast.ClassDef, module: str) -> list[str]:
    """Return the lines for one function or class."""
    if isinstance(node, ast.FunctionDef):
        return [f"### `{node.name}`", "", *_code(signature(node, module)), *_doc(node), ""]
    lines = [f"### `{node.name}`", ""]
    built = constructor(node, module)
    if built:
        lines += _code(built)
    lines += [*_doc(node), ""]
    for inner in node.body:
        if not isinstance(inner, ast.FunctionDef) or inner.name.startswith("_") or not ast.get_docstring(inner):
            continue
        words = {last_word(decorator) for decorator in inner.decorator_list}
        if "property" in words:
            lines += [f"#### `{node.name}.{inner.name}` (property)", ""]
        elif words & {"model_validator", "field_validator"}:
            continue
        else:
            lines += [f"#### `{node.name}.{inner.name}`", "", *_code(signature(inner, module, bound=True))]
        lines += [*_doc(inner), ""]
    return lines


# --- docstrings ------------------------------------------------------------------------------------------------------


def _doc(node: ast.AST) -> list[str]:
    """Return a docstring as lines of Markdown."""
    found = docstring(node)
    lines = markdown("\n".join(found.text))
    for section, items in found.sections.items():
        lines += ["", f"**{section}**", ""]
        for name, words in items:
            shown = ", ".join(f"`{word.strip()}`" for word in name.split(",")) if name else ""
            lines.append(f"- {shown}: {_safe(words)}" if shown else _safe(words))
    return lines


def markdown(text: str) -> list[str]:
    """Return the text of a docstring as lines of Markdown: indented lines are code, the rest prose."""
    return [line if line.startswith("    ") else _safe(line) for line in text.strip("\n").splitlines()]


def _safe(words: str) -> str:
    """Return prose with `<` written as an entity outside of code, so that no part of it is taken for HTML."""
    parts = re.split(r"(`[^`]*`)", words)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


# --- methods ---------------------------------------------------------------------------------------------------------


def methods_page() -> str:
    """Return the page of the shelf: the table, then each method with its hyper-parameters."""
    from secateur.methods.registry import REGISTRY
    from secateur.recipe.build import ALIASES

    lines = [*_head("Methods"), *methods_table("methods.md", same_page=True)]
    lines += ["", "`secateur methods` prints this table, `secateur methods NAME` one method; both take `--json`."]
    lines += ["Hyper-parameters are set by `--set method.NAME=VALUE` (or `tuner.NAME`, `adapter.NAME`), in a recipe by"]
    lines += ["`method: {name: ..., NAME: VALUE}`, in Python by the same mapping or an object of the class."]
    words = ", ".join(f"`{word}` is `{meaning}`" for word, meaning in ALIASES.items())
    lines += [
        f"The words of other libraries are understood, except in objects, where a method has the setting: {words}. "
        "Both at once are an error.",
        "",
    ]
    for line in REGISTRY:
        dotted, _, name = line.target.partition(":")
        module = dotted.removeprefix("secateur.").replace(".", "/")
        node, _ = located(module, name)
        assert isinstance(node, ast.ClassDef)
        fields = hyper_parameters(node, module)
        if line.kind == "adapter":
            shared, _ = located("train/adapter_config", "AdapterConfig")
            assert isinstance(shared, ast.ClassDef)
            fields += hyper_parameters(shared, "train/adapter_config")
        lines += [f"## {line.name}", "", *markdown(ast.get_docstring(parsed(module)) or ""), ""]
        lines += [f"Class `{dotted}.{name}`:", "", *markdown("\n".join(docstring(node).text)), ""]
        lines += (
            table(("hyper-parameter", "values", "default", "meaning"), fields) if fields else ["No hyper-parameters."]
        )
        lines.append("")
    return _joined(lines)


def methods_table(link: str, *, same_page: bool = False) -> list[str]:
    """Return the shelf as a table; names lead to their part of the page `link`."""
    from secateur.methods.registry import REGISTRY

    rows = [
        (
            f"[{line.name}]({'' if same_page else link}#{line.name})",
            line.kind,
            line.summary,
            line.patterns,
            ", ".join(line.needs) or "nothing",
            line.paper,
        )
        for line in REGISTRY
    ]
    return table(("name", "kind", "what it does", "patterns", "statistics", "paper"), rows)


def hyper_parameters(node: ast.ClassDef, module: str) -> list[tuple[str, ...]]:
    """Return a row for each field of a method's class: name, values, default, meaning."""
    meanings = documented(module, node.name)
    rows = []
    for inner in node.body:
        if not isinstance(inner, ast.AnnAssign) or not isinstance(inner.target, ast.Name):
            continue
        name, kind = inner.target.id, spelled(inner.annotation, module)
        if name.startswith("_") or kind.startswith("ClassVar"):
            continue
        default = f"`{spelled(inner.value, module)}`" if inner.value else "required"
        rows.append((f"`{name}`", values_of(inner.annotation, module), default, _safe(meanings.get(name, ""))))
    return rows


# --- command line ----------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Return the page of the command line: every command with its arguments and options."""
    import typer

    from secateur.cli import app

    program: Any = typer.main.get_command(app)
    lines = [
        *_head("Command line"),
        *markdown(program.help or ""),
        "",
        "Results go to stdout, everything else to stderr; `--json` prints exactly one JSON object on stdout. Exit codes",
        "are listed in [errors](../concepts/errors.md). Underscores may stand for dashes, and the words of other tools",
        "are understood: " + ", ".join(f"`--{word}` is `--{meaning}`" for word, meaning in _cli_words().items()) + ".",
        "",
    ]
    for name, command in _commands(program):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join(["secateur", name, *(str(p.metavar or p.name.upper()) for p in arguments), "[OPTIONS]"])
        lines += [f"## {name}", "", *_code(usage, "text"), *markdown(command.help or ""), ""]
        rows = [_option_row(parameter) for parameter in [*arguments, *options]]
        lines += [*table(("option", "value", "default", "meaning"), rows), ""]
    return _joined(lines)


def _commands(group: Any, above: str = "") -> list[tuple[str, Any]]:
    """Return the commands of a group and of the groups in it, by their full names."""
    found: list[tuple[str, Any]] = []
    for name, command in group.commands.items():
        full = f"{above} {name}".strip()
        found += _commands(command, full) if hasattr(command, "commands") else [(full, command)]
    return found


def _cli_words() -> Mapping[str, str]:
    from secateur.cli import _WORDS

    return _WORDS


def _option_row(parameter: Any) -> tuple[str, ...]:
    """Return spelling, value, default and meaning of one parameter."""
    words, default = parameter.help or "", ""
    if match := re.fullmatch(r"(.*) \[dim\]\\\[(.*)\]\[/dim\]", words):
        words, default = match[1], match[2]
    metavar = (parameter.metavar or "").strip()
    if parameter.param_type_name == "argument":
        return (f"`{metavar or parameter.name.upper()}`", "", "", _safe(words))
    return (", ".join(f"`{word}`" for word in parameter.opts), f"`{metavar}`" if metavar else "", default, _safe(words))


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipe_page() -> str:
    """Return the page of every key of a recipe: values, default, meaning."""
    from secateur.recipe.fields import SYNONYMS
    from secateur.recipe.schema import METHODS, STAGES, Recipe

    general = documented("recipe/schema", "Recipe") | _without(documented("recipe/stages", "prune", "load"), "model")
    lines = [
        *_head("Recipe keys"),
        "A recipe is YAML: the keys below, and a list of `stages` that each have exactly one of",
        ", ".join(f"`{kind}`" for kind in STAGES) + ". The [guide](../guides/recipes.md) shows how they are used.",
        "",
        "## The recipe",
        "",
        *table(("key", "values", "default", "meaning"), _keys(Recipe, general, {})),
        "",
        "`seed`, `device`, `dtype`, `offload`, `memory_limit` and `strict` hold for every stage that knows them;",
        "a stage may say otherwise where it has the key itself.",
        "",
    ]
    for kind, model in STAGES.items():
        meanings = documented("recipe/stages", kind) | {}
        for key, words in documented("recipe/stages", "prune", "evaluate").items():
            meanings.setdefault(key, words)
        lines += [f"## {kind}", "", (model.__doc__ or "").strip().splitlines()[0], ""]
        lines += [*table(("key", "values", "default", "meaning"), _keys(model, meanings, METHODS[kind])), ""]
    lines += [
        "## Other words",
        "",
        "`calibration` may also be a mapping with `text`, `samples`, `length`, `field`, ... in place of the keys side by",
        "side. The words of other libraries are understood: "
        + ", ".join(f"`{word}` is `{meaning}`" for word, meaning in SYNONYMS.items())
        + ".",
    ]
    return _joined(lines)


def _without(words: Mapping[str, str], *keys: str) -> dict[str, str]:
    return {key: value for key, value in words.items() if key not in keys}


def _keys(model: Any, meanings: Mapping[str, str], methods: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return a row for each key of a pydantic model."""
    schema = model.model_json_schema(by_alias=False)
    rows = []
    for key, value in schema["properties"].items():
        kind = f"a {methods[key]}: its name, or a mapping" if key in methods else json_values(value)
        default = "required" if key in schema.get("required", ()) else _yaml(value.get("default"))
        rows.append((f"`{key}`", kind, default, _safe(meanings.get(key, ""))))
    return rows


def json_values(schema: Mapping[str, Any]) -> str:
    """Return in words which values a JSON schema takes; null is left out, as it means that the key is not given."""
    if "anyOf" in schema:
        return ", or ".join(json_values(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "$ref" in schema:
        return f"a {schema['$ref'].rpartition('/')[2].lower()}"
    match schema.get("type"):
        case "boolean":
            return "`true` or `false`"
        case "integer" | "number":
            least = schema.get("minimum")
            return "whole number" + (f", at least {least}" if least is not None else "")
        case "array":
            return f"list of {json_values(schema.get('items', {}))}s"
        case "object":
            inner = schema.get("additionalProperties")
            return f"mapping of {json_values(inner)}s" if isinstance(inner, dict) else "mapping"
        case _:
            return "text"


def _yaml(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "none" if value in ([], ()) else f"`{value}`"


# --- tables inside other pages ---------------------------------------------------------------------------------------


def filled_tables() -> dict[Path, dict[str, list[str]]]:
    """Return `{page: {name of the place: lines}}`; a place stands between `<!-- name -->` and `<!-- /name -->`."""
    return {
        Path("README.md"): {"methods": methods_table("docs/reference/methods.md")},
        Path("docs/texts.md"): {"texts": texts_table(), "models": models_table()},
        Path("docs/concepts/errors.md"): {"exit-codes": errors_table()},
    }


def filled(text: str, tables: Mapping[str, list[str]], page: Path) -> str:
    """Return `text` with each table put between its marks.

    Raises:
        LookupError: if a mark is missing.
    """
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise LookupError(f"`{page}` has no place `{name}`: write `{begin.strip()}` and `{end}` there")
        text = before + begin + "\n".join(["", *lines, "", ""]) + end + after
    return text


def texts_table() -> list[str]:
    """Return the builtin texts with licence and source."""
    from secateur.data.builtin import PARTS, TEXTS

    rows = [
        (
            ", ".join(f"`builtin:{text.name}-{part}`" for part in PARTS),
            text.about,
            text.licence,
            text.source,
            "ships with the package" if text.offline else "fetched from the package index at first use",
        )
        for text in TEXTS
    ]
    return table(("name", "what it is", "licence", "source", "where it is"), rows)


def models_table() -> list[str]:
    """Return the builtin models with licence and source."""
    from secateur.models.builtin import MODELS

    rows = [
        (f"`builtin:{name}`", f"`{model.member.rpartition('/')[2]}`", model.licence, f"wheel `{model.requirement}`")
        for name, model in MODELS.items()
    ]
    return table(("name", "file", "licence", "source"), rows)


def errors_table() -> list[str]:
    """Return the errors with exit codes, in the order of the code."""
    from secateur.core import errors

    rows = []
    for node in parsed("core/errors").body:
        if isinstance(node, ast.ClassDef) and node.name != "SecateurError":
            code = getattr(errors, node.name).exit_code
            rows.append((str(code), f"`{node.name}`", _safe((ast.get_docstring(node) or "").splitlines()[0])))
    return table(("exit code", "class", "meaning"), rows)


def index_page() -> str:
    """Return the list of the pages."""
    titles = OTHER_PAGES | {name: page.title for name, page in MODULE_PAGES.items()}
    lines = [*_head("Reference"), "Written from the code by `make docs`; a test says when a page is stale.", ""]
    return _joined([*lines, *(f"- [{title}]({name}.md)" for name, title in titles.items())])


# --- Markdown --------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines of Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + " --- |" * len(head), *map(line, rows)]


def _code(text: str, language: str = "py") -> list[str]:
    return [f"```{language}", text, "```", ""]


def _head(title: str) -> list[str]:
    return [
        "<!-- written by scripts/write_reference.py: change the code, then run `make docs` -->",
        "",
        f"# {title}",
        "",
    ]


def _joined(lines: Sequence[str]) -> str:
    """Return the lines as a page: no blanks at line ends, never two empty lines in a row."""
    text = "\n".join(line.rstrip() for line in lines).strip("\n")
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
