"""torch.ops.lobs_native: the results of lobs_native.ops, in eager mode and under torch.compile."""

from __future__ import annotations

import inspect
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import features, layer
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lobs_native as lobs
from lobs_native import ops
from lobs_native.errors import DtypeError, NonFiniteError, NotPositiveDefiniteError, ShapeError
from lobs_native.ops import library

pytestmark = pytest.mark.usefixtures("one_thread")

R, C = 6, 16
NAMED = torch.ops.lobs_native


def problem() -> tuple[Tensor, Tensor]:
    """W (R, C) and A (C, C), float32."""
    W, H = layer(R, C)
    return W.float(), torch.linalg.inv(H + 0.1 * torch.eye(C)).float()


def half() -> Tensor:
    """Bool (R, C), half of every row."""
    return torch.arange(C).expand(R, C) % 2 == 0


def samples() -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Small arguments for every operation, which use different options."""
    W, A = problem()
    X = features(20, C)
    score = torch.rand(R, C, dtype=torch.float64)
    order, start = ops.rank_rows(score, half())
    U = torch.linalg.cholesky(A.double(), upper=True).float().contiguous()
    gone, none = half().to(torch.uint8), torch.zeros(R, C, dtype=torch.uint8)
    blocks = torch.eye(4).repeat(4, 1, 1).contiguous()
    p = W.masked_fill(half(), 0)
    sliced = ops.SlicedWeight.pack(W.masked_fill(half(), 0), width=16)
    parts = (sliced.values, sliced.columns, sliced.steps)
    sizes = {"rows": R, "features": C, "width": 16}
    return {
        "hessian_accumulate_": [
            ((torch.zeros(C, C, dtype=torch.float64), X), {}),
            ((torch.zeros(C + 1, C + 1), X.bfloat16(), torch.rand(20)), {"ones": True}),
            ((torch.zeros(C, C), X.float().T.contiguous().T), {"backend": "reference"}),
        ],
        "inverse_update_": [
            ((blocks, X.float()[:3], 8.0), {}),
            ((blocks[:3], X.float()[:, :11], 2.0), {}),
        ],
        "static_order_prune_": [((W, A, order, start), {})],
        "support_solve_": [
            ((W, A, half()), {}),
            ((W.double(), A.double(), half()), {"backend": "cpu"}),
        ],
        "sweep_block_": [
            ((W, U, gone, torch.empty(R, C)), {}),
            ((W, U, none, torch.empty(R, C)), {"group": 4, "per_group": 2}),
        ],
        "admm_step_": [
            ((W * 0.5, W * 0, W, half()), {"count": 20}),
            ((W * 0.5, W * 2, W, half(), gone), {"group": 4, "per_group": 2}),
            ((W * 0.5, W * 2, W, half()), {"count": 3, "unit": 2, "by_row": True}),
        ],
        "conjugate_step_": [((W, p, p.clone(), p @ A, half(), p.double().square().sum(1)), {})],
        "saliency_argmin": [
            ((W, A.diagonal(), half()), {}),
            ((W, A.diagonal().expand(R, C), half()[0]), {}),
        ],
        "sliced_linear": [
            ((X.float(), *parts), sizes),
            ((X.bfloat16(), *parts, torch.ones(R)), {**sizes, "backend": "reference"}),
        ],
        "rank_lowest": [((score, 5), {}), ((score, 0), {}), ((score, C), {"backend": "reference"})],
        "rank_rows": [((score, half()), {}), ((score, half() & (score > 2)), {})],
        "exact_trace": [
            ((W, A), {}),
            ((W, A, gone), {"limit": 10, "stop": 0.5}),
            ((W, A), {"limit": C + 5, "group": 4, "per_group": 2, "backend": "reference"}),
        ],
        "exact_trace_": [
            ((W, A), {"limit": 7}),
            ((W, A), {"limit": 4, "block": 4, "memory": 1 << 30}),
        ],
        "exchange_": [
            ((W.double(), A.double(), half()), {}),
            ((W.double(), A.double(), half(), ~half()), {"group": 8, "limit": 2}),
        ],
    }


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def flat(*results: Any) -> list[Tensor]:
    return [x for x in tree_leaves(results) if isinstance(x, Tensor)]


def test_every_operation_is_registered_and_tested() -> None:
    public = {
        name
        for name, function in vars(ops).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and "backend" in inspect.signature(function).parameters
        and any(p.annotation == "Tensor" for p in inspect.signature(function).parameters.values())
    }
    assert set(library.OPERATIONS) == public | {"exact_trace_"}
    assert set(samples()) == set(library.OPERATIONS)


@pytest.mark.parametrize("name", library.OPERATIONS)
def test_opcheck(name: str) -> None:
    for given, how in samples()[name]:
        torch.library.opcheck(getattr(NAMED, name), tuple(map(copied, given)), how)


@pytest.mark.parametrize("name", library.OPERATIONS)
def test_results_are_those_of_ops(name: str) -> None:
    for given, how in samples()[name]:
        own, theirs = tuple(map(copied, given)), tuple(map(copied, given))
        found = flat(getattr(NAMED, name)(*own, **how), own)
        if name.startswith("exact_trace"):
            state = {"state": theirs[2]} if len(theirs) == 3 else {}
            update = name.endswith("_")
            trace = ops.exact_trace(*theirs[:2], **state, update=update, **how)
            made: Any = (trace.order, trace.loss, trace.count, trace.lost)
        elif name == "admm_step_":
            state = {"state": theirs[4]} if len(theirs) == 5 else {}
            made = [torch.tensor(v) for v in ops.admm_step_(*theirs[:4], **state, **how)]
        elif name == "exchange_" and len(theirs) == 4:
            made = ops.exchange_(*theirs[:3], fixed=theirs[3], **how)
        else:
            made = getattr(ops, name)(*theirs, **how)
        expected = flat(made, theirs)
        assert len(found) == len(expected) > 0
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_options_are_those_of_ops() -> None:
    for name in library.OPERATIONS:
        function = inspect.signature(getattr(ops, name.replace("exact_trace_", "exact_trace")))
        wanted = {k: p.default for k, p in function.parameters.items() if k != "update"}
        schema = getattr(NAMED, name).default._schema
        found = {
            a.name: a.default_value if a.has_default_value() else inspect.Parameter.empty
            for a in schema.arguments
        }
        if "stop" in found:
            found["stop"] = wanted["stop"]  # schemas have no infinity: None stands for it
        assert found == wanted, name


def test_errors_come_through_and_nothing_is_written() -> None:
    H = torch.zeros(C, C, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="nan at"):
        NAMED.hessian_accumulate_(H, torch.full((3, C), torch.nan))
    with pytest.raises(ShapeError, match="H must be"):
        NAMED.hessian_accumulate_(H, torch.ones(3, C - 1))
    assert not bool(H.any())
    with pytest.raises(NotPositiveDefiniteError, match="raise the damping"):
        NAMED.exact_trace(torch.ones(2, C), -torch.eye(C))


def test_gradients_are_refused() -> None:
    W, A = problem()
    W.requires_grad_()
    loss = NAMED.exact_trace(W, A)[1]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        loss.sum().backward()
    before = W.detach().clone()
    with pytest.raises(DtypeError, match="requires grad"):
        NAMED.exact_trace_(W, A)
    assert torch.equal(W, before)
    H = torch.zeros(C, C)
    NAMED.hessian_accumulate_(H, W)  # an input may: it is only read
    assert not H.requires_grad


def accumulate_and_prune(
    H: Tensor, X: Tensor, W: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulate a second moment, then remove half of the weights by both methods."""
    NAMED.hessian_accumulate_(H, X)
    mean = (H.tril() + H.tril(-1).T) / len(X)
    mean = mean + 0.01 * mean.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    A = torch.cholesky_inverse(torch.linalg.cholesky(mean)).to(W.dtype)
    score = (W * W / A.diagonal()).double()
    gone = NAMED.rank_lowest(score, count)
    wanted = torch.where(gone, W, 0)
    NAMED.support_solve_(wanted, A, gone)
    repaired = torch.where(gone, 0, W - wanted @ A)
    exact = W.clone()
    loss = NAMED.exact_trace_(exact, A, limit=count)[1]
    return repaired, exact, loss


