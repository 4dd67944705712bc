"""Zero-shot tasks: lm-eval's numbers, from local files without the Hub, with nothing on stdout."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch

from secateur.core.errors import InputError, NumericError, RecipeError
from secateur.core.progress import Silent
from secateur.evaluate.harness import LONGEST_LINE, is_path, read_item, read_tasks, run_tasks

WORDS = ["red", "green", "blue", "tall", "small", "round", "old", "new", "warm", "cold", "fast", "slow"]


def question(index):
    choices = [WORDS[index % 12], WORDS[(index + 5) % 12] + " thing", "a " + WORDS[(index + 7) % 12]]
    return {"question": f"What is {WORDS[(index * 5) % 12]}?", "choices": choices, "answer": index % 3}


def sentence(index):
    return {"sentence": f"The {WORDS[index % 12]} _ was near.", "choices": ["cat", "horse"], "answer": index % 2}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, and an end token that may pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)} | {"<end>": 256}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")


@pytest.fixture
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model.eval()


def log_likelihood(model, tokenizer, context, continuation):
    """The plain loop: one request, one forward, no padding."""
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    with torch.no_grad():
        scores = model(ids).logits[0].float().log_softmax(-1)
    return sum(float(scores[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))


def accuracy(picks, rows):
    return sum(pick == row["answer"] for pick, row in zip(picks, rows, strict=True)) / len(rows)


def best(values):
    return max(range(len(values)), key=values.__getitem__)


def test_accuracies_equal_a_plain_log_likelihood_loop(model, tokenizer, tmp_path):
    rows = [question(index) for index in range(24)]
    picks, normed = [], []
    for row in rows:
        context = f"Question: {row['question']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, context, " " + choice) for choice in row["choices"]]
        picks.append(best(scores))
        normed.append(best([score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]))
    found = run_tasks(model, tokenizer, [write_rows(tmp_path / "colours.jsonl", rows)])["colours"]
    assert found["acc,none"] == pytest.approx(accuracy(picks, rows))
    assert found["acc_norm,none"] == pytest.approx(accuracy(normed, rows))
    assert picks != normed  # else the two metrics would not be told apart here
    assert 0 < found["acc_stderr,none"] < 1


def test_sentences_with_a_gap_are_scored_by_their_common_ending(model, tokenizer, tmp_path):
    rows = [sentence(index) for index in range(12)]
    picks = []
    for row in rows:
        before, after = row["sentence"].split("_")
        picks.append(best([log_likelihood(model, tokenizer, before + choice, after) for choice in row["choices"]]))
    found = run_tasks(model, tokenizer, [write_rows(tmp_path / "gaps.jsonl", rows)])["gaps"]
    assert found["acc,none"] == pytest.approx(accuracy(picks, rows))
    assert "acc_norm,none" not in found


def test_a_folder_gives_one_result_per_file_and_the_limit_counts_in_each(model, tokenizer, tmp_path):
    write_rows(tmp_path / "a.jsonl", [question(index) for index in range(9)])
    write_rows(tmp_path / "b.jsonl", [sentence(index) for index in range(9)])

    class Counting(Silent):
        answered = 0

        def advance(self, step, amount):
            self.answered += amount

    seen = Counting()
    found = run_tasks(model, tokenizer, [str(tmp_path)], limit=4, progress=seen)
    assert sorted(found) == ["a", "b"]
    assert seen.answered == 4 * 3 + 4 * 2


def test_batches_do_not_change_the_result(model, tokenizer, tmp_path):
    path = write_rows(tmp_path / "colours.jsonl", [question(index) for index in range(10)])
    assert run_tasks(model, tokenizer, [path], batch_size=1) == run_tasks(model, tokenizer, [path], batch_size=7)


def test_nothing_is_left_behind(model, tokenizer, tmp_path, capsys):
    path = write_rows(tmp_path / "colours.jsonl", [question(index) for index in range(4)])
    run_tasks(model, tokenizer, [path])  # the imports happen here
    capsys.readouterr()
    model.train()
    random, logger, pad = torch.get_rng_state(), logging.getLogger("lm_eval"), tokenizer.pad_token
    log = (list(logger.handlers), logger.propagate, logger.level, list(logging.getLogger().handlers))
    run_tasks(model, tokenizer, [path])
    assert capsys.readouterr().out == ""
    assert torch.equal(random, torch.get_rng_state())
    assert (list(logger.handlers), logger.propagate, logger.level, list(logging.getLogger().handlers)) == log
    assert tokenizer.pad_token == pad
    assert model.training
    assert [file.name for file in tmp_path.iterdir()] == ["colours.jsonl"]


def test_requests_cut_at_the_models_positions_are_noted(model, tokenizer, tmp_path):
    rows = [question(index) | {"question": "x" * 300} for index in range(2)]

    class Notes(Silent):
        def __init__(self):
            self.lines = []

        def note(self, message):
            self.lines.append(message)

    seen = Notes()
    model.config.max_position_embeddings = 128
    run_tasks(model, tokenizer, [write_rows(tmp_path / "long.jsonl", rows)], progress=seen)
    assert len(seen.lines) == 1
    assert "Truncating" in seen.lines[0]
    assert "(6 times)" in seen.lines[0]


@pytest.fixture
def small_registry(monkeypatch):
    """lm-eval's registry with the ARC tasks alone: reading all ten thousand takes half a minute."""
    import lm_eval.tasks

    from secateur.evaluate import bridge

    folder = Path(lm_eval.tasks.__file__).parent / "arc"
    narrow = functools.partial(bridge.TaskManager, include_defaults=False)
    monkeypatch.setattr(bridge, "TaskManager", lambda include_path: narrow(include_path=str(folder)))


