"""The head and the embedding: pruned for those who ask, on the inputs that they really see."""

from __future__ import annotations

import copy

import pytest
import torch

from secateur.core.errors import InputError, RecipeError
from secateur.core.pattern import NM
from secateur.core.problem import LayerProblem
from secateur.engine.budget import assign
from secateur.engine.journal import Journal
from secateur.engine.sweep import Sweep


def test_head_and_embedding_are_left_alone_unless_asked(tiny_llama, ids, pruner):
    head, embedding = tiny_llama.lm_head.weight.clone(), tiny_llama.model.embed_tokens.weight.clone()
    Sweep(patterns=assign(tiny_llama, "50%"), pruner=pruner).run(tiny_llama, ids)
    assert torch.equal(tiny_llama.lm_head.weight, head)
    assert torch.equal(tiny_llama.model.embed_tokens.weight, embedding)


@pytest.mark.parametrize("correction", [False, True])
def test_the_head_is_solved_on_what_the_pruned_blocks_give_it(tiny_llama, ids, pruner, correction):
    dense = copy.deepcopy(tiny_llama)
    patterns = assign(tiny_llama, NM(2, 4), include=["lm_head"])
    report = Sweep(patterns=patterns, pruner=pruner, guard=False, error_correction=correction).run(tiny_llama, ids)
    seen = []
    hook = tiny_llama.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        tiny_llama(ids, use_cache=False)
    hook.remove()
    x = seen[0].reshape(-1, seen[0].shape[-1])
    gram = x.T @ x / len(x)
    expected = pruner.prune(LayerProblem(dense.lm_head.weight.detach(), NM(2, 4), gram, gram.diagonal(), x.mean(0)))
    torch.testing.assert_close(tiny_llama.lm_head.weight.detach(), expected.weight, rtol=1e-4, atol=1e-6)
    assert report.blocks[-1].layers[0].name == "lm_head"
    assert int(report.masks["lm_head"].sum()) == expected.mask.sum()


def test_the_embedding_is_pruned_by_magnitude(tiny_llama, ids, pruner):
    before = tiny_llama.model.embed_tokens.weight.detach().clone()
    patterns = assign(tiny_llama, "50%", include=["model.embed_tokens"], ignore=["*.down_proj"])
    Sweep(patterns=patterns, pruner=pruner, refit=True).run(tiny_llama, ids)
    after = tiny_llama.model.embed_tokens.weight.detach()
    assert int((after == 0).sum()) == before.numel() // 2
    assert before.abs()[after == 0].max() <= before.abs()[after != 0].min()
    assert torch.equal(after[after != 0], before[after != 0])


def test_a_tied_head_needs_both_names_and_stays_tied(make_llama, ids, pruner):
    model = make_llama(tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"shares its weight with `model\.embed_tokens`"):
        assign(model, "50%", include=["lm_head"])
    patterns = assign(model, "50%", include=["lm_head", "model.embed_tokens"])
    Sweep(patterns=patterns, pruner=pruner).run(model, ids)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert int((model.lm_head.weight == 0).sum()) == model.lm_head.weight.numel() // 2


def test_names_that_are_not_outside_the_blocks_are_refused(tiny_llama):
    with pytest.raises(RecipeError, match=r"`lm_hed`.*lm_head"):
        assign(tiny_llama, "50%", include=["lm_hed"])
    with pytest.raises(RecipeError, match="no linear or embedding outside the blocks"):
        assign(tiny_llama, "50%", include=["model.layers.0.mlp.up_proj"])


def test_a_sweep_resumed_after_its_blocks_prunes_the_head_to_the_same_bits(make_llama, ids, pruner, tmp_path):
    def run(model, journal=None, stop=None):
        patterns = assign(model, "50%", include=["lm_head"])
        return Sweep(patterns=patterns, pruner=pruner).run(model, ids, journal=journal)

    expected = make_llama()
    run(expected)
    journal = Journal(tmp_path, {"run": 1}, resume=False)
    run(make_llama(), journal)
    journal.close(remove=False)
    for finished in (3, 2):
        lines = (tmp_path / "journal.jsonl").read_text().splitlines(keepends=True)[:finished]
        (tmp_path / "journal.jsonl").write_text("".join(lines))
        model = make_llama()
        journal = Journal(tmp_path, {"run": 1}, resume=True)
        assert journal.finished == finished
        report = run(model, journal)
        journal.close(remove=False)
        assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
        assert [block.index for block in report.blocks] == [0, 1, 2]
