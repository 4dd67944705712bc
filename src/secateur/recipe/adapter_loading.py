"""A model and an adapter folder put together by PEFT, with everything checked that PEFT lets pass.

PEFT warns of missing tensors and says nothing of superfluous ones; it keeps values that are not finite.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.core.errors import InputError, NumericError, RecipeError, ResourceError, SecateurError, missing_extra
from secateur.models.config_checks import check_code
from secateur.models.folder_checks import TOKENIZER_FILES, check_file
from secateur.models.hub import is_hub_id
from secateur.models.model_checks import opening, refuse_empty_tokenizer
from secateur.models.quiet import quiet
from secateur.models.strict_json import MEGABYTE, read_object
from secateur.recipe.adapter_folder import CONFIG, WEIGHTS, AdapterFolder
from secateur.recipe.job import Job

_SHAPES = re.compile(r"size mismatch for (\S+): .*?shape torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)")
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def open_base(stage: str, model: Any, tokenizer: Any, folder: AdapterFolder, options: dict[str, Any]) -> Job:
    """Return the opened base model of an adapter.

    Args:
        stage: what is done.
        model: what `load` takes, or a live model, which is copied; None takes what the adapter's configuration names.
        tokenizer: of a live model.
        folder: the adapter.
        options: of `load`.

    Raises:
        InputError, ResourceError: the model is not known, or cannot be opened.
    """
    if model is not None:
        return Job(stage, model, tokenizer, None, options)
    spec = folder.base
    if spec is None:
        raise InputError(
            f"`base_model_name_or_path` in `{folder.path / CONFIG}` is empty, so the adapter's base model is not known",
            hint="name it with --model BASE",
        )
    revision = folder.config.get("revision")
    if options.get("revision") is None and isinstance(revision, str) and not Path(spec).exists() and is_hub_id(spec):
        options = {**options, "revision": revision}
    try:
        return Job(stage, spec, tokenizer, None, options)
    except (InputError, ResourceError) as error:
        raise type(error)(
            f"the base model `{spec}` that `{folder.path / CONFIG}` names cannot be opened: {error}",
            hint=error.hint if error.hint and "--" in error.hint else "name it with --model BASE",
        ) from error


def adapted(model: nn.Module, folder: AdapterFolder, name: str = "default") -> tuple[Any, list[str]]:
    """Return `model` with the adapter of `folder` as PEFT's model, and what PEFT warned of.

    Args:
        model: the base model, which is wrapped and not copied; or a PEFT model that gets one more adapter.
        folder: the adapter.
        name: that it gets.

    Raises:
        InputError: the adapter is for another model or another mask, or its tensors are not complete.
        NumericError: a value of it is not finite.
    """
    need_peft()
    from peft import PeftModel, get_peft_model_state_dict

    from secateur.methods.registry import register_adapters

    register_adapters()
    what = f"the adapter `{folder.path}`"
    with warnings.catch_warnings(record=True) as caught, opening(what), _shapes_told(folder), quiet():
        warnings.simplefilter("always")
        _config_of(folder)
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder.path), name, torch_device="cpu")
            wrapped: Any = model
        else:
            wrapped = PeftModel.from_pretrained(model, str(folder.path), name, torch_device="cpu")
        wanted = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    _refuse_incomplete(folder, wanted, wrapped)
    for key, tensor in wanted.items():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise NumericError(
                f"tensor `{key}` of `{folder.path / WEIGHTS}` has {bad:,} values that are NaN or infinite (of "
                f"{tensor.numel():,})",
                hint="the file is damaged, or the training diverged",
            )
    wrapped.eval()
    return wrapped, _notes(caught)


def misfit(folder: AdapterFolder, model: nn.Module) -> str | None:
    """Return why the adapter is not for `model`, None if it is; the model is only looked at.

    Its record of shapes, values and zeros has to be that of the model where it has one, and its tensors have to be those
    that its configuration asks for in this model.
    """
    from secateur.methods.registry import register_adapters
    from secateur.train.adapter_base import check_base
    from secateur.train.adapter_config import AdapterConfig

    register_adapters()
    try:
        with warnings.catch_warnings(), opening(f"`{folder.path / CONFIG}`"):
            warnings.simplefilter("ignore")
            config = _config_of(folder)
        if isinstance(config, AdapterConfig):
            check_base(model, config)
    except SecateurError as error:
        return str(error)
    for name, tensors in folder.modules.items():
        try:
            weight = getattr(model.get_submodule(name), "weight", None)
        except AttributeError:
            return f"the adapter is for another model: this one has no linear `{name}`"
        first, second = tensors.get("lora_A"), tensors.get("lora_B")
        if first is None or second is None or weight is None or len(first.shape) != 2:
            continue
        wanted = {second.shape[0], first.shape[1]}  # a Conv1D is stored the other way round
        if wanted != set(weight.shape):
            return (
                f"the adapter is for another model: `{name}` is {'x'.join(map(str, weight.shape))}, not "
                f"{second.shape[0]}x{first.shape[1]}"
            )
    try:
        _refuse_unlike(folder, model, config)
    except SecateurError as error:
        return str(error)
    return None


def _refuse_unlike(folder: AdapterFolder, model: nn.Module, config: Any) -> None:
    """Raise InputError unless the tensors of the adapter are those that PEFT would make by `config`, names and shapes.

    It makes them for a copy of the model without memory.
    """
    from peft import PeftModel, get_peft_model_state_dict

    empty: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        there = tensor.detach().to("meta")
        empty[id(tensor)] = nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there
    with warnings.catch_warnings(), opening(f"the adapter `{folder.path}`"), quiet():
        warnings.simplefilter("ignore")
        wrapped = PeftModel(copy.deepcopy(model, empty), config, low_cpu_mem_usage=True)
        wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    _refuse_incomplete(folder, wanted, wrapped)
    for name, tensor in wanted.items():
        found = folder.tensors[name].shape
        if tuple(found) != tuple(tensor.shape):
            raise InputError(
                f"tensor `{name}` of `{folder.path / WEIGHTS}` has shape {list(found)}, but `{CONFIG}` asks for "
                f"{list(tensor.shape)} in this model"
            )


def need_peft() -> None:
    """Raise InputError if peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise missing_extra("peft", "peft", "use adapters") from error


