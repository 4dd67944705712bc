"""S2FT adapters in use: a switch against its alternatives, and several adapters in one batch; JSON lines.

Blocks of SmolLM2-135M's shapes with random weights, as in `bench_s2ft.py`. One thread, thread time, both sides in turn.

- `s2ft switch`: from one merged adapter to another, in place, with `switch_` alone and after `prepare_switches_`; against
  LoRA's unmerge and merge (r = 16, all linears), against loading the base's weights from a file and merging, and against
  loading weights that are merged already. Files are in the cache. Each line says whether the base came back bit for bit.
  The floor is a copy of the bytes that a switch must write, from one contiguous piece to another, in the same rounds.
  `by reference` is `switch_` without merging, which touches no weight, against PEFT's `set_adapter` for LoRA.
- `s2ft forward`: what an adapter that is switched by reference costs in each forward, against the merged one and LoRA's.
- `s2ft serve`: one batch of 8 rows with 8 adapters against 8 passes, and against LoRA's mixed batch.

    OMP_NUM_THREADS=1 python benchmarks/bench_switch.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from bench_s2ft import RANK, TARGETS, VOCABULARY, lora, make_model, s2ft
from measure import compare, report, sets_of
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.methods.adapters.s2ft_exchange import forget_switches_, prepare_switches_, s2ft_linears, switch_

PAIR = ("one", "two")
CASES = (("equal parameters", 282), ("32 columns a block", 32))


def bench_switches(blocks: int, repeats: int) -> None:
    plain = make_model(blocks).eval().requires_grad_(False)
    theirs = lora(copy.deepcopy(plain), TARGETS["all linears"], PAIR).eval()
    untouched = base_weights(theirs)
    for case, columns in CASES:
        for prepared in (False, True):
            ours = s2ft(copy.deepcopy(plain), columns, PAIR).eval()
            if prepared:
                prepare_switches_(ours)
            bench_switch(f"{case}{', prepared' if prepared else ''}", ours, theirs, repeats)
        bench_references(case, ours, theirs, repeats)
        bench_forwards(case, ours, theirs, repeats)
    drift = max(float((weight - untouched[name]).abs().max()) for name, weight in base_weights(theirs).items())
    print(f"LoRA's weights have drifted by up to {drift:.1e}", file=sys.stderr)


def bench_switch(case: str, ours: PeftModel, theirs: PeftModel, repeats: int) -> None:
    before, count = base_weights(ours), len(s2ft_linears(ours))

    def lora_switch(number: int) -> None:
        for layer in lora_linears(theirs):
            if layer.merged_adapters:
                layer.unmerge()
            layer.merge(adapter_names=[PAIR[number]])

    def line(other: str, reference: Callable[[int], None]) -> None:
        times = compare(reference, lambda number: switch_(ours, PAIR[number]), repeats=4 * repeats)
        floor = compare(reference, copy_of_lines(ours), repeats=repeats).ours
        switch_(ours, "__base__")
        exact = all(torch.equal(weight, before[name]) for name, weight in base_weights(ours).items())
        report(
            "s2ft switch",
            f"{case}, against {other}",
            times,
            quality={"bitwise_reversible": exact},
            floor_ms=floor,
            linears=count,
            microseconds_per_linear=round(1e3 * times.ours / count, 1),
        )

    line("LoRA's unmerge and merge", lora_switch)
    with tempfile.TemporaryDirectory() as folder:
        adapted = tuple(f"{layer.name}.base_layer.weight" for layer in s2ft_linears(ours))
        for name in ("__base__", *PAIR):
            switch_(ours, name)
            weights = {key: value.contiguous() for key, value in ours.state_dict().items() if key.endswith(adapted)}
            save_file(weights, Path(folder) / f"{name}.safetensors")
        switch_(ours, "__base__")
        other = copy.deepcopy(ours)
        forget_switches_(other)  # stored by rows, as the file is

        def reload(name: str) -> None:
            other.load_state_dict(load_file(Path(folder) / f"{name}.safetensors"), strict=False)

        def load_and_merge(number: int) -> None:
            for layer in s2ft_linears(other):  # the weights come from the file, so nothing is to be put back
                layer.merging.overwritten, layer.merged_adapters = None, []
            reload("__base__")
            for layer in s2ft_linears(other):
                layer.merge(adapter_names=[PAIR[number]])

        line("loading the base and merging", load_and_merge)
        line("loading the merged weights", lambda number: reload(PAIR[number]))


def bench_references(case: str, ours: PeftModel, theirs: PeftModel, repeats: int) -> None:
    """Switch prepared adapters without merging them; LoRA's are left unmerged."""
    for layer in lora_linears(theirs):
        layer.unmerge()
    before, count = base_weights(ours), len(s2ft_linears(ours))
    times = compare(
        lambda number: theirs.base_model.set_adapter(PAIR[number]),
        lambda number: switch_(ours, PAIR[number], merge=False),
        repeats=4 * repeats,
    )
    exact = all(torch.equal(weight, before[name]) for name, weight in base_weights(ours).items())
    report(
        "s2ft switch",
        f"{case}, by reference, against LoRA's set_adapter",
        times,
        quality={"bitwise_reversible": exact},
        linears=count,
        microseconds_per_linear=round(1e3 * times.ours / count, 1),
    )


