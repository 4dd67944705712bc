"""Examples as the trainer takes them: written in the words of the tokenizer, and fitted to the length of a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from secateur.core.errors import InputError
from secateur.data.instructions import Examples

# of tokenizers without a chat template
HEADINGS = {"system": "### System:", "user": "### Instruction:", "assistant": "### Response:", "tool": "### Tool:"}
PROBE = "secateur"


@dataclass
class Fitted:
    """What a length left of examples.

    Attributes:
        kept: examples with a token to learn.
        dropped: examples without.
        cut: examples that are longer, and end where the length does.
        cut_tokens: that were left out so.
    """

    kept: int
    dropped: int
    cut: int
    cut_tokens: int


def data_set(data: Examples, tokenizer: Any) -> Any:
    """Return the rows as TRL wants them; conversations become text where the tokenizer has no chat template."""
    import datasets

    rows = list(data.rows)
    if data.answers and not has_template(tokenizer):
        rows = [{"prompt": written(row["prompt"]), "completion": row["completion"][-1]["content"]} for row in rows]
    return datasets.Dataset.from_list(rows)


def has_template(tokenizer: Any) -> bool:
    """Return whether the tokenizer says how conversations are written."""
    return bool(getattr(tokenizer, "chat_template", None))


def written(prompt: Sequence[Mapping[str, str]]) -> str:
    """Return a conversation under headings that say who speaks, up to the heading of the answer."""
    turns = [f"{HEADINGS[message['role']]}\n{message['content']}\n\n" for message in prompt]
    return "".join(turns) + f"{HEADINGS['assistant']}\n"


def check_tokenizer(tokenizer: Any, sets: Sequence[Examples]) -> None:
    """Raise InputError if the tokenizer cannot write the examples, or has no token for what has to end or to pad."""
    template = has_template(tokenizer)
    if template:
        for one in sets:
            if one.answers:
                _check_template(tokenizer, one.rows[0])
    if tokenizer.eos_token is not None:
        return
    if tokenizer.pad_token is None or not all(template and one.answers for one in sets):
        raise InputError(
            "the tokenizer has no `eos_token`, so neither the end of a text nor padding could be written",
            hint="set `eos_token` in its tokenizer_config.json",
        )


def template_refused(error: Exception) -> InputError:
    """Return the error for a chat template that cannot write conversations."""
    return InputError(
        f"the tokenizer's chat template cannot write these conversations: {error}",
        hint="leave out what it refuses, such as `system`, or give the tokenizer another chat template",
    )


def pieces(rows: dict[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Return rows of tokens in pieces of at most `length`."""
    return {
        name: [row[start : start + length] for row in rows[name] for start in range(0, len(row), length)]
        for name in ("input_ids", "labels")
    }


def fit(rows: Any, length: int) -> tuple[Any, Fitted]:
    """Return the token rows with something to learn within `length`, and what it left of all.

    The first token of a row is not learned: nothing comes before it.
    """
    labels = rows["labels"]
    learns = [place for place, row in enumerate(labels) if any(label != -100 for label in row[1:length])]
    over = [len(labels[place]) - length for place in learns if len(labels[place]) > length]
    return rows.select(learns), Fitted(len(learns), len(labels) - len(learns), len(over), sum(over))


def notes_on_length(found: Fitted, data: Examples, length: int) -> list[str]:
    """Return what is to be said of examples that `length` cut or left nothing of.

    Raises:
        InputError: it left nothing of any.
    """
    rows = len(data.rows)
    if not found.kept:
        raise InputError(
            f"no example of `{data.source}` has a token to learn within {length} tokens", hint="raise `length`"
        )
    notes = []
    if found.dropped:
        notes.append(
            f"{found.dropped} of {rows} examples have no token to learn within {length} tokens and were left out"
        )
    if found.cut:
        more = "" if data.answers else "; `packing` learns all of a long text"
        notes.append(
            f"{found.cut} of {rows} examples of `{data.source}` are longer than {length} tokens, and "
            f"{found.cut_tokens:,} tokens at their ends were left out{more}"
        )
    return notes


def _check_template(tokenizer: Any, row: Mapping[str, Any]) -> None:
    """Raise InputError if the chat template refuses the conversation of `row`, or writes the same for any answer."""
    answer = row["completion"][-1]
    messages = [*row["prompt"], *row["completion"][:-1]]
    try:
        one, other = (
            tokenizer.apply_chat_template([*messages, {**answer, "content": content}], tokenize=False)
            for content in (answer["content"], f"{answer['content']} {PROBE}")
        )
    except TemplateError as error:
        raise template_refused(error) from error
    if one == other:
        raise InputError(
            "the tokenizer's chat template writes the same text whatever the answer is, so there is nothing to learn",
            hint="give the tokenizer a chat template that writes its messages, or none",
        )
