"""A short continuation of a prompt, to show in a report what the numbers feel like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import InputError, NumericError, RecipeError
from secateur.evaluate.placement import ready, refuse_unknown_tokens


def continuation(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    tokens: int = 40,
    seed: int | None = None,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    device: str | torch.device | None = None,
) -> str:
    """Return what `model` writes after `prompt`: the likeliest tokens, or sampled ones if a seed is given.

    transformers' own `generate` samples from the global random state, which a report must not disturb.

    Args:
        model: a causal language model; left as it was.
        tokenizer: the model's.
        prompt: text that gives at least one token.
        tokens: most tokens to write; an end-of-text token stops earlier.
        seed: None takes the likeliest token every time; a number samples, the same text for the same seed.
        temperature: divides the logits when sampling.
        top_k: likeliest tokens to sample among.
        device: where to run; None leaves the model where it is.

    Returns:
        The new text alone, without special tokens.

    Raises:
        RecipeError: if `tokens`, `temperature` or `top_k` is out of range.
        InputError: if the prompt has no tokens, or the tokenizer is another model's.
        NumericError: if the logits are not finite.
    """
    for name, value in (("tokens", tokens), ("temperature", temperature), ("top_k", top_k)):
        if not value > 0:
            raise RecipeError(f"{name} is {value}, but must be above 0")
    ids = torch.tensor([list(tokenizer(prompt)["input_ids"])], dtype=torch.long)  # (1, tokens of the prompt)
    if ids.numel() == 0:
        raise InputError("the prompt has no tokens", hint="write at least one word")
    refuse_unknown_tokens(ids, model)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    stops = _end_tokens(model)
    written: list[int] = []
    with ready(model, device) as place, torch.no_grad():
        step_ids, cache = ids.to(place), None
        while len(written) < tokens:
            output = model(input_ids=step_ids, past_key_values=cache, use_cache=True)
            token = _choose(output.logits[0, -1].float().cpu(), generator, temperature, top_k)
            if token in stops:
                break
            written.append(token)
            cache = output.past_key_values
            step_ids = torch.tensor([[token]], device=place)
    text: str = tokenizer.decode(written, skip_special_tokens=True)
    return text


def _choose(logits: Tensor, generator: torch.Generator | None, temperature: float, top_k: int) -> int:
    """Return a token for `logits` `(vocabulary,)`: the first largest, or one drawn among the `top_k` largest."""
    if not torch.isfinite(logits).all():
        raise NumericError("the model's logits hold NaN or infinity", hint="look for NaN in the weights")
    if generator is None:
        return int(logits.argmax())
    best, index = logits.topk(min(top_k, logits.numel()))
    drawn = torch.multinomial((best / temperature).softmax(0), 1, generator=generator)
    return int(index[drawn])


def _end_tokens(model: nn.Module) -> set[int]:
    """Return the token ids that end a text."""
    ends: set[int] = set()
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(settings, "eos_token_id", None)
        ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return ends
