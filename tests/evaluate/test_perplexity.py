"""Perplexity: equal to a plain loop, honest about its inputs, and without traces on the model."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.core.errors import InputError, NumericError, RecipeError, ResourceError
from secateur.core.progress import Silent
from secateur.evaluate import perplexity as module
from secateur.evaluate.perplexity import perplexity

TEXT = torch.randint(64, (200,), generator=torch.Generator().manual_seed(3))


def plain(model, ids, length):
    """The ten-line loop of the documentation."""
    losses, tokens = 0.0, 0
    for start in range(0, len(ids) - length + 1, length):
        window = ids[start : start + length].unsqueeze(0)
        with torch.no_grad():
            loss = model(input_ids=window, labels=window).loss
        losses += float(loss) * (length - 1)
        tokens += length - 1
    return math.exp(losses / tokens)


def capped_gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        final_logit_softcapping=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config).eval()


def scaled_granite():
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        logits_scaling=0.05,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GraniteForCausalLM(config).eval()


@pytest.mark.parametrize("length", [2, 24, 100])
def test_equals_the_plain_transformers_loop(tiny_llama, length):
    result = perplexity(tiny_llama, TEXT, length=length)
    assert result.value == pytest.approx(plain(tiny_llama, TEXT, length), rel=1e-4)
    assert (result.windows, result.tokens) == (200 // length, 200 // length * (length - 1))


@pytest.mark.parametrize("build", [capped_gemma2, scaled_granite])
def test_soft_caps_and_logit_scales_are_part_of_the_loss(build):
    model = build()
    assert perplexity(model, TEXT, length=20).value == pytest.approx(plain(model, TEXT, 20), rel=1e-4)


@given(batch=st.integers(1, 9), rows=st.integers(1, 30))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_and_chunks_do_not_change_the_value(tiny_llama, batch, rows):
    expected = perplexity(tiny_llama, TEXT, length=24).value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", rows * 4 * 64)
        assert perplexity(tiny_llama, TEXT, length=24, batch_size=batch).value == pytest.approx(expected, rel=1e-6)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tiny_llama):
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()
    assert perplexity(tiny_llama, TEXT, length=10).value == pytest.approx(64, rel=1e-6)


def test_limit_takes_the_first_windows(tiny_llama):
    limited = perplexity(tiny_llama, TEXT, length=24, limit=3)
    assert limited.value == pytest.approx(perplexity(tiny_llama, TEXT[:72], length=24).value, rel=1e-9)
    assert limited.windows == 3


def test_bfloat16_logits_are_normalised_in_float32(tiny_llama):
    wide = perplexity(tiny_llama, TEXT, length=24).value
    assert perplexity(tiny_llama.to(torch.bfloat16), TEXT, length=24).value == pytest.approx(wide, rel=2e-2)


def test_a_text_shorter_than_a_window_is_refused_with_both_numbers(tiny_llama):
    with pytest.raises(InputError, match=r"has 23 tokens.*24"):
        perplexity(tiny_llama, TEXT[:23], length=24)


@pytest.mark.parametrize("bad", [64, -1])
def test_an_unknown_token_is_refused_before_the_model_runs(tiny_llama, bad):
    ids = TEXT.clone()
    ids[30] = bad
    tiny_llama.forward = None
    with pytest.raises(InputError, match=rf"token id {bad} .* 64 rows"):
        perplexity(tiny_llama, ids, length=24)


@pytest.mark.parametrize("ids", [TEXT.float(), TEXT.reshape(2, 100), TEXT > 3])
def test_ids_must_be_a_row_of_integers(tiny_llama, ids):
    with pytest.raises(InputError, match="integers"):
        perplexity(tiny_llama, ids, length=24)


@pytest.mark.parametrize("wrong", [{"length": 1}, {"limit": 0}, {"batch_size": 0}])
def test_settings_out_of_range_are_refused_by_name(tiny_llama, wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        perplexity(tiny_llama, TEXT, **({"length": 24} | wrong))


def test_a_window_longer_than_the_positions_is_refused(tiny_llama):
    with pytest.raises(InputError, match=r"129.*128 positions"):
        perplexity(tiny_llama, TEXT, length=129)


def test_nan_weights_are_a_numeric_error_that_names_the_windows(tiny_llama):
    with torch.no_grad():
        tiny_llama.lm_head.weight[5] = float("nan")
    with pytest.raises(NumericError, match="windows 1 to 8"):
        perplexity(tiny_llama, TEXT, length=24)


def test_a_model_without_weights_is_refused(tiny_llama):
    with pytest.raises(InputError, match="no weights in memory"):
        perplexity(tiny_llama.to("meta"), TEXT, length=24)


def test_the_model_is_left_as_it_was(tiny_llama):
    tiny_llama.train()
    tiny_llama.model.layers[1].eval()
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    modes = [part.training for part in tiny_llama.modules()]
    state = torch.get_rng_state()
    perplexity(tiny_llama, TEXT, length=24)
    assert [part.training for part in tiny_llama.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in tiny_llama.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_training_mode_is_restored_after_an_error(tiny_llama):
    tiny_llama.train()
    with torch.no_grad():
        tiny_llama.lm_head.weight.fill_(float("inf"))
    with pytest.raises(NumericError):
        perplexity(tiny_llama, TEXT, length=24)
    assert tiny_llama.training


def test_threads_may_share_a_model(tiny_llama):
    values = []
    threads = [
        threading.Thread(target=lambda: values.append(perplexity(tiny_llama, TEXT, length=24).value)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(values) == 4
    assert len(set(values)) == 1


def test_the_batch_is_halved_where_memory_runs_out_and_the_value_stays(tiny_llama):
    expected, original, sizes = perplexity(tiny_llama, TEXT, length=24).value, tiny_llama.forward, []

    def small_device(input_ids, **settings):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return original(input_ids=input_ids, **settings)

    tiny_llama.forward = small_device
    assert perplexity(tiny_llama, TEXT, length=24, batch_size=8).value == pytest.approx(expected, rel=1e-6)
    assert sizes == [8, 4, 2, 2, 2, 2]


def test_a_device_without_room_for_one_window_is_a_resource_error(tiny_llama):
    def no_device(**settings):
        raise torch.OutOfMemoryError("out of memory")

    tiny_llama.forward = no_device
    with pytest.raises(ResourceError, match="no memory for 1 windows"):
        perplexity(tiny_llama, TEXT, length=24, batch_size=4)


def test_progress_counts_every_window(tiny_llama):
    class Counting(Silent):
        def __init__(self):
            self.total, self.done, self.open = 0, 0, 0

        def start(self, what, total):
            self.total, self.open = total, self.open + 1
            return 1

        def advance(self, step, amount):
            self.done += amount

        def finish(self, step):
            self.open -= 1

    seen = Counting()
    perplexity(tiny_llama, TEXT, length=24, batch_size=3, progress=seen)
    assert (seen.total, seen.done, seen.open) == (8, 8, 0)