def tokenizer_of(folder: AdapterFolder, job: Job) -> Any:
    """Return the tokenizer that was saved with the adapter, which may know another chat template; else the base's.

    Raises:
        InputError: it cannot be opened, asks for code, or has more tokens than the model.
    """
    if not any((folder.path / name).exists() for name in _VOCABULARY):
        return job.tokenizer
    for name in TOKENIZER_FILES:
        if (folder.path / name).exists():
            check_file(folder.path / name, folder.path)
    settings = folder.path / "tokenizer_config.json"
    if settings.exists():
        check_code(read_object(settings, 50 * MEGABYTE), str(settings), trust_remote_code=False)
    from transformers import AutoTokenizer

    with quiet(), opening(f"the tokenizer of `{folder.path}`"):
        words = AutoTokenizer.from_pretrained(folder.path, config=job.model.config, local_files_only=True)
    refuse_empty_tokenizer(words, str(folder.path))
    embeddings: Any = job.model.get_input_embeddings()  # type: ignore[operator]
    if len(words) > embeddings.num_embeddings:
        raise InputError(
            f"the tokenizer of `{folder.path}` has {len(words):,} tokens, the model {embeddings.num_embeddings:,}",
            hint="the adapter is for another model, or was trained with new tokens whose embeddings were not saved",
        )
    return words


def _config_of(folder: AdapterFolder) -> Any:
    """Return PEFT's configuration of an adapter, whose method has checked its settings.

    Raises:
        InputError: a setting cannot be; it stands in a file here, not in what a user asked for.
    """
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder.path))
    except RecipeError as error:
        raise InputError(f"`{folder.path / CONFIG}` cannot be read: {error}", hint=error.hint) from error


@contextmanager
def _shapes_told(folder: AdapterFolder) -> Iterator[None]:
    """Turn torch's error about the shape of a tensor, one of many lines, into a sentence."""
    try:
        yield
    except RuntimeError as error:
        found = _SHAPES.search(str(error))
        if found is None:
            raise
        raise InputError(
            f"tensor `{found[1]}` of `{folder.path / WEIGHTS}` has shape {found[2]}, but the model asks for {found[3]}",
            hint="the adapter is for another model, or its configuration was changed",
        ) from error


def _refuse_incomplete(folder: AdapterFolder, wanted: dict[str, Any], wrapped: Any) -> None:
    """Raise InputError unless the file holds exactly what the adapter has in this model."""
    path = folder.path / WEIGHTS
    missing = sorted(wanted.keys() - folder.tensors.keys())
    if missing:
        raise InputError(
            f"tensor `{missing[0]}` of `{path}` is missing" + _more(missing),
            hint="the file is incomplete, or the adapter is for another model",
        )
    own = wrapped.state_dict().keys()
    unused = sorted(name for name in folder.tensors.keys() - wanted.keys() if name not in own)
    if unused:
        raise InputError(
            f"tensor `{unused[0]}` of `{path}` has no place in the model" + _more(unused),
            hint=f"`target_modules` in `{CONFIG}` does not name it, or the adapter is for another model",
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""


def _notes(caught: list[warnings.WarningMessage]) -> list[str]:
    """Return what was warned of, each once; that a library's own names grow old is not the user's business."""
    texts = [" ".join(str(item.message).split()) for item in caught if issubclass(item.category, UserWarning)]
    return list(dict.fromkeys(texts))
