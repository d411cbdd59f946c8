"""Tuning what has been pruned, towards what the original network returned: all parameters of pruned
layers, and norms and biases, together, with the zeros held.

Layers are compensated one by one and by least squares. What is left is what they can only make up
for together, across norms and nonlinearities. A block is tuned towards its own original output, on
the inputs that it receives in the pruned network (mean squared distance); the network towards its
own, see :mod:`lobs_native.network.output_aim`. How is in :mod:`lobs_native.network.descent`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lobs_native.calibration.blocks import Stack
from lobs_native.calibration.outputs import tokens_in
from lobs_native.calibration.partial import readable
from lobs_native.calibration.replay import Replay
from lobs_native.calibration.sensitivity import requiring_gradients
from lobs_native.calibration.session import Session
from lobs_native.errors import ArgumentError
from lobs_native.files.shelf import Shelf
from lobs_native.layers import overwrite
from lobs_native.network.descent import HELD_BACK, Aim, Course, Tuned, descend
from lobs_native.network.output_aim import OutputAim, check_differentiable, recomputing
from lobs_native.network.resources import RunPlan, waiting_limit
from lobs_native.network.settings import NetworkSettings
from lobs_native.network.shared import SharedLedger
from lobs_native.report.records import plain
from lobs_native.rundir.ledger import Ledger

__all__ = ["Tuner", "to_tune", "tuning_passes"]

_BLOCKS = Course(passes=2, rate=2e-3, seed=0)
_NETWORK = Course(passes=2, rate=1e-3, seed=0)
_NAME = "network"  # among what was tuned
_STEP = "a step of tuning"  # what ranks tell one another, so that none waits for long


def tunable(part: nn.Module, pruned: Mapping[str, nn.Parameter], model: nn.Module) -> list[str]:
    """The names of the parameters of a part of the model that may be tuned: those of its pruned
    layers, and all norms and biases, but for those of modules with a weight that is not pruned, and
    those that are used outside of the part as well."""
    own = {id(p) for p in pruned.values()}
    inside = {id(module) for module in part.modules()}
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
        for key, p in parts.items():
            small = p.ndim <= 1 and not left_alone
            if p.is_floating_point() and (id(p) in own or small) and id(p) not in elsewhere:
                chosen.setdefault(id(p), f"{name}.{key}" if name else key)
    return list(chosen.values())


def _check(session: Session) -> None:
    """Raise ArgumentError if nothing can be differentiated."""
    if any(p.is_inference() for p in session.model.parameters()):
        raise ArgumentError(
            "tune: the model was made or loaded inside torch.inference_mode(), so that nothing can "
            "be differentiated; make it outside, or use None"
        )


def to_tune(
    stacks: Sequence[Stack],
    reasons: Sequence[str],
    pruned: Mapping[str, nn.Parameter],
    session: Session,
    settings: NetworkSettings,
) -> list[dict[str, nn.Parameter]]:
    """The parameters, by name, of each part that the settings want tuned. ArgumentError if that
    cannot be done; ``reasons`` tells why some modules are no stack."""
    if settings.tune == "network":
        return _network_to_tune(stacks, pruned, session, settings.memory is not None)
    return [] if settings.tune is None else _blocks_to_tune(stacks, reasons, pruned, session)


def _blocks_to_tune(
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
    _check(session)
    return [
        {name: session.model.get_parameter(name) for name in tunable(block, pruned, session.model)}
        for stack in stacks
        for i, block in enumerate(stack.modules)
        if any(stack.block_of(name) == i for name in pruned)
    ]


def _network_to_tune(
    stacks: Sequence[Stack],
    pruned: Mapping[str, nn.Parameter],
    session: Session,
    limited: bool,
) -> list[dict[str, nn.Parameter]]:
    """The same for the network as one part. ArgumentError if its output cannot be differentiated,
    or there is no data to hold back. ``limited``: as memory will be."""
    if (batches := len(session.batches)) < 2:
        raise ArgumentError(
            "tune: 'network' needs two batches, one of them to hold back; there is "
            f"{batches}; pass more, or smaller, batches, or use None"
        )
    _check(session)
    model = session.model
    found = {name: model.get_parameter(name) for name in tunable(model, pruned, model)}
    with _within(stacks, limited):
        check_differentiable(session, list(found.values()))
    return [found]


def _within(stacks: Sequence[Stack], limited: bool) -> contextlib.AbstractContextManager[None]:
    """With a limit on memory, blocks are recomputed in backward passes."""
    return recomputing(b for stack in stacks for b in stack.modules if limited)


def tuning_passes(network: bool, passes: int | None, recomputed: bool) -> float:
    """The forward passes over all batches that so many ``passes`` of tuning take, of all blocks or
    of the ``network``; those that are ``recomputed`` for a backward pass count as well."""
    times = passes or (_NETWORK if network else _BLOCKS).passes
    return 1.0 + times * (3.0 + recomputed) + (times + 3.0) / HELD_BACK


class Tuner:
    """Tunes the parts of a network one after another, and keeps them in the run directory.

    ``pruned`` are the parameters of all pruned layers, by name. The ``plan`` bounds the bytes of
    original outputs in memory; the rest waits on disk. ``settings`` may say how long and how far to
    go. Of several ranks, the first one tunes, and the others get what becomes of it.
    """

    def __init__(
        self,
        session: Session,
        pruned: Mapping[str, nn.Parameter],
        ledger: Ledger | SharedLedger | None,
        plan: RunPlan,
        settings: NetworkSettings,
    ) -> None:
        self.session = session
        self.pruned = pruned
        self.ledger = ledger
        self.plan = plan
        self.settings = settings
        self.done: list[Tuned] = []

    def committed(self, name: str) -> bool:
        """Whether the run directory holds a part as it was tuned."""
        return self.ledger is not None and self.ledger.has_tuned(name)

    def all_committed(self, stack: Stack) -> bool:
        """Whether it holds all blocks of the stack with pruned layers."""
        blocks = {stack.block_of(name) for name in self.pruned} - {None}
        return all(self.committed(stack.names[i]) for i in blocks if i is not None)

    def tune_block(self, replay: Replay) -> bool:
        """Tune the current block in the model, and commit it. Whether it is better than before."""
        replay.forget_repeats()
        name = replay.stack.names[replay.block]
        if not self.session.ranks.first:
            return self._heard(name)
        with Shelf(self.plan.states_limit) as targets:
            aim = _BlockAim(replay, targets)
            course = dataclasses.replace(_BLOCKS, seed=self.session.seed + replay.block)
            return self._tune(name, replay.model, aim, len(replay.batches), course)

    def tune_network(self, stacks: Sequence[Stack]) -> bool:
        """Tune the whole model, and commit it; or give it the values that it was tuned to before.
        Whether it is better than before. With a limit on memory, blocks of ``stacks`` are
        recomputed."""
        if self.committed(_NAME):
            return self.load(_NAME)
        if not self.session.ranks.first:
            return self._heard(_NAME)
        model = self.session.model
        torch.manual_seed(self.session.seed)
        with contextlib.ExitStack() as scope:
            targets = scope.enter_context(Shelf(waiting_limit(self.plan.limit)))
            aim = OutputAim(self.session, targets)
            scope.enter_context(requiring_gradients(model.parameters(), False))
            scope.enter_context(_within(stacks, self.plan.limit is not None))
            course = dataclasses.replace(_NETWORK, seed=self.session.seed)
            return self._tune(_NAME, model, aim, len(aim.batches), course)

    def _tune(self, name: str, part: nn.Module, aim: Aim, batches: int, course: Course) -> bool:
        session = self.session
        names = tunable(part, self.pruned, session.model)
        parameters = {n: session.model.get_parameter(n) for n in names}
        session.changed.update(names)
        course = dataclasses.replace(
            course,
            passes=self.settings.tune_passes or course.passes,
            rate=self.settings.tune_rate or course.rate,
            progress=session.progress,
            stoppable=self.ledger is not None,
            goes_on=lambda: session.ranks.value(_STEP, True),
        )
        tuned = descend(name, aim, batches, parameters, self.pruned, course)
        session.ranks.value(_STEP, False)
        self.done.append(tuned)
        values = {n: p.detach() for n, p in parameters.items()} if tuned.kept else {}
        info = plain(dataclasses.asdict(tuned))
        session.ranks.from_one(f"tuned {name}", info, values, 0)
        if self.ledger is not None:
            self.ledger.keep_tuned(name, values, info)
        return tuned.kept

    def _heard(self, name: str) -> bool:
        """Wait until rank 0 has tuned a part, and give it the same values."""
        ranks = self.session.ranks
        while ranks.value(_STEP, None):
            pass
        return self._take(*ranks.from_one(f"tuned {name}", None, None, 0))

    def load(self, name: str) -> bool:
        """Give a committed part the values that it was tuned to. Whether there are any."""
        assert self.ledger is not None
        with readable(f"tuned {name}"):
            return self._take(*self.ledger.load_tuned(name))

    def _take(self, info: Mapping[str, Any], values: Mapping[str, Tensor]) -> bool:
        """Give parameters the values that they were tuned to; whether there are any."""
        self.done.append(Tuned(**info))
        for parameter, value in values.items():
            self.session.changed.add(parameter)
            overwrite(self.session.model.get_parameter(parameter), value)
        return self.done[-1].kept


class _BlockAim:
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

    @property
    def measure(self) -> str:
        """What errors are."""
        return "change of the block's output relative to its size"

    def _sum(self, number: int, difference: Tensor) -> Tensor:
        """The sum of squares over the rows that count."""
        tokens = self._counted[number]
        squares = difference.to(torch.promote_types(difference.dtype, torch.float32)).square()
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
