"""A model made from a checked configuration and tensors that are already in memory, without a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import InputError
from secateur.models.config_checks import layers
from secateur.models.folder_checks import TOKENIZER_FILES, check_settings
from secateur.models.model_checks import opening, refuse_empty_tokenizer
from secateur.models.quiet import quiet

LARGEST_TABLES = 256 << 20  # bytes of buffers that a model may make for itself, if it has few weights


def empty_model(folder: Path, architecture: str, tensors: int) -> nn.Module:
    """Return the model that the configuration in `folder` describes, on the meta device: no memory, no weights.

    Args:
        folder: holds `config.json`, maybe with a tokenizer.
        architecture: name of a model class of transformers.
        tensors: how many tensors there will be, which bounds the layers that are built.

    Raises:
        InputError: if the configuration asks for code, is damaged, or belongs to another architecture.
    """
    import transformers

    raw = check_settings(folder)
    if layers(raw) > tensors:
        raise InputError(f"`{folder / 'config.json'}` states {layers(raw):,} layers for {tensors:,} tensors")
    where = f"`{folder / 'config.json'}`"
    with quiet(), opening(f"the configuration {where}"):
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        config._attn_implementation = None  # a stored choice of kernels is one for another machine
    found = getattr(transformers, architecture, None)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not known or getattr(found, "config_class", None) is not type(config):
        raise InputError(f"the architecture `{architecture[:80]}` does not belong to a {type(config).__name__}")
    maker: Any = found
    with quiet(), opening(f"the {architecture} that {where} describes"), torch.device("meta"):
        model: nn.Module = maker(config)
    tables, weights = (sum(tensor.nbytes for tensor in kind) for kind in (model.buffers(), model.parameters()))
    if tables > max(LARGEST_TABLES, 4 * weights):  # these are made, not stored, so no file bounds them
        raise InputError(f"{where} asks for {tables:,} bytes of tables beside the weights")
    return model


def fill(skeleton: nn.Module, state: Mapping[str, Tensor], tied: Mapping[str, str], folder: Path) -> nn.Module:
    """Return a model of the class of `skeleton` with exactly the tensors of `state`, in eval mode.

    Args:
        skeleton: from `empty_model`; used up.
        state: its tensors by name, each once; they become the model's, nothing is copied.
        tied: `{second name: first name}` of tensors that are one.
        folder: the sub-folder with the configuration and maybe generation settings.
    """
    from transformers import GenerationConfig

    parameters = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    whole = {
        name: nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) if name in parameters else tensor
        for name, tensor in state.items()
    }
    whole |= {second: whole[first] for second, first in tied.items()}
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        sizes[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
    maker: Any = type(skeleton)
    settings = {"config": skeleton.config, "dtype": sizes.most_common(1)[0][0]}
    # transformers makes the buffers that are not stored (rotary tables), but gives all tensors one dtype: hence twice
    with quiet():
        model: Any = maker.from_pretrained(None, state_dict=dict(whole), **settings)
    model.load_state_dict(whole, strict=True, assign=True)
    model.name_or_path = model.config.name_or_path = str(folder.parent)
    if (folder / "generation_config.json").is_file():
        with quiet(), opening(f"`{folder / 'generation_config.json'}`"):
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    filled: nn.Module = model.eval()
    return filled


def tokenizer_of(folder: Path, config: Any) -> Any:
    """Return the tokenizer in `folder`, or None if there is none.

    Args:
        folder: checked by `empty_model`.
        config: the model's configuration.

    Raises:
        InputError: if it is damaged.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    with quiet(), opening(f"the tokenizer in `{folder}`"):
        found = AutoTokenizer.from_pretrained(
            str(folder), config=config, local_files_only=True, trust_remote_code=False
        )
    refuse_empty_tokenizer(found, str(folder))
    return found
