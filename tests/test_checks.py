"""The search for NaN and infinity runs in pieces; the positions it reports must not show that."""

from __future__ import annotations

import pytest
import torch

from lobs_native import checks
from lobs_native.errors import NonFiniteError


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("shape", [(), (40,), (10, 4), (5, 4, 2)])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_the_first_nan_is_reported_whatever_the_piece_size(monkeypatch, piece, shape, place):
    monkeypatch.setattr(checks, "_PIECE", piece)
    x = torch.zeros(shape)
    checks.check_finite(x, "x")
    flat = {"first": 0, "middle": x.numel() // 2, "last": x.numel() - 1}[place]
    x.view(-1)[flat:] = torch.nan  # everything after it too: the first one counts
    position = (
        tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape)) if shape else ()
    )
    with pytest.raises(NonFiniteError) as caught:
        checks.check_finite(x, "x")
    assert f"x: nan at {position};" in str(caught.value)
    assert caught.value.flat == flat


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_rows_outside_where_may_hold_anything(monkeypatch, piece):
    monkeypatch.setattr(checks, "_PIECE", piece)
    x = torch.zeros(9, 3)
    x[2] = x[7, 1] = torch.inf
    where = torch.ones(9, dtype=torch.bool)
    where[2] = False
    with pytest.raises(NonFiniteError, match=r"inf at \(7, 1\)"):
        checks.check_finite(x, "x", where)
    where[7] = False
    checks.check_finite(x, "x", where)


def test_an_empty_tensor_is_finite():
    checks.check_finite(torch.empty(0, 3), "x")
    checks.check_finite(torch.empty(3, 0), "x")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_sum_that_overflows_does_not_make_finite_values_infinite(dtype):
    most = torch.finfo(dtype).max
    assert checks.is_finite(torch.full((9, 70_000), most, dtype=dtype))
    for wrong in (torch.nan, torch.inf, -torch.inf):
        x = torch.full((9, 70_000), 1e4, dtype=dtype)
        x[5, 7] = wrong
        assert not checks.is_finite(x)
        x[6, 7] = -wrong
        assert not checks.is_finite(x)
