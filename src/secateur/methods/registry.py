"""The shelf: every method, its paper, what it can do. A new method adds one line here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from secateur.core.registry import Entry, Registry

ANY = "unstructured, N:M"

REGISTRY = Registry(
    [
        Entry(
            "magnitude",
            "pruner",
            "secateur.methods.pruners.magnitude:Magnitude",
            "classical (Han et al., arXiv 1506.02626)",
            ANY,
            (),
            "keep the largest weights",
        ),
        Entry(
            "wanda",
            "pruner",
            "secateur.methods.pruners.wanda:Wanda",
            "Sun et al., ICLR 2024, arXiv 2306.11695",
            ANY,
            ("diag",),
            "magnitude times input norm, no weight update",
        ),
        Entry(
            "sparsegpt",
            "pruner",
            "secateur.methods.pruners.sparsegpt:SparseGPT",
            "Frantar & Alistarh, ICML 2023, arXiv 2301.00774",
            ANY,
            ("gram",),
            "one sweep over the columns, later columns make up for pruned ones",
        ),
        Entry(
            "dsnot",
            "pruner",
            "secateur.methods.pruners.dsnot:DSnoT",
            "Zhang et al., ICLR 2024, arXiv 2310.08915",
            ANY,
            ("diag", "mean", "gram"),
            "swap pruned and kept weights of any base pruner, row by row, without training",
        ),
        Entry(
            "fistapruner",
            "pruner",
            "secateur.methods.pruners.fistapruner:FISTAPruner",
            "Zhao et al., EMNLP 2025, arXiv 2408.03728",
            ANY,
            ("gram",),
            "follow a path of l1 penalties from any base pruner's solution, round to the pattern, re-solve",
        ),
        Entry(
            "mrp",
            "pruner",
            "secateur.methods.pruners.mrp:MRP",
            "Zhao et al., EMNLP 2024 findings, arXiv 2410.15567",
            ANY,
            ("gram",),
            "remove many weights together, in rounds, with one exact compensation for all of them",
        ),
        Entry(
            "sds",
            "pruner",
            "secateur.methods.pruners.sds:SDS",
            "Li et al., COLING 2025, arXiv 2408.10473",
            ANY,
            ("gram",),
            "prune, make dense again, prune a second time, around any base pruner",
        ),
        Entry(
            "alps",
            "pruner",
            "secateur.methods.pruners.alps:ALPS",
            "Meng et al., NeurIPS 2024, arXiv 2406.07831",
            ANY,
            ("gram",),
            "find mask and weights together by alternating directions, then solve the weights exactly",
        ),
        Entry(
            "scope",
            "pruner",
            "secateur.methods.pruners.scope:SCOPE",
            "Zhu et al., arXiv 2406.12017",
            ANY,
            ("gram",),
            "exchange kept and pruned weights of any base pruner while the exactly refitted error of a row falls",
        ),
        Entry(
            "ebft",
            "block tuner",
            "secateur.methods.block_tuners.ebft:EBFT",
            "Guo et al., arXiv 2402.12419",
            "any, masks are kept",
            (),
            "fine-tune each sparse block to give the dense block's output",
        ),
        Entry(
            "sds-blocks",
            "block tuner",
            "secateur.methods.block_tuners.sds:SDSBlocks",
            "Li et al., COLING 2025, arXiv 2408.10473",
            "any, masks move inside their pattern",
            (),
            "make each pruned block dense again, prune it anew, train weights and masks towards the dense block's output",
        ),
        Entry(
            "spp",
            "adapter",
            "secateur.methods.adapters.spp:SppConfig",
            "Lu et al., ICML 2024, arXiv 2405.16057",
            "any, zeros are kept",
            (),
            "scale the kept weights by learned row and column factors",
        ),
        Entry(
            "masked_lora",
            "adapter",
            "secateur.methods.adapters.masked_lora:MaskedLoraConfig",
            "Hu et al., ICLR 2022, arXiv 2106.09685, under the mask as in arXiv 2501.08582; DoRA arXiv 2402.09353",
            "any, zeros are kept",
            (),
            "low-rank updates, plain or DoRA, that reach the kept weights only",
        ),
        Entry(
            "lora",
            "adapter",
            "secateur.methods.adapters.lora:PlainLoraConfig",
            "Hu et al., ICLR 2022, arXiv 2106.09685",
            "none, a merge fills zeros",
            (),
            "PEFT's own low-rank updates, to compare with",
        ),
        Entry(
            "s2ft",
            "adapter",
            "secateur.methods.adapters.s2ft:S2ftConfig",
            "Yang et al., NeurIPS 2024, arXiv 2412.06289",
            "any, zeros are kept",
            (),
            "train a few heads and channels whole, and keep only their activations for backward",
        ),
        Entry(
            "pst",
            "adapter",
            "secateur.methods.adapters.pst:PstConfig",
            "Li et al., IJCAI 2022, arXiv 2205.11005",
            ANY,
            (),
            "learn masks and updates together, both low-rank",
        ),
        Entry(
            "cram",
            "optimizer",
            "secateur.methods.optimizers.cram:CrAM",
            "Peste et al., ICLR 2023, arXiv 2207.14200",
            ANY,
            (),
            "train a dense model that survives one-shot pruning, around any optimizer",
        ),
        Entry(
            "owl",
            "planner",
            "secateur.methods.planners.owl:OWL",
            "Yin et al., ICML 2024, arXiv 2310.05175",
            ANY,
            ("diag",),
            "blocks with more outliers among their scores stay denser",
        ),
        Entry(
            "mixed-sparsity",
            "planner",
            "secateur.methods.planners.mixed_sparsity:MixedSparsity",
            "Shao et al., ICASSP 2024, arXiv 2310.09499",
            ANY,
            ("gradients",),
            "what the loss is sensitive to stays denser, by the rank of Fisher or Hessian traces",
        ),
        Entry(
            "loss-curves",
            "planner",
            "secateur.methods.planners.loss_curves:LossCurves",
            "ours",
            "unstructured, N:M with any mix of candidates",
            ("gram", "diag", "gradients"),
            "solve the budget exactly over measured curves of layer loss against sparsity",
        ),
        Entry(
            "unipts",
            "planner",
            "secateur.methods.planners.unipts:UniPTS",
            "Xie et al., CVPR 2024, arXiv 2405.18810",
            ANY,
            ("gradients",),
            "search the sparsities, then distil the dense model under masks that still move",
        ),
        Entry(
            "drive",
            "planner",
            "secateur.methods.planners.drive:DRIVE",
            "Saikumar & Varghese, arXiv 2404.03687",
            ANY,
            ("gradients",),
            "masks by magnitude, sensitivity and gradient together, in many small rounds",
        ),
    ]
)


def register_adapters() -> None:
    """Make PEFT know every adapter of the shelf, so that it can load them: `PeftModel.from_pretrained(model, folder)`.

    Importing any of their configurations from `secateur` does the same.

    Raises:
        InputError: peft is not installed.
    """
    for entry in REGISTRY:
        if entry.kind == "adapter":
            entry.load()


def methods() -> list[dict[str, Any]]:
    """Return the shelf as plain data: name, kind, target, paper, patterns, needs and summary of every method."""
    return [asdict(entry) for entry in REGISTRY]
