"""GGUF files as models: what llama.cpp reads, opened by `transformers` and unpacked."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from secateur.core.errors import InputError, missing_extra
from secateur.models.config_checks import check_config
from secateur.models.gguf_header import read_gguf_header
from secateur.models.model_checks import (
    opening,
    refuse_empty_tokenizer,
    refuse_misfit,
    refuse_noncausal,
    refuse_unready,
)
from secateur.models.quiet import quiet
from secateur.models.weights import TORCH_DTYPES


def load_gguf(path: Path, dtype: torch.dtype | None, *, tokenizer: bool) -> tuple[Any, Any]:
    """Load a GGUF file through `transformers`, unpacked to plain numbers.

    Args:
        path: the file; nothing else is read and no request is made.
        dtype: of the weights; None takes the file's own type, float32 where it is quantised.
        tokenizer: load the tokenizer too.

    Returns:
        The model, not marked as quantised, and the tokenizer or None.

    Raises:
        InputError: the file is damaged or of an unsupported family, or the package `gguf` is missing.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import is_gguf_available

    header = read_gguf_header(path)
    if not is_gguf_available():
        raise missing_extra("gguf", "gguf", "read GGUF files")
    spec = str(path)
    wide = dtype or (TORCH_DTYPES[header.dtype] if header.dtype else torch.float32)
    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    # `dequantize` keeps newer versions from fetching kernels that compute on the packed blocks
    settings = getattr(transformers, "GgufConfig", None)
    unpack = {} if settings is None else {"quantization_config": settings(dequantize=True)}
    with quiet(), opening(f"the GGUF file `{spec}`"):
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False, **place)
        check_config(config.to_dict(), spec)
        refuse_noncausal(config, None, spec)
        with torch.device("meta"):
            wanted = sum(item.numel() for item in AutoModelForCausalLM.from_config(config).parameters())
        if wanted > header.elements:
            raise InputError(f"`{spec}` describes a model of {wanted:,} weights, but holds {header.elements:,}")
        with redirect_stderr(io.StringIO()):  # its progress bar cannot be switched off
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent,
                config=config,
                dtype=wide,
                output_loading_info=True,
                trust_remote_code=False,
                **place,
                **unpack,
            )
        # transformers leaves a dequantised model marked as quantised, and would then refuse to save it
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        words = None
        if tokenizer:
            words = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, **place)
    refuse_misfit(info, spec)
    refuse_unready(model, spec)
    if words is not None:
        refuse_empty_tokenizer(words, spec)
    return model.eval(), words
