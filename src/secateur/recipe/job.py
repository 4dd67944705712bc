"""One call of a stage: its model, tokenizer, teacher and calibration text, opened and identified."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.core.errors import InputError, RecipeError, StateError
from secateur.core.progress import Progress, Silent
from secateur.data.calibration import Calibration, from_ids, from_texts, sample
from secateur.data.text import load_text
from secateur.engine.journal import Journal
from secateur.models.files import Loaded, Source, fingerprint
from secateur.recipe.opening import device_of, load


class Result(NamedTuple):
    """What stages that change a model return.

    Attributes:
        model: the model, eval mode.
        report: plain JSON values: sparsity, seconds, peak memory, layers, blocks, warnings.
    """

    model: nn.Module
    report: dict[str, Any]


class Job:
    """The model of one call, opened and identified, and what the call was given."""

    def __init__(self, stage: str, model: Any, tokenizer: Any, teacher: Any, options: Mapping[str, Any]) -> None:
        self.started = time.perf_counter()
        self.stage = stage
        self.options = options
        self.progress: Progress = options.get("progress") or Silent()
        self.device = device_of(options.get("device"))
        self.warnings: list[str] = []
        minutes = options.get("max_minutes")
        if minutes is not None and options.get("output") is None and options.get("state") is None:
            raise RecipeError("`max_minutes` needs an `output`, where the unfinished run can wait")
        if minutes is not None and not minutes >= 0:
            raise RecipeError(f"`max_minutes` is {minutes}, but must be a number of 0 or more")
        if options.get("output") is not None and options.get("state") is not None:
            raise RecipeError("`state` is for runs without an `output`, beside which the state lies otherwise")
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.side: dict[str, Any] | None = None
        if isinstance(model, nn.Module):
            self.source: Source | None = None
            self.spec = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
            self.model = model if options.get("inplace") else copy.deepcopy(model)
            self.tokenizer = tokenizer
        else:
            loaded = self._load(model)
            self.source, self.model, self.spec = loaded.source, loaded.model, str(model)
            self.tokenizer = tokenizer if tokenizer is not None else loaded.tokenizer
            self.side = read_side(loaded.source.path) if loaded.source.path is not None else None
            self.warnings += loaded.source.notes
            if loaded.source.kind == "adapter" and stage != "evaluate":
                raise InputError(
                    f"`{model}` is an adapter beside its base model, which `{stage}` does not take",
                    hint=f"merge it first: secateur merge {model} --output DIR",
                )
        self.model.eval()
        self.teacher: nn.Module | None = None
        self.teacher_identity: dict[str, Any] | None = None
        if stage == "tune":
            self.teacher, self.teacher_identity = self._teacher(teacher)

    def _load(self, spec: Any) -> Loaded:
        return load(spec, progress=self.progress, **self._loading())

    def _loading(self) -> dict[str, Any]:
        """Return the options of the call that `load` takes."""
        names = ("dtype", "allow_pickle", "trust_remote_code", "revision")
        return {name: self.options[name] for name in names if name in self.options}

    def _teacher(self, teacher: Any) -> tuple[nn.Module, dict[str, Any]]:
        """Return the dense model, and what tells it from any other where a run can be gone on with."""
        if isinstance(teacher, nn.Module):
            kept = self.options.get("output") is not None or self.options.get("state") is not None
            return teacher.eval(), identity_of(teacher, None, type(teacher).__name__) if kept else {}
        if teacher is not None:
            dense = self._load(teacher)
            return dense.model, identity_of(dense.model, dense.source, str(teacher))
        base = (self.side or {}).get("base_model", {})
        if not base.get("spec"):
            raise InputError(
                "the dense model that this one was pruned from is not known", hint="name it with --teacher MODEL"
            )
        dense = self._load(base["spec"])
        if base.get("fingerprint") not in (None, dense.source.fingerprint) and not self._was_live(base, dense):
            raise InputError(
                f"`{base['spec']}` is not the dense model that `{self.spec}` was pruned from, or it was changed since",
                hint="name the dense model with --teacher MODEL",
            )
        return dense.model, identity_of(dense.model, dense.source, base["spec"])

    def _was_live(self, base: Mapping[str, Any], dense: Loaded) -> bool:
        """Return whether `base` was pruned in memory, and had the very tensors that are stored where it came from."""
        if self.options.get("dtype") is not None:
            dense = load(base["spec"], **{**self._loading(), "dtype": None})
        found = identity_of(dense.model, None, base["spec"])["fingerprint"]
        return bool(found == base["fingerprint"])

    def identity(self) -> dict[str, Any]:
        """Return what tells this model from any other."""
        return identity_of(self.model, self.source, self.spec)

    def config(self) -> Any:
        """Return the configuration of the model's text part."""
        config: Any = self.model.config
        return config.get_text_config()

    def need_tokenizer(self, purpose: str) -> Any:
        """Return the tokenizer, or say that `purpose` needs one."""
        if self.tokenizer is None:
            raise InputError(
                f"a tokenizer is needed to {purpose}", hint="pass `tokenizer`, or token ids instead of a text"
            )
        return self.tokenizer

    def calibration(self, *, needed: bool) -> Calibration:
        """Return the calibration tokens; two tokens where none are needed, whatever was given."""
        options = self.options
        given = options.get("calibration")
        config = self.config()
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        vocabulary = embeddings.num_embeddings
        limit = getattr(config, "max_position_embeddings", None)
        if given is None or not needed:
            if needed:
                raise RecipeError(
                    "`calibration` is missing: this method looks at data", hint="for example --calibration wikitext2"
                )
            if given is not None:
                self.warnings.append("no calibration text was read, because this method looks at weights alone")
            unread = from_ids(torch.zeros(1, 2, dtype=torch.int64), vocabulary=vocabulary)
            return replace(unread, notes=())  # what is wrong with tokens that nobody looks at is not worth a warning
        if isinstance(given, Calibration):
            return given
        if isinstance(given, Tensor):
            return from_ids(given, vocabulary=vocabulary, max_positions=limit)
        choice = {
            "samples": options["samples"],
            "length": options["length"],
            "seed": options["seed"],
            "vocabulary": vocabulary,
            "max_positions": limit,
        }
        words = self.need_tokenizer("calibrate on text")
        if isinstance(given, str | Path):
            text = load_text(str(given), field=options["field"], skip_bad=options["skip_bad"])
            return sample(text, words, **choice)
        return from_texts(list(given), words, **choice)

    def refuse_warnings(self) -> None:
        """Raise StateError with `strict` if there is anything to warn of by now."""
        if self.options.get("strict") and self.warnings:
            more = f" (and {len(self.warnings) - 1} more)" if len(self.warnings) > 1 else ""
            raise StateError(
                f"not everything was done as asked: {self.warnings[0]}{more}",
                hint="leave out --strict to accept it",
            )

    def refuse_changed_source(self) -> None:
        """Raise StateError if the files of the model changed while it was worked on."""
        source = self.source
        if source is None or source.path is None or source.kind != "folder":
            return
        if fingerprint(source.path) != source.fingerprint:
            raise StateError(
                f"the files of `{self.spec}` changed during the run, so the result would be a mixture",
                hint="run again on files that nobody writes to",
            )


