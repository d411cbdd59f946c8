"""Running the user's model on the data: for statistics, and for the change of its output.

With inputs "corrected" the original network runs beside the pruned one, batch by batch, and a layer
is asked for what makes the two agree: with x and x0 what it reads in the pruned and in the original
network, ``x @ W'^T`` should be ``x0 @ W^T``. Where its output goes straight into a sum (a residual
connection), the sums should agree, so that what the other operand has lost is made up for as well.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from lobs_native import ops
from lobs_native.errors import ArgumentError, DtypeError, NonFiniteError
from lobs_native.hessian import Hessian
from lobs_native.layers import Layer, Matrix, Sums, Watch
from lobs_native.problem import Drift
from lobs_native.shelf import Shelf
from lobs_native.weight import few_rows

__all__ = [
    "Enough",
    "Forward",
    "Moments",
    "Run",
    "Source",
    "attached",
    "batches_of",
    "calibrate",
    "hooked",
    "measure_change",
]

_AT_ONCE = 4096  # rows in one float32 product of two networks' difference

Forward = Callable[[nn.Module, Any], Any]


def batches_of(calibration: Any) -> Sequence[Any]:
    """The batches as something that can be gone through again and has a length."""
    if isinstance(calibration, (Tensor, str, bytes, Mapping)) or not isinstance(
        calibration, Iterable
    ):
        raise DtypeError(
            f"calibration: expected an iterable of batches, got {type(calibration).__name__}; "
            "wrap a single batch in a list"
        )
    again = not isinstance(calibration, Iterator)
    if again and hasattr(calibration, "__len__"):
        batches: Any = calibration
    else:
        batches = list(calibration)
    if len(batches) == 0:
        raise ArgumentError("calibration: it is empty; give at least one batch")
    return batches  # type: ignore[no-any-return]


def _to(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to(v, device) for v in value]
    return value


def _numel(batch: Any) -> int:
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return sum(x.numel() for x in tree_leaves(batch) if isinstance(x, Tensor))


class Source(Protocol):
    """Something that can be run on batches: the model on the user's, or a part of it."""

    @property
    def model(self) -> nn.Module: ...

    def each(self, what: str) -> Iterator[Any]:
        """The batches of one pass."""

    def call(self, model: nn.Module, batch: Any) -> Any:
        """Run it on a batch."""

    def call_original(self, batch: Any) -> Any:
        """Run it on a batch as it was before anything was pruned; :meth:`call` comes after it."""

    def mask(self, batch: Any) -> Tensor | None:
        """(B, T) bool, True = counts; None where everything does."""


