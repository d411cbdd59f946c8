"""compat.obc against plain float64 removal, and against OBC itself if available (see
original_programs.py)."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import sys
from types import ModuleType

import pytest
import torch
from helpers import original_programs, pretend
from helpers.cases import features
from helpers.plain import Plain, traced
from helpers.pretend import CUDA
from helpers.tolerances import distance
from torch import Tensor, nn
from torch.nn.functional import unfold

import lobs_native as lobs
from lobs_native.compat.obc import TrueOBS

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
SHARES = [0.0, 0.3, 0.5, 0.7, 1.0]


def linear(C: int, R: int, kind: str = "") -> tuple[nn.Linear, list[Tensor]]:
    """A layer and its batches (B, T, C), of unequal size."""
    x = features(8 * C, C).to(torch.float32).reshape(8, C, C)
    layer = nn.Linear(C, R)
    if "dead" in kind:
        x[:, :, 3] = 0.0
        x[:, :, C - 2] = 0.0
    if "zeros" in kind:
        layer.weight.data[torch.rand(R, C) < 0.2] = 0.0
        layer.weight.data[1, : C // 2] = 0.0
    return layer, [x[:5], x[5:6], x[6:]]


def conv(kind: str = "") -> tuple[nn.Conv2d, list[Tensor]]:
    layer = nn.Conv2d(4, 9, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    x = features(12 * 4 * 9, 10).to(torch.float32).reshape(12, 4, 9, 10)
    if "zeros" in kind:
        layer.weight.data[torch.rand_like(layer.weight) < 0.2] = 0.0
    return layer, [x[:7], x[7:]]


CASES = {
    "linear": lambda: linear(24, 7),
    "two chunks, odd": lambda: linear(37, 35),
    "dead columns": lambda: linear(24, 6, "dead"),
    "zeros": lambda: linear(24, 9, "zeros"),
    "dead and zeros": lambda: linear(24, 9, "dead zeros"),
    "conv": conv,
    "conv with zeros": lambda: conv("zeros"),
}
EVEN = [name for name in CASES if "odd" not in name]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def collected(layer, batches, rel_damp=0.0, kind=TrueOBS, **options):
    obs = kind(layer, rel_damp, **options)
    for x in batches:
        obs.add_batch(x, None)
    return obs


def rows_of(layer, x: Tensor) -> Tensor:
    """(N, C) float64: the rows by which the weights are multiplied."""
    x = x.to(F64)
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    patches = unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def moment_of(layer, batches) -> Tensor:
    samples = sum(len(x) for x in batches)
    return sum(rows.T @ rows for rows in (rows_of(layer, x) for x in batches)) * (2 / samples)


class Reference:
    """OBC's results, computed from its definition in float64."""

    def __init__(self, layer, batches, rel_damp=0.0, block=1, **options) -> None:
        H = moment_of(layer, batches)
        W = layer.weight.detach().flatten(1).to(F64)
        dead = H.diagonal() == 0
        H.diagonal().add_(rel_damp * H.diagonal().mean())
        H.diagonal()[dead] = 1.0
        W = torch.where(dead, 0.0, W)
        self.place = torch.arange(W.shape[1])  # working column -> original column
        if layer.weight.ndim == 4 and (block > 1 or options):  # neighbours are channels
            self.place = self.place.view(layer.weight.shape[1:]).permute(1, 2, 0).flatten()
            H, W = H[self.place][:, self.place], W[:, self.place]
        zeros = (W == 0).to(torch.uint8)
        if block > 1:
            zeros = zeros.view(len(W), -1, block).amin(2).repeat_interleave(block, 1)
        self.W, self.H, self.block, self.zeros, self.options = W, H, block, zeros, options
        self.rows = traced(W, H, zeros, block=block, **options)
        each = torch.stack([torch.from_numpy(row.loss) for row in self.rows]) if not options else 0
        if not options:
            self.losses = each.view(len(W), -1, block).sum(2) / 2  # (R, K)

    def level(self, r: int, k: int) -> Tensor:
        """Row r after k removals."""
        A = torch.linalg.inv(self.H).numpy()
        state = self.zeros[r].numpy()
        row = Plain(self.W[r].numpy(), A, state, block=self.block, limit=k * self.block)
        return self.back(row.weight[None])[0]

    def back(self, weight: Tensor) -> Tensor:
        out = torch.empty_like(weight)
        out[:, self.place] = weight
        return out

    def pruned(self, share: float) -> Tensor:
        """The cheapest removals of the layer by their own costs, as prefixes of rows."""
        R, K = self.losses.shape
        count = math.ceil(R * K * share)
        cheapest = self.losses.flatten().argsort(stable=True)[:count] // K
        return torch.stack([self.level(r, int((cheapest == r).sum())) for r in range(R)])


