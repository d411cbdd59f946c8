"""The reference: every native operation in plain torch and float64, slow but readable.

The functions have the names and the meaning of those in :mod:`lobs_native.ops`, which does the
checking. They are also a backend, ``"reference"``, and the only one for devices without kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lobs_native.ops.native import AdmmPlan, ExactPlan, WeightState

_REMOVED = max(WeightState) + 1  # a further state of a column in :func:`exact_trace`


def hessian_accumulate_(H: Tensor, X: Tensor, weights: Tensor | None, ones: bool) -> None:
    """Lower triangle of H (D, D) += X^T diag(weights) X, X (N, C), with a last column of ones if
    ``ones``."""
    x = X.to(torch.float64)  # (N, C)
    if weights is not None:
        x = x[weights > 0]
        weights = weights[weights > 0]
    if ones:
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)  # (N, C + 1)
    tx = x if weights is None else x * weights.to(torch.float64)[:, None]
    H += torch.tril(tx.T @ x).to(H.dtype)


def inverse_update_(F: Tensor, G: Tensor, m: float) -> int:
    """Update F (blocks, B, B) with the samples G (r, d) one at a time, as published.

    Returns -1, or the first block that lost definiteness; then F is unchanged.
    """
    blocks, B, _ = F.shape
    padded = torch.zeros(len(G), blocks * B, dtype=torch.float64, device=F.device)
    padded[:, : G.shape[1]] = G
    f = F.to(torch.float64)
    for g in padded.view(-1, blocks, B):  # (blocks, B)
        y = torch.einsum("bij,bj->bi", f, g)
        scale = m + torch.einsum("bi,bi->b", g, y)
        bad = ~((scale > 0) & torch.isfinite(scale))
        if bool(bad.any()):
            return int(bad.to(torch.uint8).argmax())
        f -= torch.einsum("bi,bj->bij", y, y) / scale[:, None, None]
    F.copy_(f)
    return -1


def saliency(W: Tensor, diag: Tensor | float) -> Tensor:
    """Cost of removing each weight, ``w**2 / diag``: the exact increase of tr(dW H dW^T)."""
    return W * W / diag


def saliency_argmin(W: Tensor, diag: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest live column of each row (the lowest on a tie, -1 if none), and its cost."""
    cost = saliency(W, diag)  # (R, C), rounded as in the kernels
    cost = torch.where(live, cost, torch.inf)
    value = cost.amin(dim=1)  # (R,)
    column = ((cost == value[:, None]) & live).to(torch.uint8).argmax(dim=1)
    return torch.where(live.any(dim=1), column, -1), value


def static_order_prune_(W: Tensor, A: Tensor, order: Tensor, start: Tensor) -> None:
    """Remove columns order[start[r]:start[r+1]] from row r of W (R, C), one after another."""
    w = W.to(torch.float64)
    a = A.to(torch.float64)
    removed = order.tolist()
    bounds = start.tolist()
    for r, row in enumerate(w):
        columns = removed[bounds[r] : bounds[r + 1]]
        for q in columns:
            row -= (row[q] / a[q, q]) * a[:, q]
        row[columns] = 0.0
    W.copy_(w)


def rank_lowest(score: Tensor, count: int) -> Tensor:
    """Bool like score (R, C): the ``count`` lowest of each row, ties to the lowest column."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    return chosen.scatter_(1, score.argsort(dim=1, stable=True)[:, :count], True)


def rank_rows(score: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen columns of each row by rising score, row after row, and where each row starts."""
    count = chosen.sum(dim=1)
    start = torch.zeros(len(count) + 1, dtype=torch.int64, device=score.device)
    start[1:] = count.cumsum(0)
    # Sort by score, then move the chosen to the front, keeping that order.
    by_score = score.argsort(dim=1, stable=True)
    chosen_first = (~chosen.gather(1, by_score)).to(torch.uint8).argsort(dim=1, stable=True)
    ranked = by_score.gather(1, chosen_first)  # (R, C)
    place = torch.arange(score.shape[1], device=score.device)
    return ranked[place < count[:, None]].to(torch.int32), start


