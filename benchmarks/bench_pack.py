"""The packed format: size, bit-exactness and speed; one JSON line per case.

Matrix cases pack and unpack one weight at LLaMA-7B shapes and compare thread time with the plain numpy way (selection
and assignment by a bool mask), interleaved in one process. The floor is one copy of the dense weight.

The file case writes a pruned model of TinyLlama's block shapes, reads it back, and tells the size of its pruned
matrices and of the whole file against the dense ones. Its times are wall times, its reference the safetensors library
writing the dense model; `peak_growth` is what writing added to the resident memory (Linux), over the model's bytes.

    OMP_NUM_THREADS=1 python benchmarks/bench_pack.py [--quick] [--out benchmarks/results/pack.jsonl]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.core.pattern import parse_pattern
from secateur.export.bitmask import WEIGHTS, read, write
from secateur.export.packing import pack, unpack
from secateur.models.linears import find_all_linears

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SEED = 0


def plain_pack(words: Tensor) -> tuple[Any, Any]:
    """Return values and bits of an integer matrix, by selection with a bool mask."""
    array = words.numpy()
    kept = array != 0
    return array[kept], np.packbits(kept, axis=1, bitorder="little")


def plain_unpack(values: Any, bits: Any, shape: tuple[int, int]) -> Any:
    """Return the matrix of `plain_pack`, by assignment with a bool mask."""
    kept = np.unpackbits(bits, axis=1, count=shape[1], bitorder="little").view(np.bool_)
    result = np.zeros(shape, values.dtype)
    result[kept] = values
    return result


def interleaved(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Return thread times in milliseconds of both, run in turns after two warm-ups."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 2):
        for run, kept in zip((first, second), times, strict=True):
            started = time.thread_time()
            run()
            if turn >= 2:
                kept.append(1e3 * (time.thread_time() - started))
    return times


def spread(times: list[float]) -> float:
    """Return the distance between the quartiles over the median."""
    quarters = statistics.quantiles(times, n=4)
    return (quarters[2] - quarters[0]) / statistics.median(times)


def weight_of(rows: int, columns: int, pattern: str, dtype: torch.dtype) -> Tensor:
    """Return a Gaussian weight with uneven inputs, pruned by magnitude."""
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(columns, generator=generator).add(0.1)
    return weight.masked_fill(~parse_pattern(pattern).mask(weight.abs(), "row"), 0).to(dtype)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def line(job: str, case: str, dtype: str, reference: list[float], ours: list[float], floor: float, quality: Any) -> Any:
    """Return the JSON line of one case."""
    ref_ms, ours_ms = statistics.median(reference), statistics.median(ours)
    return {
        "job": job,
        "case": case,
        "device": "cpu",
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "ref_ms": round(ref_ms, 2),
        "ours_ms": round(ours_ms, 2),
        "ratio": round(ref_ms / ours_ms, 2),
        "quality": quality,
        "floor_ms": round(floor, 2),
        "fraction_of_floor": round(floor / ours_ms, 3),
        "n": len(ours),
        "spread": round(max(spread(reference), spread(ours)), 3),
        "versions": {name: version(name) for name in ("torch", "numpy", "safetensors", "transformers")},
        "seed": SEED,
    }


def resident(field: str, reset: bool = False) -> int:
    """Return the resident memory now (`VmRSS`) or at its peak (`VmHWM`), bytes; `reset` starts a new peak."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def matrix_case(rows: int, columns: int, pattern: str, dtype: str, repeats: int) -> list[Any]:
    """Return the lines for packing and unpacking one matrix."""
    weight = weight_of(rows, columns, pattern, DTYPES[dtype])
    words = weight.view({2: torch.int16, 4: torch.int32}[weight.element_size()])
    packed = pack(weight)
    values, bits = plain_pack(words)
    floor = statistics.median(interleaved(weight.clone, weight.clone, repeats)[0])
    quality = {
        "size_ratio": round((packed.values.nbytes + packed.bits.nbytes) / weight.nbytes, 4),
        "bit_exact": same_bits(unpack(packed), weight),
    }
    case = f"{rows}x{columns} {pattern}"
    packing = interleaved(lambda: plain_pack(words), lambda: pack(weight), repeats)
    unpacking = interleaved(lambda: plain_unpack(values, bits, (rows, columns)), lambda: unpack(packed), repeats)
    return [
        line("pack", case, dtype, *packing, floor, quality),
        line("unpack", case, dtype, *unpacking, floor, quality),
    ]


def file_case(hidden: int, inner: int, layers: int, pattern: str) -> Any:
    """Return the line for a whole model, written and read; its times are wall times, its reference is a plain file."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=2048,
        dtype="bfloat16",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for view in find_all_linears(model):
        weight = view.read()
        view.write(weight.masked_fill(~parse_pattern(pattern).mask(weight.float().abs(), "row"), 0))
    pruned = {f"{view.name}.weight" for view in find_all_linears(model)}
    dense = sum(value.nbytes for value in model.parameters())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = resident("VmRSS", reset=True)
        started = time.perf_counter()
        write(model, None, folder, None)
        written = 1e3 * (time.perf_counter() - started)
        growth = resident("VmHWM") - before
        started = time.perf_counter()
        save_file(dict(model.state_dict()), folder / "plain")
        plain = 1e3 * (time.perf_counter() - started)
        started = time.perf_counter()
        again, _ = read(folder)
        reading = 1e3 * (time.perf_counter() - started)
        size = (folder / WEIGHTS).stat().st_size
        with safe_open(folder / WEIGHTS, "np") as file:
            parts = {entry: file.get_slice(entry) for entry in file.keys()}  # noqa: SIM118, not a dict
            sizes = {"BF16": 2, "U8": 1, "I64": 8}
            linears = sum(
                sizes[part.get_dtype()] * int(np.prod(part.get_shape()))
                for entry, part in parts.items()
                if entry.rpartition(".")[0] in pruned
            )
    dense_linears = sum(view.read().nbytes for view in find_all_linears(model))
    states = again.state_dict()
    quality = {
        "size_ratio_of_pruned": round(linears / dense_linears, 4),
        "size_ratio_of_file": round(size / dense, 4),
        "bit_exact": all(same_bits(tensor, states[name]) for name, tensor in model.state_dict().items()),
        "peak_growth": round(growth / dense, 3),
        "read_ms": round(reading, 1),
    }
    case = f"model {layers} x ({hidden}, {inner}) {pattern}, wall time"
    return line("write", case, "bfloat16", [plain] * 2, [written] * 2, plain, quality) | {"n": 1, "spread": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes and few repeats")
    parser.add_argument("--out", type=Path, help="file to append the lines to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [(256, 512)] if options.quick else [(4096, 4096), (4096, 11008)]
    repeats = 3 if options.quick else 7
    lines = [file_case(256, 512, 2, "50%") if options.quick else file_case(2048, 5632, 2, "50%")]
    for rows, columns in shapes:
        for pattern, dtype in (("50%", "bfloat16"), ("2:4", "bfloat16"), ("70%", "bfloat16"), ("50%", "float32")):
            lines += matrix_case(rows, columns, pattern, dtype, repeats)
    for found in lines:
        print(json.dumps(found), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(found) + "\n" for found in lines)


if __name__ == "__main__":
    main()
