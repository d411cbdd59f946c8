"""The second moment: the operation, the Hessian object, and inversion with rising damping."""

from __future__ import annotations

import socket
from typing import ClassVar

import pytest
import torch
import torch.multiprocessing
from helpers.cases import features
from helpers.tolerances import RELATIVE, distance
from safetensors.torch import load, save
from torch.utils._python_dispatch import TorchDispatchMode

import lobs_native as lobs
from lobs_native import ops
from lobs_native.errors import (
    ArgumentError,
    LobsError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
)
from lobs_native.ops import reference
from lobs_native.solvers.inversion import invert

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def full(H: torch.Tensor) -> torch.Tensor:
    return H.tril() + H.tril(-1).T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (300, 64), (257, 193), (1000, 200), (40, 500)])
@pytest.mark.parametrize("ones", [False, True])
def test_accumulate_equals_the_matrix_product(backend, dtype, shape, ones):
    X = features(*shape).to(dtype)
    D = shape[1] + ones
    H = torch.zeros(D, D, dtype=torch.float64)
    assert ops.hessian_accumulate_(H, X, ones=ones, backend=backend) == backend
    x = X.double()
    if ones:
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
    assert distance(full(H), x.T @ x) < (
        RELATIVE[torch.float64] if dtype == torch.float64 else 1e-6
    )
    assert float(H.triu(1).abs().max()) == 0.0  # the other triangle is not touched


def test_accumulate_adds_to_what_is_there(backend):
    X = features(100, 20)
    once, twice = (torch.zeros(20, 20, dtype=torch.float64) for _ in range(2))
    ops.hessian_accumulate_(once, X, backend=backend)
    for part in X.split([33, 1, 66]):
        ops.hessian_accumulate_(twice, part, backend=backend)
    assert distance(twice, once) < 1e-14


def test_sixteen_bit_products_are_exact_in_short_sums(backend):
    """Two bfloat16 factors have 16 significant bits together: float32 loses nothing until sums
    round."""
    X = torch.tensor([[1.0078125, 3.015625], [0.0, 0.0]], dtype=torch.bfloat16)
    H = torch.zeros(2, 2, dtype=torch.float64)
    ops.hessian_accumulate_(H, X, backend=backend)
    assert H[1, 0].item() == X[0, 0].double().item() * X[0, 1].double().item()