@dataclass
class Run:
    """The model and the data, and how to bring them together."""

    model: nn.Module
    batches: Sequence[Any]
    forward: Forward | None
    device: torch.device | str | None
    seed: int
    progress: bool
    token_mask: bool = False  # leave out what the batches' attention_mask leaves out
    padded: bool = field(default=False, init=False)  # whether it left anything out
    originals: Shelf = field(default_factory=Shelf, init=False)  # parameters from before, by name
    changed: set[str] = field(default_factory=set, init=False)  # those that are others now
    swapped_limit: int | None = field(default=None, init=False)  # bytes of those in memory

    def call(self, model: nn.Module, batch: Any) -> Any:
        if self.device is not None:
            batch = _to(batch, self.device)
        if self.forward is not None:
            return self.forward(model, batch)
        if isinstance(batch, Tensor):
            return model(batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, (list, tuple)):
            return model(*batch)
        raise DtypeError(
            f"calibration: a batch is a {type(batch).__name__}; give tensors, tuples or dicts, "
            "or pass forward="
        )

    def size(self) -> float:
        """How many batches there are, in units of the first one."""
        if not isinstance(self.batches, list):
            return float(len(self.batches))
        first = _numel(self.batches[0])
        return sum(map(_numel, self.batches)) / first if first else float(len(self.batches))

    def call_original(self, batch: Any) -> Any:
        """Run the original network; the random state is left as it was."""
        with self.original():
            return self.call(self.model, batch)

    @contextlib.contextmanager
    def original(self, part: nn.Module | None = None) -> Iterator[None]:
        """The model, or the ``part`` of it that is run, is the original network for a while; its
        random numbers are not counted."""
        names = sorted(self.changed)
        if part is not None:
            inside = {id(p) for p in part.parameters()}
            names = [name for name in names if id(self._named[name]) in inside]
        with torch.random.fork_rng(devices=self._devices()), self._holding(names):
            yield

    @contextlib.contextmanager
    def _holding(self, names: Iterable[str]) -> Iterator[None]:
        """Copied in and out: swapping the tensors themselves (torch.func.functional_call) goes
        wrong where a module has two names."""
        with Shelf(self.swapped_limit) as kept:
            try:
                for name in names:
                    kept.put(name, self._named[name].detach().clone())
                    self._named[name].copy_(self.originals[name])
                yield
            finally:
                for name, value in kept.items():
                    self._named[name].copy_(value)

    @functools.cached_property
    def _named(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def mask(self, batch: Any) -> Tensor | None:
        """(B, T) bool, False at padding, if the batch says where that is."""
        if not self.token_mask or not isinstance(batch, Mapping):
            return None
        given = batch.get("attention_mask")
        two_sides = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        if not isinstance(given, Tensor) or given.ndim != 2 or two_sides:
            return None
        mask = given != 0
        if bool(mask.all()) or bool((mask & (given != 1)).any()):
            return None
        self.padded = True
        return mask

    def each(self, what: str) -> Iterator[Any]:
        """The batches of one pass, seeded, with a progress bar."""
        torch.manual_seed(self.seed)
        bar = tqdm(
            self.batches,
            desc=what,
            unit="batch",
            leave=False,
            disable=None if self.progress else True,
        )
        yield from bar

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode, no gradients, the caller's random state kept; all of it undone at the end."""
        training = [module for module in self.model.modules() if module.training]
        try:
            self.model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=self._devices()):
                yield
        finally:
            for module in training:
                module.training = True

    def _devices(self) -> list[int]:
        return sorted(
            {p.device.index or 0 for p in self.model.parameters() if p.device.type == "cuda"}
        )


class Enough(BaseException):
    """Ends a forward pass of which nothing more is needed. No Exception, so that a model that
    catches those lets it through."""


@contextlib.contextmanager
def attached(handles: Iterable[Any]) -> Iterator[None]:
    """Hooks that are removed at the end."""
    made: list[Any] = []
    try:
        made.extend(handles)
        yield
    finally:
        for handle in made:
            handle.remove()


Columns = Callable[[Tensor], Iterable[tuple[int, Tensor]]]
See = Callable[[Layer, Tensor, Columns], Any]


@contextlib.contextmanager
def hooked(layers: Sequence[Layer], see: See) -> Iterator[None]:
    """Call ``see(layer, inputs, columns)`` whenever the model gives inputs to a layer;
    ``columns(inputs)`` yields them as (group, X)."""

    def hook_for(layer: Layer, site: Layer) -> Callable[..., None]:
        signature = inspect.signature(type(site.module).forward)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, *given = signature.bind(module, *args, **kwargs).args
            if not given or not isinstance(given[0], Tensor):
                what = type(given[0]).__name__ if given else "no argument"
                raise DtypeError(f"layer {site.name!r}: called with {what} instead of a tensor")
            x, *others = given
            see(layer, x, lambda x: site.columns(x, *others))

        return hook

    def seen(layer: Layer, group: int, x: Tensor) -> None:
        see(layer, x, lambda x: [(group, x)])

    with contextlib.ExitStack() as scope:
        # torch's fused attention would hide the inputs of its output projection
        scope.callback(torch.backends.mha.set_fastpath_enabled, _fast_path())
        torch.backends.mha.set_fastpath_enabled(False)
        for layer in layers:
            scope.enter_context(layer.running())
            for site in layer.sites if not layer.watched else ():
                hook = hook_for(layer, site)
                handle = site.module.register_forward_pre_hook(hook, with_kwargs=True)
                scope.callback(handle.remove)
        if watched := [layer for layer in layers if isinstance(layer, Matrix)]:
            scope.enter_context(Watch(watched, seen))
        yield


def _fast_path() -> bool:
    return bool(torch.backends.mha.get_fastpath_enabled())


