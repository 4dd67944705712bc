"""Where plans are kept that several runs share, so that what plans alike plans once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from secateur.core.allocation import Budget
from secateur.core.contracts import Planner
from secateur.core.errors import ResourceError
from secateur.recipe.build import describe
from secateur.recipe.job import digest_of


def plan_folder(parent: Path, planner: Planner, budget: Budget, shared: Mapping[str, Any]) -> Path:
    """Return the folder of a plan, made if there is none, named by all that decides the plan.

    Args:
        parent: holds the folders of all plans.
        planner: with its hyper-parameters.
        budget: what is divided among which linears.
        shared: what else decides it, as plain data: the model, the text, the machine.

    Raises:
        ResourceError: it cannot be made.
    """
    decides = {
        **shared,
        "planner": describe(planner),
        "pattern": str(budget.pattern),
        "scope": budget.scope,
        "linears": [asdict(linear) for linear in budget.linears],
    }
    folder = parent / digest_of(decides)[:24]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"the folder `{folder}` cannot be made: {error.strerror}") from error
    return folder