def test_token_weights_scale_rows_and_zero_weights_hide_them(backend):
    X = features(64, 17)
    t = torch.rand(64, dtype=torch.float64)
    t[::4] = 0
    poisoned = X.clone()
    poisoned[::4] = torch.nan
    H = torch.zeros(17, 17, dtype=torch.float64)
    ops.hessian_accumulate_(H, poisoned, t, backend=backend)
    assert distance(full(H), (X * t[:, None]).T @ X) < 1e-13


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.repeat_interleave(3, 1)[:, ::3],
        lambda x: x.flip(0).flip(0),
    ],
    ids=["transposed", "wide rows", "every second row", "every third column", "flipped"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_change_a_bit(backend, view, dtype):
    X = features(50, 33).to(dtype)
    plain, strided = (torch.zeros(33, 33, dtype=torch.float64) for _ in range(2))
    ops.hessian_accumulate_(plain, X, backend=backend)
    ops.hessian_accumulate_(strided, view(X), backend=backend)
    if backend == "reference":  # plain torch may choose another product for another layout
        assert distance(strided, plain) < 1e-14
    else:
        assert torch.equal(plain, strided)


@pytest.mark.parametrize("weights", [None, "padding", "any"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(255, 127), (256, 128), (257, 129), (33, 257)])
def test_tiles_end_where_they_should(backend, shape, dtype, weights):
    """Around 128 columns and 256 rows, where tiles and partial sums of the kernels meet."""
    ones = shape[1] % 2 == 1
    X = (features(*shape) - 0.3).to(dtype)
    t = torch.ones(len(X), dtype=torch.float64)
    if weights is not None:
        t[::3] = 0
        t[1::5] *= 1 if weights == "padding" else 0.3
    x = torch.cat([X.double(), torch.ones(len(X), int(ones))], 1)
    expected = (x * t[:, None]).T @ x
    X[t == 0] = torch.nan
    for out in (torch.float64, torch.float32):
        H = torch.zeros(len(expected), len(expected), dtype=out)
        ops.hessian_accumulate_(H, X, None if weights is None else t, ones=ones, backend=backend)
        assert distance(full(H), expected) < 3e-6  # 256 terms in float32
        assert float(H.triu(1).abs().max()) == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_in_one_call_stay_accurate(backend, dtype):
    X = (features(8193, 20) + 1).to(dtype)
    H = torch.zeros(21, 21, dtype=torch.float64)
    ops.hessian_accumulate_(H, X, ones=True, backend=backend)
    x = torch.cat([X.double(), torch.ones(len(X), 1)], 1)
    assert distance(full(H), x.T @ x) < (1e-12 if dtype == torch.float64 else 5e-7)


def test_rows_that_are_packed_in_several_stretches_all_count(backend):
    """16 MiB of packed rows are 1792 rows of 1100 columns. Threads share them."""
    if not backend.startswith("cpu_"):
        pytest.skip("other backends pack nothing")
    X = features(1900, 1100)
    one, three = (torch.zeros(1100, 1100, dtype=torch.float64) for _ in range(2))
    before = torch.get_num_threads()
    try:
        for threads, H in ((1, one), (3, three)):
            torch.set_num_threads(threads)
            ops.hessian_accumulate_(H, X, backend=backend)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)
    assert distance(full(one), X.double().T @ X.double()) < 1e-6


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_a_kernel_must_copy_first_give_the_same_bits(emulated, dtype, ones):
    """136 columns are read in place; transposed or shifted by one column they are copied first."""
    X = features(70, 136).to(dtype)
    D = 136 + ones
    plain = torch.zeros(D, D, dtype=torch.float64)
    ops.hessian_accumulate_(plain, X, ones=ones, backend=emulated)
    for view in (X.T.contiguous().T, torch.cat([X[:, :1], X], 1)[:, 1:]):
        other = torch.zeros(D, D, dtype=torch.float64)
        ops.hessian_accumulate_(other, view, ones=ones, backend=emulated)
        assert torch.equal(other, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_bad_value_is_found_and_the_sum_left_alone(backend, dtype):
    X = features(300, 150).to(dtype)
    t = torch.ones(300, dtype=torch.float64)
    t[2] = 0
    X[2, 5] = X[299, 149] = X[171, 148] = X[172, 0] = torch.nan
    H = torch.full((150, 150), 7.0, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"nan at \(171, 148\)"):
        ops.hessian_accumulate_(H, X, t, backend=backend)
    assert float(H.min()) == float(H.max()) == 7.0


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e18, 1e30, 3e37])
def test_extreme_float32_inputs_neither_underflow_nor_overflow(backend, scale):
    X = (features(40, 9) * scale).float()
    H = torch.zeros(9, 9, dtype=torch.float64)
    ops.hessian_accumulate_(H, X, backend=backend)
    assert distance(full(H), X.double().T @ X.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_long_sums_with_an_offset_stay_accurate(dtype):
    """2,000 batches with a mean of 1e3: running sums in float32 would lose digits, widened ones do
    not (N3)."""
    h = lobs.Hessian(16)
    expected = torch.zeros(16, 16, dtype=torch.float64)
    for i in range(2000):
        x = (features(8, 16, seed=i) + 1e3).to(dtype)
        h.update(x)
        expected += x.double().T @ x.double()
    assert distance(h.matrix() * h.rows, expected) <= 1e-7


def test_a_float32_sum_is_offered_and_less_accurate():
    x = features(5000, 24).float()
    single, double = lobs.Hessian(24, dtype=torch.float32).update(x), lobs.Hessian(24).update(x)
    assert distance(single.matrix(), double.matrix()) < 1e-5
    assert single.matrix().dtype == torch.float64
    assert single.dtype == torch.float32


def test_matrix_is_the_mean_and_symmetric():
    x = features(70, 11)
    h = lobs.Hessian(11)
    for part in x.reshape(7, 10, 11):
        assert h.update(part.reshape(2, 5, 11)) is h
    H = h.matrix()
    assert torch.equal(H, H.T)
    assert h.rows == 70
    assert distance(H, x.T @ x / 70) < 1e-14


def test_a_wide_matrix_is_mirrored_in_pieces_without_a_second_copy():
    """The sum and the result take 8 (C + 1)^2 bytes each; nothing else is of that size."""
    X = features(40, 1100)
    h = lobs.Hessian(1100, bias=True).update(X)
    x = torch.cat([X, torch.ones(40, 1, dtype=X.dtype)], 1).double()
    before = h._sum.clone()
    H = h.matrix()
    assert torch.equal(H, H.T)
    assert torch.equal(h._sum, before)
    assert distance(H, x.T @ x / 40) < RELATIVE[torch.float64]

    class Large(TorchDispatchMode):
        made: ClassVar[set[int]] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= 1101**2:
                self.made.add(out.untyped_storage().data_ptr())
            return out

    with Large():
        H = h.matrix()
    assert Large.made - {h._sum.untyped_storage().data_ptr()} == {H.untyped_storage().data_ptr()}


def test_weights_count_as_rows():
    x = features(30, 4).reshape(5, 6, 4)
    t = torch.ones(5, 6)
    t[:, 4:] = 0
    h = lobs.Hessian(4, bias=True).update(x, t)
    kept = torch.cat([x[:, :4].reshape(-1, 4), torch.ones(20, 1)], 1)
    assert h.rows == 20
    assert distance(h.matrix(), kept.T @ kept / 20) < 1e-13


def test_merge_equals_seeing_everything():
    x = features(90, 8)
    a, b = lobs.Hessian(8).update(x[:20]), lobs.Hessian(8).update(x[20:])
    assert distance(a.merge(b).matrix(), lobs.Hessian(8).update(x).matrix()) < 1e-14
    with pytest.raises(ShapeError, match="other"):
        a.merge(lobs.Hessian(8, bias=True))


def test_state_survives_safetensors():
    h = lobs.Hessian(6, bias=True).update(features(20, 6))
    again = lobs.Hessian(6, bias=True)
    again.load_state_dict(load(save(h.state_dict())))
    assert torch.equal(again.matrix(), h.matrix())
    assert again.rows == h.rows
    state = h.state_dict()
    state["sum"][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="sum"):
        again.load_state_dict(state)
    with pytest.raises(ShapeError, match="bias=True"):
        lobs.Hessian(7).load_state_dict(h.state_dict())
    assert torch.equal(again.matrix(), h.matrix())


def test_from_matrix_round_trips_and_goes_on():
    x = features(50, 5)
    H = x.T @ x / 50
    h = lobs.Hessian.from_matrix(H, rows=50)
    assert distance(h.matrix(), H) < 1e-15
    assert distance(h.update(x).matrix(), H) < 1e-14


def test_an_empty_hessian_says_so():
    with pytest.raises(LobsError, match="no rows"):
        lobs.Hessian(3).matrix()
    h = lobs.Hessian(3).update(torch.ones(4, 3), torch.zeros(4))
    with pytest.raises(LobsError, match="no rows"):
        h.matrix()


def test_no_rows_change_nothing():
    h = lobs.Hessian(3).update(torch.ones(2, 3)).update(torch.empty(0, 3))
    assert h.rows == 2


def _rank(rank: int, world: int, port: int, results) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    h = lobs.Hessian(6)
    if rank > 0:  # unequal shards, rank 0 has none
        h.update(features(60, 6)[(rank - 1) * 20 : (rank - 1) * 20 + 20 * rank])
    h.all_reduce()
    results[rank] = (h.rows, h.matrix())
    dist.destroy_process_group()


def test_all_reduce_weighs_unequal_shards_by_rows():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, args=(3, port, results), nprocs=3)
        found = dict(results)
    x = features(60, 6)
    expected = lobs.Hessian(6).update(x[:20]).update(x[20:60])
    for rank in range(3):
        assert found[rank][0] == 60
        assert torch.equal(found[rank][1], found[0][1])
        assert distance(found[rank][1], expected.matrix()) < 1e-12


