from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effort import effort
from secateur.core.errors import RecipeError
from secateur.recipe.yaml_loader import MAX_BYTES, load_yaml, parse_value, parse_yaml
from secateur.recipe.yaml_writer import to_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(6)
)

REFUSED = {
    "alias bomb": (BOMB, "more than 10000 values", "r.yaml:5:"),
    "deep flow": ("[" * 1000, "deeper than 32", "r.yaml:1:33"),
    "deep block": ("\n".join(" " * i + "a:" for i in range(400)), "deeper than 32", "r.yaml:33:"),
    "deep by alias": (
        f"a: &a {'[' * 20 + ']' * 20}\nb: {'[' * 20}*a{']' * 20}",
        "deeper than 32 levels, aliases written out",
        "r.yaml:2:",
    ),
    "many values": ("[" + "1," * 20_000 + "]", "more than 10000 values", "r.yaml:1:"),
    "duplicate key": ("a: 1\nb: 2\na: 3", "`a` is given twice", "r.yaml:3:1"),
    "nested duplicate": ("a:\n  b: 1\n  b: 2", "`b` is given twice", "r.yaml:3:3"),
    "python tag": ("a: !!python/object/apply:os.system [x]", "tags are not allowed", "r.yaml:1:4"),
    "own tag": ("a: !thing x", "tags are not allowed, got `!thing`", "r.yaml:1:4"),
    "bare tag": ("a: ! x", "tags are not allowed", "r.yaml:1:4"),
    "tag on a key": ("!!str a: 1", "a key must be a plain text", "r.yaml:1:1"),
    "alias inside its anchor": ("a: &a [*a]", "inside its own anchor", "r.yaml:1:8"),
    "unknown alias": ("a: *nowhere", "has no anchor", "r.yaml:1:4"),
    "merge key": ("a: &a {x: 1}\nb: {<<: *a}", "merge keys", "r.yaml:2:5"),
    "tab": ("a:\n\tb: 1", "tab characters", "r.yaml:2:1"),
    "two documents": ("a: 1\n---\nb: 2", "second document", "r.yaml:2:1"),
    "directive": ("%YAML 1.1\n---\na: 1", "directives", "r.yaml:1:1"),
    "empty": ("", "empty", "r.yaml"),
    "only a comment": ("# nothing\n", "empty", "r.yaml"),
    "NUL": ("a: \0", "not valid YAML", "r.yaml:1:4"),
    "bell": ("a: b\nc: \x07", "not valid YAML", "r.yaml:2:4"),
    "open bracket": ("a: [1,\nb: 2", "not valid YAML", "r.yaml:"),
    "bad indent": ("a: 1\n  b: 2", "not valid YAML", "r.yaml:2:4"),
    "list as key": ("? [a]\n: 1", "a key must be a plain text", "r.yaml:1:3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_yaml_is_refused_at_its_line_and_column(name, tmp_path, monkeypatch):
    text, words, where = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_bytes(text.encode())
    with pytest.raises(RecipeError) as caught:
        load_yaml("r.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith(where)


def test_a_bomb_is_refused_before_it_is_expanded(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(BOMB)  # 9**7 values

    def refused() -> None:
        with pytest.raises(RecipeError, match="more than 10000 values"):
            load_yaml(path)

    refused()  # imports
    taken = effort(refused)
    assert taken.calls < 300_000
    assert taken.peak_bytes < 10_000_000


def test_a_tag_that_would_create_a_file_does_not(tmp_path):
    canary = tmp_path / "canary"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: !!python/object/apply:pathlib.Path.touch [!!python/object:pathlib.Path ['{canary}']]")
    with pytest.raises(RecipeError):
        load_yaml(recipe)
    assert not canary.exists()


def test_bytes_that_are_not_utf8_are_named_with_their_place(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("model: é\nx: ".encode() + b"\xff\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2:4: byte 0xff is not UTF-8"):
        load_yaml(path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: x\n")
    assert load_yaml(path)[0] == {"model": "x"}


def test_a_file_beyond_the_limit_is_refused_without_parsing(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a" * (MAX_BYTES + 1))
    with pytest.raises(RecipeError, match="larger than"):
        load_yaml(path)


@pytest.mark.parametrize("make", ["missing", "folder"])
def test_what_is_no_file_is_refused(make, tmp_path):
    path = tmp_path / "r.yaml"
    if make == "folder":
        path.mkdir()
    with pytest.raises(RecipeError, match="file"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("12:30:00", "12:30:00"),
        ("1e-3", 1e-3),
        ("1.5e6", 1.5e6),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("~", None),
        ("", None),
        ("70%", "70%"),
        ("010", 10),
        ("0x1F", 31),
        ("-7", -7),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        (".inf", float("inf")),
        ("'5'", "5"),
        ('"true"', "true"),
        ("$HOME", "$HOME"),
        ("`ls`", "`ls`"),
    ],
)
def test_scalars_follow_yaml_1_2_and_nothing_is_expanded(text, value):
    if not text.startswith("`"):  # YAML reserves a leading backtick
        assert parse_yaml(f"a: {text}")[0] == {"a": value}
    assert parse_value(text) == value


def test_settings_keep_globs_and_regexes_as_they_are():
    assert parse_value("*.down_proj") == "*.down_proj"
    assert parse_value("re:^a.*[0-9]$") == "re:^a.*[0-9]$"
    assert parse_value("[a, 2, '*.b']") == ["a", 2, "*.b"]


def test_aliases_copy_their_value():
    data, positions = parse_yaml("a: &x {k: [1]}\nb: *x\n", "r.yaml")
    assert data == {"a": {"k": [1]}, "b": {"k": [1]}}
    data["a"]["k"].append(2)
    assert data["b"] == {"k": [1]}
    assert positions.of(("b", "k", 0)) == "r.yaml:2:1"


def test_positions_are_those_of_keys_and_items():
    _, positions = parse_yaml("stages:\n  - prune: {a: 1}\n  - x\n", "r.yaml")
    assert positions.of(("stages", 0, "prune", "a")) == "r.yaml:2:13"
    assert positions.of(("stages", 1)) == "r.yaml:3:5"
    assert positions.of(("stages", 0, "prune", "unknown", "deeper")) == "r.yaml:2:5"


texts = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\n\t :#-'\"%2"), max_size=12)
leaves = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | texts
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(texts, trees, min_size=1, max_size=4))
def test_what_is_written_reads_back_equal(data):
    assert parse_yaml(to_yaml(data))[0] == data


@given(st.binary(max_size=200))
def test_any_bytes_give_data_or_a_recipe_error(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(raw)
    try:
        load_yaml(path)
    except RecipeError as error:
        assert "any.yaml" in str(error)
