"""Tiny models and shared settings of the tests: CPU, float32, one thread, no network."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from secateur.core.problem import LayerProblem, Pruned

ASSETS = Path(__file__).parent / "assets"
TINY_TRAINED = ASSETS / "tiny-llama"


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Take interrupts also where the tests were started in the background of a shell, which ignores them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Keep results independent of the number of cores."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class GramScaled:
    """A pruner whose answer depends on the whole Gram, so that wrong inputs show."""

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "diag", "mean"})
    scope: ClassVar[str] = "row"

    def score(self, problem: LayerProblem) -> torch.Tensor:
        return (problem.weight @ problem.need("gram")).abs()

    def prune(self, problem: LayerProblem) -> Pruned:
        mask = problem.select(self.score(problem), self.scope)
        return Pruned.keep(0.9 * problem.weight, mask)


@pytest.fixture
def pruner():
    """A pruner that sees everything a pruner can see."""
    return GramScaled()


def random_llama(layers: int = 2, hidden: int = 32, vocabulary: int = 64, seed: int = 0, **settings):
    """Return a small random LLaMA (grouped queries, untied head) in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=128,
        tie_word_embeddings=settings.pop("tie_word_embeddings", False),
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def random_ids(samples: int = 4, length: int = 24, vocabulary: int = 64, seed: int = 0) -> torch.Tensor:
    """Return int64 `(samples, length)` token ids."""
    return torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tiny_llama():
    """A fresh random LLaMA with two blocks."""
    return random_llama()


@pytest.fixture
def make_llama():
    """The function that builds random LLaMAs."""
    return random_llama


@pytest.fixture
def make_ids():
    """The function that draws token ids."""
    return random_ids


@pytest.fixture
def ids():
    """Token ids for `tiny_llama`: 4 samples of 24 tokens."""
    return random_ids()


@pytest.fixture(scope="session")
def trained_folder() -> Path:
    """The folder of the tiny trained model."""
    return TINY_TRAINED
