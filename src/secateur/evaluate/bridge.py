"""The one module that imports lm-eval: its model class, its task class and its evaluation loop, each held by the hand.

`simple_evaluate` is avoided because it seeds the global random states, starts `git` and collects the environment.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lm_eval
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor, nn

from secateur.core.errors import InputError, NumericError, RecipeError, SecateurError, did_you_mean
from secateur.core.progress import Progress, step
from secateur.evaluate.harness import LocalTask
from secateur.evaluate.placement import refuse_unknown_tokens

FEWSHOT_SEED = 1234  # lm-eval's default; matters only for tasks that bring their own shots
BOOTSTRAP = 100  # resamplings for the standard errors that have no closed form; those of accuracies have one


class FileTask(ConfigurableTask):  # type: ignore[misc]
    """A local task, served from memory: no data set builder, no cache, no network."""

    def __init__(self, task: LocalTask) -> None:
        self._rows = [asdict(item) for item in task.items]
        config = {
            "task": task.name,
            "dataset_path": task.name,
            "test_split": "test",
            "output_type": "multiple_choice",
            "num_fewshot": 0,
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                for metric in (["acc"] if task.partial else ["acc", "acc_norm"])
            ],
        }
        # lm-eval scores choices in the context when `doc_to_text` gives the answer's index, as its WinoGrande does
        config |= (
            {"doc_to_text": _answer, "doc_to_target": _ending, "doc_to_choice": _contexts}
            if task.partial
            else {"doc_to_text": _context, "doc_to_target": _answer, "doc_to_choice": _continuations}
        )
        super().__init__(config=config)

    def download(self, dataset_kwargs: Any = None, **settings: Any) -> None:
        """Hand over the rows; lm-eval calls this where other tasks load their data set."""
        self.dataset = {"test": Dataset.from_list(self._rows)}


def _answer(row: dict[str, Any]) -> int:
    return int(row["answer"])


def _context(row: dict[str, Any]) -> str:
    return str(row["contexts"][0])


def _contexts(row: dict[str, Any]) -> list[str]:
    return list(row["contexts"])


def _continuations(row: dict[str, Any]) -> list[str]:
    return list(row["continuations"])


def _ending(row: dict[str, Any]) -> str:
    return str(row["continuations"][0])


class Scorer(HFLM):  # type: ignore[misc]
    """lm-eval's transformers model with our progress and a float32 softmax; tokens and results are checked."""

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int, progress: Progress) -> None:
        super().__init__(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32"
        )
        self._progress = progress

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of every request.

        Raises:
            NumericError: if a log-likelihood is not finite.
        """
        with step(self._progress, "tasks", len(requests)) as number:
            self.set_cache_hook(_Counter(self._progress, number))
            answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        for (value, _), request in zip(answers, requests, strict=True):
            if not math.isfinite(value):
                raise NumericError(
                    f"the log-likelihood of a choice of task `{request.task_name}` is {value}",
                    hint="look for NaN or infinity in the weights, or use a wider dtype",
                )
        return answers

    def _model_call(self, inps: Tensor, **settings: Any) -> Tensor:
        refuse_unknown_tokens(inps, self.model)
        logits: Tensor = super()._model_call(inps, **settings)
        return logits

    def _model_generate(self, context: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        refuse_unknown_tokens(context, self.model)
        ids: Tensor = super()._model_generate(context, *arguments, **settings)
        return ids


class _Counter:
    """Stands where lm-eval would store answers in a cache, and counts them instead."""

    def __init__(self, progress: Progress, number: int) -> None:
        self._progress, self._number = progress, number

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._progress.advance(self._number, 1)


def prepare(names: Sequence[str], local: Sequence[LocalTask], include_path: str | Path | None) -> dict[str, Any]:
    """Return lm-eval's `{"tasks": ..., "groups": ...}` for registered names and local tasks.

    Raises:
        RecipeError: if a name is unknown.
        InputError: if the data of a task cannot be had.
    """
    prepared: dict[str, Any] = {"tasks": {}, "groups": {}}
    if names:
        with _quiet():
            manager = TaskManager(include_path=None if include_path is None else str(include_path))
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            near = did_you_mean(unknown[0], manager.all_tasks)
            hint = (
                f"write `./{unknown[0]}` for a folder" if Path(unknown[0]).exists() else "`lm-eval ls tasks` lists them"
            )
            raise RecipeError(f"lm-eval has no task `{unknown[0]}`{near}", hint=hint)
        for name in names:
            loaded = _load(manager, name)
            prepared["tasks"].update(loaded["tasks"])
            prepared["groups"].update(loaded.get("groups", {}))
    for task in local:
        if task.name in prepared["tasks"]:
            raise RecipeError(f"the task `{task.name}` is named twice", hint=f"rename `{task.name}.jsonl`")
        with _quiet():
            prepared["tasks"][task.name] = FileTask(task)
    for task in prepared["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return prepared


def score(
    model: nn.Module, tokenizer: Any, prepared: dict[str, Any], limit: int | None, batch_size: int, progress: Progress
) -> dict[str, dict[str, float]]:
    """Return `{task or group: {metric: value}}`; see `harness.run_tasks` for the arguments."""
    with _quiet():
        scorer = Scorer(model, tokenizer, batch_size, progress)
    with _quiet() as heard:
        results = lm_eval.evaluate(
            lm=scorer, task_dict=prepared, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False
        )
    for message, count in heard.values():
        progress.note(f"lm-eval: {message}" + (f" ({count} times)" if count > 1 else ""))
    return {
        name: {key: float(value) for key, value in metrics.items() if "," in key and _is_number(value)}
        for name, metrics in results["results"].items()
    }


def _load(manager: TaskManager, name: str) -> Any:
    try:
        with _quiet():
            return manager.load([name])
    except SecateurError:
        raise
    except ImportError as error:
        raise InputError(f"the task `{name}` needs a package: {error}", hint="install it beside lm-eval") from error
    except Exception as error:  # a task may be any code and its data any server, so any failure is the task's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the task `{name}` of lm-eval could not be prepared: {reason}",
            hint="without the Hub, give a local file: `--tasks path/to/file.jsonl`",
        ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@contextmanager
def _quiet() -> Iterator[dict[tuple[str, int], tuple[str, int]]]:
    """Hold lm-eval's log back, and yield what it warned of: `{place in the source: (first message, count)}`.

    Its logger is put back as it was.
    """
    heard: dict[tuple[str, int], tuple[str, int]] = {}

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            place = (record.pathname, record.lineno)
            message, count = heard.get(place, (record.getMessage(), 0))
            heard[place] = (message, count + 1)

    logger, listener = logging.getLogger("lm_eval"), Listener(logging.WARNING)
    propagate = logger.propagate
    logger.addHandler(listener)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.propagate = propagate
        logger.removeHandler(listener)
