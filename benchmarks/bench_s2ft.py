"""S2FT against full fine-tuning and PEFT's LoRA: a training step; JSON lines. `bench_switch.py` has what comes after.

Blocks have SmolLM2-135M's shapes (576 hidden, 9 heads on 3 groups, 1536 channels), with random weights and a small
vocabulary, so that the blocks are what is measured. One thread, thread time, both sides in turn. LoRA is PEFT's own with
r = 16, on all linears of the blocks, on the five of the S2FT paper, and on PEFT's default two; S2FT trains as many
parameters as each of them.

- `step`: forward, backward and a fused AdamW step on 4 x 256 tokens. `saved_ratio` compares all bytes kept for
  backward. S2FT does not keep the activations of gated MLPs, which any training could do without: `plain_saved_ratio` is
  without that, and `own_saved_ratio` what the adapters alone keep beyond the frozen model with gradients flowing through.
  *Whole channels* are columns of `down` with the rows of `up` and `gate` that fill them (`coupled`).

    OMP_NUM_THREADS=1 python benchmarks/bench_s2ft.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from measure import compare, report, sets_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.methods.adapters.s2ft import S2ftConfig
from secateur.train.gated_product import keep_activations_

SEED = 0
HIDDEN, CHANNELS, HEADS, GROUPS, VOCABULARY = 576, 1536, 9, 3, 512
RANK = 16
TARGETS = {
    "all linears": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "q, k, v, up, down": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "q, v": ["q_proj", "v_proj"],
}
FULL_GATE, LORA_GATE, SAVED_GATE = 1.3, 1.05, 0.75


def make_model(blocks: int) -> LlamaForCausalLM:
    """Return blocks of SmolLM2's shapes with random weights, the same each time."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=CHANNELS,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return LlamaForCausalLM(config)


def lora(model: nn.Module, targets: list[str], adapters: tuple[str, ...] = ("default",)) -> PeftModel:
    """Return `model` with LoRA adapters that are not empty."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(model, config, adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    return model


def s2ft(model: nn.Module, columns: int, adapters: tuple[str, ...] = ("default",)) -> PeftModel:
    """Return `model` with S2FT adapters that train `columns` columns in each block: a head of `o`, the rest of `down`."""
    size = HIDDEN // HEADS
    heads = 1 if columns >= 2 * size else 0
    settings = {"o": heads, "down": columns - heads * size, "init_weights": False}
    model = get_peft_model(model, S2ftConfig(**settings), adapters[0])
    for seed, name in enumerate(adapters[1:], 1):
        model.add_adapter(name, S2ftConfig(seed=seed, **settings))
    return model


def coupled(model: nn.Module, columns: int) -> PeftModel:
    """Return `model` with an S2FT adapter that trains channels with the rows that fill them, as many values."""
    return get_peft_model(model, S2ftConfig(o=0, down=columns // 3, coupled=True, init_weights=False))


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def stepper(model: nn.Module, batches: list[Tensor]) -> Callable[[int], None]:
    """Return a function that does one training step on a batch."""
    model.train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=batches[number], labels=batches[number], use_cache=False).loss.backward()
        optimizer.step()

    return step


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collect the bytes of the storages kept for backward, the model's own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers())}
    kept: dict[int, int] = {}
    alive = []  # as long as the count goes on, no storage may be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def saved_bytes(model: nn.Module, ids: Tensor, flowing: bool = False) -> int:
    """Return the bytes kept for backward by one forward; `flowing` lets gradients in at the embedding."""
    model.train()
    inputs = {"input_ids": ids}
    if flowing:
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids).detach().requires_grad_()}
    with counting(model) as kept:
        model(**inputs, labels=ids, use_cache=False)
    return sum(kept.values())


def bench_steps(blocks: int, repeats: int) -> None:
    plain = make_model(blocks)
    batches = list(
        sets_of(lambda seed: torch.randint(VOCABULARY, (4, 256), generator=torch.Generator().manual_seed(seed)))
    )
    frozen = saved_bytes(copy.deepcopy(plain).requires_grad_(False), batches[0], flowing=True)
    base = {"blocks": blocks, "tokens": "4 x 256"}
    cases = [(name, "", targets, s2ft) for name, targets in TARGETS.items()]
    cases.append(("all linears", ", whole channels", TARGETS["all linears"], coupled))
    for name, kind, targets, adapted in cases:
        other = lora(copy.deepcopy(plain), targets)
        ours = adapted(copy.deepcopy(plain), round(trainable(other) / blocks / HIDDEN))
        kept = [saved_bytes(model, batches[0]) for model in (other, ours)]
        as_others = copy.deepcopy(ours)
        keep_activations_(as_others)
        flowing = [saved_bytes(model, batches[0], flowing=True) - frozen for model in (other, as_others)]
        times = compare(stepper(other, batches), stepper(ours, batches), repeats=repeats)
        report(
            "s2ft step",
            f"against LoRA r={RANK} on {name}{kind}",
            times,
            quality={
                "trainable_ratio": round(trainable(ours) / trainable(other), 4),
                "saved_ratio": round(kept[1] / kept[0], 3),
                "plain_saved_ratio": round(saved_bytes(as_others, batches[0]) / kept[0], 3),
                "own_saved_ratio": round(flowing[1] / flowing[0], 3),
            },
            gate=LORA_GATE,
            saved_gate=SAVED_GATE,
            saved_bytes={"lora": kept[0], "s2ft": kept[1]},
            trainable={"lora": trainable(other), "s2ft": trainable(ours)},
            **base,
        )
        if name == "all linears":
            full = copy.deepcopy(plain)
            times = compare(stepper(full, batches), stepper(ours, batches), repeats=repeats)
            whole = saved_bytes(full, batches[0])
            report(
                "s2ft step",
                f"against full fine-tuning{kind}",
                times,
                quality={"saved_ratio": round(kept[1] / whole, 3)},
                gate=FULL_GATE,
                trainable={"full": trainable(full), "s2ft": trainable(ours)},
                **base,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer blocks and repeats")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    blocks, repeats = (2, 3) if quick else (6, 11)
    bench_steps(blocks, repeats)


if __name__ == "__main__":
    main()
