from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur.core.linalg as linalg
from secateur.core.errors import NumericError
from secateur.core.linalg import (
    cholesky_factor,
    corrected_target,
    damped,
    inverse_factor,
    invert_definite_,
    is_finite,
    quadratic_loss,
    refit,
    refit_exact,
    refit_iterative,
)
from secateur.core.pattern import NM, Unstructured
from strategies import correlated_gram, correlated_inputs, random_weight, seeds

quick = settings(max_examples=25, deadline=None)


def least_squares(target: Tensor, inputs: Tensor, mask: Tensor) -> Tensor:
    """The masked optimum from the tokens themselves, one row at a time, float64."""
    result = torch.zeros_like(target, dtype=torch.float64)
    for row, support in enumerate(mask):
        answer = inputs.double() @ target[row].double()
        result[row, support] = torch.linalg.lstsq(inputs.double()[:, support], answer[:, None]).solution[:, 0]
    return result


@given(rows=st.integers(1, 6), columns=st.integers(1, 20), seed=seeds)
@quick
def test_the_quadratic_loss_is_the_error_on_the_tokens(rows, columns, seed):
    inputs, error = correlated_inputs(64, columns, seed=seed).double(), random_weight(rows, columns, seed).double()
    gram = inputs.T @ inputs / 64
    expected = (inputs @ error.T).square().sum() / 64
    torch.testing.assert_close(quadratic_loss(error, gram), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("columns", [63, 64, 65, 200, 515])
def test_strips_of_the_quadratic_loss_cover_everything_once(columns):
    error, gram = random_weight(3, columns), correlated_gram(columns)
    expected = ((error.double() @ gram.double()) * error.double()).sum()
    torch.testing.assert_close(quadratic_loss(error, gram), expected, rtol=1e-5, atol=0)


@given(columns=st.integers(1, 24), damping=st.sampled_from([0.0, 1e-3, 0.1]), seed=seeds)
@quick
def test_the_inverse_factor_is_upper_and_squares_to_the_inverse(columns, damping, seed):
    gram = correlated_gram(columns, decay=0.5, seed=seed).double()
    upper, used = inverse_factor(gram, damping)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped(gram, used)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 256, 257, 600])
def test_a_definite_matrix_is_inverted_in_place_by_halves(size):
    matrix = correlated_gram(size)
    matrix.diagonal().add_(matrix.diagonal().mean())
    inverse = matrix.clone()
    assert invert_definite_(inverse)
    torch.testing.assert_close(inverse @ matrix, torch.eye(size), atol=1e-3, rtol=0)
    torch.testing.assert_close(inverse, inverse.T, rtol=1e-3, atol=1e-4 * float(inverse.abs().max()))


@pytest.mark.parametrize("place", [3, 599])
def test_an_indefinite_matrix_has_no_definite_inverse(place):
    matrix = torch.eye(600)
    matrix[place, place] = -1.0
    assert not invert_definite_(matrix)


def test_rows_of_the_inverse_factor_eliminate_from_the_left():
    gram = correlated_gram(12, seed=3).double()
    upper, _ = inverse_factor(gram, 0.01)
    for j in range(12):
        rest = torch.linalg.inv(damped(gram, 0.01)[j:, j:])
        torch.testing.assert_close(upper[j, j] ** 2, rest[0, 0])
        torch.testing.assert_close(upper[j, j:] / upper[j, j], rest[0] / rest[0, 0])


def test_a_dead_input_gets_a_unit_diagonal_and_does_not_dilute_the_damping():
    gram = torch.diag(torch.tensor([2.0, 0.0, 4.0]))
    torch.testing.assert_close(damped(gram, 0.1).diagonal(), torch.tensor([2.3, 1.0, 4.3]))
    torch.testing.assert_close(damped(torch.zeros(2, 2), 0.1), torch.eye(2))


def test_a_singular_gram_gets_more_damping_and_says_how_much():
    inputs = random_weight(4, 16)  # 4 tokens, 16 features
    factor, used = cholesky_factor(inputs.T @ inputs - 1e-3 * torch.eye(16), 1e-6)
    assert used > 1e-6
    assert torch.isfinite(factor).all()


def test_float64_is_tried_before_more_damping(monkeypatch):
    tried = []
    original = torch.linalg.cholesky_ex

    def fails_in_float32(matrix: Tensor) -> tuple[Tensor, Tensor]:
        tried.append(matrix.dtype)
        factor, info = original(matrix)
        return factor, info + (matrix.dtype == torch.float32)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_in_float32)
    factor, used = cholesky_factor(correlated_gram(8), 0.01)
    assert tried == [torch.float32, torch.float64]
    assert (factor.dtype, used) == (torch.float32, 0.01)


def test_a_hopeless_gram_is_refused():
    with pytest.raises(NumericError, match="no Cholesky factor"):
        cholesky_factor(torch.tensor([[1.0, 1e6], [1e6, 1.0]]), 0.01)
    with pytest.raises(NumericError, match="NaN or infinity"):
        cholesky_factor(torch.full((2, 2), float("nan")), 0.01)


def test_finite_means_every_entry():
    assert is_finite(torch.tensor([3e38, 3e38]))  # the sum overflows, the entries do not
    assert not is_finite(torch.tensor([1.0, float("inf"), -float("inf")]))
    assert not is_finite(torch.tensor([1.0, float("nan")]))
    assert is_finite(torch.empty(0))


