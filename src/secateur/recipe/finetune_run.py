"""One run of `finetune`: the adapter made, trained, merged or published, and reported."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.core.errors import RecipeError, TimeLimitReached
from secateur.core.processes import is_first, process_count
from secateur.core.versions import versions
from secateur.data.instructions import Examples
from secateur.engine.memory import peak_memory
from secateur.methods.registry import REGISTRY
from secateur.models.files import save_model
from secateur.models.linears import find_all_linears, sparsity
from secateur.models.publish import publish
from secateur.recipe.build import describe
from secateur.recipe.finetune_folder import (
    CHECKPOINTS,
    as_published,
    is_done,
    merged,
    save_adapter,
    side_of,
    unfinished,
    weight_sides,
)
from secateur.recipe.job import Job, Result, refuse_existing
from secateur.train.sharding import is_asked_for

if TYPE_CHECKING:
    from secateur.train.masking import FixedMasks
    from secateur.train.supervised import Trained
    from secateur.train.training import Training

SELECTING = 32  # examples that a selection by activations or gradients reads


@dataclass
class FinetuneRun:
    """A training of the model of a job, from its settings to its report.

    Attributes:
        job: the opened model and the options of the call.
        tokenizer: of the model.
        examples: to learn.
        tested: whose loss is measured.
        training: how to train.
        config: PEFT's configuration of the adapter; None trains all weights.
        outer: the optimizer around the optimizer, if there is one.
    """

    job: Job
    tokenizer: Any
    examples: Examples
    tested: Examples | None
    training: Training
    config: Any
    outer: Any

    def run(self) -> Result:
        """Train, publish, report."""
        job, options = self.job, self.job.options
        target = None if options["output"] is None else Path(options["output"])
        report = self._head()
        job.refuse_warnings()
        if options["dry_run"]:
            return Result(job.model, {**report, "dry_run": True, "warnings": job.warnings})
        identity = self._identity(report)
        made = {**identity, "merge": options["merge"]}  # an unfinished run does not depend on it, its output does
        if target is not None and options["resume"]:
            if is_done(target, made):  # every process sees that it has nothing to do
                job.warnings.append(f"`{target}` was complete already, so nothing was done")
                return Result(job.model, {**report, **as_published(target), "warnings": job.warnings})
            if is_first():
                refuse_existing(target, resume=False, overwrite=options["overwrite"])
        again = {"resume": options["resume"], "overwrite": options["overwrite"]}
        with unfinished(target, identity, main=is_first(), **again) as state:
            trained = self._trained(state, target)
            job.refuse_warnings()
            report |= {
                "steps_done": trained.steps,
                "losses": trained.losses,
                "evaluations": trained.evaluations,
                "sequences": trained.examples,
                "dropped": trained.dropped,
                "cut": trained.cut,
                "cut_tokens": trained.cut_tokens,
                **_trainable(trained.model),
            }
            result = self._published(trained.model, made, state, target)
            report["sparsity"] = effective_sparsity(result)
        report |= {
            "merged": options["merge"],
            "seconds": time.perf_counter() - job.started,
            "peak_memory_bytes": peak_memory(job.device),
            "warnings": job.warnings,
        }
        return Result(result.eval(), report)

    def _head(self) -> dict[str, Any]:
        """Return what the report says before any work is done."""
        job, options = self.job, self.job.options
        return {
            "stage": "finetune",
            "model": job.spec,
            "output": None if options["output"] is None else str(options["output"]),
            **self._settings(),
            "data": _data_line(self.examples),
            "evaluation": None if self.tested is None else _data_line(self.tested),
            "device": str(job.device),
            "dtype": str(next(job.model.parameters()).dtype).removeprefix("torch."),
            "versions": versions(),
            "sparsity_before": sparsity(job.model),
        }

    def _settings(self) -> dict[str, Any]:
        """Return what the call asked for, as plain data."""
        options = self.job.options
        return {
            "adapter": None if self.config is None else _described(self.config),
            "around": None if self.outer is None else describe(self.outer),
            **{name: options[name] for name in ("keep_zeros", "compact_state", "merge")},
            **asdict(self.training),
        }

    def _identity(self, report: dict[str, Any]) -> dict[str, Any]:
        """Return all that decides the weights."""
        job, settings = self.job, self._settings()
        return {
            "stage": "finetune",
            **{name: value for name, value in settings.items() if name not in ("log_to", "log_every", "merge")},
            "model": job.identity() if job.options["output"] is not None else {},
            **{name: report[name] for name in ("data", "evaluation", "dtype")},
            "device": job.device.type,
            "processes": process_count(),
            **({"shards": True} if is_asked_for() else {}),
            "versions": report["versions"],
        }

    def _trained(self, state: Path | None, target: Path | None) -> Trained:
        """Train the adapter or all weights, with checkpoints in the folder `state`."""
        from secateur.train.supervised import train

        job, config = self.job, self.config
        model = job.model.requires_grad_(True) if config is None else self._with_adapter()
        trained = train(
            model,
            self.tokenizer,
            self.examples,
            self.training,
            evaluation=self.tested,
            folder=None if state is None else state / CHECKPOINTS,
            logs=None if target is None else target.with_name(f"{target.name}.logs"),
            device=job.device,
            masks=self._masks(),
            compact=bool(job.options["compact_state"]),
            callbacks=config.callbacks() if hasattr(config, "callbacks") else (),
            around=None if self.outer is None else self.outer.around,
            deadline=job.deadline,
            progress=job.progress,
        )
        if not trained.finished:
            raise TimeLimitReached(
                f"the time limit was reached after {trained.steps} steps; they are kept in `{state}`",
                hint="run the same again with --resume",
            )
        job.warnings += trained.notes
        return trained

    def _masks(self) -> FixedMasks | None:
        """Return the masks under which all weights are trained, if they are and there are zeros to keep."""
        job, found = self.job, None
        if self.config is None and job.options["keep_zeros"] and sparsity(job.model) > 0:
            from secateur.train.masking import FixedMasks

            found = FixedMasks.from_zeros(job.model)
        if job.options["compact_state"] and found is None:
            raise RecipeError("`compact_state` needs a sparse model and `keep_zeros`", hint="leave it out")
        return found

    def _with_adapter(self) -> Any:
        """Return PEFT's model with a new adapter, which alone is to be trained."""
        from peft import get_peft_model

        from secateur.train.adapter_config import check_pattern_keys
        from secateur.train.peft_parts import BaseTunerLayer

        job, config = self.job, self.config
        if getattr(config, "task_type", None) is None:
            config.task_type = "CAUSAL_LM"
        if hasattr(config, "prepared"):
            config = config.prepared(job.model, self._some_ids)
        job.model.requires_grad_(False)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            with _drawn_alike(job.model, self.training.seed):
                model = get_peft_model(job.model, config)
        modules = model.get_base_model().named_modules()
        check_pattern_keys(config, [name for name, module in modules if isinstance(module, BaseTunerLayer)])
        if job.source is not None:
            for made in model.peft_config.values():
                made.base_model_name_or_path = _findable(job.spec)
        job.warnings += [str(one.message) for one in heard if issubclass(one.category, UserWarning)]
        return model

    def _some_ids(self) -> Iterator[Tensor]:
        """Yield the ids `(1, tokens)` of some examples, for methods that look at text before they train."""
        for row in self.examples.rows[:SELECTING]:
            if "text" in row:
                text = row["text"]
            else:
                text = "\n\n".join(message["content"] for part in ("prompt", "completion") for message in row[part])
            given = {"truncation": True, "max_length": self.training.length, "return_tensors": "pt"}
            ids = self.tokenizer(text, **given)["input_ids"]
            if ids.numel():
                yield ids

    def _published(self, model: Any, made: dict[str, Any], state: Path | None, target: Path | None) -> nn.Module:
        """Return the model of the result, merged if asked for, after the first process has written it to `target`."""
        job, words = self.job, self.tokenizer
        side = side_of(made, job.options["merge"] or self.config is None, job)
        if not is_first():
            state = target = None
        if job.options["merge"]:
            return merged(model, words, job, state, target, side)
        if target is not None:
            with publish(target, job.options["overwrite"]) as folder:
                if self.config is None:
                    job.warnings += save_model(model, words, folder, {**side, "weights": weight_sides(model, job)})
                    job.refuse_warnings()
                else:
                    save_adapter(model, words, folder, side)
        result: nn.Module = model
        return result


