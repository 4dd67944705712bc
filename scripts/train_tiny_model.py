"""Train the tiny LLaMA of the tests: half a million weights that know some English.

Random weights have no structure that a pruner could use or harm, so orderings between methods mean nothing on them.
This model is small enough to be committed and pruned in a second, and good enough that the orderings of large models
show on it. It sees the calibration parts of the builtin texts only, never the evaluation parts.

    OMP_NUM_THREADS=1 python scripts/train_tiny_model.py

takes about six minutes on one core and writes tests/assets/tiny-llama. One thread, one seed: the same machine writes
the same bytes again.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.data.builtin import builtin_documents

END, PADDING = "<|endoftext|>", "<|pad|>"
VOCABULARY = 1024
CONTEXT = 256  # tokens
TINY_TEXT_REPEATS = 3  # the shipped text is small beside the wiki text, and tests evaluate on its other part
log = logging.getLogger("train_tiny_model")


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that adds no special tokens and decodes to exactly the text it was given."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        bos_token=END,
        eos_token=END,
        pad_token=PADDING,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return the untrained model: 4 blocks, grouped queries, tied head."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.04,
        )
    )


def encode(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return int64 `(n,)` ids of the documents, each followed by the end token."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(ids)


def train(model: LlamaForCausalLM, ids: Tensor, *, steps: int, batch: int, rate: float, seed: int) -> None:
    """Train on random crops of `ids` with AdamW, a short warm-up and a cosine to zero, in place."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=rate, betas=(0.9, 0.98)
    )
    warmup = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps))))
    )
    generator = torch.Generator().manual_seed(seed)
    crop = torch.arange(CONTEXT)
    model.train()
    started, recent = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - CONTEXT, (batch, 1), generator=generator)
        rows = ids[starts + crop]  # (batch, CONTEXT)
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent += loss.item()
        if step % 50 == 0:
            log.info("step %d of %d, loss %.3f, %.0f s", step, steps, recent / 50, time.monotonic() - started)
            recent = 0.0
    model.eval()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: Tensor, windows: int = 40) -> float:
    """Return the perplexity over the first `windows` full contexts of `ids`."""
    rows = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)[:windows]
    return math.exp(model(input_ids=rows, labels=rows, use_cache=False).loss.item())


def main() -> None:
    """Train, report, save."""
    parser = argparse.ArgumentParser(description="train the tiny LLaMA of the tests")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "tests" / "assets" / "tiny-llama")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=6, help="contexts of 256 tokens per step")
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)

    wiki, _ = builtin_documents("wiki", "calibration")
    tiny, _ = builtin_documents("tiny", "calibration")
    tokenizer = train_tokenizer(wiki + tiny * TINY_TEXT_REPEATS)
    model = new_model(tokenizer, chosen.seed)
    ids = encode(wiki + tiny * TINY_TEXT_REPEATS, tokenizer)
    log.info("%d weights, %d training tokens", sum(p.numel() for p in model.parameters()), len(ids))
    train(model, ids, steps=chosen.steps, batch=chosen.batch, rate=chosen.rate, seed=chosen.seed)
    for name in ("wiki", "tiny"):
        held_out, _ = builtin_documents(name, "evaluation")
        log.info("perplexity on %s-evaluation: %.2f", name, perplexity(model, encode(held_out, tokenizer)))
    model.save_pretrained(chosen.output)
    tokenizer.save_pretrained(chosen.output)


if __name__ == "__main__":
    main()
