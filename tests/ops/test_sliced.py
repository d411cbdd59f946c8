"""The product with a sparse weight in slices, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.tolerances import RELATIVE, distance
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import ArgumentError, BackendError, DtypeError, ShapeError
from lobs_native.ops import SlicedWeight

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SHAPES = [(1, 1, 1), (2, 16, 63), (3, 17, 64), (5, 33, 127)]
SHAPES += [(16, 15, 15), (17, 33, 130), (33, 5, 16), (40, 20, 70), (161, 18, 70)]
TOLERANCE = {F32: RELATIVE[F32], BF16: 5e-3}  # bfloat16 has eight bits


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def sparse(R: int, C: int, share: float = 0.3) -> Tensor:
    """A weight with this share of its entries, an empty row and a full one."""
    weight = torch.randn(R, C).masked_fill_(torch.rand(R, C) >= share, 0)
    if R > 2:
        weight[1] = 0
        weight[2] = torch.randn(C)
    return weight


def product(
    x: Tensor, weight: SlicedWeight, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    parts = (weight.values, weight.columns, weight.steps)
    sizes = {"rows": weight.rows, "features": weight.features, "width": weight.width}
    return ops.sliced_linear(x, *parts, bias, **sizes, backend=backend)


def bits(x: Tensor) -> bytes:
    return x.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_keeps_every_weight(shape, width):
    _, R, C = shape
    weight = sparse(R, C)
    sliced = SlicedWeight.pack(weight, width=width)
    assert torch.equal(sliced.unpack(), weight)
    padding = sliced.columns == width - 1
    assert not bool(sliced.values[padding].any())
    assert int((~padding).sum()) == int((weight != 0).sum())


@pytest.mark.parametrize("stored", [F32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_that_of_float64(backend, shape, width, dtype, stored):
    N, R, C = shape
    weight = sparse(R, C).to(stored)
    x, bias = torch.randn(N, C).to(dtype), torch.randn(R)
    sliced = SlicedWeight.pack(weight, width=width)
    for added in (None, bias):
        found = product(x, sliced, added, backend)
        assert found.dtype == dtype
        wanted = x.to(F64) @ weight.to(F64).T + (0 if added is None else added.to(F64))
        assert distance(found, wanted) < TOLERANCE[dtype]


def test_a_bfloat16_result_is_rounded_to_the_nearest(backend):
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.4e38, -1e-40, torch.nan])
    sliced = SlicedWeight.pack(values[:, None])
    for rows in (1, 9):
        found = product(torch.ones(rows, 1).to(BF16), sliced, backend=backend)
        torch.testing.assert_close(
            found, values.to(BF16).expand(rows, -1), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_an_infinity_or_nan_reaches_those_rows_that_have_a_weight_there(backend, rows, width):
    weight = sparse(20, 90)
    sliced = SlicedWeight.pack(weight, width=width)
    for value in (torch.inf, torch.nan):
        x = torch.randn(rows, 90)
        x[:, 62] = value
        found = product(x, sliced, backend=backend)
        assert torch.equal(found.isfinite(), (weight[:, 62] == 0).expand(rows, -1))
    weight[3, 5], weight[4, 70] = torch.inf, torch.nan
    found = product(torch.ones(rows, 90), SlicedWeight.pack(weight, width=width), backend=backend)
    assert bool(found[:, 3].isinf().all() and found[:, 4].isnan().all())
    assert bool(found[:, [0, 1, 2, *range(5, 20)]].isfinite().all())


@pytest.mark.parametrize("rows", [2, 20])
def test_inputs_may_have_any_strides(backend, rows):
    sliced, x = SlicedWeight.pack(sparse(21, 70)), torch.randn(rows, 70)
    wanted = bits(product(x, sliced, backend=backend))
    wide = torch.full((rows, 200), torch.nan)
    wide[:, 3:143:2] = x
    for other in (wide[:, 3:143:2], x.T.contiguous().T, torch.flip(x.flip(1), (1,))):
        assert bits(product(other, sliced, backend=backend)) == wanted
    same = x[:1].expand(rows, 70)
    assert bits(product(same, sliced, backend=backend)) == bits(
        product(same.contiguous(), sliced, backend=backend)
    )


@pytest.mark.parametrize("rows", [1, 6, 70])
def test_results_do_not_depend_on_the_number_of_threads(backend, rows):
    if backend in ("reference", "emulated", "cuda"):
        pytest.skip("no threads")
    sliced, x = SlicedWeight.pack(sparse(520, 640)), torch.randn(rows, 640)
    seen = set()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        seen.add(bits(product(x, sliced, backend=backend)))
    assert len(seen) == 1


def test_nothing_is_no_work(backend):
    for N, R, C in ((0, 5, 5), (3, 0, 5), (3, 5, 0), (20, 5, 0)):
        found = product(torch.ones(N, C), SlicedWeight.pack(torch.ones(R, C)), backend=backend)
        assert torch.equal(found, torch.zeros(N, R))
    none = SlicedWeight.pack(torch.zeros(5, 9))
    assert torch.equal(product(torch.ones(2, 9), none, torch.ones(5), backend), torch.ones(2, 5))


def test_parts_that_do_not_fit_are_named():
    sliced = SlicedWeight.pack(sparse(20, 40), width=16)
    parts = {"values": sliced.values, "columns": sliced.columns, "steps": sliced.steps}
    given = {**parts, "rows": 20, "features": 40, "width": 16}
    beyond = sliced.columns.clone()
    beyond[-1, 0] = 13  # the last block has the columns 30 to 39
    absent = sliced.columns.clone()
    absent[-1, 15] = 0  # the second slice has four rows
    twice = sliced.columns.clone()
    twice[1, 2] = twice[0, 2]  # row 2 is full
    wrong = [
        ("columns", twice, ArgumentError),
        ("values", sliced.values[1:], ShapeError),
        ("values", sliced.values.double(), DtypeError),
        ("columns", sliced.columns[:, 1:], ShapeError),
        ("columns", sliced.columns.int(), DtypeError),
        ("columns", sliced.columns + 1, ArgumentError),
        ("columns", beyond, ArgumentError),
        ("columns", absent, ArgumentError),
        ("steps", sliced.steps[:1], ShapeError),
        ("steps", sliced.steps.flip(1) * 0, ShapeError),
        ("width", 32, ArgumentError),
        ("rows", -1, ArgumentError),
        ("features", 2.5, DtypeError),
    ]
    for name, value, error in wrong:
        with pytest.raises(error, match=name if name != "steps" else None):
            SlicedWeight(**{**given, name: value})
    for name, value, error in (
        ("x", torch.ones(2, 41), ShapeError),
        ("x", torch.ones(2, 40).double(), DtypeError),
        ("x", torch.ones(40), ShapeError),
        ("bias", torch.ones(19), ShapeError),
        ("bias", torch.ones(20).bfloat16(), DtypeError),
    ):
        with pytest.raises(error, match=f"^{name}"):
            ops.sliced_linear(**{"x": torch.ones(2, 40), **given, name: value})
    with pytest.raises(DtypeError, match="dtype"):
        SlicedWeight.pack(torch.ones(2, 2), dtype=torch.float16)
    with pytest.raises(BackendError, match="there is none"):
        product(torch.ones(2, 40), sliced, backend="nothing")