def test_an_unknown_task_is_refused_with_the_nearest_names(model, tokenizer, small_registry):
    with pytest.raises(RecipeError, match=r"no task `arc_eazy` \(did you mean `arc_easy`"):
        run_tasks(model, tokenizer, ["arc_eazy"])


def test_a_registered_task_whose_data_cannot_be_had_points_to_local_files(
    model, tokenizer, small_registry, monkeypatch
):
    import datasets

    def unreachable(*arguments, **settings):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"`arc_easy`.*Couldn't reach") as caught:
        run_tasks(model, tokenizer, ["arc_easy"])
    assert ".jsonl" in caught.value.hint


def test_a_registered_task_runs_by_its_name(model, tokenizer, small_registry, monkeypatch):
    import datasets

    rows = [question(index) for index in range(8)]
    as_on_the_hub = [
        {"question": row["question"], "choices": {"text": row["choices"], "label": ["A", "B", "C"]}, "answerKey": key}
        for row, key in zip(rows, "ABCABCAB", strict=True)
    ]
    split = datasets.Dataset.from_list(as_on_the_hub)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **settings: dict.fromkeys(SPLITS, split))
    found = run_tasks(model, tokenizer, ["arc_easy"])
    assert found["arc_easy"].keys() >= {"acc,none", "acc_norm,none"}


SPLITS = ("train", "validation", "test")


def test_a_missing_lm_eval_names_the_extra(model, tokenizer, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "colours.jsonl", [question(0)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="lm-eval") as caught:
        run_tasks(model, tokenizer, [path])
    assert caught.value.hint == "pip install 'secateur[eval]'"


def test_the_same_task_twice_is_refused(model, tokenizer, tmp_path):
    path = write_rows(tmp_path / "colours.jsonl", [question(0)])
    with pytest.raises(RecipeError, match="`colours` is named twice"):
        run_tasks(model, tokenizer, [path, str(tmp_path)])


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"batch_size": 0}, {"tasks": []}])
def test_settings_out_of_range_are_refused(model, tokenizer, wrong):
    with pytest.raises(RecipeError, match=r"limit|batch_size|no task"):
        run_tasks(model, tokenizer, **({"tasks": ["arc_easy"]} | wrong))


