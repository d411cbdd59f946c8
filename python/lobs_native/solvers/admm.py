"""Method "admm": alternating directions between the layer's error and the wanted number of zeros.

Every iteration costs one product of the layer's size, whatever is removed, so that the cost of a
layer grows with the square of its width for each row, where that of "exact" grows with the cube.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lobs_native import ops
from lobs_native.errors import NotPositiveDefiniteError
from lobs_native.ops import WeightState
from lobs_native.solvers.conjugate import conjugate_gradients_, times
from lobs_native.solvers.costs import costs_between
from lobs_native.solvers.extent import Extent, Flops
from lobs_native.solvers.inversion import invert_
from lobs_native.solvers.method import Choice, Method
from lobs_native.solvers.patterns import FORCED, ZERO, Pattern, goes_first
from lobs_native.solvers.problem import Problem, in_errors, nearest_count, spectral_norm
from lobs_native.solvers.rows import own_share

__all__ = ["Admm"]


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """How the penalty grows, in units of the geometric mean of the scaled H's eigenvalues."""

    inverted: tuple[float, ...]  # penalties with an inverse; those between are interpolated
    values: int  # of the penalty, in geometric steps


# Chosen on layers of an encoder and of a language model (bench/quality/admm.py). A dual variable is
# not rescaled when the penalty changes; that, momentum, relaxation and Anderson acceleration all
# made it worse. An inverse costs as much as 3 products where C = 4 R, so there the smaller schedule
# saves a tenth to a fifth of the time and makes the error up to 1 percent larger.
_USUAL, _WIDE = _Schedule((0.5, 1.0, 2.0), 18), _Schedule((0.5, 2.0), 10)
_ITERATIONS = 2  # for each value
_STILL = 2e-4  # share of the weights: with fewer newly removed, the mask stands still
_BRIEFLY = 5  # values where only the error is wanted, which comes out 1 to 2 percent higher
_MOST_STEPS = 20  # of conjugate gradients at the end
_STEPS = 6  # of them that plans expect
_GAIN = 0.06  # at which they may end: 0.003 takes twice the steps and gains 0.2 percent
_LEVELS = (0.25, 0.5, 0.7, 0.85, 0.95, 1.0)  # of the removals at which a layer's error is measured
_WELL_CONDITIONED = 2e4  # layers of transformers are at most at 8,000 with enough samples
_PIECE = 512  # rows of H that are scaled in one temporary
_LEAST_IMPORTANCE = 1e-12  # rows whose cost counts less are still repaired accurately
_OPTIMALITY = 10.0  # the ratio at which they may end; results above 30 are solved for again


