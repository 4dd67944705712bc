"""Instruction data from anywhere: prompts with their answers, conversations, or plain text to go on with.

| record | what is learned |
|---|---|
| `{"instruction": ..., "response": ...}` | the response; `input` and `system` are put where they belong |
| `{"prompt": ..., "completion": ...}` | the completion; both are texts, or both lists of messages |
| `{"messages": [{"role": ..., "content": ...}, ...]}` | every answer of the assistant, each after all that came before it |
| `{"text": ...}`, `.txt` files | all of the text |

Records come from `.jsonl` and `.parquet` files, from data sets of the hub, and from `builtin:tiny-instructions`, which
ships with the package: countries to name and sentences to write, made of the profiles of `builtin:tiny`. Other field
names are said with `instruction_field` and `response_field`; the usual ones of other collections are known.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.core.errors import InputError, RecipeError
from secateur.data.builtin import PARTS, Role, builtin_documents, tiny_profiles
from secateur.data.dataset import DATA_SETS, data_set_rows
from secateur.data.text import is_file, load_text, names_data_set
from secateur.data.textfile import (
    Faults,
    check_file,
    jsonl_records,
    listed,
    notes_on,
    parquet_rows,
    put_right,
)

LIMIT = 1_000_000  # records
LONGEST = 32 * 2**20  # characters of a line
TINY = "tiny-instructions"
PAIRS = (  # fields of a question and its answer, by how collections call them
    ("instruction", "response"),
    ("instruction", "output"),  # Alpaca
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
)
CONVERSATIONS = ("messages", "conversations")
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's words
ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, str]


@dataclass(frozen=True)
class Examples:
    """Examples to train on, all of one kind.

    Attributes:
        rows: each `{"prompt": [message, ...], "completion": [message]}`, or each `{"text": text}`; a message is
            `{"role": ..., "content": ...}`.
        source: the data as they were asked for.
        notes: what was put right or left out while reading, one sentence each.
    """

    rows: tuple[dict[str, Any], ...]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def answers(self) -> bool:
        """Whether rows are prompts with answers, not plain text."""
        return "prompt" in self.rows[0]

    @property
    def digest(self) -> str:
        """Return the sha256 of the rows, 64 hexadecimal digits."""
        whole = hashlib.sha256()
        for row in self.rows:
            whole.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass") + b"\n")
        return whole.hexdigest()


def load_examples(
    spec: str | Path | Iterable[Mapping[str, Any]],
    *,
    instruction_field: str | None = None,
    response_field: str | None = None,
    field: str = "text",
    split: str | None = None,
    skip_bad: int = 0,
    role: Role = "calibration",
    limit: int = LIMIT,
) -> Examples:
    """Return the examples that `spec` names.

    Args:
        spec: a `.jsonl`, `.parquet` or `.txt` file, a data set of the hub, `builtin:tiny-instructions`, any builtin text,
            or the records themselves.
        instruction_field: field of the question, where it has an unusual name; needs `response_field`.
        response_field: field of the answer.
        field: field of plain text.
        split: split of a hub data set where `spec` does not say it.
        skip_bad: how many malformed records may be left out before it is an error.
        role: "calibration" takes the training part of builtin data and data sets, "evaluation" the other.
        limit: records after which reading stops, with a note.

    Raises:
        InputError: the data are not there, not readable as asked, of mixed kinds, or empty.
        RecipeError: an argument is out of range.
    """
    if skip_bad < 0:
        raise RecipeError(f"skip_bad is {skip_bad}, but must be 0 or more")
    if (instruction_field is None) != (response_field is None):
        raise RecipeError(
            "`instruction_field` and `response_field` belong together, only one is given", hint="give both or neither"
        )
    fields = None if instruction_field is None else (instruction_field, str(response_field))
    counts: Counter[str] = Counter()
    if not isinstance(spec, str | Path):
        faults = Faults("the given records", "record", skip_bad)
        return _collected(iter(enumerate(spec, start=1)), "the given records", fields, field, faults, counts, limit)
    name = str(spec)
    if name.startswith("builtin:"):
        return _builtin(name.removeprefix("builtin:"), role)
    if isinstance(spec, Path) or is_file(name):
        path = Path(name).expanduser()
        if path.suffix.lower() == ".txt":
            return _plain(name, role)
        check_file(path)
        unit = "row" if path.suffix.lower() == ".parquet" else "line"
        faults = Faults(name, unit, skip_bad)
        records: Iterator[tuple[int, Any]] = (
            parquet_rows(path) if unit == "row" else jsonl_records(path, faults, counts, LONGEST)
        )
        return _collected(records, name, fields, field, faults, counts, limit)
    if name.partition(":")[0] in DATA_SETS:
        return _plain(name, role)
    if not names_data_set(name):
        raise InputError(
            f"data `{name}` is no file and no known name",
            hint=f"give a .jsonl or .parquet file, `builtin:{TINY}` or the `owner/name` of a data set",
        )
    rows, source = data_set_rows(name, split, role, limit + 1)
    return _collected(
        iter(enumerate(rows, start=1)), source, fields, field, Faults(source, "row", skip_bad), counts, limit
    )


def _plain(name: str, role: Role) -> Examples:
    text = load_text(name, role=role)
    return Examples(tuple({"text": document} for document in text.documents), text.source, text.notes)


def _collected(
    records: Iterator[tuple[int, Any]],
    source: str,
    fields: tuple[str, str] | None,
    field: str,
    faults: Faults,
    counts: Counter[str],
    limit: int,
) -> Examples:
    """Return the examples of all records; the first good one decides of which kind all must be."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    reader: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None
    for seen, (number, record) in enumerate(records):
        if seen >= limit:
            notes.append(f"data `{source}`: only the first {limit:,} records were read")
            break
        try:
            if not isinstance(record, dict):
                raise _Unusable(f"holds a {type(record).__name__}, but must hold an object")
            reader = reader or _reader_of(record, fields, field)
            rows += [_clean(row, counts) for row in reader(record)]
        except _Unusable as error:
            faults.add(number, str(error))
    faults.check()
    if not rows:
        raise InputError(f"data `{source}` hold no example", hint="give at least one record with an answer")
    return Examples(tuple(rows), source, (*notes, *faults.notes(), *notes_on(source, counts)))