@torch.no_grad()
def bench_forwards(case: str, ours: PeftModel, theirs: PeftModel, repeats: int) -> None:
    """Answer with an adapter that was switched by reference."""
    forget_switches_(ours)
    merged = copy.deepcopy(ours)
    switch_(merged, PAIR[0])
    switch_(ours, PAIR[0], merge=False)
    theirs.base_model.set_adapter(PAIR[0])
    for tokens in (1, 32, 256):
        batches = sets_of(
            lambda seed, t=tokens: torch.randint(VOCABULARY, (1, t), generator=torch.Generator().manual_seed(seed))
        )

        def logits(model: nn.Module, number: int, batches: Sequence[Tensor] = batches) -> Tensor:
            return model(input_ids=batches[number], use_cache=False).logits

        gap = float((logits(ours, 0) - logits(merged, 0)).abs().max())
        for name, other in (("merged", merged), (f"LoRA r={RANK} on all linears", theirs)):
            report(
                "s2ft forward",
                f"{case}, {tokens} tokens, by reference against {name}",
                compare(partial(logits, other), partial(logits, ours), repeats=2 * repeats),
                quality={"gap_to_merged": gap},
            )


def copy_of_lines(model: PeftModel) -> Callable[[int], None]:
    """Return what copies as many bytes as a switch writes, from one contiguous piece of memory to another."""
    pieces = []
    for layer in s2ft_linears(model):
        k = {name: len(layer.secateur_s2ft_index[name]) for name in PAIR}
        size = sum(k.values()), layer.out_features if layer.columns else layer.in_features
        pieces.append((torch.ones(size), torch.empty(size)))

    def job(_: int) -> None:
        for source, target in pieces:
            target.copy_(source)

    return job


def lora_linears(model: nn.Module) -> list[LoraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the weights below adapters."""
    return {name: weight.clone() for name, weight in model.state_dict().items() if "base_layer" in name}


@torch.no_grad()
def bench_serving(blocks: int, repeats: int) -> None:
    plain = make_model(blocks).eval().requires_grad_(False)
    names = tuple(f"number{i}" for i in range(8))
    ours = s2ft(copy.deepcopy(plain), 282, names).eval()
    theirs = lora(copy.deepcopy(plain), TARGETS["all linears"], names).eval()
    for tokens in (1, 32):
        batches = list(
            sets_of(
                lambda seed, t=tokens: torch.randint(VOCABULARY, (8, t), generator=torch.Generator().manual_seed(seed))
            )
        )

        def together(number: int, model: nn.Module = ours, batches: list[Tensor] = batches) -> Tensor:
            return model(input_ids=batches[number], adapter_names=list(names), use_cache=False).logits

        def alone(number: int, batches: list[Tensor] = batches) -> Tensor:
            outputs = []
            for row, name in enumerate(names):
                for layer in s2ft_linears(ours):
                    layer._active_adapter = [name]
                outputs.append(ours(input_ids=batches[number][row : row + 1], use_cache=False).logits)
            return torch.cat(outputs)

        gap = float((together(0) - alone(0)).abs().max())
        for name, other in (
            ("8 passes", alone),
            (f"LoRA r={RANK} on all linears in one batch", lambda number, own=together: own(number, theirs)),
        ):
            report(
                "s2ft serve",
                f"8 adapters, 8 x {tokens} tokens, one batch against {name}",
                compare(other, together, repeats=2 * repeats),
                quality={"largest_gap": gap},
                blocks=blocks,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer blocks and repeats")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    blocks, repeats = (2, 3) if quick else (6, 11)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        bench_switches(blocks, repeats)
        bench_serving(blocks, repeats)


if __name__ == "__main__":
    main()