# ---- parity with the definition ------------------------------------------------------------------


def test_h_is_twice_the_mean_over_the_first_dimension(case):
    layer, batches = case
    obs = collected(layer, batches)
    expected = moment_of(layer, batches)
    assert obs.H.dtype == F64
    assert obs.nsamples == sum(len(x) for x in batches)
    assert (obs.rows, obs.columns) == (len(layer.weight), expected.shape[0])
    assert distance(obs.H, expected) < 1e-6


def test_h_may_be_read_and_changed_between_batches():
    layer, batches = linear(12, 4)
    obs = collected(layer, batches[:1])
    obs.H *= 3
    for x in batches[1:]:
        obs.add_batch(x, None)
    first, all_three = (moment_of(layer, part) for part in (batches[:1], batches))
    assert distance(obs.H, all_three + 2 * first * (len(batches[0]) / 8)) < 1e-6


@pytest.mark.parametrize("rel_damp", [0, 0.01])
def test_losses_are_those_of_single_removals_in_order(case, rel_damp):
    layer, batches = case
    obs = collected(layer, batches, rel_damp)
    obs.prepare_unstr()
    expected = Reference(layer, batches, rel_damp).losses
    assert obs.Losses.shape == (obs.rows, obs.columns + 1)
    assert obs.Losses.dtype == torch.float32
    assert bool((obs.Losses[:, 0] == 0).all())
    torch.testing.assert_close(obs.Losses[:, 1:].to(F64), expected, rtol=1e-3, atol=1e-9)


def check_order(reference: Reference, traces, tie: float = 1e-6) -> None:
    """Check that each removal was the cheapest one at its step."""
    A = torch.linalg.inv(reference.H)
    at = 0
    for trace in traces:
        for i in range(trace.shape[1]):
            gone = trace[:, i, reference.place] == 0  # (K + 1, C)
            w, D, there = reference.W[at].clone(), A.clone(), reference.zeros[at] == 0
            for q in (~there).nonzero()[:, 0].tolist():
                D -= torch.outer(D[:, q], D[q]) / D[q, q]
            first = int((~there).sum()) // reference.block
            for k in range(first, len(gone) - 1):
                new = (gone[k + 1] & there).view(-1, reference.block)
                (g,) = new.all(1).nonzero()[:, 0].tolist()
                blocks = there.view(-1, reference.block).all(1).nonzero()[:, 0].tolist()
                costs = {b: cost_of(w, D, b, reference.block) for b in blocks}
                assert costs[g] <= min(costs.values()) * (1 + tie)
                for q in range(g * reference.block, (g + 1) * reference.block):
                    w -= w[q] / D[q, q] * D[:, q]
                    D -= torch.outer(D[:, q], D[q]) / D[q, q]
                    there[q] = False
                w[~there] = 0.0
            at += 1


def cost_of(w: Tensor, D: Tensor, b: int, size: int) -> float:
    part = slice(b * size, (b + 1) * size)
    return float(w[part] @ torch.linalg.solve(D[part, part], w[part]))


@pytest.mark.parametrize("name", ["linear", "dead and zeros", "conv"])
def test_every_removal_is_the_cheapest(name):
    layer, batches = CASES[name]()
    obs = collected(layer, batches, 0.01)
    obs.prepare_unstr()
    check_order(Reference(layer, batches, 0.01), obs.Traces)
    obs.prepare_blocked(4)
    check_order(Reference(layer, batches, 0.01, block=4), obs.Traces)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("name", EVEN)
