"""Block tuning against the published procedure: time of a step, and time to its final block loss; one JSON line each.

Both tune the same block under the same Wanda mask towards the dense block's outputs, in one thread, in thread time.
`step` interleaves epochs of both at equal batches; its quality is the ratio of both block losses after equal steps
without decay and clipping (masked gradients against masks in the forward; 1 = the same training). `time to reference
loss` runs the published procedure to its end, then ours until the mean squared error over all sequences, measured with
the clock stopped, is at or below the reference's; once from the masked weights, once from an exact refit of each linear
whose time is counted. A run that never gets there counts its whole time, and `reached` is false.

Without `--model`: one block of SmolLM2-135M's shape with random weights, on hidden states with a decaying spectrum.

    OMP_NUM_THREADS=1 python benchmarks/bench_ebft.py
    OMP_NUM_THREADS=1 python benchmarks/bench_ebft.py --model FOLDER --calibration TEXT --block 10
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measure import Times, product_rate, report
from reference.ebft import PublishedEBFT
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from secateur.core.contracts import BlockTask
from secateur.core.linalg import refit
from secateur.core.pattern import parse_pattern
from secateur.data.calibration import sample
from secateur.data.text import load_text
from secateur.methods.block_tuners.ebft import EBFT
from secateur.models.blocks import find_blocks
from secateur.models.calls import BlockCall
from secateur.models.skeleton import capture, run_block

SEED = 0
STEP_GATE, RACE_GATE = 1.05, 2.0


@dataclass
class Case:
    """A dense block, the masks to tune it under, and its data `(samples, tokens, hidden)`."""

    block: nn.Module
    masks: dict[str, Tensor]
    grams: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor
    arguments: BlockCall

    def call(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return run_block(block, hidden, self.arguments.rows(slice(0, len(hidden)), len(self.inputs)))

    @torch.no_grad()
    def error(self, block: nn.Module, masked: bool = False) -> float:
        """Return the mean squared error over all sequences; `masked` prunes a copy first."""
        if masked:
            block = pruned(block, self.masks)
        total = sum(
            float((self.call(block, x) - y).square().sum(dtype=torch.float64))
            for x, y in zip(self.inputs.split(8), self.targets.split(8), strict=True)
        )
        return total / self.targets.numel()

    def task(self, block: nn.Module, progress: Callable[[float], None]) -> BlockTask:
        return BlockTask(
            block=block,
            masked=[(block.get_submodule(name).weight, mask) for name, mask in self.masks.items()],
            inputs=[self.inputs],
            targets=[self.targets],
            call=lambda module, batch, rows: self.call(module, self.inputs if rows is None else self.inputs[rows]),
            keep=lambda batch: None,
            generator=torch.Generator().manual_seed(SEED),
            progress=progress,
        )


class Clock:
    """Thread time that can be stopped; keeps the length of every step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.started = time.thread_time()

    def step(self) -> None:
        self.steps.append(time.thread_time() - self.started)
        self.started = time.thread_time()

    @property
    def total(self) -> float:
        return sum(self.steps)


@torch.no_grad()
def pruned(block: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """Return a copy of `block` with its masked weights zero."""
    block = copy.deepcopy(block)
    for name, mask in masks.items():
        block.get_submodule(name).weight.masked_fill_(~mask, 0.0)
    return block


@torch.no_grad()
def make_case(model: nn.Module, ids: Tensor, index: int, pattern: str) -> Case:
    """Return the case of block `index` on the dense model's own hidden states, with Wanda's masks."""
    blocks = find_blocks(model)
    hidden, calls = capture(model, blocks, ids, None)
    for number in range(index):
        before = Case(blocks.modules[number], {}, {}, hidden, hidden, calls[number])
        hidden = torch.cat([before.call(before.block, part) for part in hidden.split(8)])
    block = copy.deepcopy(blocks.modules[index]).eval()
    case = Case(block, {}, {}, hidden, hidden, calls[index])
    grams: dict[str, Tensor] = {}
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}

    def collect(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].reshape(-1, given[0].shape[-1])
            grams[name] = grams.get(name, 0) + rows.T @ rows / hidden.shape[:2].numel()

        return hook

    hooks = [linear.register_forward_pre_hook(collect(name)) for name, linear in linears.items()]
    case.targets = torch.cat([case.call(block, x) for x in hidden.split(8)])
    for handle in hooks:
        handle.remove()
    case.grams = grams
    for name, linear in linears.items():
        score = linear.weight.abs() * grams[name].diagonal().sqrt()
        case.masks[name] = parse_pattern(pattern).mask(score, "row")
    return case


