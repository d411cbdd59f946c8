"""Tuning a block after its layers have been pruned: all of its parameters together, with the zeros
held, towards what the block returned in the original network.

Layers are compensated one by one and by least squares. What is left is what they can only make up
for together, across norms and nonlinearities. Adam (Kingma & Ba 2015) minimises the mean squared
distance of the block's output from the original one, on the inputs that the block receives in the
pruned network. A tenth of the batches is held back and decides what is kept.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lobs_native.calibration.blocks import Stack
from lobs_native.calibration.held_back import in_between
from lobs_native.calibration.outputs import tokens_in
from lobs_native.calibration.partial import readable
from lobs_native.calibration.replay import Replay
from lobs_native.calibration.sensitivity import requiring_gradients
from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError
from lobs_native.files.shelf import Shelf
from lobs_native.layers import overwrite
from lobs_native.report.records import plain
from lobs_native.rundir.ledger import Ledger

__all__ = ["TUNING", "TunedBlock", "Tuner", "blocks_to_tune", "tuning_bytes"]

_PASSES = 2  # over the batches that are not held back
_RATE = 2e-3  # of a step at first, relative to the root mean square of a parameter
_BETAS = (0.9, 0.95)
TUNING = 3.0 + 3.0 * _PASSES  # of a block, in its forward passes
_TINY = 1e-12
_HELD_BACK = 10  # one batch of so many


@dataclass(frozen=True)
class TunedBlock:
    """What tuning a block changed: mean squared distances of a row of its output, over the root of
    those of the original one, on the data that it was tuned on and on what was held back."""

    block: str
    error_before: float
    error_after: float
    held_back_before: float
    held_back_after: float
    kept: bool
    seconds: float


def tunable(block: nn.Module, pruned: Mapping[str, nn.Parameter], model: nn.Module) -> list[str]:
    """The names of the block's parameters that may be tuned: those of its pruned layers, and all
    norms and biases, but for those of modules with a weight that is not pruned, and those that are
    used outside of the block as well."""
    own = {id(p) for p in pruned.values()}
    inside = {id(module) for module in block.modules()}
    elsewhere = {
        id(p)
        for module in model.modules()
        if id(module) not in inside
        for p in module.parameters(recurse=False)
    }
    chosen: dict[int, str] = {}
    for name, module in model.named_modules():
        if id(module) not in inside or hasattr(module, "parametrizations"):
            continue
        parts = dict(module.named_parameters(recurse=False))
        left_alone = any(p.ndim > 1 and id(p) not in own for p in parts.values())
        for part, p in parts.items():
            small = p.ndim <= 1 and not left_alone
            if p.is_floating_point() and (id(p) in own or small) and id(p) not in elsewhere:
                chosen.setdefault(id(p), f"{name}.{part}" if name else part)
    return list(chosen.values())


def blocks_to_tune(
    stacks: Sequence[Stack],
    reasons: Sequence[str],
    pruned: Mapping[str, nn.Parameter],
    session: Session,
) -> list[dict[str, nn.Parameter]]:
    """The parameters of each block that is to be tuned, by name. ArgumentError if there is none, or
    no data to hold back; ``reasons`` tells why some modules are no stack."""
    batches = len(session.batches)
    if not stacks or batches < 2:
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise ArgumentError(
            "tune: 'blocks' needs a stack of blocks with layers to prune, inputs 'corrected' or "
            "'pruned', and two batches, one of them to hold back; there are "
            f"{batches} batches and {len(stacks)} stacks{why}; use None"
        )
    if any(p.is_inference() for p in session.model.parameters()):
        raise ArgumentError(
            "tune: the model was made or loaded inside torch.inference_mode(), so that nothing can "
            "be differentiated; make it outside, or use None"
        )
    return [
        {name: session.model.get_parameter(name) for name in tunable(block, pruned, session.model)}
        for stack in stacks
        for i, block in enumerate(stack.modules)
        if any(stack.block_of(name) == i for name in pruned)
    ]


def tuning_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes that tuning these takes besides a backward pass: values in float32, two more copies of
    them, two moments, and gradients."""
    return sum(p.numel() * (6 * _wide(p).itemsize + 1) for p in parameters)


class Tuner:
    """The blocks of a run that are tuned, one after another, and kept in its run directory.

    ``pruned`` are the parameters of all pruned layers, by name.
    """

    def __init__(
        self,
        session: Session,
        pruned: Mapping[str, nn.Parameter],
        ledger: Ledger | None,
        limit: int | None,
    ) -> None:
        self.session = session
        self.pruned = pruned
        self.ledger = ledger
        self.limit = limit
        self.done: list[TunedBlock] = []

    def committed(self, block: str) -> bool:
        """Whether the run directory holds the block as it was tuned."""
        return self.ledger is not None and self.ledger.block(block) is not None

    def all_committed(self, stack: Stack) -> bool:
        """Whether it holds all blocks of the stack with pruned layers."""
        blocks = {stack.block_of(name) for name in self.pruned} - {None}
        return all(self.committed(stack.names[i]) for i in blocks if i is not None)

    def tune(self, replay: Replay) -> bool:
        """Tune the current block in the model, and commit it. Whether it is better than before."""
        names = tunable(replay.model, self.pruned, self.session.model)
        parameters = {name: self.session.model.get_parameter(name) for name in names}
        self.session.changed.update(names)
        tuned = tune_block(
            replay, parameters, self.pruned, seed=self.session.seed, limit=self.limit
        )
        self.done.append(tuned)
        if self.ledger is not None:
            values = {name: p.detach() for name, p in parameters.items()} if tuned.kept else {}
            self.ledger.keep_block(tuned.block, values, plain(dataclasses.asdict(tuned)))
        return tuned.kept

    def load(self, block: str) -> bool:
        """Give a committed block the values that it was tuned to. Whether there are any."""
        assert self.ledger is not None
        record = self.ledger.block(block)
        assert record is not None
        with readable(f"block {block}"):
            self.done.append(TunedBlock(**record.info))
            for name, value in self.ledger.run.load(record).items():
                self.session.changed.add(name)
                overwrite(self.session.model.get_parameter(name), value)
        return self.done[-1].kept