class _Unusable(Exception):
    """A record that is no example; says why."""


def _reader_of(
    record: Mapping[str, Any], fields: tuple[str, str] | None, field: str
) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """Return what makes examples of records that look like this one."""
    if fields is not None:
        return lambda found: _pair(found, *fields)
    for name in CONVERSATIONS:
        if name in record:
            return lambda found, name=name: _conversation(found, name)  # type: ignore[misc]
    for question, answer in PAIRS:
        if question in record and answer in record:
            return lambda found, question=question, answer=answer: _pair(found, question, answer)  # type: ignore[misc]
    if field in record:
        return lambda found: [{"text": _words(found, field)}]
    known = ", ".join(f"`{question}` and `{answer}`" for question, answer in PAIRS[:3])
    raise _Unusable(f"no fields {known}, `messages` or `{field}`, only {listed(list(record))}")


def _pair(record: Mapping[str, Any], question: str, answer: str) -> list[dict[str, Any]]:
    """Return the examples of a question and an answer; `input` follows the question, `system` comes before it."""
    if isinstance(record.get(question), list):
        prompt, completion = (_messages(record, name) for name in (question, answer))
        if completion[-1]["role"] != "assistant":
            raise _Unusable(f"the last message of `{answer}` is not of the role `assistant`")
        return _answers([*prompt, *completion], len(prompt))
    asked = _words(record, question)
    more = _addition(record, "input") if question == "instruction" else ""
    if more:
        asked = f"{asked}\n\n{more}"
    prompt = [{"role": "user", "content": asked}]
    system = _addition(record, "system")
    if system:
        prompt.insert(0, {"role": "system", "content": system})
    return [{"prompt": prompt, "completion": [{"role": "assistant", "content": _words(record, answer)}]}]


def _addition(record: Mapping[str, Any], name: str) -> str:
    """Return the text of a field that may be missing, null or empty."""
    found = record.get(name)
    if found is not None and not isinstance(found, str):
        raise _Unusable(f"field `{name}` holds a {type(found).__name__}, but must hold a text")
    return found if found and found.strip() else ""