def test_a_tokenizer_of_another_model_is_refused(model, tokenizer, tmp_path):
    path = write_rows(tmp_path / "colours.jsonl", [question(0) | {"question": "caf\u00e9"}])
    model.resize_token_embeddings(120)
    with pytest.raises(InputError, match="120 rows"):
        run_tasks(model, tokenizer, [path])
    with pytest.raises(InputError, match="need a tokenizer"):
        run_tasks(model, None, [path])


def test_nan_weights_are_a_numeric_error_that_names_the_task(model, tokenizer, tmp_path):
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(NumericError, match="task `colours`"):
        run_tasks(model, tokenizer, [write_rows(tmp_path / "colours.jsonl", [question(0)])])


@pytest.mark.parametrize(
    ("text", "path"),
    [("arc_easy", False), ("./arc_easy", True), ("arc.jsonl", True), ("data/zeroshot", True), (".", True)],
)
def test_a_slash_or_the_ending_makes_a_path(text, path):
    assert is_path(text) is path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["one"]}, "`choices` must be a list of at least two texts"),
        ({"choices": ["one", 2]}, "`choices` must be"),
        ({"choices": ["one", " "]}, "`choices` must be"),
        ({"answer": 3}, "`answer` must be the index of a choice, 0 to 2, got 3"),
        ({"answer": "1"}, "`answer` must be"),
        ({"answer": True}, "`answer` must be"),
        ({"question": ""}, "`question` must be a text"),
        ({"sentence": "no gap"}, "exactly one `_`"),
        ({"sentence": "_ and _ end"}, "exactly one `_`"),
        ({"sentence": "ends in _"}, "with text after it"),
        ({"premise": "It rained.", "relation": "reason"}, "`relation` must be cause or effect"),
    ],
)
def test_a_malformed_row_is_refused_by_key(change, message):
    with pytest.raises(InputError, match=message):
        read_item(question(0) | change)


def test_a_row_that_is_no_object_is_refused():
    with pytest.raises(InputError, match="must be a JSON object, got list"):
        read_item([1])


def test_a_passage_stands_before_its_question():
    item = read_item({"passage": "Rain fell.", "question": "is it wet", "choices": ["yes", "no"], "answer": 0})
    assert item.contexts == ("Rain fell.\nQuestion: is it wet?\nAnswer:",) * 2


def test_a_cause_is_asked_with_because_and_an_effect_with_therefore():
    row = {"premise": "It rained.", "relation": "effect", "choices": ["We got wet.", "It was dry."], "answer": 0}
    assert read_item(row).contexts[0] == "It rained therefore"
    assert read_item(row | {"relation": "cause"}).contexts[0] == "It rained because"
    assert read_item(row).continuations == ("we got wet.", "it was dry.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "a"\n', r"bad.jsonl:1: the line is not JSON"),
        (json.dumps(question(0)).encode() + b"\n\n" + b"\xff\xfe\n", r"bad.jsonl:3: the line is not UTF-8"),
        (json.dumps(question(0)).encode() + b'\n{"question": "b"}\n', r"bad.jsonl:2: `choices` must be"),
        (b"[" * 100_000, r"bad.jsonl:1: the line is not JSON"),
        (b'{"question": "a", "question": "b"}', r"bad.jsonl:1: the key `question` is there twice"),
        (
            "\n".join(json.dumps(row) for row in (question(0), sentence(0))).encode(),
            r"bad.jsonl:2: rows with and without",
        ),
        (b"\n \n", "holds no rows"),
        (b" " * (LONGEST_LINE + 1), r"bad.jsonl:1: the line is longer than"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_tasks(path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(question(0)).encode() + b"\r\n")
    assert read_tasks(path)[0].items[0] == read_item(question(0))


def test_an_empty_folder_or_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no \.jsonl file"):
        read_tasks(tmp_path)
    with pytest.raises(InputError, match="no task file"):
        read_tasks(tmp_path / "none.jsonl")