def exact_trace(
    W: Tensor, A: Tensor, state: Tensor | None, plan: ExactPlan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greedy OBS of every row of W (R, C) with its own downdated copy of A, as published.

    Returns order (R, limit) int32 (-1 after a row has ended), loss (R, limit), count (R,) and lost
    (R,) bool. With ``plan.update``, W holds the repaired weights of the rows that are not lost.
    """
    R, C = W.shape
    limit, block, group = plan.limit, plan.block, plan.group
    order = torch.full((R, limit), -1, dtype=torch.int32, device=W.device)
    loss = torch.zeros(R, limit, dtype=torch.float64, device=W.device)
    count = torch.zeros(R, dtype=torch.int64, device=W.device)
    lost = torch.zeros(R, dtype=torch.bool, device=W.device)
    unit = group or block
    whole = C - C % unit
    for r in range(R):
        w = W[r].to(torch.float64)
        D = A.to(torch.float64)
        first_diag = D.diagonal().clone()
        kind = torch.zeros(C, dtype=torch.uint8) if state is None else state[r].clone()
        kind[whole:] = WeightState.STAYS
        taken = [0] * (C // unit)
        if group and plan.per_group == 0:
            kind[kind == WeightState.MAY_GO] = WeightState.STAYS
        while int(count[r]) + block <= limit:
            first = kind == WeightState.GOES_FIRST
            may = (first if bool(first.any()) else kind == WeightState.MAY_GO).nonzero()[:, 0]
            if len(may) == 0:
                break
            if block == 1:
                cost = saliency(w[may], D.diagonal()[may])
                good = D.diagonal()[may] > plan.floor * first_diag[may]
                choice = int(torch.where(good, cost, 0.0).argmin())  # a lost one ends the row
                columns = [int(may[choice])]
            else:
                starts = may[may % block == 0].tolist()
                costs = []
                for s in starts:
                    B = slice(s, s + block)
                    L, info = torch.linalg.cholesky_ex(D[B, B])
                    y = torch.linalg.solve_triangular(L, w[B, None], upper=False)
                    costs.append(y.square().sum() if int(info) == 0 else w.new_zeros(()))
                cost = torch.stack(costs)
                choice = int(cost.argmin())
                columns = list(range(starts[choice], starts[choice] + block))
            if not bool(first.any()) and float(cost[choice]) > plan.stop:
                break
            for i, q in enumerate(columns):
                d = float(D[q, q])
                if not d > plan.floor * float(first_diag[q]):
                    lost[r] = True
                    break
                order[r, count[r] + i] = q
                loss[r, count[r] + i] = saliency(w[q], d)
                column = D[:, q] / d
                w = w - w[q] * column
                D = D - torch.outer(column, column) * d
                w[q] = 0.0
                kind[q] = _REMOVED
            if lost[r]:
                break
            count[r] += block
            if group:
                g = columns[0] // group
                taken[g] += 1
                if taken[g] >= plan.per_group:
                    members = slice(g * group, (g + 1) * group)
                    kind[members][kind[members] == WeightState.MAY_GO] = WeightState.STAYS
        if plan.update and not lost[r]:
            w[kind == _REMOVED] = 0.0
            W[r] = w.to(W.dtype)
    ended = torch.arange(limit, device=W.device) >= count[:, None]
    order[ended] = -1
    loss[ended] = 0.0
    return order, loss.to(W.dtype), count, lost


def support_solve_(X: Tensor, M: Tensor, chosen: Tensor) -> int:
    """Solve X[r, P] <- M[P, P]^-1 X[r, P] with P = chosen[r] for row r of X (R, C); zero elsewhere.

    Returns -1, or the first row whose system is not positive definite; X is undefined from there
    on.
    """
    m = M.to(torch.float64)
    for r in range(len(X)):
        P = chosen[r].nonzero()[:, 0]
        L, info = torch.linalg.cholesky_ex(m[P][:, P])
        if int(info):
            return r
        x = torch.cholesky_solve(X[r, P].to(torch.float64)[:, None], L)[:, 0]
        X[r] = 0.0
        X[r, P] = x.to(X.dtype)
    return -1


def sweep_block_(W: Tensor, U: Tensor, gone: Tensor, E: Tensor, group: int, per_group: int) -> None:
    """Sweep one block as SparseGPT does, column by column: W (R, B), U (B, B) upper, gone and E
    (R, B)."""
    w = W.to(torch.float64)
    u = U.to(torch.float64)
    for j in range(W.shape[1]):
        if group and j % group == 0:
            members = slice(j, j + group)
            states = gone[:, members]  # (R, M)
            first, stays = states == WeightState.GOES_FIRST, states == WeightState.STAYS
            cost = (w[:, members] / u.diagonal()[members]) ** 2
            cost = torch.where(first, -1.0, cost)
            cost = torch.where(stays, torch.inf, cost)
            rank = cost.argsort(dim=1, stable=True).argsort(dim=1)  # (R, M)
            states.copy_(~stays & ((rank < per_group) | first))
        e = torch.where(gone[:, j] == 1, w[:, j] / u[j, j], 0.0)  # (R,)
        w[:, j:] -= e[:, None] * u[j, j:]
        w[gone[:, j] == 1, j] = 0.0
        E[:, j] = e.to(E.dtype)
    W.copy_(w)


def exchange_(
    W: Tensor, A: Tensor, kept: Tensor, fixed: Tensor | None, group: int, limit: int
) -> tuple[Tensor, Tensor, int]:
    """Swap one kept weight of each row of W (R, C) for one removed weight while that helps.

    Returns the number of swaps (R,) int64, the remaining error (R,) float64, and -1 or the first
    row for which A lost definiteness; that row of W and ``kept`` is unchanged.
    """
    R, C = W.shape
    swaps = torch.zeros(R, dtype=torch.int64, device=W.device)
    left = torch.zeros(R, dtype=torch.float64, device=W.device)
    group_of = torch.arange(C, device=W.device) // (group or C or 1)
    bad = -1
    for r in range(R):
        free = torch.ones(C, dtype=torch.bool, device=W.device) if fixed is None else ~fixed[r]
        done = _exchange_row(W[r], A, kept[r], free, group_of, limit)
        if done is None:
            bad = r if bad < 0 else bad
        else:
            kept[r], W[r], swaps[r], left[r] = done
    return swaps, left, bad


def _exchange_row(
    w0: Tensor, A: Tensor, kept: Tensor, free: Tensor, group_of: Tensor, limit: int
) -> tuple[Tensor, Tensor, int, float] | None:
    """The final kept set (C,), the weights (C,), the number of swaps and the remaining error.

    None if A is not positive definite.
    """
    S, done = kept.clone(), 0
    while True:
        i, j = torch.nonzero(S)[:, 0], torch.nonzero(~S)[:, 0]  # kept, removed
        factor, info = torch.linalg.cholesky_ex(A[j][:, j])
        if int(info):
            return None
        K = torch.cholesky_inverse(factor)
        x = K @ w0[j]
        w = w0 - A[:, j] @ x
        w[j] = 0.0
        error = float(x @ w0[j])
        if done >= limit or not len(i) or not len(j):
            return S, w, done, max(error, 0.0)
        T = A[i][:, j] @ K  # (kept, removed)
        D = A.diagonal()[i] - (T * A[i][:, j]).sum(dim=1)
        ratio = x / K.diagonal()
        share = T / K.diagonal()
        cost = saliency(w[i, None] + T * ratio, D[:, None] + T * share)  # of removing i, j back
        net = cost - x * ratio
        allowed = free[i, None] & free[j] & (group_of[i, None] == group_of[j])
        net = torch.where(allowed, net, torch.inf)
        best = int(net.argmin())  # the first: the lowest i, then the lowest j
        if not float(net.view(-1)[best]) < -1e-9 * error:
            return S, w, done, max(error, 0.0)
        row, column = divmod(best, len(j))
        S[i[row]], S[j[column]] = False, True
        done += 1


def admm_step_(
    p: Tensor, d: Tensor, x: Tensor, removed: Tensor, state: Tensor | None, plan: AdmmPlan
) -> tuple[int, float, int]:
    """Project y = (p + x) + u on the sparse weights and update d and removed (R, C).

    Returns the number of weights that are removed now and were not before, what the costliest
    removed unit costs (0 where states decide, with groups and by row), and -1 or the flat index of
    the first y that is not finite; then nothing is written.
    """
    R, C = d.shape
    y = (p + x) + torch.where(removed, -(d + x), 0.0)  # rounded as in the kernels
    bad = ~torch.isfinite(y)
    if bool(bad.any()):
        return 0, 0.0, int(bad.view(-1).to(torch.uint8).argmax())
    unit = plan.unit
    whole = C - C % (plan.group or unit)
    parts = y[:, :whole].to(torch.float64).reshape(R, -1, unit)
    cost = parts[:, :, 0].abs() if unit == 1 else parts[:, :, 0].square()
    for i in range(1, unit):  # from the left
        cost = cost + parts[:, :, i].square()
    code = torch.zeros_like(d, dtype=torch.uint8) if state is None else state
    code = code[:, :whole:unit]
    first, stays = code == WeightState.GOES_FIRST, code == WeightState.STAYS
    ranked = torch.where(first, -1.0, torch.where(stays, torch.inf, cost))  # (R, units)
    count = plan.per_group if plan.group else plan.count
    if plan.group:
        ranked = ranked.view(-1, plan.group)
    elif not plan.by_row:
        ranked = ranked.view(1, -1)
    goes = (rank_lowest(ranked, count).view_as(cost) | first) & ~stays
    now = torch.zeros_like(removed)
    now[:, :whole] = goes.repeat_interleave(unit, dim=1)
    changed = int((now & ~removed).sum())
    d.copy_(torch.where(now, -y, y) - x)
    removed.copy_(now)
    chosen = cost[goes & ~first]
    known = not plan.group and not plan.by_row and len(chosen) and int(goes.sum()) == count
    return changed, float(chosen.max()) if known else 0.0, -1


def conjugate_step_(
    w: Tensor, g: Tensor, p: Tensor, h: Tensor, removed: Tensor, rr: Tensor
) -> None:
    """A step of conjugate gradients on the kept columns of each row of w, g, p, h (R, C), with
    rr (R,) float64 the squared norms of g."""
    kept = torch.where(removed, 0.0, h.to(torch.float64))
    direction, residual = p.to(torch.float64), g.to(torch.float64)
    q = (direction * kept).sum(dim=1)
    good = (rr != 0) & (q > 0) & torch.isfinite(q)
    a = torch.where(good, rr / q, 0.0)[:, None]
    after = residual - a * kept
    t = after.square().sum(dim=1)
    onward = after + (t / rr)[:, None] * direction
    w.copy_(torch.where(good[:, None], w + a * direction, w.to(torch.float64)))
    g.copy_(torch.where(good[:, None], after, residual))
    p.copy_(torch.where(good[:, None], onward, direction))
    rr.copy_(torch.where(good, t, 0.0))


def unsliced(
    values: Tensor, columns: Tensor, steps: Tensor, rows: int, features: int, width: int
) -> tuple[Tensor, Tensor]:
    """The matrix (R, C) that slices stand for, and where a weight of it is stored (bool)."""
    lanes, none = values.shape[1], width - 1
    weight = torch.zeros(rows, features, dtype=values.dtype)
    stored = torch.zeros(rows, features, dtype=torch.bool)
    counted = steps.reshape(-1).long()
    slice_and_block = torch.arange(len(counted)).repeat_interleave(counted)[:, None]
    row = slice_and_block // max(steps.shape[1], 1) * lanes + torch.arange(lanes)
    column = slice_and_block % max(steps.shape[1], 1) * none + columns
    real = columns != none
    weight[row[real], column[real]] = values[real]
    stored[row[real], column[real]] = True
    return weight, stored


def sliced_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    steps: Tensor,
    bias: Tensor | None,
    rows: int,
    features: int,
    width: int,
) -> Tensor:
    """x (N, C) times the transposed weight (R, C) in slices, row by row over its stored weights."""
    weight, stored = unsliced(values, columns, steps, rows, features, width)
    y = torch.zeros(len(x), rows, dtype=torch.float64)
    for r in range(rows):
        y[:, r] = x[:, stored[r]].to(torch.float64) @ weight[r, stored[r]].to(torch.float64)
    if bias is not None:
        y += bias.to(torch.float64)
    return y.to(x.dtype)


def columns_trace(
    layers: Sequence[tuple[Tensor, Tensor, Tensor, float]],
    first: Sequence[float],
    sets: Sequence[Sequence[int]],
    limit: int,
    floor: float,
) -> tuple[list[int], list[float], int]:
    """Units in the order of removal, what each costs, and layer * units + unit of a lost pivot, or
    -1. Layers are (W, A, start, scale); W and A are updated after every removal."""
    W = [each[0].to(torch.float64, copy=True) for each in layers]
    A = [each[1].to(torch.float64, copy=True) for each in layers]
    start = [each[2].tolist() for each in layers]
    least = [floor * a.diagonal().clone() for a in A]
    left, order, spent = [set(s) for s in sets], list[int](), list[float]()

    def cost(m: int, u: int) -> float:
        s = slice(start[m][u], start[m][u + 1])
        L, failed = torch.linalg.cholesky_ex(A[m][s, s])
        if int(failed) or not bool((L.diagonal().square() > least[m][s]).all()):
            return -1.0
        reduced = torch.linalg.solve_triangular(L, W[m][:, s].T, upper=False)
        return layers[m][3] * float(reduced.square().sum())

    while True:
        costs = [[cost(m, u) for m in range(len(layers))] for u in range(len(first))]
        lost = [m * len(first) + u for u, of in enumerate(costs) for m, c in enumerate(of) if c < 0]
        if lost and not order:
            return order, spent, min(lost)
        stay = set(order).union(*(s for s in left if len(s) == 1))
        free = [u for u in range(len(first)) if u not in stay]
        if len(order) >= limit or not free:
            return order, spent, -1
        u = min(free, key=lambda u: min(first[u], 0.0) or sum(max(c, 0.0) for c in costs[u]))
        for m, c in enumerate(costs[u]):
            if c < 0:
                return order, spent, m * len(first) + u
        for m, of in enumerate(start):
            s = slice(of[u], of[u + 1])
            Q = torch.linalg.solve(A[m][s, s], A[m][s])
            W[m] -= W[m][:, s] @ Q
            A[m] -= A[m][:, s] @ Q
            A[m][s, s] = torch.eye(of[u + 1] - of[u], dtype=torch.float64, device=Q.device)
            least[m][s] = 0
        order.append(u)
        spent.append(sum(costs[u]))
        left = [s - {u} for s in left]