def _conversation(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return one example for each answer of the assistant, with all that was said before as its prompt."""
    messages = _messages(record, name)
    found = _answers(messages, 1)
    if not found:
        raise _Unusable(f"`{name}` has no message of the role `assistant` after another one")
    return found


def _answers(messages: list[Message], first: int) -> list[dict[str, Any]]:
    """Return an example for each answer of the assistant from message `first` on."""
    return [
        {"prompt": messages[:place], "completion": [messages[place]]}
        for place in range(first, len(messages))
        if messages[place]["role"] == "assistant"
    ]


def _messages(record: Mapping[str, Any], name: str) -> list[Message]:
    found = record.get(name)
    if not isinstance(found, list) or not found:
        raise _Unusable(_missing(record, name, "a list of messages"))
    messages: list[Message] = []
    for place, message in enumerate(found, start=1):
        if not isinstance(message, dict):
            raise _Unusable(f"message {place} of `{name}` is a {type(message).__name__}, but must be an object")
        who = message.get("role", message.get("from"))
        said = _said(message.get("content", message.get("value")), place, name)
        who = SPEAKERS.get(str(who), who)
        if who not in ROLES:
            raise _Unusable(
                f"message {place} of `{name}` has the role `{who}`, but must have one of {', '.join(ROLES)}"
            )
        if not isinstance(said, str) or not said.strip():
            raise _Unusable(f"message {place} of `{name}` has no text in `content`")
        messages.append({"role": str(who), "content": said})
    return messages


def _said(content: Any, place: int, name: str) -> Any:
    """Return the content of a message; a list of texts becomes one text.

    Raises:
        _Unusable: the list holds something else, such as an image.
    """
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            raise _Unusable(f"message {place} of `{name}` holds more than text, which alone can be learned")
        texts.append(text)
    return "\n".join(texts)


def _words(record: Mapping[str, Any], name: str) -> str:
    found = record.get(name)
    if not isinstance(found, str) or not found.strip():
        raise _Unusable(_missing(record, name, "a text"))
    return found


def _missing(record: Mapping[str, Any], name: str, wanted: str) -> str:
    if name not in record:
        return f"no field `{name}`, only {listed(list(record))}"
    found = record[name]
    shown = "is empty" if found in ("", []) or (isinstance(found, str) and not found.strip()) else None
    return f"field `{name}` {shown or f'holds a {type(found).__name__}'}, but must hold {wanted}"


def _clean(row: dict[str, Any], counts: Counter[str]) -> dict[str, Any]:
    """Return the row with its texts put right."""

    def right(text: str) -> str:
        found = put_right(text, counts)
        if not found.strip():
            raise _Unusable("a text in it is empty without its NUL characters")
        return found

    if "text" in row:
        return {"text": right(row["text"])}
    return {
        part: [{**message, "content": right(message["content"])} for message in row[part]]
        for part in ("prompt", "completion")
    }


def _builtin(name: str, role: Role) -> Examples:
    kind, part = next(((TINY, part) for part in PARTS if name == f"{TINY}-{part}"), (name, role))
    if kind != TINY:
        documents, full = builtin_documents(name, role)
        return Examples(tuple({"text": document} for document in documents), f"builtin:{full}")
    rows = [row for title, text in tiny_profiles(part) for row in _questions(title, text)]
    return Examples(tuple(rows), f"builtin:{TINY}-{part}")


def _questions(title: str, text: str) -> Iterator[dict[str, Any]]:
    """Yield what can be asked about a country's profile: to name the country, and to write the first sentence."""
    sentences = re.split(r"(?<=[a-z0-9)]\.) (?=[A-Z])", text)
    hidden = re.sub(rf"\b{re.escape(title)}\b", "this country", " ".join(sentences[1:4]))
    asked = [(f"Write the first sentence of a profile of {title}.", sentences[0])]
    if hidden:
        asked.append((f"Which country is this about? Answer with its name.\n\n{hidden}", title))
    for question, answer in asked:
        yield {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