@pytest.mark.filterwarnings("ignore")  # those of the compilers themselves
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_results_are_those_of_eager(compiler: str) -> None:
    if compiler == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor: a C++ compiler is missing")
    if compiler == "inductor" and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("inductor: the headers of Python are missing")
    torch._dynamo.reset()
    W, _ = problem()
    compiled = torch.compile(accumulate_and_prune, fullgraph=True, backend=compiler)
    for rows in (40, 56):
        X = features(rows, C, seed=rows).float()
        H, G = (torch.ones(C, C, dtype=torch.float64) for _ in range(2))
        found = compiled(H, X, W, C // 2)
        expected = accumulate_and_prune(G, X, W, C // 2)
        assert torch.equal(H, G)
        assert torch.equal(found[1] == 0, expected[1] == 0)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert int((found[0] == 0).sum()) == int((found[1] == 0).sum()) == W.numel() // 2


def test_a_ranking_is_one_graph_where_torch_allows_such_lengths() -> None:
    W, A = problem()

    def prune(W: Tensor, A: Tensor, gone: Tensor) -> Tensor:
        score = (W * W / A.diagonal()).double()
        order, start = NAMED.rank_rows(score, gone)
        pruned = W.clone()
        NAMED.static_order_prune_(pruned, A, order, start)
        return pruned

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(W, A, half()), prune(W, A, half()))
        more = half() | (torch.arange(C) == 1)
        assert torch.equal(compiled(W, A, more), prune(W, A, more))


def test_a_module_that_watches_its_inputs_compiles() -> None:
    h = torch.zeros(C, C, dtype=torch.float64)

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        NAMED.hessian_accumulate_(h, x.detach())
        return x @ weight.T

    torch._dynamo.reset()
    x, (W, _) = features(30, C).float(), problem()
    out = torch.compile(forward, fullgraph=True, backend="aot_eager")(x, W)
    torch.testing.assert_close(out, x @ W.T)
    expected = lobs.Hessian(C).update(x)
    assert torch.equal(h.tril(), expected.state_dict()["sum"])