class Moments(list[Hessian]):
    """The second moments of a layer's groups, and what there is to say about them."""

    def __init__(self, layer: Layer) -> None:
        bias, device = layer.bias() is not None, layer.weight().device
        super().__init__(
            Hessian(layer.width, bias=bias, device=device) for _ in range(layer.groups)
        )
        self.layer = layer
        self.padding = 0  # rows left out
        self.unmasked = False  # whether a mask did not fit
        self.differences: dict[str, Differences] = {}  # by layer, with inputs "corrected"
        self._matrices: list[Tensor] | None = None

    @property
    def rows(self) -> float:
        """Rows that the layer saw; of all experts together."""
        return sum(h.rows for h in self) if self.layer.routed else self[0].rows

    def matrices(self) -> list[Tensor]:
        """The second moments, made when they are first asked for; the sums are given up then. An
        expert that saw no row gets the mean one without correlations: removing by magnitude."""
        if self._matrices is None:
            seen = [h for h in self if h.rows > 0]
            found = {}
            for h in seen if self.layer.routed and seen else self:
                found[id(h)] = h.matrix()
                h.release()
            if len(found) < len(self):
                C = self.layer.width
                size = sum(float(H.diagonal()[:C].mean()) for H in found.values()) / len(found)
                unseen = torch.ones(next(iter(found.values())).shape[0], dtype=torch.float64)
                unseen[:C] = size or 1.0
            self._matrices = [
                found[id(h)] if id(h) in found else torch.diag(unseen).to(h.device) for h in self
            ]
        return self._matrices

    def drift(self, layer: Layer) -> Drift | None:
        """What ``layer`` should make up for; None where the networks could not be compared."""
        found = self.differences.get(layer.name)
        return None if found is None or found.unlike else found.drift([h.rows for h in self])

    def notes(self, layer: Layer) -> list[str]:
        """What a report should say."""
        notes = []
        C, few = self.layer.width, [h.rows for h in self if h.rows < self.layer.width]
        unseen = [str(g) for g, h in enumerate(self) if h.rows == 0]
        if few and not self.layer.routed:
            notes.append(few_rows(min(few), C))
        elif few:
            if unseen:
                notes.append(
                    f"{len(unseen)} of {len(self)} experts saw no row and were pruned by "
                    f"magnitude: {', '.join(unseen)}"
                )
            if some := [n for n in few if n > 0]:
                notes.append(f"{len(some)} of {len(self)} experts: {few_rows(min(some), C)}")
        if self.padding:
            notes.append(f"{self.padding} rows were padding (attention_mask) and were left out")
        if self.unmasked:
            notes.append(
                "padding was counted: the inputs are not (batch, length, width) as attention_mask "
                "has them"
            )
        if (found := self.differences.get(layer.name)) and found.unlike:
            notes.append(f"not corrected, only calibrated on pruned inputs: {found.unlike}")
        elif found and found.summed:
            notes.append("corrected together with what is added to its output")
        return notes


class Differences:
    """How far a layer, as it is, is from the original network's outputs on the pruned network's
    inputs: sums over rows.

    ``unlike`` says why the two networks could not be compared row by row, where they could not.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        wide = layer.weight().dtype == torch.float64
        self.dtype = torch.float64 if wide else torch.float32
        self.W = layer.weight().to(self.dtype)  # (G, R, C)
        bias = layer.bias()
        self.bias = None if bias is None else bias.to(self.dtype)
        D = layer.width + (bias is not None)
        self.pull = [
            torch.zeros(D, layer.rows, dtype=torch.float64, device=self.W.device)
            for _ in range(layer.groups)
        ]
        self.inherited = [0.0] * layer.groups
        self.energy = [0.0] * layer.groups
        self.summed = False
        self.unlike = ""

    def update(
        self, g: int, x: Tensor, x0: Tensor, extra: Tensor | None, weights: Tensor | None
    ) -> None:
        """Add rows x (n, C) of the pruned and x0 (n, C) of the original network; ``extra`` (n, R)
        is how much more is added to the original one's output."""
        C, W = self.layer.width, self.W[g]
        for at in torch.arange(len(x), device=x.device).split(_AT_ONCE):
            if weights is not None:
                at = at[weights[at] > 0]
            a, b = x[at].to(self.dtype), x0[at].to(self.dtype)
            away = (b - a) @ W.T
            if extra is not None:
                away += extra[at].to(self.dtype)
            wanted = b @ W.T
            if self.bias is not None:
                wanted += self.bias[g]
            w = None if weights is None else weights[at, None].to(self.dtype)
            weighted = away if w is None else away * w
            self.pull[g][:C] += (a.T @ weighted).double()
            if len(self.pull[g]) > C:
                self.pull[g][C] += weighted.sum(0).double()
            self.inherited[g] += float((away * weighted).sum(dtype=torch.float64))
            self.energy[g] += float(
                (wanted.square() * (1.0 if w is None else w)).sum(dtype=torch.float64)
            )

    def drift(self, rows: Sequence[float]) -> Drift:
        """Means over the rows that each group saw; to be called once."""
        if not all(bool(torch.isfinite(p).all()) for p in self.pull):
            raise NonFiniteError(
                f"layer {self.layer.name!r}: NaN or infinity in its input in the original network"
            )
        each = [n or 1.0 for n in rows]
        return Drift(
            pull=[p.div_(n) for p, n in zip(self.pull, each, strict=True)],
            inherited=sum(e / n for e, n in zip(self.inherited, each, strict=True)),
            energy=sum(e / n for e, n in zip(self.energy, each, strict=True)),
        )