def synthetic_model(hidden: int, inner: int, heads: int, groups: int) -> nn.Module:
    """Return a one-block LLaMA with random weights and an embedding whose spectrum decays."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=4096,
        max_position_embeddings=2048,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config).eval()
        factors = torch.randn(4096, hidden) * torch.logspace(0, -1.5, hidden)
        model.model.embed_tokens.weight.data = factors @ torch.randn(hidden, hidden) / hidden**0.5
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                scales = torch.rand(module.in_features) + 0.5
                module.weight.data = torch.randn_like(module.weight) * scales / module.in_features**0.5
    return model


def published_clock(case: Case, settings: PublishedEBFT) -> tuple[Clock, nn.Module]:
    """Run the published procedure on a copy of the block."""
    block = copy.deepcopy(case.block)
    clock = Clock()
    generator = torch.Generator().manual_seed(SEED)
    settings.tune(block, case.masks, case.inputs, case.targets, case.call, generator, clock.step)
    return clock, block


def our_clock(case: Case, settings: EBFT) -> tuple[Clock, nn.Module]:
    """Run ours on a pruned copy of the block."""
    block = pruned(case.block, case.masks)
    clock = Clock()
    settings.tune(case.task(block, lambda fraction: clock.step()))
    return clock, block


def bench_step(case: Case, batch_size: int, repeats: int, label: str) -> None:
    """Print the line that compares single steps, and trajectories of equal steps."""
    ours, reference = [], []
    for _ in range(repeats):
        clock, _ = published_clock(case, PublishedEBFT(epochs=1, batch_size=batch_size))
        reference += clock.steps[2:]
        clock, _ = our_clock(case, EBFT(epochs=1, batch_size=batch_size))
        ours += clock.steps[2:]
    arguments = case.arguments.rows(slice(0, 2), len(case.inputs))
    small = Case(case.block, case.masks, case.grams, case.inputs[:2], case.targets[:2], arguments)
    rate = 2e-4
    _, plain = published_clock(
        small, PublishedEBFT(epochs=5, batch_size=2, learning_rate=rate, weight_decay=0.0, clip=float("inf"))
    )
    equal = EBFT(
        epochs=5,
        batch_size=2,
        learning_rate=rate,
        relative_rate=False,
        warmup=0.0,
        loss="mse",
        holdout=0.0,
        min_gain=0.0,
        train_norms=True,
    )
    _, masked = our_clock(small, equal)
    tokens = batch_size * case.inputs.shape[1]
    weights = sum(mask.numel() for mask in case.masks.values())
    quality = {"mse_after_equal_steps_ratio": small.error(masked) / small.error(plain)}
    times = Times(
        1e3 * statistics.median(reference),
        1e3 * statistics.median(ours),
        len(ours),
        max(spread(reference), spread(ours)),
    )
    floor = 6 * tokens * weights / product_rate()
    report("ebft", f"step, {label}", times, quality=quality, floor_ms=floor, gate=STEP_GATE)


def bench_race(case: Case, published: PublishedEBFT, settings: EBFT, label: str) -> None:
    """Print the lines that compare the time to the published procedure's final block loss."""
    clock, block = published_clock(case, published)
    goal, start = case.error(block), case.error(case.block, masked=True)
    for refitted in (False, True):
        block = pruned(case.block, case.masks)
        race = Clock()
        if refitted:
            with torch.no_grad():
                for name, mask in case.masks.items():
                    dense = case.block.get_submodule(name).weight
                    block.get_submodule(name).weight.copy_(refit(dense, case.grams[name], mask))
        race.step()
        reached: list[float] = [race.total] if case.error(block) <= goal else []
        race.started = time.thread_time()

        def look(fraction: float, race: Clock = race, block: nn.Module = block, reached: list[float] = reached) -> None:
            race.step()
            if not reached and len(race.steps) % 2 == 0 and case.error(block) <= goal:
                reached.append(race.total)
            race.started = time.thread_time()

        settings.tune(case.task(block, look))
        quality = {
            "reached": bool(reached),
            "start_mse": start,
            "reference_final_mse": goal,
            "our_final_mse": case.error(block),
            "our_total_ms": 1e3 * race.total,
        }
        origin = "a refit (its time included)" if refitted else "the mask alone"
        name = f"time to reference loss, {label}, from {origin}"
        times = Times(1e3 * clock.total, 1e3 * (reached[0] if reached else race.total), 1, 0.0)
        report(
            "ebft",
            name,
            times,
            quality=quality,
            gate=RACE_GATE,
            seed=SEED,
            published=f"{published.epochs} epochs of batch {published.batch_size}",
            settings=f"{settings.epochs} epochs of batch {settings.batch_size} at most",
        )


def spread(times: list[float]) -> float:
    """Return the distance between the quartiles over the median; 0 of a single time."""
    if len(times) < 2:
        return 0.0
    quarters = statistics.quantiles(times, n=4)
    return (quarters[2] - quarters[0]) / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; a random block without it")
    parser.add_argument("--calibration", help="text to calibrate on, with `--model`")
    parser.add_argument("--block", type=int, default=10, help="block of `--model`")
    parser.add_argument("--pattern", default="70%")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=10, help="of the published procedure")
    parser.add_argument("--batch-size", type=int, default=8, help="of the published procedure")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small block, to see that it runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.model:
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        text = load_text(given.calibration)
        ids = sample(text, tokenizer, samples=given.samples, length=given.length, seed=SEED).ids
        label, index = f"block {given.block} of the given model", given.block
    else:
        shape = (64, 128, 4, 2) if given.quick else (576, 1536, 9, 3)
        model, label, index = synthetic_model(*shape), f"random block {shape[0]}x{shape[1]}", 0
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(0, 4096, (given.samples, given.length), generator=generator)
    case = make_case(model, ids, index, given.pattern)
    label += f", {given.pattern}"
    published = PublishedEBFT(epochs=given.epochs, batch_size=given.batch_size)
    bench_step(case, 2, 2 if given.quick else given.repeats, label)
    bench_race(case, published, EBFT(), label)


if __name__ == "__main__":
    main()
