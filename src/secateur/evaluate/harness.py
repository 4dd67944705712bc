"""Zero-shot tasks through lm-eval: its registry by name, and local JSONL files without the Hub.

Metrics keep the names of lm-eval (`acc,none`, `acc_norm,none`, `acc_stderr,none`). Local rows come in three shapes, all
with `choices` (texts) and `answer` (index of the right one):

- `question`: every choice is scored as the continuation of "Question: ...\\nAnswer:", the prompt of lm-eval's ARC and
  PIQA; a `passage` stands before it as in its BoolQ;
- `premise` and `relation` ("cause" or "effect"): lm-eval's COPA, the choice continues "... because" or "... therefore";
- `sentence` with one `_`: partial scoring as in lm-eval's WinoGrande, the same ending after each choice.

Other keys of a row are ignored.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.core.errors import InputError, RecipeError, missing_extra
from secateur.core.progress import Progress, Silent
from secateur.data.textfile import RepeatedKey, json_record
from secateur.evaluate.placement import ready

LONGEST_LINE = 16 << 20  # bytes; a longer one is no question


@dataclass(frozen=True)
class Item:
    """One question of a local task.

    Attributes:
        contexts: the text before the continuation, one for each choice.
        continuations: what is scored, one for each choice; a blank joins it to its context.
        choices: the choices as written, whose lengths normalise `acc_norm`.
        answer: index of the right choice.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class LocalTask:
    """A task read from a JSONL file.

    Attributes:
        name: the stem of the file.
        items: its questions, at least one.
        partial: whether the choices stand in the context (the `sentence` shape); then there is no `acc_norm`.
    """

    name: str
    items: tuple[Item, ...]
    partial: bool


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Return `{task: {metric: value}}` as lm-eval computes it, zero shots unless the task says otherwise.

    While lm-eval runs, stdout of the whole process goes to stderr, because some of its tasks print.

    Args:
        model: a causal language model; left as it was.
        tokenizer: the model's; a copy is used, because lm-eval may add a padding token to it.
        tasks: names of lm-eval's tasks, groups and tags ("arc_easy"), paths of JSONL files ("data/piqa.jsonl"), or of
            folders of them ("data/zeroshot", "./zeroshot"); a text with a slash or the ending `.jsonl` is a path.
        include_path: folder with more lm-eval task files (YAML). They may contain Python that lm-eval runs: trust them
            as you trust a program.
        limit: questions of each task, from the start; None takes all.
        batch_size: requests run together.
        device: where to run; None leaves the model where it is.
        progress: told about every answered request.

    Raises:
        RecipeError: if a task is unknown or named twice, or a setting is out of range.
        InputError: if lm-eval is not installed, a task's data cannot be read, or the tokenizer does not fit the model.
        NumericError: if a log-likelihood is not finite.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise RecipeError(f"{name} is {value}, but must be at least 1")
    if tokenizer is None:
        raise InputError("zero-shot tasks need a tokenizer", hint="give the model's tokenizer")
    names = [task for task in tasks if not is_path(task)]
    local = [found for task in tasks if is_path(task) for found in read_tasks(Path(task))]
    _refuse_twice([*names, *(task.name for task in local)])
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra("lm-eval", "eval", "run zero-shot tasks")
    with redirect_stdout(sys.stderr):
        from secateur.evaluate import bridge

        prepared = bridge.prepare(names, local, include_path)
        with ready(model, device):
            return bridge.score(model, tokenizer, prepared, limit, batch_size, progress or Silent())


def is_path(task: str) -> bool:
    """Return whether `task` means a file or folder rather than a name of lm-eval's registry."""
    return "/" in task or os.sep in task or task in (".", "..") or task.endswith(".jsonl")


def read_tasks(path: Path) -> list[LocalTask]:
    """Return the task of a JSONL file, or those of all JSONL files directly in a folder, in order of their names.

    Raises:
        InputError: if there is no such file, or a row is malformed; the message names file and line.
    """
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise InputError(f"the task folder `{path}` holds no .jsonl file")
        return [_read_task(file) for file in files]
    if not path.is_file():
        raise InputError(f"there is no task file or folder `{path}`")
    return [_read_task(path)]


def read_item(row: Any) -> Item:
    """Return the question that one JSON row of a local task holds.

    Raises:
        InputError: if a key is missing or of the wrong type.
    """
    if not isinstance(row, dict):
        raise InputError(f"a row must be a JSON object, got {type(row).__name__}")
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise InputError("`choices` must be a list of at least two texts")
    answer = row.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise InputError(f"`answer` must be the index of a choice, 0 to {len(choices) - 1}, got {answer!r}")
    if "sentence" in row:
        return _sentence_item(_text(row, "sentence"), choices, answer)
    if "premise" in row:
        return _premise_item(_text(row, "premise"), row.get("relation"), choices, answer)
    context = f"Question: {_text(row, 'question')}\nAnswer:"
    if "passage" in row:
        context = f"{_text(row, 'passage')}\nQuestion: {_text(row, 'question').removesuffix('?')}?\nAnswer:"
    return Item((context,) * len(choices), tuple(choices), tuple(choices), answer)


def _read_task(path: Path) -> LocalTask:
    items: list[Item] = []
    partial: bool | None = None
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            where = f"{path}:{number}"
            if len(line) > LONGEST_LINE:
                raise InputError(f"the line is longer than {LONGEST_LINE >> 20} MiB", where=where)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json_record(text)
                item = read_item(row)
            except UnicodeDecodeError as error:
                raise InputError(f"the line is not UTF-8 ({error.reason})", where=where) from error
            except RepeatedKey as error:
                raise InputError(str(error), where=where) from error
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"the line is not JSON ({error})", where=where) from error
            except InputError as error:
                hint = "a row has question, choices and answer"
                raise InputError(str(error), where=where, hint=hint) from error
            if partial is not None and partial != ("sentence" in row):
                raise InputError("rows with and without `sentence` cannot share a file", where=where)
            partial = "sentence" in row
            items.append(item)
    if not items:
        raise InputError(f"the task file `{path}` holds no rows")
    return LocalTask(path.stem, tuple(items), bool(partial))


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"`{key}` must be a text, got {value!r}")
    return value


def _sentence_item(sentence: str, choices: list[str], answer: int) -> Item:
    before, gap, after = sentence.partition("_")
    if not gap or "_" in after or not after.strip():
        raise InputError("`sentence` must have exactly one `_`, with text after it")
    return Item(tuple(before + choice for choice in choices), (after.strip(),) * len(choices), tuple(choices), answer)


def _premise_item(premise: str, relation: Any, choices: list[str], answer: int) -> Item:
    words = {"cause": "because", "effect": "therefore"}
    if relation not in words:
        raise InputError(f"`relation` must be cause or effect, got {relation!r}")
    context = f"{premise.strip().removesuffix('.')} {words[relation]}"
    lowered = tuple(choice[0].lower() + choice[1:] for choice in choices)
    return Item((context,) * len(choices), lowered, lowered, answer)


def _refuse_twice(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise RecipeError(f"the task `{name}` is named twice", hint="rename one of the files, or drop one task")
        seen.add(name)
    if not seen:
        raise RecipeError("no task is named", hint="name lm-eval's tasks, or a folder of .jsonl files")
