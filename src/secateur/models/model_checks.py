"""What is checked of a model once a library has opened it, and how the library's own errors are told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from secateur.core.errors import InputError, ResourceError, SecateurError

# families that `AutoModelForCausalLM` opens although they look at later tokens too, unless `is_decoder` is set
_BIDIRECTIONAL = frozenset(
    (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta",
        "xlm-roberta-xl", "xlnet", "xmod",
    )
)  # fmt: skip


@contextmanager
def opening(what: str) -> Iterator[None]:
    """Turn whatever a library raises about a bad file into an `InputError`; libraries use any class for it."""
    try:
        yield
    except (SecateurError, KeyboardInterrupt, SystemExit):
        raise
    except MemoryError as error:
        raise ResourceError(f"there is not enough memory to load {what}") from error
    except ImportError as error:
        raise InputError(f"{what} needs a package that is not installed: {_line(error)}") from error
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what} cannot be loaded: {_line(error)}") from error


def refuse_noncausal(config: Any, architectures: list[str] | None, spec: str) -> None:
    """Raise `InputError` unless the configuration is one of a decoder that predicts the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = str(getattr(config, "model_type", ""))
    hint = "only causal language models are supported"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"`{spec}` ({family}) is an encoder-decoder model", hint=hint)
    if family in _BIDIRECTIONAL and not getattr(config, "is_decoder", False):
        raise InputError(f"`{spec}` ({family}) is not a causal language model", hint=hint)
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)
    brings_code = bool(getattr(config, "auto_map", None))
    if known is None and not brings_code:
        raise InputError(f"`{spec}` is of the family `{family}`, which has no causal language model", hint=hint)
    causal = ("ForCausalLM", "LMHeadModel")
    if architectures and not any(name == known or name.endswith(causal) for name in architectures):
        raise InputError(f"`{spec}` holds a {', '.join(architectures)}, not a causal language model", hint=hint)


def refuse_misfit(info: Mapping[str, Any], spec: str) -> None:
    """Raise `InputError` if tensors are missing, misshapen or left over, where the library would make do.

    Args:
        info: the library's loading info.
        spec: the model, for messages.
    """
    for name, stored, wanted in sorted(info["mismatched_keys"], key=lambda item: str(item[0])):
        raise InputError(
            f"tensor `{name}` of `{spec}` has shape {list(stored)}, but the configuration asks for {list(wanted)}"
            + _more(info["mismatched_keys"])
        )
    if info["missing_keys"]:
        raise InputError(
            f"tensor `{min(info['missing_keys'])}` of `{spec}` is missing{_more(info['missing_keys'])}",
            hint="the weights are incomplete, or the configuration is of another model",
        )
    if info.get("error_msgs"):
        raise InputError(f"`{spec}` cannot be loaded: {str(info['error_msgs'][0])[:300]}")
    blocks = sorted(name for name in info["unexpected_keys"] if name.endswith("weight"))
    if blocks:
        raise InputError(
            f"tensor `{blocks[0]}` of `{spec}` has no place in the model{_more(blocks)}",
            hint="the configuration is of another model, perhaps of one with fewer layers",
        )


def refuse_unready(model: Any, spec: str) -> None:
    """Raise `InputError` if the model cannot be pruned as it is: without values, quantised, or complex."""
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise InputError(f"`{spec}` is quantised", hint="decompress first")
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise InputError(f"tensor `{name}` of `{spec}` has no values after loading")
        if not parameter.is_floating_point():
            raise InputError(f"tensor `{name}` of `{spec}` is of {parameter.dtype}", hint="decompress first")


def refuse_empty_tokenizer(words: Any, spec: str) -> None:
    """Raise `InputError` if the tokenizer knows no token, which is how some libraries take missing files."""
    if len(words) == 0:
        raise InputError(f"the tokenizer of `{spec}` has no vocabulary", hint="its files are incomplete")


def _more(names: Any) -> str:
    return f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
