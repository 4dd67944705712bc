"""The generated pages say what the code says, and are made without any model library."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def write_reference(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import write_reference

    return write_reference


@pytest.fixture
def copied(tmp_path, write_reference) -> Path:
    """A folder with README and docs as the code would have them now."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    write_reference.write(tmp_path)
    return tmp_path


def test_pages_are_fresh_and_made_without_torch():
    program = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import write_reference; "
        "code = write_reference.main(['--check']); "
        "heavy = {'torch', 'transformers'} & set(sys.modules); "
        "sys.exit(f'imports {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stale_missing_and_left_over_pages_are_named(copied, write_reference, capsys):
    reference = copied / "docs" / "reference"
    assert write_reference.main(["--check", "--root", str(copied)]) == 0
    with (reference / "cli.md").open("a") as page:
        page.write("by hand\n")
    (reference / "methods.md").unlink()
    (reference / "gone.md").write_text("a room that is no more\n")
    assert write_reference.main(["--check", "--root", str(copied)]) == 1
    told = capsys.readouterr().out
    assert all(f"stale: docs/reference/{name}.md" in told for name in ("cli", "methods", "gone"))
    assert told.count("stale:") == 3
    assert write_reference.main(["--root", str(copied)]) == 0
    assert write_reference.main(["--check", "--root", str(copied)]) == 0


def test_words_around_a_filled_table_stay(copied, write_reference):
    readme = copied / "README.md"
    text = readme.read_text()
    readme.write_text(text.replace("| sparsegpt", "| something else"))
    write_reference.write(copied)
    assert readme.read_text() == text


def test_a_page_without_its_marks_is_an_error(copied, write_reference):
    readme = copied / "README.md"
    readme.write_text(readme.read_text().replace("<!-- /methods -->", ""))
    with pytest.raises(LookupError, match="README"):
        write_reference.stale(copied)


def test_every_method_and_hyper_parameter_of_the_shelf_has_its_line(write_reference):
    from secateur.methods.registry import REGISTRY
    from secateur.recipe.build import fields_of

    page = write_reference.methods_page()
    for entry in REGISTRY:
        part = page.partition(f"\n## {entry.name}\n")[2].partition("\n## ")[0]
        for name in fields_of(entry):
            meaning = next(line for line in part.splitlines() if line.startswith(f"| `{name}` |")).split("|")[-2]
            assert meaning.strip(), f"`{name}` of `{entry.name}` is not explained in the docstring of its class"


def test_every_key_of_a_recipe_is_explained(write_reference):
    rows = [line for line in write_reference.recipe_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    assert [row for row in rows if not row.split("|")[-2].strip()] == []
