"""What to do with a few minutes: method, tuner, plan and calibration chosen by costs measured on this machine.

The options are tried in the order of `recipe/expected.py`, best first. The first one that fits the time with a
calibration that is worth having is taken; what time it leaves goes into more calibration text, then more epochs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import RecipeError, ResourceError, StateError
from secateur.core.pattern import NM, Pattern, Unstructured, parse_pattern
from secateur.core.progress import Progress
from secateur.core.quantities import duration
from secateur.core.versions import versions
from secateur.data.calibration import from_ids
from secateur.data.text import load_text, tokenise
from secateur.engine.budget import assign, divides_model
from secateur.engine.memory import MemoryPlan, available_memory, plan_memory, with_planning
from secateur.engine.probe import Costs, probe
from secateur.engine.stream import compute_dtype
from secateur.engine.sweep import Sweep
from secateur.methods.registry import REGISTRY
from secateur.models.blocks import find_blocks
from secateur.recipe.build import build_method
from secateur.recipe.choice import Choice, calibrations, choose, solver_of
from secateur.recipe.expected import BY_COST, MEASURED, ORDER, Option
from secateur.recipe.job import Job
from secateur.recipe.opening import modes_back
from secateur.recipe.report import write_text
from secateur.recipe.schema import Recipe
from secateur.recipe.yaml_writer import to_yaml

RESERVE = 0.8  # of the time that is planned for: other programs run too, and a few tokens measure a cost roughly
PROBE = 0.1  # of the time that measuring may take
DISK = 200e6  # bytes a second at which a model is read, journalled, written and hashed, taken low
WINDOWS, WINDOW = 20, 1024  # of the evaluation, where a text for it is named


@modes_back()
def suggest(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    pattern: str | float | Pattern = "50%",
    minutes: float,
    calibration: str | Path = "builtin:wiki-calibration",
    perplexity: str | Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    field: str = "text",
    skip_bad: int = 0,
    output: str | Path | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return a recipe that prunes a model as well as can be expected in so many minutes on this machine.

    One block is run, solved and tuned with a few tokens; the model is not changed, and nothing is pruned yet.

    Args:
        model: what `load` takes; a recipe can only name it. A live model can be measured, but its recipe names no file.
        tokenizer: of a live model.
        pattern: what to prune to, see `prune`.
        minutes: the time that `run` may take with the recipe, measuring here not counted.
        calibration: the text of the recipe.
        perplexity: a text to measure the result on, as a stage of the recipe.
        output: file to write the recipe in.
        overwrite: replace that file.
        seed, device, dtype, field, skip_bad, allow_pickle, trust_remote_code, revision, progress: as in `prune`.

    Returns:
        `{"recipe": plain data, "yaml": text, "reason": [sentences], "expected_seconds", "choices": [...], "costs"}`.

    Raises:
        RecipeError: if `minutes` is not positive, or nothing fits in them.
        InputError: if the text is too short for any calibration.
        StateError: if `output` exists, or cannot be a file.
    """
    if not minutes > 0 or minutes == float("inf"):
        raise RecipeError(f"`minutes` is {minutes}, but must be a positive number")
    target = None if output is None else Path(output)
    _refuse_file(target, overwrite)
    general = parse_pattern(pattern)
    job = Job("suggest", model, tokenizer, None, {**locals(), "output": None, "inplace": True})
    text = load_text(str(calibration), field=field, skip_bad=skip_bad)
    search = Search(job, general, minutes, tokenise(text, job.need_tokenizer("calibrate on text")), bool(perplexity))
    chosen = search.chosen()
    data = _recipe(job, str(general), chosen, on_disk=search.short_of_memory(chosen))
    recipe = Recipe.from_dict(data)
    recipe.check()
    reason = search.reasons(chosen)
    written = "".join(f"# {line}\n" for line in reason) + to_yaml(data)
    if target is not None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, written)
        except OSError as error:
            raise ResourceError(f"cannot write `{target}`: {error.strerror}") from error
    return {
        "stage": "suggest",
        "model": job.spec,
        "pattern": str(general),
        "minutes": minutes,
        "recipe": data,
        "yaml": written,
        "reason": reason,
        "expected_seconds": search.expected(chosen),
        "choices": [choice.words() for choice in search.choices],
        "costs": dataclasses.asdict(search.costs),
        "output": None if target is None else str(target),
        "versions": versions(),
        "warnings": [*job.warnings, *text.notes],
    }


