"""The table of methods, and the guarantees of the protocol for a new method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import layer
from helpers.plain import damped, least_squares
from helpers.tolerances import RELATIVE, distance
from torch import Tensor

import lobs_native as lobs
from lobs_native.errors import ArgumentError
from lobs_native.solvers.method import Choice, Method
from lobs_native.solvers.methods import TABLE
from lobs_native.solvers.patterns import pattern_of
from lobs_native.solvers.problem import Problem, nearest_count
from lobs_native.solvers.pruning import prune_problem
from lobs_native.solvers.settings import METHODS, SCOPES, Target
from lobs_native.solvers.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
R, C = 6, 12


class Last(Method):
    """Removes the last weights of every row: all that a new method has to write."""

    def choose(self, share: float, scope: str) -> Choice:
        removed = self.problem.masked()
        removed[:, :, C - nearest_count(share, C) : C] = True
        return Choice(removed)


def problem(method: type[Method], **changes: Any) -> tuple[Problem, Tensor, Tensor]:
    W, H = layer(R, C)
    made = Problem.of(
        W[None],
        None,
        [H],
        **{
            "damping": 0.01,
            "inverted": method.inverts,
            "prune_bias": False,
            "mask": None,
            "workspace": Workspace("cpu"),
            **changes,
        },
    )
    return made, W, H


def test_the_table_and_the_settings_name_the_same_methods_in_one_order():
    assert tuple(TABLE) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_a_threshold_is_for_methods_that_compare_saliencies(method):
    W, H = layer(R, C)
    if TABLE[method].thresholds:
        assert lobs.prune_weight(W, H, threshold=1e9, method=method).sparsity == 1
        return
    with pytest.raises(ArgumentError, match="threshold"):
        lobs.prune_weight(W, H, threshold=1.0, method=method)
    with pytest.raises(NotImplementedError, match=TABLE[method].__name__):
        TABLE[method](problem(TABLE[method])[0], pattern_of("unstructured")).choose_below(1.0)


@pytest.mark.parametrize("method", METHODS)
def test_layers_share_a_budget_under_methods_that_can_compare_them(method):
    given, W, H = problem(TABLE[method])
    chooser = TABLE[method](given, pattern_of("unstructured"))
    if TABLE[method].compares_layers:
        costs, unit = chooser.cheapest(9)
        assert costs.shape == (9,)
        assert torch.equal(costs, costs.sort().values)
        ceilings = lobs.trace_weight(W, H).loss.cummax(1).values.reshape(-1).sort().values
        near = 0.5 if method == "admm" else RELATIVE[F64]  # a curve through few points
        assert distance(unit * costs, ceilings[:9]) < near
        return
    with pytest.raises(NotImplementedError, match=TABLE[method].__name__):
        chooser.cheapest(9)
    with pytest.raises(ArgumentError, match="scope: 'model' needs"):
        lobs.prune(
            torch.nn.Linear(C, R), [torch.ones(2, C)], sparsity=0.5, method=method, scope="model"
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_method_inverts_only_what_it_declares(method):
    W, H = layer(R, C)
    out = lobs.prune_weight(W, H, sparsity=0.5, method=method)
    assert (out.condition is not None) == TABLE[method].inverts


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x3"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_choice_leaves_the_problem_unchanged_and_zeros_where_it_removes(method, scope, pattern):
    given, W, _ = problem(TABLE[method])
    chooser = TABLE[method](given, pattern_of(pattern))
    for share in (0.0, 0.5):
        choice = chooser.choose(share, scope)
        assert choice.removed.shape == W[None].shape
        assert choice.removed.dtype == torch.bool
        assert torch.equal(given.before[0], W)
        if choice.weights is not None:
            assert not bool(choice.weights[choice.removed].any())


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_alone_is_a_choice_of_every_method(method):
    mask = torch.rand(1, R, C) > 0.3
    given, _, _ = problem(TABLE[method], mask=mask)
    choice = TABLE[method](given, pattern_of("unstructured")).choose_masked()
    assert torch.equal(choice.removed, ~mask)


@pytest.mark.parametrize("target", [Target(sparsity=0.25), Target(max_error=1.0), Target()])
@pytest.mark.parametrize("refine", [None, "solve", "exchange"])
def test_a_method_that_only_chooses_is_repaired_and_refined(target, refine):
    mask = torch.ones(1, R, C, dtype=torch.bool)
    mask[:, :, -2:] = False
    given, W, H = problem(Last, mask=mask)
    out = prune_problem(
        given, Last, pattern_of("unstructured"), target=target, scope="layer", refine=refine
    )
    assert out.optimal
    assert out.costs is None
    assert (out.swaps > 0) <= (refine == "exchange")
    if target.sparsity is not None:
        assert int(out.removed.sum()) == R * 3
    for row, removed, before in zip(out.weights[0], out.removed[0], W, strict=True):
        best = least_squares(before, damped(H, 0.01), removed)
        assert distance(row, best) < RELATIVE[F64]
