"""Same bytes for every number of threads, and no dependence on scale."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.cases import conditioned, features
from torch import Tensor

import lobs_native as lobs
from lobs_native import ops
from lobs_native.solvers.settings import METHODS, SCOPES

THREADS = (1, 2, 3, 8)
RUNS = 20


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bits(*tensors: Tensor) -> tuple[bytes, ...]:
    return tuple(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)


# ---- threads -------------------------------------------------------------------------------------


Call = Callable[[str], tuple[bytes, ...]]  # a backend's name -> what the call wrote


def accumulate(x: torch.dtype, h: torch.dtype, *, weighted: bool, ones: bool) -> Call:
    X = features(700, 200).to(x)  # two tiles, three chunks of rows
    t = torch.linspace(0, 2, len(X), dtype=torch.float64) if weighted else None

    def call(backend: str) -> tuple[bytes, ...]:
        H = torch.zeros(200 + ones, 200 + ones, dtype=h)
        ops.hessian_accumulate_(H, X, t, ones=ones, backend=backend)
        return bits(H)

    return call


def update(dtype: torch.dtype, B: int, blocks: int) -> Call:
    start = torch.eye(B, dtype=dtype).repeat(blocks, 1, 1) * 1e3
    G = features(37, B * blocks - B // 2).to(dtype)

    def call(backend: str) -> tuple[bytes, ...]:
        F = start.clone()
        ops.inverse_update_(F, G, 37.0, backend=backend)
        return bits(F)

    return call


def prune(dtype: torch.dtype) -> Call:
    rows, columns = 33, 257
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(rows, columns, generator=generator).to(dtype)
    A = conditioned(columns, 100.0).to(dtype)
    count = torch.arange(rows) * columns // rows
    shuffled = [torch.randperm(columns, generator=generator)[:k] for k in count]
    order = torch.cat(shuffled).to(torch.int32)
    start = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])

    def call(backend: str) -> tuple[bytes, ...]:
        W = dense.clone()
        ops.static_order_prune_(W, A, order, start, backend=backend)
        return bits(W)

    return call


def argmin(dtype: torch.dtype) -> Call:
    generator = torch.Generator().manual_seed(2)
    W = torch.randint(-9, 9, (101, 1300), generator=generator).to(dtype)  # many ties
    diag = torch.randint(1, 5, (101, 1300), generator=generator).to(dtype)
    live = torch.rand(101, 1300, generator=generator) < 0.7
    live[50] = False
    return lambda backend: bits(*ops.saliency_argmin(W, diag, live, backend=backend))


def trace(dtype: torch.dtype, **options: Any) -> Call:
    rows, columns = 13, 150  # past the first panel, so that dead columns are squeezed out
    generator = torch.Generator().manual_seed(6)
    dense = torch.randn(rows, columns, generator=generator).to(dtype)
    A = torch.linalg.inv(conditioned(columns, 100.0)).to(dtype)

    def call(backend: str) -> tuple[bytes, ...]:
        W = dense.clone()
        found = ops.exact_trace(W, A, backend=backend, **options)
        return bits(W, found.order, found.loss, found.count)

    return call


def solve(dtype: torch.dtype) -> Call:
    rows, columns = 29, 170
    generator = torch.Generator().manual_seed(7)
    sides = torch.randn(rows, columns, generator=generator).to(dtype)
    share = torch.arange(rows)[:, None] / (rows - 1)
    chosen = torch.rand(rows, columns, generator=generator) < share
    M = conditioned(columns, 100.0).to(dtype)

    def call(backend: str) -> tuple[bytes, ...]:
        X = sides.clone()
        ops.support_solve_(X, M, chosen, backend=backend)
        return bits(X)

    return call


F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
CALLS = {
    "accumulate float64": accumulate(F64, F64, weighted=False, ones=False),
    "accumulate float32": accumulate(F32, F64, weighted=False, ones=False),
    "accumulate float32 into float32": accumulate(F32, F32, weighted=False, ones=True),
    "accumulate float16 weighted": accumulate(F16, F64, weighted=True, ones=False),
    "accumulate bfloat16 weighted": accumulate(BF16, F64, weighted=True, ones=True),
    "update float64, blocks of 50": update(F64, 50, 41),
    "update float32, blocks of 50": update(F32, 50, 41),
    "update float32, one block of 150": update(F32, 150, 1),
    "prune float64": prune(F64),
    "prune float32": prune(F32),
    "argmin float64": argmin(F64),
    "argmin float32": argmin(F32),
    "trace float64": trace(F64, update=True),
    "trace float32": trace(F32),
    "trace float32, 2:4": trace(F32, group=4, per_group=2, update=True),
    "trace float32, blocks of 4": trace(F32, block=4, limit=100, update=True),
    "solve float64": solve(F64),
    "solve float32": solve(F32),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_same_bytes_for_any_number_of_threads_and_every_run(call):
    seen = set()
    for threads in THREADS:
        torch.set_num_threads(threads)
        seen.update(CALLS[call]("cpu") for _ in range(RUNS))
    assert len(seen) == 1


@pytest.mark.parametrize("call", CALLS)
def test_the_same_bytes_for_any_number_of_threads_at_every_level(call, backend):
    if backend == "reference":
        pytest.skip("the reference is torch's own arithmetic, which may depend on the threads")
    if backend == "emulated" and (call.startswith("solve") or "block of 150" in call):
        pytest.skip("a device leaves this to torch, which here may depend on the threads")
    seen = set()
    for threads in THREADS:
        torch.set_num_threads(threads)
        seen.add(CALLS[call](backend))
    assert len(seen) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_pruned_the_same_on_every_run(method):
    """Threads as they are: the inverse is torch's, which may depend on their number."""
    x = features(200, 96)
    generator = torch.Generator().manual_seed(8)
    W = torch.randn(80, 96, generator=generator)
    h = lobs.Hessian(96).update(x)
    seen = set()
    for _ in range(5):
        out = lobs.prune_weight(W, h, sparsity=0.6, method=method, refine="exchange")
        seen.add((out.error, *bits(out.weight, out.mask)))
    assert len(seen) == 1