@given(rows=st.integers(1, 5), columns=st.integers(1, 16), sparsity=st.sampled_from([0.0, 0.4, 0.8, 1.0]), seed=seeds)
@quick
def test_the_refit_is_the_least_squares_solution_on_the_tokens(rows, columns, sparsity, seed):
    inputs, target = (
        correlated_inputs(80, columns, decay=0.5, seed=seed).double(),
        random_weight(rows, columns, seed).double(),
    )
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) >= sparsity
    gram = inputs.T @ inputs / 80
    expected = least_squares(target, inputs, mask)
    torch.testing.assert_close(refit_exact(target, gram, mask, damping=0.0), expected, rtol=1e-6, atol=1e-7)
    iterative = refit_iterative(target, gram, mask, target, damping=0.0, tolerance=1e-14)
    torch.testing.assert_close(iterative, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["auto", "exact", "iterative"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6, "layer")])
def test_the_gradient_vanishes_on_the_support(form, pattern):
    target, gram = random_weight(24, 64), correlated_gram(64, decay=1.0)
    mask = pattern.mask(target.abs())
    value = refit(target, gram, mask, form=form)
    assert not value[~mask].any()
    gradient = ((value - target) @ damped(gram, 1e-4))[mask]
    start = ((target * mask - target) @ damped(gram, 1e-4))[mask]
    assert gradient.norm() < (3e-2 if form == "iterative" else 1e-4) * start.norm()


def test_both_forms_agree_on_the_loss():
    target, gram = random_weight(32, 96), correlated_gram(96)
    mask = NM(2, 4).mask(target.abs())
    exact = quadratic_loss(refit_exact(target, gram, mask) - target, gram)
    iterative = quadratic_loss(refit_iterative(target, gram, mask, target) - target, gram)
    assert abs(float(iterative / exact) - 1) < 1e-3


def test_the_iterative_form_never_raises_the_loss_of_its_start():
    target, gram = random_weight(8, 32), correlated_gram(32, decay=2.5)
    mask = NM(1, 4).mask(target.abs())
    regular = damped(gram, 1e-4)
    loss = float(quadratic_loss(target * mask - target, regular))
    for steps in range(1, 12):
        value = refit_iterative(target, gram, mask, target, iterations=steps)
        now = float(quadratic_loss(value - target, regular))
        assert now <= loss * (1 + 1e-5)
        loss = now


def test_large_supports_go_to_the_iterative_form_and_small_ones_do_not(monkeypatch):
    chosen = []
    monkeypatch.setattr(linalg, "refit_exact", lambda target, *_: chosen.append("exact") or target)
    monkeypatch.setattr(linalg, "_conjugate_gradients", lambda target, *_: chosen.append("iterative") or (target, True))
    target = torch.zeros(4, 1536)
    for kept in (400, 800):
        mask = torch.zeros_like(target, dtype=torch.bool)
        mask[:, :kept] = True
        refit(target, torch.eye(1536), mask)
    assert chosen == ["exact", "iterative"]


def test_an_iteration_that_does_not_settle_gives_way_to_the_exact_form(monkeypatch):
    monkeypatch.setattr(linalg, "EXPECTED_STEPS", 0)
    target, gram = random_weight(6, 64), correlated_gram(64, decay=3.0)
    mask = NM(2, 4).mask(target.abs())
    torch.testing.assert_close(refit(target, gram, mask), refit_exact(target, gram, mask), rtol=0, atol=0)


def test_the_batched_form_of_other_devices_equals_the_loop(monkeypatch):
    target, gram = random_weight(10, 32), correlated_gram(32, decay=1.0)
    mask = Unstructured(0.6, "layer").mask(target.abs())
    mask[3] = False
    regular, linear = damped(gram, 1e-4), target @ damped(gram, 1e-4)
    batched = linalg._refit_rows(linear, regular, mask, int(mask.sum(1).max()))
    torch.testing.assert_close(batched, refit_exact(target, gram, mask), rtol=1e-3, atol=1e-4)


def test_a_row_that_float32_cannot_factor_is_solved_in_float64():
    inputs = random_weight(64, 3)
    inputs = torch.cat([inputs, inputs[:, :1] + 1e-5 * random_weight(64, 1, seed=1)], 1)
    gram = inputs.T @ inputs / 64
    system = gram + 1e-9 * torch.eye(4)
    right = torch.ones(4)
    solution = linalg._solve_definite(system, right)
    expected = torch.linalg.solve(system.double(), right.double())
    if int(torch.linalg.cholesky_ex(system).info):
        torch.testing.assert_close(solution.double(), expected, rtol=1e-5, atol=0)
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    torch.testing.assert_close(linalg._solve_definite(indefinite, torch.tensor([3.0, 3.0])), torch.ones(2))


def test_equal_paths_need_no_correction():
    weight, gram = random_weight(6, 24), correlated_gram(24)
    torch.testing.assert_close(corrected_target(weight, gram, gram), weight, rtol=1e-3, atol=1e-3)


def test_the_corrected_target_is_the_least_squares_answer_to_the_dense_outputs():
    dense = correlated_inputs(200, 12, seed=1).double()
    sparse = dense + 0.3 * correlated_inputs(200, 12, seed=2).double()
    weight = random_weight(5, 12).double()
    expected = torch.linalg.lstsq(sparse, dense @ weight.T).solution.T
    result = corrected_target(weight, dense.T @ sparse / 200, sparse.T @ sparse / 200, damping=0.0)
    torch.testing.assert_close(result, expected)


def test_a_dead_input_keeps_its_weight_in_the_corrected_target():
    gram = correlated_gram(6).double()
    gram[2], gram[:, 2] = 0.0, 0.0
    weight = random_weight(3, 6).double()
    torch.testing.assert_close(corrected_target(weight, gram, gram), weight)