def identity_of(model: nn.Module, source: Source | None, spec: str) -> dict[str, Any]:
    """Return what tells a model from any other: its name, and a fingerprint of its files, or of a live one's tensors."""
    if source is not None:
        return {"spec": spec, "fingerprint": source.fingerprint}
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {"spec": spec, "fingerprint": digest.hexdigest()}


def state_folder(output: Path) -> Path:
    """Return where an unfinished run towards `output` keeps its state."""
    return output.with_name(output.name + ".unfinished")


def forget(state: Path) -> None:
    """Delete the state of an unfinished run, unless a process is working on it."""
    journal = Journal(state, _identity_of(state), resume=True)
    journal.close(remove=True)


def _identity_of(state: Path) -> dict[str, Any]:
    try:
        found = json.loads((state / "identity.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if key != "format"} if isinstance(found, dict) else {}


def read_side(folder: Path) -> dict[str, Any] | None:
    """Return what `secateur.json` in `folder` says, or None if there is none."""
    try:
        found = json.loads((folder / "secateur.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def digest_of(identity: Mapping[str, Any]) -> str:
    """Return the sha256 of what decides a result."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def refuse_existing(output: str | Path | None, resume: bool, overwrite: bool) -> None:
    """Refuse an output that is there already, before any work is done."""
    if output is None:
        return
    target = Path(output)
    if target.exists() and not overwrite and not (resume and read_side(target)):
        empty = target.is_dir() and not any(target.iterdir())
        if not empty:
            raise StateError(
                f"the output `{target}` exists", hint="choose another --output, or replace it with --overwrite"
            )