def _data_line(examples: Examples) -> dict[str, Any]:
    return {"source": examples.source, "examples": len(examples.rows), "digest": examples.digest}


def _described(config: Any) -> dict[str, Any]:
    if REGISTRY.entry_of(config) is not None:
        return describe(config)
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return {"name": type(config).__name__, **plain}


@contextmanager
def _drawn_alike(model: nn.Module, seed: int) -> Iterator[None]:
    """Let PEFT's own adapters, which draw from torch's generators, begin alike in every process and run."""
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _findable(spec: str) -> str:
    """Return what names the base model from any working folder."""
    return str(Path(spec).absolute()) if Path(spec).exists() else spec


def _trainable(model: nn.Module) -> dict[str, Any]:
    """Return how many values were trained, and their share of all."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    return {"trainable": trained, "trainable_share": trained / every}


def effective_sparsity(model: Any) -> float:
    """Return the fraction of zeros in the linears of the blocks, those with adapters of ours as if these were merged.

    PEFT's own adapters are passed over: merging one into zeros needs a decision of the user's.
    """
    if not hasattr(model, "get_base_model"):
        return sparsity(model)
    from secateur.train.adapter_linear import adapted_linears
    from secateur.train.adapter_model import without_adapters

    base = model.get_base_model()
    layers = {layer.get_base_layer(): layer for layer in adapted_linears(base)}
    kept = size = 0
    with without_adapters(base):
        for view in find_all_linears(base):
            layer = layers.get(view.module)
            mask = view.read() != 0 if layer is None else layer.effective_mask()
            kept, size = kept + int(mask.count_nonzero()), size + mask.numel()
    return 1 - kept / size if size else 0.0
