"""One training step of SPP's linears: our single product against the published sliced form.

OMP_NUM_THREADS=1 python benchmarks/bench_spp.py [--quick]

A step is forward and backward to the input and the factors. `bytes_ratio` compares what autograd keeps in between,
beside the parameters; a linear alone keeps n of n + m numbers a token, so its ratio depends on its shape, and only the
block has a gate. The block has the seven linears of SmolLM2-135M with the inputs that they share.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import realistic
import torch
from measure import Times, compare, product_rate, report, sets_of
from reference.spp import Sliced, saved_bytes
from torch import Tensor, nn

from secateur.core.pattern import NM, Pattern, Unstructured
from secateur.methods.adapters.spp import SppConfig, SppLinear

R, TOKENS = 16, 512
# outputs, inputs, number of the input they read
BLOCK = [(576, 576, 0), (192, 576, 0), (192, 576, 0), (576, 576, 1), (1536, 576, 2), (1536, 576, 2), (576, 1536, 3)]
CASES: list[tuple[str, list[tuple[int, int, int]], Pattern]] = [
    ("linear 1024x1024 50%", [(1024, 1024, 0)], Unstructured(0.5)),
    ("linear 1536x576 2:4", [(1536, 576, 0)], NM(2, 4)),
    ("linear 576x1536 75%", [(576, 1536, 0)], Unstructured(0.75)),
    ("block of SmolLM2-135M 50%", BLOCK, Unstructured(0.5)),
]


class Linears:
    """The linears of a case in both forms, sharing their parameters."""

    def __init__(self, shapes: list[tuple[int, int, int]], pattern: Pattern) -> None:
        self.order = [place for _, _, place in shapes]
        self.ours: list[nn.Module] = []
        self.published: list[nn.Module] = []
        for number, (rows, columns, _) in enumerate(shapes):
            weight = realistic.weight(rows, columns, number)
            linear = nn.Linear(columns, rows, bias=False).requires_grad_(False)
            linear.weight.copy_(weight * pattern.mask(weight.abs()))
            layer = SppLinear(linear, f"linear{number}")
            layer._active_adapter = ["default"]
            layer.add_adapter("default", SppConfig(r=R, dropout=0.0, init_weights=False))
            self.ours.append(layer)
            self.published.append(Sliced(linear.weight, None, *layer.tensors("default"), 2.0))
        self.parameters = [parameter for layer in self.ours for parameter in layer.parameters()]
        self.widths = {place: columns for _, columns, place in shapes}

    def inputs(self, seed: int) -> dict[int, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            place: torch.randn(1, TOKENS, columns, generator=generator).requires_grad_()
            for place, columns in self.widths.items()
        }

    def forward(self, forms: list[nn.Module], inputs: dict[int, Tensor]) -> Tensor:
        return torch.stack([form(inputs[place]).sum() for form, place in zip(forms, self.order, strict=True)]).sum()

    def step(self, forms: list[nn.Module], inputs: dict[int, Tensor]) -> list[Tensor]:
        for tensor in (*self.parameters, *inputs.values()):
            tensor.grad = None
        self.forward(forms, inputs).backward()
        return [tensor.grad for tensor in (*self.parameters, *inputs.values()) if tensor.grad is not None]


def steps(linears: Linears, repeats: int) -> Times:
    """Return the times of a step in both forms."""
    sets = sets_of(linears.inputs)

    def job(forms: list[nn.Module]) -> Callable[[int], object]:
        return lambda number: linears.step(forms, sets[number])

    return compare(job(linears.published), job(linears.ours), repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = 5 if parser.parse_args().quick else 11
    torch.set_num_threads(1)
    rate = product_rate()
    for case, shapes, pattern in CASES:
        linears = Linears(shapes, pattern)
        times = steps(linears, repeats)
        inputs = linears.inputs(7)
        kept = [
            saved_bytes(lambda forms=forms: linears.forward(forms, inputs), linears.parameters)[1]  # noqa: B023
            for forms in (linears.published, linears.ours)
        ]
        pairs = zip(*(linears.step(forms, inputs) for forms in (linears.published, linears.ours)), strict=True)
        error = max(float((one - other).norm() / one.norm()) for one, other in pairs)
        floor = sum(3 * 2 * TOKENS * rows * columns for rows, columns, _ in shapes) / rate
        report(
            "spp",
            case,
            times,
            quality={"gradient_error": error},
            floor_ms=floor,
            gate=1.4,
            tokens=TOKENS,
            ref_bytes=kept[0],
            ours_bytes=kept[1],
            bytes_ratio=round(kept[1] / kept[0], 3),
            bytes_gate=0.6 if len(shapes) > 1 else None,
        )


if __name__ == "__main__":
    main()