@dataclass
class Search:
    """The search for what fits: a model, a pattern and a time, and what they cost on this machine.

    Attributes:
        job: the opened model.
        general: what to prune to.
        minutes: the time.
        ids: tokens `(n,)` of the calibration text.
        evaluated: whether the recipe measures the result.
        options: what can be tried, best first.
        patterns: of each linear, as they are measured.
        rungs: calibrations that the text allows, from the least.
    """

    job: Job
    general: Pattern
    minutes: float
    ids: Tensor
    evaluated: bool
    options: list[Option] = field(init=False)
    patterns: dict[str, Pattern] = field(init=False)
    rungs: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.rungs = calibrations(len(self.ids), positions_of(self.job))
        self.patterns = dict(assign(self.job.model, self.general))
        shelf = {entry.name for entry in REGISTRY}
        self.options = [option for option in ORDER if shelf.issuperset(option.names)]
        divides = divides_model(self.patterns.values())
        if divides:  # a budget over the whole model needs scores, and costs what one per layer costs
            self.options = [option for option in self.options if hasattr(REGISTRY.find(option.method).load(), "score")]
            self.patterns = {name: Unstructured(each.sparsity, "layer") for name, each in self.patterns.items()}
        if divides or isinstance(self.general, NM):  # a plan would mix N:M, of which machines know one
            self.options = [option for option in self.options if option.plan is None]

    @cached_property
    def costs(self) -> Costs:
        """What the options cost, measured on one block with a few tokens."""
        length = self.rungs[0][1]
        samples = max(1, 1024 // length)
        few = from_ids(self.ids[: samples * length].reshape(samples, length), vocabulary=self.vocabulary).ids
        by_cost = sorted(self.options, key=lambda option: (BY_COST.index(option.method), option.refit))
        tuners = dict.fromkeys(option.tuner for option in self.options if option.tuner is not None)
        return probe(
            self.job.model,
            few,
            self.patterns,
            {solver_of(option): (build_method(option.method, "pruner"), option.refit) for option in by_cost},
            {name: _tuner(name, 1) for name in tuners},
            {
                option.plan: (_planner(option.plan), build_method(option.method, "pruner"))
                for option in self.options
                if option.plan is not None
            },
            device=self.job.device,
            most_seconds=max(60 * self.minutes * PROBE, 5.0),
            progress=self.job.progress,
        )

    @cached_property
    def choices(self) -> list[Choice]:
        """Every option with the most that fits of it."""
        available = 60 * self.minutes * RESERVE - self.fixed
        return [self._within_memory(choose(option, self.costs, self.rungs, available)) for option in self.options]

    @cached_property
    def fixed(self) -> float:
        """Seconds of what every recipe does: open and publish the model, and measure it if asked."""
        seconds = 3 * sum(parameter.nbytes for parameter in self.job.model.parameters()) / DISK
        if self.evaluated:
            costs, config = self.costs, self.job.config()
            head = config.vocab_size * config.hidden_size  # in the proportion of its weights to those of the blocks
            per_token = costs.forward * (costs.blocks + head * costs.blocks / max(costs.parameters, 1))
            seconds += WINDOWS * WINDOW * per_token
        return float(seconds)

    @cached_property
    def free(self) -> int:
        """Bytes of main memory that are free."""
        return available_memory()

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        embeddings: Any = self.job.model.get_input_embeddings()  # type: ignore[operator]
        return int(embeddings.num_embeddings)

    def chosen(self) -> Choice:
        """Return the first option that fits.

        Raises:
            RecipeError: nothing does.
        """
        for choice in self.choices:
            if choice.fits:
                return choice
        least = min((choice.seconds for choice in self.choices if choice.seconds is not None), default=None)
        needed = ""
        if least is not None:
            needed = f"; the quickest option needs about {duration((least + self.fixed) / RESERVE)}"
        raise RecipeError(
            f"nothing fits in {self.minutes:g} minutes on this machine{needed}", hint="give it more --minutes"
        )

    def expected(self, choice: Choice) -> float:
        """Return the seconds that the recipe of a choice is expected to take."""
        return (choice.seconds or 0.0) + self.fixed

    def memory(self, choice: Choice) -> MemoryPlan:
        """Return the memory that the sweep of a choice needs."""
        option, job = choice.option, self.job
        sweep = Sweep(
            patterns=self.patterns,
            pruner=build_method(option.method, "pruner"),
            tuner=None if option.tuner is None else _tuner(option.tuner, choice.epochs),
            refit=option.refit,
            device=job.device,
        )
        dtype = compute_dtype(job.model, job.device)
        blocks, width = find_blocks(job.model), job.config().hidden_size
        return plan_memory(blocks, sweep, choice.samples, choice.length, width, dtype)

    def short_of_memory(self, choice: Choice) -> bool:
        """Return whether hidden states have to wait on disk."""
        return self.memory(choice).total > self.free

    def _within_memory(self, choice: Choice) -> Choice:
        """Pass over a plan that the memory is too small for; all else can wait on disk."""
        if choice.option.plan is None or not choice.fits:
            return choice
        blocks, width = find_blocks(self.job.model), self.job.config().hidden_size
        planner = _planner(choice.option.plan)
        need = with_planning(self.memory(choice), planner, blocks, choice.length, width, self.vocabulary).total
        if need <= self.free:
            return choice
        why = f"planning needs {need / 2**30:.1f} GiB of memory, {self.free / 2**30:.1f} GiB are free"
        return dataclasses.replace(choice, fits=False, why=why)

    def reasons(self, chosen: Choice) -> list[str]:
        """Return why it is this choice, a sentence each."""
        option, costs, tokens = chosen.option, self.costs, chosen.samples * chosen.length
        taking = duration(self.expected(chosen))
        found = [
            f"{option.label}: the best that fits in {self.minutes:g} minutes, expected to take about {taking}",
            f"its place in the order comes from {MEASURED if option.source == 'measured' else 'papers'}: {option.note}",
        ]
        for choice in self.choices[: self.choices.index(chosen)]:
            needs = "" if choice.seconds is None else f", at least {duration(choice.seconds)}"
            found.append(f"{choice.option.label} would be tried before: {choice.why}{needs}")
        size = f"{chosen.samples} samples of {chosen.length} tokens"
        if (chosen.samples, chosen.length) == self.rungs[-1]:
            found.append(f"{size}, the most that is worth it or that the text and the model allow")
        else:
            found.append(f"{size}, the most that fits")
        if option.tuner is not None:
            found.append(f"{chosen.epochs} epochs of {option.tuner} at most; it stops where it gains nothing")
        if option.plan is not None:
            found.append(f"the plan takes about {duration(costs.planning(option.plan, tokens))} of that")
        if self.short_of_memory(chosen):
            found.append("hidden states wait on disk, because main memory is too small for them")
        found.append(
            f"measured on one of {costs.blocks} blocks with {costs.tokens} tokens in {duration(costs.seconds)}: "
            f"{1e6 * costs.forward:.1f} us for a token's forward, "
            f"{duration(costs.solvers[solver_of(option)])} to solve a block"
            + (f", {1e6 * costs.tuners[option.tuner]:.1f} us for a token's epoch" if option.tuner is not None else "")
        )
        return found


def positions_of(job: Job) -> int | None:
    """Return how many positions the model knows; None: it does not say."""
    return getattr(job.config(), "max_position_embeddings", None)


def _refuse_file(target: Path | None, overwrite: bool) -> None:
    """Refuse a recipe file that could not be written at the end."""
    if target is None:
        return
    if target.exists() and not overwrite:
        raise StateError(f"`{target}` exists", hint="choose another --output, or replace it with --overwrite")
    if target.is_dir() or any(one.is_file() for one in target.absolute().parents):
        raise StateError(
            f"`{target}` cannot be written: it is a folder, or lies in a file", hint="choose another --output"
        )


def _tuner(name: str, epochs: int) -> Any:
    return build_method({"name": name, "epochs": epochs}, "block tuner")


def _planner(name: str) -> Any:
    return build_method(name, "planner", where="plan")


def _recipe(job: Job, pattern: str, chosen: Choice, *, on_disk: bool) -> dict[str, Any]:
    """Return the recipe as short plain data: what is left out has its default."""
    given, option = job.options, chosen.option
    calibration: dict[str, Any] = {
        "text": str(given["calibration"]),
        "samples": chosen.samples,
        "length": chosen.length,
    }
    if given["field"] != "text":
        calibration["field"] = given["field"]
    prune: dict[str, Any] = {"method": option.method, "pattern": pattern}
    if option.plan is not None:
        prune["plan"] = option.plan
    if option.tuner is not None:
        prune["tuner"] = {"name": option.tuner, "epochs": chosen.epochs}
    if option.refit:
        prune["refit"] = True
    stages: list[dict[str, Any]] = [{"prune": {**prune, "calibration": calibration}}]
    if given["perplexity"] is not None:
        window = min(WINDOW, positions_of(job) or WINDOW)
        measured = {"perplexity": str(given["perplexity"]), "length": window, "limit": WINDOWS}
        stages.append({"evaluate": measured})
    top: dict[str, Any] = {"model": job.spec, "seed": given["seed"]}
    top |= {"device": str(given["device"])} if given["device"] is not None else {}
    top |= {"dtype": given["dtype"]} if given["dtype"] is not None else {}
    loading = {name: given[name] for name in ("allow_pickle", "trust_remote_code", "revision") if given[name]}
    return {**top, "stages": stages, **loading, **({"offload": "disk"} if on_disk else {})}