def test_traces_are_the_weights_after_every_removal(name, block):
    layer, batches = CASES[name]()
    obs = collected(layer, batches)
    if block == 1:
        obs.prepare_unstr(parallel=4)
    else:
        obs.prepare_blocked(block, parallel=4)
    expected = Reference(layer, batches, block=block)
    steps = obs.columns // block
    assert len(obs.Traces) == -(-obs.rows // 4)
    assert [t.shape for t in obs.Traces[:-1]] == [(steps + 1, 4, obs.columns)] * (
        len(obs.Traces) - 1
    )
    found = torch.cat(list(obs.Traces), 1)
    assert found.dtype == torch.float32
    for r in range(obs.rows):
        for k in (0, 1, steps // 2, steps - 1, steps):
            torch.testing.assert_close(
                found[k, r].to(F64), expected.level(r, k), rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("rel_damp", [0, 0.01])
def test_weights_at_several_sparsities_from_one_trace(case, rel_damp):
    layer, batches = case
    before = layer.weight.detach().clone()
    obs = collected(layer, batches, rel_damp)
    obs.prepare_unstr()
    found = obs.prune_unstr(SHARES)
    reference = Reference(layer, batches, rel_damp)
    for share, weight, error in zip(SHARES, found, obs.errors, strict=True):
        expected = reference.pruned(share)
        assert weight.shape == (obs.rows, obs.columns)
        assert torch.equal(weight == 0, expected == 0)
        torch.testing.assert_close(weight.to(F64), expected, rtol=1e-4, atol=1e-6)
        change = weight.to(F64) - reference.W
        lost = float(((change @ reference.H) * change).sum()) / 2
        assert error == pytest.approx(lost, rel=1e-3, abs=1e-9)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", EVEN)
def test_blocks(name, size):
    layer, batches = CASES[name]()
    obs = collected(layer, batches, 0.01)
    obs.prepare_blocked(size)
    reference = Reference(layer, batches, 0.01, block=size)
    assert obs.Losses.shape == (obs.rows, obs.columns // size + 1)
    torch.testing.assert_close(obs.Losses[:, 1:].to(F64), reference.losses, rtol=1e-3, atol=1e-9)
    for share, weight in zip(SHARES, obs.prune_blocked(SHARES), strict=True):
        expected = reference.pruned(share)
        torch.testing.assert_close(weight.to(F64), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("name", EVEN)
def test_groups_are_written_into_the_layer(name, n, m):
    layer, batches = CASES[name]()
    obs = collected(layer, batches, 0.01)
    reference = Reference(layer, batches, 0.01, group=m, per_group=n)
    expected = reference.back(torch.stack([row.weight for row in reference.rows]))
    parameter, bias = layer.weight, layer.bias.detach().clone()
    obs.nmprune(n, m)
    assert layer.weight is parameter
    assert torch.equal(layer.bias, bias)
    found = layer.weight.detach().flatten(1).to(F64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    change = found[:, reference.place] - reference.W
    lost = float(((change @ reference.H) * change).sum()) / 2
    assert obs.errors == [pytest.approx(lost, rel=1e-4)]


def test_weights_are_ranked_by_raw_costs_and_edited_losses_count():
    layer, batches = linear(16, 6)
    obs = collected(layer, batches)
    obs.prepare_unstr()
    obs.Losses[2] = torch.inf
    (weight,) = obs.prune_unstr([0.5])
    assert bool((weight[2] != 0).all())
    assert int((weight == 0).sum()) == math.ceil(0.5 * 6 * 16)


# ---- our own numerics ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4])
def test_our_numerics_are_those_of_trace_weight(block):
    layer, batches = linear(24, 12)
    layer.weight.data *= torch.logspace(-1, 1, 12)[:, None]
    obs = collected(layer, batches, 0.01, numerics="ours")
    obs.prepare_unstr() if block == 1 else obs.prepare_blocked(block)
    pattern = "unstructured" if block == 1 else f"1x{block}"
    trace = lobs.trace_weight(layer.weight, moment_of(layer, batches), pattern=pattern)
    for share, weight in zip(SHARES, obs.prune_unstr(SHARES), strict=True):
        expected = trace.at(share)
        assert torch.equal(weight != 0, expected.mask)
        assert distance(weight, expected.weight) < 1e-5


def test_our_numerics_raise_if_the_moment_is_singular():
    layer, batches = linear(24, 5)
    obs = collected(layer, [x[:1, :9] for x in batches[:2]], numerics="ours")
    with pytest.raises(lobs.NotPositiveDefiniteError, match="rel_damp: 0"):
        obs.prepare_unstr()


def test_numerics_may_be_set_on_the_class():
    class Ours(TrueOBS):
        numerics = "ours"

    assert Ours(nn.Linear(4, 2)).numerics == "ours"
    assert TrueOBS(nn.Linear(4, 2)).numerics == "host"


# ---- singular second moments, as in OBC ----------------------------------------------------------


@pytest.mark.parametrize("missing", [1, 3, 15])
def test_a_singular_moment_gets_the_identity_with_a_warning(missing):
    layer, _ = linear(24, 5)
    x = features(24 - missing, 24).to(torch.float32)
    obs = collected(layer, [x])
    for call in (obs.nmprune, obs.prepare_unstr):
        original = copy.deepcopy(layer.weight.data)
        with pytest.warns(RuntimeWarning, match="identity was added") as warned:
            call()
        assert warned[0].filename == __file__
        assert any("identity" in note for note in obs.notes)
        layer.weight.data.copy_(original)
    H = moment_of(layer, [x]) + torch.eye(24)
    expected = torch.stack(
        [torch.from_numpy(r.loss) for r in traced(layer.weight.detach().to(F64), H)]
    )
    torch.testing.assert_close(obs.Losses[:, 1:].to(F64), expected / 2, rtol=1e-3, atol=1e-9)


def test_an_ill_conditioned_moment_is_handled_in_float64():
    layer, _ = linear(24, 5)
    x = features(400, 24) * torch.logspace(0, -3, 24, dtype=F64)
    obs = collected(layer, [x])
    obs.prepare_unstr()
    assert any("float64" in note for note in obs.notes)
    torch.testing.assert_close(
        obs.Losses[:, 1:].to(F64), Reference(layer, [x]).losses, rtol=1e-3, atol=0
    )


# ---- faults of the original that are not reproduced ----------------------------------------------


@pytest.mark.parametrize("blocks", [False, True])
def test_groups_of_a_convolution_have_their_own_inputs_and_one_budget(blocks):
    """The original fails with a shape error."""
    layer = nn.Conv2d(8, 10, 3, groups=2, padding=1)
    x = features(6 * 8 * 6, 6).to(torch.float32).reshape(6, 8, 6, 6)
    halves = []
    for g in range(2):
        half = nn.Conv2d(4, 5, 3, padding=1)
        half.weight.data = layer.weight.data[5 * g : 5 * g + 5]
        halves.append(collected(half, [x[:, 4 * g : 4 * g + 4]], 0.01))
    both = collected(layer, [x], 0.01)
    assert torch.equal(both.H, torch.stack([half.H for half in halves]))
    for obs in (both, *halves):
        obs.prepare_blocked(4) if blocks else obs.prepare_unstr()
    assert distance(both.Losses, torch.cat([half.Losses for half in halves])) < 1e-6
    (weight,) = both.prune_unstr([0.5])
    assert weight.shape == (10, 36)
    step = 4 if blocks else 1
    assert int((weight == 0).sum()) == step * math.ceil(0.5 * (360 // step))
    traces = torch.cat([t for half in halves for t in half.Traces], 1)
    for r, row in enumerate(weight):
        assert distance(row, traces[int((row == 0).sum()) // step, r]) < 1e-5


def test_dead_columns_lose_their_weights_even_with_damping():
    """The original adds the damping first, so it finds no zeros on the diagonal."""
    layer, batches = linear(24, 6, "dead")
    obs = collected(layer, batches, 0.01)
    obs.prepare_unstr()
    (weight,) = obs.prune_unstr([0.1])
    assert bool((weight[:, [3, 22]] == 0).all())
    assert bool((obs.Losses[:, 1:3] == 0).all())


def test_zeros_beyond_a_group_stay_zero():
    """The original removes n of them and changes the others to nonzero values."""
    layer, batches = linear(16, 5)
    layer.weight.data[:, :3] = 0.0
    collected(layer, batches).nmprune(2, 4)
    assert bool((layer.weight[:, :3] == 0).all())
    zeros = (layer.weight == 0).view(5, 4, 4).sum(2)
    assert zeros.tolist() == [[3, 2, 2, 2]] * 5


@pytest.mark.parametrize("n", [0, 4])
def test_groups_that_keep_all_or_nothing(n):
    """With n = 0 the original removes a column."""
    layer, batches = linear(16, 5)
    before = layer.weight.detach().clone()
    collected(layer, batches).nmprune(n, 4)
    assert torch.equal(layer.weight, before if n == 0 else torch.zeros_like(before))


def test_free_releases_everything():
    """The original keeps the traces, which take the most memory."""
    layer, batches = linear(16, 5)
    obs = collected(layer, batches)
    obs.prepare_unstr()
    obs.free()
    assert (obs.H, obs.Losses, obs.Traces) == (None, None, None)
    for call in (obs.prepare_unstr, lambda: obs.add_batch(batches[0], None)):
        with pytest.raises(lobs.LobsError, match="free"):
            call()
    with pytest.raises(lobs.LobsError, match="prepare_unstr or"):
        obs.prune_unstr([0.5])


def test_padding_is_that_of_the_layer():
    """The original always pads with zeros, and rejects named padding."""
    x = torch.randn(3, 4, 7, 7)
    for options in ({"padding": 1, "padding_mode": "circular"}, {"padding": "same"}):
        layer = nn.Conv2d(4, 2, 3, **options)
        mode = options.get("padding_mode", "constant")
        padded = nn.functional.pad(x, (1, 1, 1, 1), mode=mode)
        assert distance(collected(layer, [x]).H, moment_of(nn.Conv2d(4, 2, 3), [padded])) < 1e-6


def test_16_bit_inputs_are_summed_in_a_wider_dtype():
    """The original's product of float16 overflows."""
    layer, _ = linear(16, 5)
    x = (features(64, 16) * 300).to(torch.float16)
    assert distance(collected(layer, [x]).H, moment_of(layer, [x])) < 1e-5


def test_zeros_in_kept_blocks_are_repaired_as_in_the_original_and_noted():
    layer, batches = linear(16, 5)
    layer.weight.data[:, 0] = 0.0
    obs = collected(layer, batches)
    obs.prepare_blocked(4)
    assert any("5 zeros are in blocks" in note for note in obs.notes)


def test_16_bit_layers_keep_their_dtype():
    layer, batches = linear(16, 5)
    layer = layer.to(torch.bfloat16)
    obs = collected(layer, batches, 0.01)
    obs.nmprune(2, 4)
    assert layer.weight.dtype == torch.bfloat16
    assert bool(((layer.weight == 0).view(5, 4, 4).sum(2) == 2).all())
    obs.prepare_unstr()
    assert obs.prune_unstr([0.75])[0].dtype == torch.float32


# ---- errors --------------------------------------------------------------------------------------


def computed():
    layer = nn.Linear(4, 3)
    nn.utils.prune.random_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TrueOBS(torch.eye(3)), lobs.DtypeError, "layer: expected a torch.nn.Module"),
        (lambda: TrueOBS(nn.Embedding(3, 3)), lobs.DtypeError, "layer: Embedding"),
        (lambda: TrueOBS(computed()), lobs.ArgumentError, "cannot hold a pruned value"),
        (lambda: TrueOBS(nn.Linear(3, 3), -1), lobs.ArgumentError, "rel_damp: -1"),
        (lambda: TrueOBS(nn.Linear(3, 3), numerics="none"), lobs.ArgumentError, "numerics: 'none'"),
    ],
)
def test_unsupported_layers_and_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o: o.add_batch(torch.ones(2, 5)), lobs.ShapeError, r"inp: \(2, 5\)"),
        (lambda o: o.add_batch(torch.full((2, 16), torch.nan)), lobs.NonFiniteError, "inp: nan"),
        (lambda o: o.add_batch([1.0]), lobs.DtypeError, "inp: expected"),
        (lambda o: setattr(o, "H", torch.eye(3)), lobs.ShapeError, r"H: \(3, 3\)"),
        (lambda o: o.prepare_unstr(0), lobs.ArgumentError, "parallel: 0"),
        (lambda o: o.prepare_blocked(5), lobs.PatternError, "does not divide"),
        (lambda o: o.nmprune(2, 5), lobs.PatternError, "does not divide"),
        (lambda o: o.nmprune(5, 4), lobs.PatternError, "n: 5 of 4"),
        (lambda o: o.prune_unstr([0.5]), lobs.LobsError, "call prepare_unstr"),
        (lambda o: o.quantize(), lobs.LobsError, "quantize: .*host.quantize"),
    ],
)
def test_wrong_calls_are_refused_and_change_nothing(call, error, message):
    layer, batches = linear(16, 5)
    obs = collected(layer, batches)
    H, weight = obs.H.clone(), layer.weight.detach().clone()
    with pytest.raises(error, match=message):
        call(obs)
    assert torch.equal(obs.H, H)
    assert torch.equal(layer.weight, weight)


def test_wrong_sparsities_are_refused():
    layer, batches = linear(16, 5)
    obs = collected(layer, batches)
    obs.prepare_unstr()
    with pytest.raises(lobs.ArgumentError, match=r"sparsities: 1\.5"):
        obs.prune_unstr([0.5, 1.5])


def test_pruning_without_inputs_is_an_error():
    obs = TrueOBS(nn.Linear(4, 3))
    with pytest.raises(lobs.LobsError, match="add_batch"):
        obs.prepare_unstr()
    obs.H = torch.eye(4)
    obs.prepare_unstr()
    expected = obs.layer.weight.detach().square().sort(1).values / 2
    assert distance(obs.Losses[:, 1:], expected) < 1e-6


# ---- backends and devices ------------------------------------------------------------------------


def test_the_reference_backend_agrees():
    layer, batches = linear(16, 5, "zeros")
    found = [collected(layer, batches, 0.01, backend=b) for b in (None, "reference")]
    for obs in found:
        obs.prepare_unstr()
    assert distance(found[0].Losses, found[1].Losses) < 1e-5


@pytest.fixture(params=["reference", "kernels"])
def device(request):
    """A pretend CUDA device."""
    with pretend.device(request.getfixturevalue("emulated") if "k" in request.param else None):
        yield


def test_tensors_stay_on_their_device(device):
    layer, batches = linear(16, 5, "zeros")
    here = collected(layer, batches, 0.01)
    there = collected(copy.deepcopy(layer).to(CUDA), [x.to(CUDA) for x in batches], 0.01)
    assert there.H.device == CUDA
    for obs in (here, there):
        obs.prepare_unstr()
    assert there.Losses.device == CUDA
    assert distance(there.Losses.cpu(), here.Losses) < 1e-5
    assert there.Traces[0].device.type == "cpu"
    assert distance(there.Traces[0], here.Traces[0]) < 1e-5
    (weight,) = there.prune_unstr([0.5])
    assert weight.device == CUDA
    assert distance(weight.cpu(), here.prune_unstr([0.5])[0]) < 1e-5
    there.nmprune(2, 4)
    here.nmprune(2, 4)
    assert distance(there.layer.weight.detach().cpu(), here.layer.weight.detach()) < 1e-5


# ---- under OBC's name ----------------------------------------------------------------------------


class Pretender:
    """A class with OBC's signatures that records calls of quantize."""

    def __init__(self, layer, rel_damp=0):
        self.layer = layer

    def add_batch(self, inp, out): ...
    def prepare_unstr(self, parallel=32): ...
    def prune_unstr(self, sparsities): ...
    def prepare_blocked(self, size=4, parallel=32): ...
    def prune_blocked(self, sparsities): ...
    def nmprune(self, n=2, m=4, parallel=32): ...
    def free(self): ...

    def quantize(self, parallel=32):
        self.layer.asked = self.H, self.nsamples, self.quantizer, parallel


def test_patch_installs_it_and_leaves_quantize_to_the_original(monkeypatch):
    module = ModuleType("trueobs")
    module.TrueOBS = Pretender
    monkeypatch.setitem(sys.modules, "trueobs", module)
    layer, batches = linear(16, 5)
    with lobs.compat.patch("obc") as record:
        obs = collected(layer, batches, kind=module.TrueOBS)
        assert isinstance(obs, TrueOBS)
        obs.prepare_unstr()
        obs.prune_unstr([0.5])
        obs.quantizer = "a quantizer"
        obs.quantize(8)
    assert layer.asked == (obs.H, obs.nsamples, "a quantizer", 8)
    assert module.TrueOBS is Pretender
    assert {line.name: line.calls for line in record.lines} == {
        "TrueOBS.add_batch": 3,
        "TrueOBS.prepare_unstr": 1,
        "TrueOBS.prune_unstr": 1,
        "TrueOBS.prepare_blocked": 0,
        "TrueOBS.prune_blocked": 0,
        "TrueOBS.nmprune": 0,
    }


# ---- against OBC itself --------------------------------------------------------------------------

HOST_CASES = {
    **{name: (make, 0.0) for name, make in CASES.items()},
    # With damping, the original removes the weights of dead columns later.
    **{f"{n}, damped": (m, 0.01) for n, m in CASES.items() if "dead" not in n},
}


@pytest.fixture(params=HOST_CASES)
def pair(request):
    """The same layer and inputs in OBC's class and in ours, side by side."""
    make, rel_damp = HOST_CASES[request.param]
    layer, batches = make()
    with original_programs.trueobs() as module, contextlib.redirect_stdout(io.StringIO()):
        host = collected(copy.deepcopy(layer), batches, rel_damp, kind=module.TrueOBS)
        yield host, collected(layer, batches, rel_damp)


def check_against(host, ours, block: int) -> None:
    assert distance(ours.H, host.H) < 1e-6
    torch.testing.assert_close(ours.Losses, host.Losses, rtol=1e-3, atol=1e-7)
    assert len(ours.Traces) == len(host.Traces)
    for result, theirs in zip(ours.Traces, host.Traces, strict=True):
        torch.testing.assert_close(result, theirs, rtol=1e-4, atol=1e-6)
    name = "prune_unstr" if block == 1 else "prune_blocked"
    for result, theirs in zip(
        getattr(ours, name)(SHARES), getattr(host, name)(SHARES), strict=True
    ):
        assert torch.equal(result == 0, theirs == 0)
        torch.testing.assert_close(result, theirs, rtol=1e-4, atol=1e-6)


def test_single_weights_as_the_original(pair):
    host, ours = pair
    host.prepare_unstr()
    ours.prepare_unstr()
    check_against(host, ours, 1)


def test_blocks_as_the_original(pair):
    host, ours = pair
    if ours.columns % 4:
        pytest.skip("blocks of 4 do not divide its columns")
    host.prepare_blocked(4)
    ours.prepare_blocked(4)
    check_against(host, ours, 4)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_groups_as_the_original(pair, n, m):
    host, ours = pair
    if ours.columns % m:
        pytest.skip(f"groups of {m} do not divide its columns")
    ordered = ours.layer.weight.detach()
    if ordered.ndim == 4:
        ordered = ordered.movedim(1, -1)
    rows = (ordered.reshape(ours.rows, -1, m) == 0).sum(2).amax(1) <= n
    host.nmprune(n, m)
    ours.nmprune(n, m)
    assert bool(rows.any())  # rows with more zeros are in another test
    theirs = host.layer.weight.detach()[rows]
    torch.testing.assert_close(ours.layer.weight.detach()[rows], theirs, rtol=1e-4, atol=1e-6)


def test_an_unmodified_program_is_verified_by_the_original():
    layer, batches = linear(24, 9)
    with (
        original_programs.trueobs() as module,
        lobs.compat.patch("obc", verify=1) as record,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        obs = collected(layer, batches, kind=module.TrueOBS)
        obs.prepare_unstr()
        obs.prune_unstr([0.3, 0.7])
        obs.prepare_blocked(4)
        obs.prune_blocked([0.5])
        obs.nmprune(2, 4)
    lines = {line.name: line for line in record.lines}
    for name in ("prune_unstr", "prune_blocked", "nmprune"):
        line = lines[f"TrueOBS.{name}"]
        assert (line.calls, line.verified, line.mask, line.exceeded) == (1, 1, 0, 0), str(line)