class _Pairs:
    """What layers read in the original network, kept for one batch beside what they read in the
    pruned one."""

    def __init__(
        self,
        layers: Sequence[Layer],
        run: Source,
        readers: Mapping[str, Sequence[Layer]],
        moments: Mapping[str, Moments],
    ) -> None:
        self.layers, self.run = layers, run
        self.found = {}
        for name, mine in readers.items():
            self.found[name] = [Differences(layer) for layer in mine]
            moments[name].differences = {d.layer.name: d for d in self.found[name]}
            for difference in self.found[name]:
                if difference.layer.routed:
                    difference.unlike = "experts are sent other rows than in the original network"
        self.read: dict[str, list[tuple[Tensor, Columns]]] = {}
        self.added: dict[str, list[Tensor]] = {}
        self.late: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
        self.summed = self._find_sums()

    def _find_sums(self) -> dict[str, nn.Module]:
        """The layers whose outputs go straight into a sum, found by running the first batch."""
        candidates = {
            d.layer.name: d.layer.module
            for mine in self.found.values()
            for d in mine
            if d.layer.token_rows and not d.layer.watched and len(d.layer.sites) == 1
        }
        if not candidates:
            return {}
        with Sums(candidates) as sums:
            for batch in self.run.each("look"):
                self.run.call(self.run.model, batch)
                break
        once = [n for n in candidates if sums.calls[n] == 1 and len(sums.found[n]) == 1]
        return {name: candidates[name] for name in once if name not in sums.elsewhere}

    def watching(
        self, until: nn.Module | None
    ) -> tuple[Sums, contextlib.AbstractContextManager[Any]]:
        """For one forward: what sees the sums, and what ends it, which is the last of the sums
        where there are any."""
        waiting = set(self.summed)

        def stop(name: str) -> None:
            waiting.discard(name)
            if until is not None and not waiting:
                raise Enough

        return Sums(self.summed, stop), _ending(None if self.summed else until)

    def original(self, batch: Any, until: nn.Module | None) -> None:
        """Run the original network on a batch and keep what is read and added there."""
        self.read = {layer.name: [] for layer in self.layers}

        def keep(layer: Layer, x: Tensor, columns: Columns) -> None:
            self.read[layer.name].append((x.detach().clone(), columns))

        sums, ending = self.watching(until)
        with contextlib.suppress(Enough), hooked(self.layers, keep), sums, ending:
            self.run.call_original(batch)
        self.added = sums.found

    def rows(self, layer: Layer) -> Iterator[tuple[int, Tensor]]:
        """What the layer read in the original network at the call that is next in turn."""
        kept = self.read[layer.name]
        if not kept:
            self._unlike(layer.name, "it is called more often than in the original network")
            return
        x, columns = kept.pop(0)
        yield from columns(x)

    def see(
        self,
        name: str,
        g: int,
        x: Tensor,
        rows: Iterator[tuple[int, Tensor]],
        weights: Tensor | None,
    ) -> None:
        """Rows x (n, C) of the pruned network, beside the next of the original one's."""
        g0, x0 = next(rows, (-1, x))
        if g0 != g or x0.shape != x.shape:
            self._unlike(name, "its inputs have other shapes than in the original network")
            return
        for difference in self.found[name]:
            if difference.unlike:
                continue
            if difference.layer.name in self.summed:
                if not any(kept[0] == name for kept in self.late):
                    self.late.append((name, x.detach().clone(), x0, weights))
            else:
                difference.update(g, x, x0, None, weights)

    def end(self, sums: Sums) -> None:
        """The forward is done: what was added to outputs is known."""
        for name, x, x0, weights in self.late:
            for difference in self.found[name]:
                mine = difference.layer.name
                if difference.unlike or mine not in self.summed:
                    continue
                added = [*sums.found[mine], *self.added[mine]]
                whole = len(x) * difference.layer.rows
                if len(added) != 2 or any(extra.numel() != whole for extra in added):
                    difference.unlike = "what is added to its output differs from call to call"
                    continue
                difference.summed = True
                extra = (added[1] - added[0]).reshape(len(x), -1)
                difference.update(0, x, x0, extra, weights)
        self.late.clear()
        for name, kept in self.read.items():
            if kept:
                self._unlike(name, "it is called less often than in the original network")

    def _unlike(self, name: str, why: str) -> None:
        for difference in self.found[name]:
            difference.unlike = difference.unlike or why


