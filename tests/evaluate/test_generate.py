"""Continuations: transformers' greedy text, reproducible samples, no traces."""

from __future__ import annotations

import pytest
import torch

from secateur.core.errors import InputError, NumericError, RecipeError
from secateur.evaluate.generate import continuation


class Letters:
    """A tokenizer of 64 letters that adds nothing."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) - 48 for letter in text]}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(token + 48) for token in ids)


PROMPT = "01234567"


@pytest.fixture
def model(tiny_llama):
    tiny_llama.config.eos_token_id = None
    tiny_llama.generation_config.eos_token_id = None
    return tiny_llama


def test_greedy_equals_generate_of_transformers(model):
    ids = torch.tensor([Letters()(PROMPT)["input_ids"]])
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, max_new_tokens=12, **settings)[0, ids.shape[1] :]
    assert continuation(model, Letters(), PROMPT, 12) == Letters().decode(expected.tolist(), True)


def test_the_same_seed_writes_the_same_text_and_another_seed_another(model):
    texts = [continuation(model, Letters(), PROMPT, 20, seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 20


def test_an_end_token_stops_the_text(model):
    text = continuation(model, Letters(), PROMPT, 12)
    model.generation_config.eos_token_id = [ord(text[4]) - 48]
    assert continuation(model, Letters(), PROMPT, 12) == text[: text.index(text[4])]


def test_sampling_leaves_random_state_and_mode_alone(model):
    model.train()
    state = torch.get_rng_state()
    continuation(model, Letters(), PROMPT, 3, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"temperature": 0.0}, {"top_k": -1}])
def test_settings_out_of_range_are_refused_by_name(model, wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        continuation(model, Letters(), PROMPT, **wrong)


def test_a_prompt_without_tokens_is_refused(model):
    with pytest.raises(InputError, match="no tokens"):
        continuation(model, Letters(), "")


def test_a_token_of_another_model_is_refused(model):
    with pytest.raises(InputError, match="64 rows"):
        continuation(model, Letters(), "0\x80")


def test_nan_logits_are_a_numeric_error(model):
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericError, match="NaN"):
        continuation(model, Letters(), PROMPT, seed=0)