class Admm(Method):
    """Iterates on all weights of a problem at once.

    With ``s_j = A_jj^(-1/2)``, the weights are ``w_j s_j`` and the second moment is ``H_ij / (s_i
    s_j)``: the square of a weight is OBS's price of its removal. That scaling is ours. Source of
    the rest: Boza 2024; ALPS (Meng et al. 2024), which scales by ``H_jj^(1/2)``.
    """

    in_blocks = True
    compares_layers = True

    def __init__(
        self, problem: Problem, pattern: Pattern, importance: Tensor | None = None
    ) -> None:
        super().__init__(problem, pattern, importance)
        G, _, D = problem.before.shape
        dtype, device = problem.dtype, problem.before.device
        self.H = torch.empty(G, D, D, dtype=dtype, device=device)
        self.scaling = torch.empty(G, 1, D, dtype=dtype, device=device)
        common = max(i.scale for i in problem.inverses)
        self.mean = torch.empty(G, 1, 1, dtype=dtype, device=device)
        for g, inverse in enumerate(problem.inverses):
            A_jj = inverse.diagonal()
            s = A_jj.rsqrt()
            # U^T U = A = H^-1, and H is about to be scaled by 1 / s on both sides.
            self.mean[g] = (A_jj.log().mean() - 2 * inverse.U.diagonal().log().mean()).exp()
            for first in range(0, D, _PIECE):  # a temporary of D * D float64 would make the peak
                rows = slice(first, first + _PIECE)
                self.H[g, rows] = problem.damped(g, rows).div_(s).div_(s[rows, None])
            self.scaling[g] = s * (inverse.scale / common) ** 0.5
        self.unit_cost = in_errors(common, problem.exponent)
        self.factors: Tensor | None = None  # (G, R, 1), of whole rows
        if importance is not None and float(importance.max()) > 0 and not pattern.is_grouped:
            # A cost that is multiplied by f is that of weights that are multiplied by its root.
            relative = (importance / importance.mean()).clamp_min(_LEAST_IMPORTANCE)
            self.factors = relative.sqrt().to(dtype)[:, :, None]
        self.schedule = _schedule(problem.before.shape[1], D)
        # Float32 inverts what is better conditioned. Few samples make it worse: a few directions
        # have all of H, and the damping is all of the others.
        norms = torch.tensor([spectral_norm(H) for H in self.H])
        worst = float((norms / self.mean.view(-1).cpu()).max()) / self.schedule.inverted[0]
        self.inverting = torch.float64 if worst > _WELL_CONDITIONED else dtype
        self._resolvents: dict[float, Tensor] | None = None  # once several choices are to be made

    # ---- plans -----------------------------------------------------------------------------------

    @classmethod
    def matrices(cls, extent: Extent) -> int:
        """See :class:`Method`: H and what is added to it while preparing, while iterating, or
        during conjugate gradients."""
        size, several = extent.kernel.itemsize, extent.searched or extent.shared
        inverted = len(_schedule(extent.rows, extent.order).inverted)
        resolvents = inverted + 1 if several else 2  # one of them between two others
        preparing = (8 + size) * extent.squares + size * extent.weights  # the inverse is there
        # Before, x, p, d and a temporary; at the end x, z, g, h, a product of two. With removed and
        # states.
        iterating = (1 + resolvents) * size * extent.squares + (5 * size + 2) * extent.weights
        if extent.samples < extent.order:  # then it is inverted in float64
            iterating += (8 - size + size * (size < 8)) * extent.squares
        ending = (1 + several * resolvents) * size * extent.squares
        ending += (6 * size + 2) * extent.weights
        costs = (8 + 8) * extent.weights * extent.shared  # also joined
        return max(preparing, iterating + costs, ending + costs)

    @classmethod
    def flops(cls, extent: Extent) -> Flops:
        """See :class:`Method`: every iteration and every step of conjugate gradients a product, and
        some penalties an inverse."""
        penalties = len(_schedule(extent.rows, extent.order).inverted) * (1 + extent.shared)
        inverting = _in_kernel(extent, 2.0 * extent.order * penalties * extent.squares)
        return super().flops(extent) + inverting + cls.flops_by_row(extent)

    @classmethod
    def flops_by_row(cls, extent: Extent) -> Flops:
        """See :class:`Method`: the products."""
        choices = 1
        if extent.searched:
            choices += math.ceil(math.log2(extent.weights + 1))
        products = choices * (_schedule(extent.rows, extent.order).values * _ITERATIONS + _STEPS)
        products += len(_LEVELS) * extent.shared * (_BRIEFLY * _ITERATIONS + _STEPS + 1)
        return _in_kernel(extent, 2.0 * extent.order * products * extent.weights)

    # ---- choices ---------------------------------------------------------------------------------

    def choose(self, share: float, scope: str) -> Choice:
        """See :class:`Method`."""
        problem, pattern = self.problem, self.pattern
        G, R, _ = problem.before.shape
        units = problem.candidates // pattern.unit
        by_row = scope == "row"
        count = nearest_count(share, units if by_row else G * R * units)
        if not pattern.is_grouped and count == 0:
            nothing = torch.zeros_like(problem.before, dtype=torch.bool)
            return Choice(nothing, problem.before.clone())
        state, decided = self._state(count, by_row=by_row)
        if decided:
            assert state is not None
            return Choice(state == WeightState.GOES_FIRST)
        return self._alternate(count, by_row, state)

    def _state(self, count: int, *, by_row: bool) -> tuple[Tensor | None, bool]:
        """The state (G, R, D) of every weight, uint8, None where all may go; and whether that alone
        decides what is removed.

        Where masked weights and zeros are more than the count, the first of them go first, and all
        other weights (of the row) stay.
        """
        problem, pattern = self.problem, self.pattern
        C, (G, R, D) = problem.candidates, problem.before.shape
        forced, zero = problem.masked()[:, :, :C], problem.before[:, :, :C] == 0
        some = problem.mask is not None or bool(zero.any())
        if not some and not problem.bias_stays:
            return None, False
        state = torch.zeros(G, R, D, dtype=torch.uint8, device=forced.device)
        state[:, :, C:] = WeightState.STAYS
        if not some:
            return state, False
        if pattern.is_grouped:
            first = goes_first(forced, zero, pattern.group, pattern.per_group)
            state[:, :, :C].masked_fill_(first, WeightState.GOES_FIRST)
            return state, int(first.sum()) * pattern.group == first.numel() * pattern.per_group
        score = torch.where(forced, FORCED, torch.where(zero, ZERO, 0.0)).to(torch.float64)
        score = pattern.unit_scores(score)
        score = score.view(G * R, -1) if by_row else score.view(1, -1)
        first = score < 0
        full = first.sum(1) >= count  # (rows,)
        if bool(full.any()):
            first[full] = ops.rank_lowest(score[full], count, backend=problem.workspace.backend)
        units = torch.where(
            first,
            int(WeightState.GOES_FIRST),
            torch.where(full[:, None], int(WeightState.STAYS), int(WeightState.MAY_GO)),
        )
        weights = units.view(G, R, -1).repeat_interleave(pattern.unit, -1)
        state[:, :, :C] = weights.to(torch.uint8)
        return state, bool(full.all())

    def prepare(self) -> None:
        """See :class:`Method`: keeps the inverses."""
        self._resolvents = {}

    def cheapest(self, units: int) -> tuple[Tensor, float]:
        """See :class:`Method`. The layer is pruned to a few counts, briefly; a removal costs the
        slope of the error between them."""
        zeros = int((self.problem.before[:, :, : self.problem.candidates] == 0).sum())
        free = torch.zeros(min(zeros, units), dtype=torch.float64)
        if units <= zeros:
            return free, self.unit_cost
        self.prepare()
        counts = sorted({max(1, round(share * (units - zeros))) for share in _LEVELS})
        state, _ = self._state(zeros + 1, by_row=False)
        errors = []
        for count in counts:
            layer = _Layer(self, state)
            self._settle(layer, zeros + count, by_row=False, values=_BRIEFLY)
            errors.append(layer.error())
        return torch.cat([free, costs_between(counts, errors)]), self.unit_cost

    # ---- the iteration ---------------------------------------------------------------------------

    def _alternate(self, count: int, by_row: bool, state: Tensor | None) -> Choice:
        problem = self.problem
        layer = _Layer(self, state)
        self._settle(layer, count, by_row=by_row)
        removed = layer.joined(layer.removed)
        if problem.precise:  # conjugate gradients reach neither float64 nor little damping
            return Choice(removed)
        after = layer.joined(layer.repaired())
        after.div_(self.scaling)
        if self.factors is not None:
            after.div_(self.factors)
        return Choice(removed, problem.restored(after, removed))

    def _settle(
        self, layer: _Layer, count: int, *, by_row: bool, values: int | None = None
    ) -> None:
        """All iterations of one choice, with so many ``values`` of the penalty."""
        for inverse in self.problem.inverses:
            inverse.release()  # half of what a wide layer would hold from here on
        layer.project(count, by_row)
        for M in self._growing(values or self.schedule.values):
            for _ in range(_ITERATIONS):
                layer.step(M)
                if layer.project(count, by_row) < _STILL * self.problem.before.numel():
                    break

    def _growing(self, values: int) -> Iterator[Tensor]:
        """(G, D, D), ``values`` times: :meth:`_resolvent` while the penalty grows.

        One that lies between two inverses is the mean of them that is right for eigenvalues far
        above and far below; in the middle it is 3 percent low (11 percent in the wide schedule),
        as if H were higher there. The conjugate gradients at the end have H as it is. With an
        inverse for each value, the error is 0.1 percent lower. A tensor is undefined once the next
        one is asked for.
        """
        inverted = self.schedule.inverted
        low, high = inverted[0], inverted[-1]
        grown = [low * (high / low) ** (i / (values - 1)) for i in range(values)]
        M = self._resolvent(low)
        for now, upper in pairwise(inverted):
            target = self._resolvent(upper)
            if self._resolvents is not None:
                M = M.clone()
            at = now
            for penalty in grown:
                if now <= penalty < upper:
                    M.lerp_(target, (penalty - at) / (upper - at))
                    at = penalty
                    yield M
            M = target
        yield M

    def _resolvent(self, penalty: float) -> Tensor:
        """(G, D, D): ``rho (H + rho I)^-1`` with ``rho = penalty * mean``."""
        if self._resolvents is not None and penalty in self._resolvents:
            return self._resolvents[penalty]
        M = self.H.to(self.inverting, copy=True).div_(penalty * self.mean)
        M.diagonal(dim1=1, dim2=2).add_(1.0)
        if len(M) > 1:  # many small ones (grouped convolutions) at once
            with ops.one_thread():
                M, info = torch.linalg.inv_ex(M)
            positive = not bool(info.any())
        else:
            positive = invert_(M[0])
        M = M.to(self.H.dtype)
        if not positive:
            raise NotPositiveDefiniteError(
                f"hessian: not positive definite in {self.problem.dtype} with damping "
                f"{self.problem.damping:g}; pass a larger damping, or a float64 weight"
            )
        if self._resolvents is not None:
            self._resolvents[penalty] = M
        return M


