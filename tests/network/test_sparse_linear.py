"""Linear layers that skip their zeros, in the place of dense ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lobs_native as lobs
from lobs_native.errors import ArgumentError, BackendError, DtypeError, ShapeError

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(C: int, R: int, sparsity: float = 0.8, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(C, R, bias=bias)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand(R, C) < sparsity, 0)
    return layer


class Network(nn.Module):
    """One layer of each kind that ``to_sparse`` must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first = linear(256, 320)
        self.same = self.first
        self.full = nn.Linear(320, 256)
        self.small = linear(256, 8)
        self.tied = linear(256, 300)
        self.embedding = nn.Embedding(300, 256)
        self.embedding.weight = self.tied.weight
        self.attention = nn.MultiheadAttention(256, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.full(self.first(x).relu() + self.same(x))
        return self.small(y) + self.tied(self.attention(y, y, y)[0]).mean()


@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_the_dense_layer_computes(bias):
    dense = linear(70, 33, bias=bias)
    sparse = lobs.sparse_linear(dense)
    assert (sparse.in_features, sparse.out_features) == (70, 33)
    with torch.inference_mode():
        for shape in ((70,), (1, 70), (2, 3, 70), (40, 70), (0, 70)):
            x = torch.randn(shape)
            torch.testing.assert_close(sparse(x), dense(x), rtol=1e-5, atol=1e-6)
        for x in (
            torch.randn(70, 5).T,
            torch.randn(3, 70, 5).mT,
            torch.randn(1, 70).expand(3, 2, 70),
        ):
            torch.testing.assert_close(sparse(x), dense(x), rtol=1e-5, atol=1e-6)
        nothing = lobs.SparseLinear(torch.ones(3, 0))
        assert nothing(torch.ones(2, 4, 0)).equal(torch.zeros(2, 4, 3))
    with torch.no_grad():
        x = torch.randn(2, 70, requires_grad=True)
        assert not sparse(x).requires_grad
    assert torch.equal(sparse.weight, dense.weight)
    assert (sparse.bias is None) if not bias else torch.equal(sparse.bias, dense.bias)


def test_bfloat16_halves_the_values_and_accumulates_in_float32():
    dense, x = linear(512, 200), torch.randn(3, 512)
    rounded = dense.weight.bfloat16().float()
    narrow = lobs.sparse_linear(dense, dtype=torch.bfloat16)
    assert narrow.nbytes < 0.65 * lobs.sparse_linear(dense).nbytes
    with torch.inference_mode():
        wanted = torch.nn.functional.linear(x, rounded, dense.bias)
        torch.testing.assert_close(narrow(x), wanted, rtol=1e-5, atol=1e-5)
        half = lobs.sparse_linear(dense.bfloat16())
        assert half(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(half(x.bfloat16()).float(), wanted, rtol=0.02, atol=0.05)


def test_the_state_is_that_of_the_dense_layer():
    dense, other = linear(40, 20), linear(40, 20, 0.5)
    sparse = lobs.sparse_linear(dense)
    state = sparse.state_dict()
    assert list(state) == ["weight", "bias"]
    assert all(torch.equal(state[k], v) for k, v in dense.state_dict().items())
    sparse.load_state_dict(other.state_dict())
    x = torch.randn(2, 40)
    torch.testing.assert_close(sparse(x), other(x).detach(), rtol=1e-5, atol=1e-6)
    assert copy.deepcopy(sparse)(x).equal(sparse(x))
    before = sparse(x)
    sparse.load_state_dict({key: value.double() for key, value in other.state_dict().items()})
    assert sparse(x).equal(before)
    before = sparse(x)
    for wrong, message in (
        ({"weight": torch.ones(20, 40)}, "Missing key.*bias"),
        ({**state, "more": torch.ones(1)}, "Unexpected key.*more"),
        ({**state, "weight": torch.ones(20, 41)}, r"weight is \(20, 41\)"),
        ({**state, "bias": torch.ones(21)}, r"bias is \(21,\), but must be \(20,\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            lobs.sparse_linear(dense).load_state_dict(wrong)
    assert sparse(x).equal(before)


def test_layers_are_replaced_and_put_back():
    torch.manual_seed(0)
    model, x = Network().eval(), torch.randn(3, 256)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():
        wanted = model(x)
    done = lobs.to_sparse(model)
    assert set(done.replaced) == {"first"}
    assert done.replaced["first"] == pytest.approx(0.8, abs=0.02)
    assert model.first is model.same
    assert isinstance(model.first, lobs.SparseLinear)
    assert done.left == {
        "full": "0.0% zeros",
        "small": "it has 2048 weights",
        "tied": "its weight belongs to another layer as well",
        "attention.out_proj": "its type is NonDynamicallyQuantizableLinear",
    }
    with torch.inference_mode():
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    model.load_state_dict(state)
    assert lobs.from_sparse(model) == ["first"]
    assert type(model.first) is nn.Linear
    assert model.first is model.same
    assert model.first.weight.requires_grad
    assert not model.first.training
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    with torch.inference_mode():
        assert model(x).equal(wanted)


def test_under_compile_it_stays_in_one_graph():
    sparse, x = lobs.sparse_linear(linear(70, 33)), torch.randn(2, 70)
    compiled = torch.compile(sparse, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert compiled(x).equal(sparse(x))


def test_what_it_cannot_do_is_refused():
    sparse = lobs.sparse_linear(linear(40, 20))
    for x, error, message in (
        (torch.randn(2, 41), ShapeError, r"x is \(2, 41\)"),
        (torch.tensor(1.0), ShapeError, "x is"),
        (torch.randn(2, 40).double(), DtypeError, "float64"),
        (torch.randn(2, 40, device="meta"), BackendError, "computes on the CPU"),
        (torch.randn(2, 40, requires_grad=True), ArgumentError, "inference_mode"),
    ):
        with pytest.raises(error, match=message):
            sparse(x)
    for given, error, message in (
        (linear(4, 4).double(), DtypeError, "float64"),
        (linear(4, 4).half(), DtypeError, "float16"),
        (nn.Conv1d(1, 1, 1), DtypeError, "Conv1d"),
        (nn.Linear(4, 4, device="meta"), DtypeError, "meta"),
    ):
        with pytest.raises(error, match=message):
            lobs.sparse_linear(given)
    with pytest.raises(DtypeError, match="dtype"):
        lobs.sparse_linear(linear(4, 4), dtype=torch.float16)
    with pytest.raises(ShapeError, match="bias has 3"):
        lobs.SparseLinear(torch.ones(4, 4), torch.ones(3))
    model = nn.Sequential(linear(300, 300))
    for how, error, message in (
        ({"sparsity": 1.5}, ArgumentError, "sparsity"),
        ({"smallest": -1}, ArgumentError, "smallest"),
        ({"dtype": torch.float16}, DtypeError, "dtype"),
    ):
        with pytest.raises(error, match=message):
            lobs.to_sparse(model, **how)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ArgumentError, match="linear layer itself"):
        lobs.to_sparse(linear(4, 4))
    with pytest.raises(ArgumentError, match="SparseLinear itself"):
        lobs.from_sparse(sparse)