@contextlib.contextmanager
def _ending(until: nn.Module | None) -> Iterator[None]:
    """Ends a forward pass when ``until`` has returned."""

    def stop(*_: Any) -> None:
        raise Enough

    with attached([] if until is None else [until.register_forward_hook(stop)]):
        yield


@ops.full_precision()
def calibrate(
    layers: Sequence[Layer],
    run: Source,
    what: str,
    *,
    until: nn.Module | None = None,
    corrected: Mapping[str, Sequence[Layer]] | None = None,
) -> dict[str, Moments]:
    """One pass over the data: name -> a Hessian for every group.

    Parameters
    ----------
    layers, run, what
        Whose inputs, in what, and the pass's name for people.
    until : nn.Module, optional
        End each forward as soon as this module has returned (and its sum has been made).
    corrected : {name: layers}, optional
        For each of ``layers`` those that read its inputs; :meth:`Moments.drift` then has what they
        should make up for.
    """
    moments = {layer.name: Moments(layer) for layer in layers}
    mask: Tensor | None = None
    pairs = _Pairs(layers, run, corrected, moments) if corrected else None

    def see(layer: Layer, x: Tensor, columns: Columns) -> None:
        mine, weights = moments[layer.name], None
        if mask is not None and layer.token_rows and x.shape[:-1] == mask.shape:
            weights = mask.reshape(-1).to(device=x.device, dtype=torch.float64)
            mine.padding += int((weights == 0).sum())
        elif mask is not None:
            mine.unmasked = True
        before = None if pairs is None else pairs.rows(layer)
        try:
            for group, rows in columns(x):
                mine[group].update(rows, weights)
                if pairs is not None and before is not None:
                    pairs.see(layer.name, group, rows, before, weights)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"layer {layer.name!r}: its input on the calibration data: {error}"
            ) from error

    for batch in run.each(what):
        mask = run.mask(batch)
        if pairs is None:
            with contextlib.suppress(Enough), hooked(layers, see), _ending(until):
                run.call(run.model, batch)
            continue
        pairs.original(batch, until)
        sums, ending = pairs.watching(until)
        with contextlib.suppress(Enough), hooked(layers, see), sums, ending:
            run.call(run.model, batch)
        pairs.end(sums)
    return moments


@torch.no_grad()
def measure_change(run: Run) -> tuple[float, float, float] | None:
    """(||output - original||_F^2, ||original||_F^2, rows) over the data; None if outputs are not
    floating-point tensors."""
    difference = size = rows = 0.0
    for batch in run.each("measure"):
        before = run.call_original(batch)
        now = run.call(run.model, batch)
        if not isinstance(now, Tensor) or not now.is_floating_point() or now.ndim == 0:
            return None
        difference += float((now.double() - before.double()).square().sum())
        size += float(before.double().square().sum())
        rows += now.numel() / now.shape[-1]
    return difference, size, rows