class _Layer:
    """The weights of one layer while directions alternate, in scaled coordinates; where processes
    share its rows, the own blocks of them, R' rows."""

    def __init__(self, admm: Admm, state: Tensor | None) -> None:
        problem = admm.problem
        G, self.rows, D = problem.before.shape
        self.admm = admm
        self.shared = problem.workspace.rows
        own = self.shared.own(self.rows, whole_blocks=True)
        self.blocks = self.shared.own_blocks(self.rows)
        self.x = torch.stack([problem.working(g) for g in range(G)])[:, own].mul_(admm.scaling)
        if admm.factors is not None:
            self.x *= admm.factors[:, own]
        self.p, self.d = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.removed = torch.zeros_like(self.x, dtype=torch.bool)
        self._flat = [t.view(-1, D) for t in (self.p, self.d, self.x, self.removed)]
        self._state = None if state is None else state[:, own].reshape(-1, D)
        self._cut = 0.0

    def joined(self, x: Tensor) -> Tensor:
        """(G, R, D): the rows of all processes, of (G, R', D)."""
        if self.shared.size == 1:
            return x
        return self.shared.joined(x[0], self.rows, whole_blocks=True)[None]

    def step(self, M: Tensor) -> None:
        """The product of an iteration, with :meth:`Admm._resolvent`."""
        times(self.d, M, self.blocks, out=self.p)

    def project(self, count: int, by_row: bool) -> int:
        """All the rest of it, see csrc/admm.h; the number of weights that are newly removed."""
        pattern = self.admm.pattern
        if self.shared.size > 1 and not (by_row or pattern.is_grouped):
            count = self._own_count(count)
        newly, self._cut = ops.admm_step_(
            *self._flat,
            count=None if pattern.is_grouped else count,
            unit=pattern.unit,
            group=pattern.group,
            per_group=pattern.per_group,
            by_row=by_row,
            state=self._state,
            cut=self._cut,
            backend=self.admm.problem.workspace.backend,
        )
        return sum(changed for (changed,) in self.shared.values([newly]))

    def _own_count(self, count: int) -> int:
        """How many of the ``count`` units that the layer is to lose are in the own rows: as the
        kernel costs them, see csrc/admm.h."""
        p, d, x, removed = self._flat
        y, unit = (p + x).sub_((d + x).mul_(removed)), self.admm.pattern.unit
        end = y.shape[1] // unit * unit
        if unit == 1:
            cost = y.abs_()
        else:
            squares = y[:, :end].to(torch.float64).square_()
            cost = squares[:, ::unit].contiguous()
            for i in range(1, unit):
                cost += squares[:, i::unit]
        keys = cost.view(torch.int32 if cost.dtype == torch.float32 else torch.int64)
        if self._state is None:
            return own_share(self.shared, keys.view(-1), count)
        state = self._state[:, :end:unit]
        first = int((state == WeightState.GOES_FIRST).sum())
        count -= sum(others for (others,) in self.shared.values([first]))
        return first + own_share(self.shared, keys[state == WeightState.MAY_GO], max(0, count))

    def repaired(self) -> Tensor:
        """(G, R', D): the best weights for what is removed now, up to some thousandths of their
        error. The end: x, p and d are used up."""
        z, x = self.d.add_(self.x), self.x
        del self.p, self._flat
        conjugate_gradients_(
            z.masked_fill_(self.removed, 0.0),
            x,
            self.admm.H,
            self.removed,
            tolerance=_OPTIMALITY * z.shape[2] * torch.finfo(torch.float32).eps,
            gain=_GAIN,
            most=_MOST_STEPS,
            backend=self.admm.problem.workspace.backend,
            rows=self.shared,
            count=self.rows,
        )
        return z

    def error(self) -> float:
        """tr(dW H dW^T) of :meth:`repaired`, in scaled units, of all rows in this process; also the
        end."""
        x = self.x.clone()
        change = self.repaired().sub_(x)
        product = times(change, self.admm.H, self.blocks, out=x)
        return float(torch.linalg.vecdot(product, change).sum(dtype=torch.float64))


def _in_kernel(extent: Extent, work: float) -> Flops:
    return Flops(double=work) if extent.kernel == torch.float64 else Flops(single=work)


def _schedule(rows: int, columns: int) -> _Schedule:
    return _WIDE if columns > 2 * rows else _USUAL
