"""What a model calls its blocks with, and how to run one of them alone.

Nothing here knows a family. The *skeleton pass* gives every block a forward that notes its arguments and returns the
hidden states it was given, so one cheap call of the model yields the input of the first block and the arguments of all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import InputError, NumericError
from secateur.models.blocks import BY_BLOCK, Blocks, architecture, evaluating
from secateur.models.calls import BlockCall, call_of, first_parameter, settle


def capture(
    model: nn.Module,
    blocks: Blocks,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    like: Sequence[BlockCall] | None = None,
) -> tuple[Tensor, list[BlockCall]]:
    """Return the hidden states that enter the first block, and the call of every block; no block is run.

    The model is left as it was. The first capture for `blocks` also runs the first block of each class on a few tokens,
    to learn what it returns, and makes sure that the model calls each block once and hands the hidden states straight
    from block to block.

    Args:
        model: the model that `blocks` belong to.
        blocks: from `find_blocks(model)`.
        input_ids: int64 `(batch, tokens)`, on any device.
        attention_mask: `(batch, tokens)`, true on real tokens; None where all are real.
        dtype: floating dtype of the calls, None for the model's; tensors that blocks share stay shared.
        like: the calls of an earlier batch; tensors equal to theirs are shared instead of kept twice.

    Returns:
        hidden states `(batch, tokens, hidden)` in the model's dtype on the model's device, and one call for each block.

    Raises:
        InputError: if the ids are malformed, or the model cannot be walked block by block.
    """
    ids, mask = _checked(model, input_ids, attention_mask)
    with torch.no_grad(), evaluating(model):
        if not blocks.returns:
            _learn(model, blocks, ids[:1, :8])
        hidden, calls = _Skeleton(model, blocks).run(ids, mask)
        probes = calls
        if len(ids) > 1:
            # with the first sequence twice, the dimensions that grew are those of the sequences, whatever their size
            again = torch.cat([ids, ids[:1]])
            _, probes = _Skeleton(model, blocks).run(again, None if mask is None else torch.cat([mask, mask[:1]]))
        return hidden, settle(blocks.names, calls, probes, len(ids), dtype, like)


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Return what `block` makes of `hidden`, `(batch, tokens, hidden)`, with dropout off.

    Gradients flow if they are enabled. Forwards that interleave on one block (greenlets) need it in eval mode already,
    because the first to end gives the training flags back.

    Args:
        block: the block or a copy of it.
        hidden: `(batch, tokens, hidden)`, on the block's device in its dtype.
        call: what else it is called with, see `BlockCall.to` and `BlockCall.rows`.

    Raises:
        InputError: if the block returns neither hidden states nor a tuple that starts with them.
    """
    with evaluating(block):
        own = call.fresh()  # what a block writes into its arguments must not reach the next run
        output = block(hidden, *own.args, **own.kwargs)
    return _hidden_of(output, hidden, block)


def replay_tail(
    model: nn.Module,
    blocks: Blocks,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    hidden: Tensor,
    name: str,
    module: nn.Module,
) -> Tensor:
    """Return what `module`, which runs behind the last block, is given when the last block returns `hidden`.

    Only what stands between the last block and `module` is computed (norms, projections), in the model's own dtype.

    Args:
        model: the model that `blocks` and `module` belong to.
        blocks: from `find_blocks(model)`, captured once.
        input_ids: int64 `(batch, tokens)`.
        attention_mask: `(batch, tokens)`, true on real tokens; None where all are real.
        hidden: `(batch, tokens, hidden)`, the outputs of the last block.
        name: of `module`, for the message.
        module: a linear outside the blocks.

    Raises:
        InputError: if `module` does not run behind the blocks.
    """
    ids, mask = _checked(model, input_ids, attention_mask)
    parameter = next(model.parameters())
    with torch.no_grad(), evaluating(model):
        return _Skeleton(model, blocks).behind(ids, mask, hidden.to(parameter.device, parameter.dtype), name, module)


