"""What quality to expect of which combination: the order in which `suggest` tries what fits the time.

The order is by perplexity where this project has measured it (SmolLM2-135M, WikiText-2, shown in `docs/results.md`), and
by the papers' own tables where it has not: those combinations come after every measured one with the same tuner that is
known to be good, and never before block tuning, whose gain is the largest of all that was measured. Options with a plan
are for unstructured sparsity alone. Methods that are not on the shelf are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["measured", "papers"]
MEASURED = "docs/results.md"


@dataclass(frozen=True)
class Option:
    """One way to spend the time.

    Attributes:
        method: pruner.
        tuner: block tuner, or None.
        refit: exact refit on the final mask.
        plan: planner, or None.
        source: where its place in the order comes from.
        note: the number or the claim behind it.
    """

    method: str
    tuner: str | None
    refit: bool
    plan: str | None
    source: Source
    note: str

    @property
    def names(self) -> tuple[str, ...]:
        """The methods of the shelf that it is made of."""
        return tuple(name for name in (self.method, self.tuner, self.plan) if name is not None)

    @property
    def label(self) -> str:
        """What the option is called in reasons and tables."""
        words = self.method + (" with refit" if self.refit else "")
        words += f", plan {self.plan}" if self.plan else ""
        return f"{words} and {self.tuner}" if self.tuner else words


# best first
ORDER: tuple[Option, ...] = (
    Option("alps", "ebft", False, "loss-curves", "measured", "perplexity 52.9 at 70 %, 57.4 without the plan"),
    Option("alps", "ebft", False, None, "measured", "perplexity 57.4 at 70 %, 46.6 at 2:4"),
    Option("sparsegpt", "ebft", True, None, "measured", "perplexity 60.4 at 70 %, 47.4 at 2:4"),
    Option("wanda", "ebft", True, None, "measured", "perplexity 66.8 at 70 %, 49.6 at 2:4"),
    Option("alps", None, False, "loss-curves", "measured", "perplexity 72.8 at 70 %, 88.7 without the plan"),
    Option("alps", None, False, None, "measured", "perplexity 88.7 at 70 %, 53.5 at 2:4"),
    Option(
        "scope", None, False, None, "measured", "perplexity 160 at 70 % where ALPS has 155, at three times its cost"
    ),
    Option("mrp", None, False, None, "measured", "perplexity 94.2 at 70 % where SparseGPT has 169 and ALPS 88.7"),
    Option("sds", None, False, None, "measured", "perplexity 184 at 70 % where SparseGPT has 525 and ALPS 155"),
    Option("fistapruner", None, False, None, "measured", "perplexity 269 at 70 % where SparseGPT has 525"),
    Option("sparsegpt", None, True, None, "papers", "lower layer loss than SparseGPT alone on the same mask, exactly"),
    Option("sparsegpt", None, False, None, "measured", "perplexity 169 at 70 %, 69.8 at 2:4"),
    Option("dsnot", None, False, None, "measured", "perplexity 744 at 70 %"),
    Option("wanda", None, False, None, "measured", "perplexity 910 at 70 %, 158 at 2:4"),
    Option("magnitude", None, False, None, "measured", "perplexity 69,698 at 70 %, 2,715 at 2:4"),
)

# from the cheapest solver to the dearest (floating-point operations of a layer, `docs/results.md`): the order of measuring
BY_COST = ("magnitude", "wanda", "sparsegpt", "dsnot", "mrp", "sds", "scope", "alps", "fistapruner")