def test_all_reduce_without_a_group_says_what_to_do():
    with pytest.raises(LobsError, match="init_process_group"):
        lobs.Hessian(2).all_reduce()


# ---- inversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.01, 1.0])
def test_invert_multiplies_back_to_the_identity(damping):
    x = features(400, 48)
    H = x.T @ x / 400
    found = invert(H, damping, "H")
    damped = H + damping * H.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    assert distance(found.A / found.scale @ damped, torch.eye(48, dtype=torch.float64)) < 1e-10
    assert (found.damping, found.raised) == (damping, False)


@pytest.mark.parametrize("columns", [1, 2, 255, 256, 257, 511, 600])
def test_blocks_make_what_torch_makes_at_once(columns):
    x = features(columns + 50, columns)
    H = x.T @ x / len(x)
    given = H.clone()
    found = invert(H, 0.01, "H")
    damped = H / found.scale
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    A = torch.linalg.inv(damped)
    pull = torch.randn(columns, 3, dtype=torch.float64)
    assert distance(found.times(pull), A @ pull) < 1e-10
    U = found.U
    assert torch.equal(U, U.triu())
    assert distance(U, torch.linalg.cholesky(A, upper=True)) < 1e-10
    kept = U.clone()
    assert distance(found.A, A) < 1e-10
    assert torch.equal(found.A, found.A.T)
    assert torch.equal(U, kept)  # which a caller may still hold
    assert distance(found.U, U) < 1e-10
    assert distance(found.times(pull), A @ pull) < 1e-10
    assert torch.equal(H, given)


