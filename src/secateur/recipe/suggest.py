"""What to do with a few minutes: method, tuner, plan and calibration chosen by costs measured on this machine.

The options are tried in the order of `recipe/expected.py`, best first. The first one that fits the time with a
calibration that is worth having is taken; what time it leaves goes into more calibration text, then more epochs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.core.errors import RecipeError, ResourceError, StateError
from secateur.core.pattern import NM, Pattern, Unstructured, parse_pattern
from secateur.core.progress import Progress, Silent
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
from secateur.recipe.expected import BY_COST, MEASURED, ORDER
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
    if target is not None and target.exists() and not overwrite:
        raise StateError(f"`{target}` exists", hint="choose another --output, or replace it with --overwrite")
    if target is not None and (target.is_dir() or any(one.is_file() for one in target.absolute().parents)):
        raise StateError(
            f"`{target}` cannot be written: it is a folder, or lies in a file", hint="choose another --output"
        )
    show = progress or Silent()
    general = parse_pattern(pattern)
    job = Job("suggest", model, tokenizer, None, {**locals(), "output": None, "inplace": True})
    patterns = assign(job.model, general)
    positions = getattr(job.config(), "max_position_embeddings", None)
    text = load_text(str(calibration), field=field, skip_bad=skip_bad)
    ids = tokenise(text, job.need_tokenizer("calibrate on text"))
    rungs = calibrations(len(ids), positions)
    shelf = {entry.name for entry in REGISTRY}
    options = [option for option in ORDER if shelf.issuperset(option.names)]
    divides = divides_model(patterns.values())
    if divides:  # a budget over the whole model needs scores, and costs what one per layer costs
        options = [option for option in options if hasattr(REGISTRY.find(option.method).load(), "score")]
        patterns = {name: Unstructured(each.sparsity, "layer") for name, each in patterns.items()}
    if divides or isinstance(general, NM):  # a plan would mix N:M, of which machines know one
        options = [option for option in options if option.plan is None]
    samples, length = max(1, 1024 // rungs[0][1]), rungs[0][1]
    few = from_ids(ids[: samples * length].reshape(samples, length), vocabulary=_vocabulary(job)).ids
    costs = probe(
        job.model,
        few,
        patterns,
        {
            solver_of(option): (build_method(option.method, "pruner"), option.refit)
            for option in sorted(options, key=lambda option: (BY_COST.index(option.method), option.refit))
        },
        {name: _tuner(name, 1) for name in dict.fromkeys(option.tuner for option in options) if name is not None},
        {
            option.plan: (build_method(option.plan, "planner", where="plan"), build_method(option.method, "pruner"))
            for option in options
            if option.plan is not None
        },
        device=job.device,
        most_seconds=max(60 * minutes * PROBE, 5.0),
        progress=show,
    )
    stored = sum(parameter.nbytes for parameter in job.model.parameters())
    available = 60 * minutes * RESERVE - _fixed(costs, stored, job, perplexity is not None)
    blocks = find_blocks(job.model)
    hidden, dtype_of_blocks = job.config().hidden_size, compute_dtype(job.model, job.device)
    free = available_memory()

    def memory_of(choice: Choice) -> MemoryPlan:
        option = choice.option
        sweep = Sweep(
            patterns=patterns,
            pruner=build_method(option.method, "pruner"),
            tuner=None if option.tuner is None else _tuner(option.tuner, choice.epochs),
            refit=option.refit,
            device=job.device,
        )
        return plan_memory(blocks, sweep, choice.samples, choice.length, hidden, dtype_of_blocks)

    def fitting(choice: Choice) -> Choice:
        """Pass over a plan that the memory is too small for; all else can wait on disk."""
        if choice.option.plan is None or not choice.fits:
            return choice
        planner = build_method(choice.option.plan, "planner", where="plan")
        need = with_planning(memory_of(choice), planner, blocks, choice.length, hidden, _vocabulary(job)).total
        if need <= free:
            return choice
        why = f"planning needs {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
        return dataclasses.replace(choice, fits=False, why=why)

    choices = [fitting(choose(option, costs, rungs, available)) for option in options]
    chosen = next((choice for choice in choices if choice.fits), None)
    if chosen is None:
        least = min((c.seconds for c in choices if c.seconds is not None), default=None)
        fixed = _fixed(costs, stored, job, perplexity is not None)
        needed = "" if least is None else f"; the quickest option needs about {duration((least + fixed) / RESERVE)}"
        raise RecipeError(f"nothing fits in {minutes:g} minutes on this machine{needed}", hint="give it more --minutes")
    memory = memory_of(chosen).total
    window = min(WINDOW, positions or WINDOW)
    data = _recipe(job.spec, str(general), chosen, calibration, perplexity, window, seed, device, dtype)
    if field != "text":
        data["stages"][0]["prune"]["calibration"]["field"] = field
    data |= {
        name: value
        for name, value in (
            ("allow_pickle", allow_pickle),
            ("trust_remote_code", trust_remote_code),
            ("revision", revision),
            ("offload", "disk" if memory > free else None),
        )
        if value
    }
    recipe = Recipe.from_dict(data)
    recipe.check()
    expected = (chosen.seconds or 0.0) + _fixed(costs, stored, job, perplexity is not None)
    reason = _reasons(chosen, choices, costs, rungs, minutes, expected, memory > free)
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
        "expected_seconds": expected,
        "choices": [choice.words() for choice in choices],
        "costs": dataclasses.asdict(costs),
        "output": None if target is None else str(target),
        "versions": versions(),
        "warnings": [*job.warnings, *text.notes],
    }


def _tuner(name: str, epochs: int) -> Any:
    return build_method({"name": name, "epochs": epochs}, "block tuner")


def _vocabulary(job: Job) -> int:
    embeddings: Any = job.model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.num_embeddings)


def _fixed(costs: Costs, stored: int, job: Job, evaluated: bool) -> float:
    """Return the seconds of what every recipe does: open and publish the model, and measure it if asked."""
    seconds = 3 * stored / DISK
    if evaluated:
        tokens = WINDOWS * WINDOW
        config = job.config()
        head = config.vocab_size * config.hidden_size  # in the proportion of its weights to those of the blocks
        seconds += tokens * costs.forward * (costs.blocks + head * costs.blocks / max(costs.parameters, 1))
    return float(seconds)


def _recipe(
    spec: str,
    pattern: str,
    chosen: Choice,
    calibration: str | Path,
    perplexity: str | Path | None,
    window: int,
    seed: int,
    device: str | torch.device | None,
    dtype: str | None,
) -> dict[str, Any]:
    """Return the recipe as short plain data: what is left out has its default."""
    option = chosen.option
    prune: dict[str, Any] = {"method": option.method, "pattern": pattern}
    if option.plan is not None:
        prune["plan"] = option.plan
    if option.tuner is not None:
        prune["tuner"] = {"name": option.tuner, "epochs": chosen.epochs}
    if option.refit:
        prune["refit"] = True
    prune["calibration"] = {"text": str(calibration), "samples": chosen.samples, "length": chosen.length}
    stages: list[dict[str, Any]] = [{"prune": prune}]
    if perplexity is not None:
        stages.append({"evaluate": {"perplexity": str(perplexity), "length": window, "limit": WINDOWS}})
    top: dict[str, Any] = {"model": spec, "seed": seed}
    top |= {"device": str(device)} if device is not None else {}
    top |= {"dtype": dtype} if dtype is not None else {}
    return {**top, "stages": stages}


def _reasons(
    chosen: Choice,
    choices: Sequence[Choice],
    costs: Costs,
    rungs: Sequence[tuple[int, int]],
    minutes: float,
    expected: float,
    short: bool,
) -> list[str]:
    """Return why it is this recipe, a sentence each."""
    option, tokens = chosen.option, chosen.samples * chosen.length
    found = [
        f"{option.label}: the best that fits in {minutes:g} minutes, expected to take about {duration(expected)}",
        f"its place in the order comes from {MEASURED if option.source == 'measured' else 'papers'}: {option.note}",
    ]
    for choice in choices[: choices.index(chosen)]:
        needs = "" if choice.seconds is None else f", at least {duration(choice.seconds)}"
        found.append(f"{choice.option.label} would be tried before: {choice.why}{needs}")
    size = f"{chosen.samples} samples of {chosen.length} tokens"
    if (chosen.samples, chosen.length) == rungs[-1]:
        found.append(f"{size}, the most that is worth it or that the text and the model allow")
    else:
        found.append(f"{size}, the most that fits")
    if option.tuner is not None:
        found.append(f"{chosen.epochs} epochs of {option.tuner} at most; it stops where it gains nothing")
    if option.plan is not None:
        found.append(f"the plan takes about {duration(costs.planning(option.plan, tokens))} of that")
    if short:
        found.append("hidden states wait on disk, because main memory is too small for them")
    found.append(
        f"measured on one of {costs.blocks} blocks with {costs.tokens} tokens in {duration(costs.seconds)}: "
        f"{1e6 * costs.forward:.1f} us for a token's forward, {duration(costs.solvers[solver_of(option)])} to solve a block"
        + (f", {1e6 * costs.tuners[option.tuner]:.1f} us for a token's epoch" if option.tuner is not None else "")
    )
    return found
