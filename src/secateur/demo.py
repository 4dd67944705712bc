"""The demonstration: a real language model, pruned to 70 % zeros and brought back, measured before, between and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.core.progress import Progress, Silent, step
from secateur.recipe.schema import Recipe

MODEL = "builtin:smollm2-135m"
PROMPTS = (
    "The history of the city began",
    "In physics, energy is",
)
WORDS = 40  # tokens of each continuation


def demo_recipe(*, quick: bool = False) -> Recipe:
    """Return the recipe of the demonstration; `quick` takes a few percent of the tokens and proves only that it runs."""
    calibration = {"text": "builtin:wiki-calibration", "samples": 4 if quick else 32, "length": 256 if quick else 512}
    measure = {
        "perplexity": ["builtin:wiki-evaluation"],
        "length": 256 if quick else 512,
        "limit": 4 if quick else 24,
    }
    tuner = {"name": "ebft", "epochs": 1 if quick else 3}
    return Recipe.from_dict(
        {
            "title": "SmolLM2-135M pruned to 70 % and brought back",
            "model": MODEL,
            "stages": [
                {"evaluate": measure},
                {"prune": {"method": "sparsegpt", "pattern": "70%", "calibration": calibration}},
                {"evaluate": measure},
                {"tune": {"method": tuner, "calibration": calibration}},
                {"evaluate": measure},
            ],
        }
    )


def run(
    output: Path | str,
    *,
    quick: bool = False,
    resume: bool = False,
    overwrite: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the demonstration in the folder `output` and return its report, as `recipe.run.run` does.

    Args:
        output: run folder; an earlier demonstration there is replaced.
        quick: a few percent of the tokens.
        resume: go on with an earlier, unfinished demonstration.
        overwrite: replace an earlier demonstration.
        progress: shown every step.
    """
    from secateur.recipe.report import write_report
    from secateur.recipe.run import run as run_recipe

    show = progress or Silent()
    recipe = demo_recipe(quick=quick)
    folder = Path(output)
    report = run_recipe(recipe, folder, resume=resume, overwrite=overwrite, progress=show)
    report["samples"] = continuations(report, show)
    write_report(report, folder)
    return report


def continuations(report: dict[str, Any], progress: Progress) -> list[dict[str, str]]:
    """Return what each model of the run writes after the same prompts."""
    from secateur.evaluate.generate import continuation
    from secateur.recipe.stages import load

    made = [(stage["label"], stage["model"]) for stage in report["stages"] if stage["stage"] == "evaluate"]
    samples = []
    with step(progress, "writing a few words", len(made) * len(PROMPTS)) as number:
        for label, spec in made:
            model, tokenizer, _ = load(spec)
            for prompt in PROMPTS:
                samples.append({"label": label, "text": prompt + continuation(model, tokenizer, prompt, WORDS)})
                progress.advance(number, 1)
    return samples