def tune_block(
    replay: Replay,
    parameters: Mapping[str, nn.Parameter],
    pruned: Mapping[str, nn.Parameter],
    *,
    seed: int,
    limit: int | None = None,
) -> TunedBlock:
    """Tune ``parameters`` of the current block, by name; zeros of those in ``pruned`` stay zeros.

    They are changed in place where that lowers the error on what is held back, and have their old
    values otherwise. ``limit`` bounds the bytes of the block's original outputs in memory; the rest
    waits on disk.
    """
    begun = time.perf_counter()
    replay.forget_repeats()
    with Shelf(limit) as targets, requiring_gradients(parameters.values(), True):
        aim = _Aim(replay, targets)
        numbers = range(len(replay.batches))
        count = len(numbers) // _HELD_BACK or 1
        held_back = in_between(count, len(numbers))
        training = [n for n in numbers if n not in held_back]
        before = aim.error(training), aim.error(held_back)
        best = before[1]
        steps = _Steps(parameters, pruned, _PASSES * len(training))
        kept = steps.values()
        generator = torch.Generator().manual_seed(seed + replay.block)
        for _ in range(_PASSES):
            for i in torch.randperm(len(training), generator=generator).tolist():
                steps.step(aim.loss(training[i]))
            if (now := aim.error(held_back)) < best:
                best, kept = now, steps.values()
        steps.put(kept)
        after = aim.error(training), aim.error(held_back)
    seconds = time.perf_counter() - begun
    name = replay.stack.names[replay.block]
    errors = before[0], after[0], before[1], after[1]
    return TunedBlock(name, *errors, kept=best < before[1], seconds=seconds)


class _Aim:
    """What the current block should return, and how far it is from that."""

    def __init__(self, replay: Replay, targets: Shelf) -> None:
        self.replay = replay
        self.targets = targets
        self._counted: dict[int, Tensor | None] = {}
        self._energy: dict[int, float] = {}
        for number, batch, target in replay.targets():
            targets.put(number, target)
            self._counted[number] = tokens_in(target, replay.mask(batch))
            self._energy[number] = float(self._sum(number, target))

    def _sum(self, number: int, difference: Tensor) -> Tensor:
        """The sum of squares over the rows that count."""
        tokens = self._counted[number]
        squares = difference.to(_wide(difference)).square()
        return (squares if tokens is None else squares * tokens).sum()

    def loss(self, number: int) -> Tensor:
        """The error on a batch, with gradients, relative to the mean size of the targets."""
        with torch.enable_grad():
            difference = self.replay.run(number) - self.targets[number]
            scale = sum(self._energy.values()) / len(self._energy)
            return self._sum(number, difference) / (scale or 1.0)

    def error(self, numbers: Iterable[int]) -> float:
        """The relative error on some batches."""
        some = list(numbers)
        squares = [float(self._sum(n, self.replay.run(n) - self.targets[n])) for n in some]
        return math.sqrt(sum(squares) / (sum(self._energy[n] for n in some) or 1.0))


class _Steps:
    """Steps of Adam for parameters in place, with values in float32 at least."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], pruned: Mapping[str, Tensor], steps: int
    ) -> None:
        self.parameters = list(parameters.values())
        self.kept = [p.detach() != 0 if name in pruned else None for name, p in parameters.items()]
        self.masters = [p.detach().to(_wide(p), copy=True) for p in self.parameters]
        sizes = [_size(x) for x in self.masters]
        usual = max(sizes)  # for biases that are still zero
        groups = [
            {"params": [x], "lr": _RATE * (size or usual)}
            for x, size in zip(self.masters, sizes, strict=True)
        ]
        self.adam = torch.optim.Adam(groups, betas=_BETAS, eps=_TINY)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam, steps)

    def step(self, loss: Tensor) -> None:
        """One step against the gradient of ``loss``; none if that is not finite."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        if all(g is None or bool(torch.isfinite(g).all()) for g in gradients):
            for x, g, kept in zip(self.masters, gradients, self.kept, strict=True):
                g = torch.zeros_like(x) if g is None else g.to(x.dtype)
                x.grad = g if kept is None else g * kept
            self.adam.step()
            self.put(self.masters)
        self.schedule.step()

    def values(self) -> list[Tensor]:
        """Copies of the present values."""
        return [x.clone() for x in self.masters]

    def put(self, values: Sequence[Tensor]) -> None:
        """Give the parameters these values."""
        for p, x in zip(self.parameters, values, strict=True):
            overwrite(p, x)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _size(x: Tensor) -> float:
    """The root mean square of the entries that are not zero; 0 if all are."""
    count = int((x != 0).sum())
    return float((x.double().square().sum() / count).sqrt()) if count else 0.0