def check_replay(
    model: nn.Module,
    blocks: Blocks,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    tolerance: float = 1e-3,
) -> float:
    """Return how far running the blocks one by one is from the real forward, relative to its largest value.

    Costs two forwards of the blocks on `input_ids`; a few tokens tell already. Padding is not compared.

    Raises:
        InputError: if it is further than `tolerance`, as in a model whose blocks speak to each other in other ways.
        NumericError: if the real forward holds NaN or infinity.
    """
    ids, mask = _checked(model, input_ids, attention_mask)
    hidden, calls = capture(model, blocks, ids, mask)
    with torch.no_grad(), evaluating(model):
        real = _Skeleton(model, blocks).real_output(ids, mask).double()
        for name, block, call in zip(blocks.names, blocks.modules, calls, strict=True):
            try:
                hidden = run_block(block, hidden, call)
            except (TypeError, ValueError, LookupError, AttributeError) as error:
                raise InputError(
                    f"`{name}` of {architecture(model)} does not run alone, {BY_BLOCK}: {error}"
                ) from error
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    real, replayed = real[kept.to(real.device)], hidden.double()[kept.to(hidden.device)].to(real.device)
    if not bool(torch.isfinite(real).all()):
        raise NumericError(f"the hidden states of {architecture(model)} hold NaN or infinity")
    distance = float((replayed - real).abs().max() / real.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    if not distance <= tolerance:
        raise InputError(
            f"the blocks of {architecture(model)}, run one by one, give other hidden states than its forward "
            f"(relative difference {distance:.2g}, allowed is {tolerance:.2g}), {BY_BLOCK}"
        )
    return distance


class _LastBlockSeen(Exception):
    """Ends a pass before the final norm and the head."""


class _Skeleton:
    """One pass through a model whose blocks only note their calls."""

    def __init__(self, model: nn.Module, blocks: Blocks, *, learning: bool = False) -> None:
        self.model = model
        self.blocks = blocks
        self.learning = learning  # run blocks of unknown classes, and the model to its end
        self.calls: list[BlockCall] = []
        self.shape: torch.Size | None = None  # (batch, tokens)
        self.entered: Tensor | None = None  # what the first block got
        self.passed: Tensor | None = None  # what the last block that was called gave
        self.version = 0

    def run(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, list[BlockCall]]:
        """Return the hidden states that enter the first block and the call of every block."""
        self.shape = ids.shape
        with ExitStack() as stack:
            for position, block in enumerate(self.blocks.modules):
                stack.enter_context(_forward_replaced(block, self.noting(position, block, block.forward)))
            stack.enter_context(suppress(_LastBlockSeen))
            self.call_model(ids, mask)
        if self.entered is None or len(self.calls) < len(self.blocks):
            raise self.refusal(f"calls {len(self.calls)} of its {len(self.blocks)} blocks in a forward")
        return self.entered, self.calls

    def real_output(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return what the last block gives in a real forward, `(batch, tokens, hidden)`."""
        last = self.blocks.modules[-1]
        forward = last.forward

        def keep(*args: Any, **kwargs: Any) -> None:
            given = args[0] if args else kwargs[first_parameter(forward)]
            self.passed = _hidden_of(forward(*args, **kwargs), given, last)
            raise _LastBlockSeen

        with _forward_replaced(last, keep), suppress(_LastBlockSeen):
            self.call_model(ids, mask)
        if self.passed is None:
            raise self.refusal(f"does not call `{self.blocks.names[-1]}`")
        return self.passed

    def behind(self, ids: Tensor, mask: Tensor | None, hidden: Tensor, name: str, module: nn.Module) -> Tensor:
        """Return the input of `module` when the last block returns `hidden`."""
        reached = False
        given: list[Tensor] = []

        def passing(position: int, block: nn.Module) -> Callable[..., Any]:
            def answer(*args: Any, **kwargs: Any) -> Any:
                nonlocal reached
                reached = position == len(self.blocks) - 1
                count = self.blocks.returns[type(block)]
                return hidden if count == 0 else (hidden, *[None] * (count - 1))

            return answer

        def stop(*args: Any, **kwargs: Any) -> None:
            if not reached:
                raise InputError(
                    f"`{name}` of {architecture(self.model)} runs before the blocks, where nothing is pruned",
                    hint="leave it out of `include`",
                )
            given.append(args[0])
            raise _LastBlockSeen

        with ExitStack() as stack:
            for position, block in enumerate(self.blocks.modules):
                stack.enter_context(_forward_replaced(block, passing(position, block)))
            stack.enter_context(_forward_replaced(module, stop))
            stack.enter_context(suppress(_LastBlockSeen))
            self.call_model(ids, mask)
        if not given:
            raise InputError(f"`{name}` of {architecture(self.model)} is never run", hint="leave it out of `include`")
        return given[0]

    def call_model(self, ids: Tensor, mask: Tensor | None) -> None:
        parameters = inspect.signature(self.model.forward).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        settings: dict[str, Any] = {"use_cache": False}
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if getattr(getattr(self.model, "config", None), name, False):
                settings[name] = False  # where the config asks for them, transformers would install hooks for good
        if mask is not None:
            settings["attention_mask"] = mask
            if not anything and "attention_mask" not in parameters:
                raise self.refusal("takes no `attention_mask`, which padded samples need")
        self.model(ids, **{name: value for name, value in settings.items() if anything or name in parameters})

    def noting(self, position: int, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of block `position` for this pass; `forward` is its real one."""
        name = self.blocks.names[position]

        def note(*args: Any, **kwargs: Any) -> Any:
            if position != len(self.calls):
                raise self.refusal(f"calls `{name}` out of order or more than once in a forward")
            hidden, call = call_of(args, kwargs, forward)
            self.check(name, hidden, call)
            self.calls.append(call)
            kind = type(block)
            answer: Any
            if self.learning and kind not in self.blocks.returns:
                answer = forward(*args, **kwargs)
                self.passed = _hidden_of(answer, hidden, block)
                self.blocks.returns[kind] = 0 if isinstance(answer, Tensor) else len(answer)
            else:
                self.passed = hidden
                count = self.blocks.returns[kind]
                answer = hidden if count == 0 else (hidden, *[None] * (count - 1))
            self.version = _version(hidden if self.passed is None else self.passed)
            if position == len(self.blocks) - 1 and not self.learning:
                raise _LastBlockSeen
            return answer

        return note

    def check(self, name: str, hidden: Any, call: BlockCall) -> None:
        """Refuse a block whose input is not what the block before it gave."""
        fitting = isinstance(hidden, Tensor) and hidden.is_floating_point() and hidden.dim() == 3
        if not fitting or hidden.shape[:2] != self.shape:
            raise self.refusal(f"gives `{name}` no hidden states (batch, tokens, hidden) as its first argument")
        if self.passed is None:
            self.entered = hidden
            return
        if not _same(hidden, self.passed) or _version(hidden) != self.version:
            raise self.refusal(f"changes the hidden states before `{name}`, outside its blocks")
        if self.learning and any(_same(tensor, self.passed) for tensor in call.tensors().values()):
            raise self.refusal(f"gives the hidden states to `{name}` more than once")

    def refusal(self, what: str) -> InputError:
        return InputError(f"{architecture(self.model)} {what}, {BY_BLOCK}")


def _learn(model: nn.Module, blocks: Blocks, ids: Tensor) -> None:
    """Fill `blocks.returns`, and refuse a model that does more with its blocks than call each once, in order."""
    learned = False
    try:
        _, calls = _Skeleton(model, blocks, learning=True).run(ids, None)
        if any(call.has_store() for call in calls):
            check_replay(model, blocks, ids)
        learned = True
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise InputError(
            f"{architecture(model)} cannot be walked block by block: {type(error).__name__}: {error}",
            hint="its blocks depend on more than their arguments",
        ) from error
    finally:
        if not learned:
            blocks.returns.clear()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or views of all of one."""
    if one is other:
        return True
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def _version(tensor: Tensor) -> int:
    """Return a number that grows when `tensor` is changed in place."""
    return 0 if tensor.is_inference() else tensor._version  # inference tensors do not count


def _hidden_of(output: Any, given: Tensor, block: nn.Module) -> Tensor:
    """Return the hidden states in what a block returned."""
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor) or hidden.shape != given.shape:
        what = f"a tensor {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else f"`{type(output).__name__}`"
        kind = type(block).__name__
        raise InputError(f"a block of class {kind} returns {what} instead of hidden states {tuple(given.shape)}")
    return hidden


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give `module` another forward of its own, and its old one, be it its own or its class's, back afterwards."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own


def _checked(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return ids and mask as int64 on the model's device."""
    shape = tuple(input_ids.shape)
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool or not input_ids.numel():
        raise InputError(f"token ids must be integers (batch, tokens), got {input_ids.dtype} with shape {shape}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise InputError(f"the attention mask has shape {tuple(attention_mask.shape)}, the token ids have {shape}")
    embedding = next(model.parameters())
    low, high = int(input_ids.min()), int(input_ids.max())
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
        raise InputError(f"token ids must lie in 0..{vocabulary - 1 if vocabulary else '?'}, got {low}..{high}")
    mask = None if attention_mask is None else attention_mask.to(embedding.device, torch.long)
    return input_ids.to(embedding.device, torch.long), mask