def test_set_num_threads_is_obeyed():
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert ops.threads() == threads


def test_two_python_threads_with_private_outputs_get_what_one_gets():
    X = features(600, 200).float()
    expected = torch.zeros(200, 200, dtype=torch.float64)
    ops.hessian_accumulate_(expected, X)
    found = [torch.zeros(200, 200, dtype=torch.float64) for _ in range(8)]
    failures: list[BaseException] = []

    def work(H: Tensor) -> None:
        try:
            for _ in range(10):
                H.zero_()
                ops.hessian_accumulate_(H, X)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(H,)) for H in found]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    assert {bits(H) for H in found} == {bits(expected)}


# ---- scale ---------------------------------------------------------------------------------------


def layer(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight of few significant bits, so that it survives scaling into the denormals."""
    generator = torch.Generator().manual_seed(4)
    W = torch.randint(-1000, 1000, (12, 20), generator=generator).to(dtype) / 1024
    x = features(60, 20)
    x[:, 7] = 0  # one dead column
    return W, x.T @ x / len(x)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-600, -130, -1, 1, 120, 600])
def test_the_scale_of_the_second_moment_does_not_matter(exponent, method, scope):
    W, H = layer(torch.float32)
    scaled = H * 2.0**exponent
    for share in (0.1, 0.5, 0.9):
        plain = lobs.prune_weight(W, H, sparsity=share, method=method, scope=scope)
        other = lobs.prune_weight(W, scaled, sparsity=share, method=method, scope=scope)
        assert torch.equal(plain.mask, other.mask)
        assert bits(plain.weight) == bits(other.weight)
        assert other.error == plain.error * 2.0**exponent
        assert other.relative_error == plain.relative_error
        assert other.damping == plain.damping


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(F32, -130), (F32, -20), (F32, 20), (F32, 120), (F64, -1000), (F64, 400), (BF16, -100)],
    ids=str,
)
def test_the_scale_of_the_weight_does_not_matter(dtype, exponent, method, scope):
    W, H = layer(dtype)
    factor = torch.tensor(2.0, dtype=F64) ** exponent
    scaled = (W.double() * factor).to(dtype)
    assert torch.equal(scaled.double() / factor, W.double())  # no bit was lost on the way
    for share in (0.1, 0.5, 0.9):
        plain = lobs.prune_weight(W, H, sparsity=share, method=method, scope=scope)
        other = lobs.prune_weight(scaled, H, sparsity=share, method=method, scope=scope)
        assert torch.equal(plain.mask, other.mask)
        if exponent >= -100:  # below, results fall among the denormals and round
            assert torch.equal(other.weight.double() / factor, plain.weight.double())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("exponent", [-130, -60, 60, 120])
def test_the_scale_of_the_inputs_does_not_matter(exponent):
    """Small integers: every sum is exact, in float32 and in the float64 of extreme scales."""
    W, _ = layer(torch.float32)
    X = torch.randint(-8, 8, (50, 20), generator=torch.Generator().manual_seed(5)).float()
    plain = lobs.Hessian(20).update(X)
    other = lobs.Hessian(20).update(X * 2.0**exponent)
    assert torch.equal(other.matrix(), plain.matrix() * 4.0**exponent)
    masks = [lobs.prune_weight(W, h, sparsity=0.5).mask for h in (plain, other)]
    assert torch.equal(*masks)