@pytest.mark.parametrize("place", [0, 255, 256, 400, 599])
def test_a_pivot_that_fails_in_any_block_climbs_the_ladder(place):
    H = torch.eye(600, dtype=torch.float64)
    H[place, place] = -0.05
    found = invert(H, 0.01, "H")  # mean is 0.998: 0.01 is too little, 0.1 is enough
    assert (found.damping, found.raised) == (0.1, True)
    with pytest.raises(NotPositiveDefiniteError, match="damping 0;"):
        invert(H, 0.0, "H")


def test_the_ladder_is_climbed_and_recorded():
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05], dtype=torch.float64))
    mean = H.diagonal().mean()
    found = invert(H, 0.01, "H")  # 0.01 * mean < 0.05 < 0.1 * mean
    assert (found.damping, found.raised) == (0.1, True)
    assert (
        distance(
            found.A / found.scale @ (H + 0.1 * mean * torch.eye(4, dtype=torch.float64)),
            torch.eye(4, dtype=torch.float64),
        )
        < 1e-12
    )


def test_the_end_of_the_ladder_is_an_error_that_names_the_matrix():
    H = torch.diag(torch.tensor([1.0, -3.0, 4.0], dtype=torch.float64))
    with pytest.raises(NotPositiveDefiniteError, match=r"layer x: .*0\.01, 0\.1, 1"):
        invert(H, 0.01, "layer x")


def test_no_damping_means_no_ladder():
    x = torch.ones(5, 3, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match=r"damping 0;.*pass a larger damping"):
        invert(x.T @ x, 0.0, "H")


@pytest.mark.parametrize("power", [-900, -40, 40, 900])
def test_invert_scales_exactly_with_powers_of_two(power):
    x = features(60, 10)
    H = x.T @ x
    plain, scaled = invert(H, 0.01, "H"), invert(H * 2.0**power, 0.01, "H")
    assert torch.equal(plain.A, scaled.A)
    assert scaled.scale == plain.scale * 2.0**power


def test_reference_is_what_the_contract_says():
    """The oracle itself against the definition, entry by entry."""
    X = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    H = torch.zeros(3, 3, dtype=torch.float64)
    reference.hessian_accumulate_(H, X, torch.tensor([1.0, 2.0]).double(), ones=True)
    assert H.tolist() == [[19.0, 0.0, 0.0], [-4.0, 6.0, 0.0], [7.0, 0.0, 3.0]]


def test_weights_below_zero_are_refused():
    h = lobs.Hessian(2)
    with pytest.raises(ArgumentError, match=r"weights: -1.0 at 1"):
        h.update(torch.ones(2, 2), torch.tensor([1.0, -1.0]))
    assert h.rows == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [5, 300, 700])
def test_taking_the_matrix_gives_up_the_sum(columns, dtype):
    h = lobs.Hessian(columns, dtype=dtype).update(features(40, columns))
    expected, memory = h.matrix(), h._sum.data_ptr()
    taken = h.take()
    assert torch.equal(taken, expected)
    assert (taken.data_ptr() == memory) == (dtype == torch.float64)
    assert h.rows == 40
    with pytest.raises(LobsError, match="its sum was released"):
        h.matrix()


def test_a_sum_that_overflowed_is_not_taken():
    h = lobs.Hessian(3).update(torch.full((2, 3), 1e200, dtype=torch.float64))
    with pytest.raises(lobs.NonFiniteError, match="the sum overflowed"):
        h.take()
    with pytest.raises(LobsError, match="interrupted halfway"):
        h.matrix()


def test_a_released_hessian_is_refused():
    h = lobs.Hessian(3).update(torch.ones(2, 3))
    h.release()
    assert h.rows == 2
    for use in (h.matrix, h.state_dict, lambda: h.update(torch.ones(2, 3))):
        with pytest.raises(lobs.LobsError, match="hessian: its sum was released"):
            use()
