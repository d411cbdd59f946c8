"""The processes that share the work of one run, and what they tell one another by
``torch.distributed``.

Every exchange begins with a few numbers from each rank: whether it has failed, and what it is about
to exchange. So an error on one rank reaches all others at their next exchange, and none waits for
a rank that has gone another way. Values travel as JSON, tensors as their bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lobs_native import errors
from lobs_native.errors import ArgumentError, DtypeError, RankError
from lobs_native.rundir.underway import StoppedError, stop

__all__ = ["ALONE", "Ranks", "check_alike"]

_WELL, _STOPPING, _FAILED = 0, 1, 2
_KNOWN: dict[str, type[BaseException]] = {name: getattr(errors, name) for name in errors.__all__}
_KNOWN |= {kind.__name__: kind for kind in (MemoryError, OSError, StoppedError)}


class Ranks:
    """The ranks of a ``torch.distributed`` group, or, without one, this process alone.

    All methods but :meth:`tell` are collective: every rank calls them in the same order. Alone,
    they return what they were given.

    Raises
    ------
    ArgumentError, DtypeError
        ``group`` is no process group of which this process is a part.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank, self.size = 0, 1
        self.sent = 0  # bytes
        self.waited = 0.0  # seconds until all others had arrived at an exchange
        self.exchanging = 0.0  # seconds, with those
        self._device = torch.device("cpu")
        self._over = False  # whether an error has ended the exchange
        self._load = [0.0]
        if group is not None:
            self._join(group)

    def _join(self, group: Any) -> None:
        from torch import distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError(
                "group: torch.distributed has no process group; call init_process_group first, or "
                "leave group out to prune in this process alone"
            )
        if not isinstance(group, dist.ProcessGroup):
            raise DtypeError(
                f"group: expected a torch.distributed process group, got {type(group).__name__}; "
                "torch.distributed.group.WORLD is that of all ranks"
            )
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ArgumentError(
                "group: this process is not a part of it; only its ranks call prune"
            )
        if dist.get_backend(group) == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._load = [0.0] * self.size

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0

    def members(self) -> list[int]:
        """The numbers of the ranks in the whole of ``torch.distributed``."""
        from torch import distributed as dist

        if self.group is not None:
            return dist.get_process_group_ranks(self.group)
        return [dist.get_rank()] if dist.is_available() and dist.is_initialized() else [0]

    def owner_of(self, cost: float, here: Sequence[float]) -> int:
        """The rank that does the next piece of work that is done by one rank: the one that has the
        least to do ``here``, or, of those, has done the least so far. Every rank asks for every
        piece."""
        owner = min(range(self.size), key=lambda rank: (here[rank], self._load[rank]))
        self._load[owner] += cost
        return owner

    # ---- values and tensors ----------------------------------------------------------------------

    def all_values(self, what: str, value: Any) -> list[Any]:
        """The plain JSON value of every rank, in the order of ranks."""
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        with self._exchange(what, len(data)) as lengths:
            return self._gathered(data, lengths)

    def _gathered(self, data: bytes, lengths: Sequence[int]) -> list[Any]:
        """The values whose JSON, of these lengths, the ranks pass."""
        every = self._to_all(_bytes_of(data), lengths)
        return [json.loads(bytes(x.numpy())) for x in every.split(list(lengths))]

    def value(self, what: str, value: Any, source: int = 0) -> Any:
        """The plain JSON value of one rank; what the others pass does not count."""
        return self.from_one(what, value, {}, source)[0]

    def clock(self) -> float:
        """The seconds of rank 0, for what all must decide alike."""
        return float(self.value("the time", time.perf_counter()))

    def tensors(
        self, what: str, tensors: Mapping[str, Tensor] | None, source: int = 0
    ) -> dict[str, Tensor]:
        """The named tensors of one rank, of any types, on the CPU for the others."""
        return self.from_one(what, None, tensors, source)[1]

    def from_one(
        self, what: str, value: Any, tensors: Mapping[str, Tensor] | None, source: int
    ) -> tuple[Any, dict[str, Tensor]]:
        """The value and the tensors of one rank together."""
        if self.size == 1:
            return value, dict(tensors or {})
        own = dict(tensors or {}) if self.rank == source else {}
        forms = {k: [str(x.dtype).removeprefix("torch."), *x.shape] for k, x in own.items()}
        data = json.dumps([value, forms]).encode() if self.rank == source else b""
        found: dict[str, Tensor] = {}
        with self._exchange(what, len(data)) as lengths:
            told = _bytes_of(data) if data else torch.zeros(lengths[source], dtype=torch.uint8)
            value, forms = json.loads(bytes(self._broadcast(told, source).numpy()))
            for name, (dtype, *shape) in forms.items():
                if name in own:
                    x = own[name].detach().cpu().contiguous()
                else:
                    x = torch.empty(shape, dtype=getattr(torch, dtype))
                sent = self._broadcast(x.reshape(-1).view(torch.uint8), source)
                found[name] = own[name] if name in own else sent.view(x.dtype).view(shape)
        return value, found

    def _broadcast(self, data: Tensor, source: int) -> Tensor:
        """The bytes of one rank, on the CPU; in the memory of ``data`` if the exchange is there."""
        from torch import distributed as dist

        if not data.numel():
            return data
        moved = data.to(self._device)
        self._carry_out(dist.broadcast, moved, dist.get_global_rank(self.group, source))
        if self.rank == source:
            self.sent += data.numel()
        return moved.cpu()

    def joined(self, what: str, own: Tensor, counts: Sequence[int]) -> Tensor:
        """(sum(counts), ...): the tensors (counts[r], ...) of all ranks, one after another."""
        if self.size == 1:
            return own
        flat = own.detach().contiguous().view(-1).view(torch.uint8)
        each = own.dtype.itemsize * math.prod(own.shape[1:])
        with self._exchange(what, len(flat)):
            out = self._to_all(flat, [count * each for count in counts])
        return out.view(own.dtype).view(-1, *own.shape[1:])

    def gathered(self, what: str, value: Any) -> Tensor:
        """The whole of a DTensor, of which each rank has a piece; its memory may be that of the
        own piece, if this is all of it."""

        def gather(group: Any) -> Tensor:
            with torch.no_grad():
                whole: Tensor = value.full_tensor()
            return whole

        if self.size == 1:
            return gather(self.group)
        with self._exchange(what, 0):
            whole: Tensor = self._carry_out(gather)
        self.sent += value.to_local().nbytes * (value.device_mesh.size() - 1)
        return whole

    def _to_all(self, piece: Tensor, come: Sequence[int]) -> Tensor:
        """The flat pieces of all ranks, of so many entries each, one after another.

        They go to all others at once. all_gather would do, but gloo's passes them on from rank to
        rank, which takes more CPU seconds for small ones."""
        from torch import distributed as dist

        flat = piece.to(self._device).repeat(self.size)
        out = torch.empty(sum(come), dtype=piece.dtype, device=self._device)
        away = [len(piece)] * self.size
        self._carry_out(dist.all_to_all_single, out, flat, list(come), away)
        self.sent += len(piece) * (self.size - 1) * piece.element_size()
        return out.to(piece.device)

    # ---- sums ------------------------------------------------------------------------------------

    def _pieces(self, count: int) -> list[int]:
        """How many of ``count`` entries are in the piece of each rank."""
        ends = [r * count // self.size for r in range(self.size + 1)]
        return [end - begin for begin, end in itertools.pairwise(ends)]

    def to_owners(
        self,
        what: str,
        values: Any,
        tensors: Iterable[tuple[str, Tensor]],
        senders: Sequence[int],
        take: Callable[[str, list[Tensor]], None],
    ) -> list[Any]:
        """The JSON values of the ranks ``senders``, in this order. ``take`` is called for each of
        the flat tensors, with the own piece of it as each of these ranks has it."""
        from torch import distributed as dist

        sends, data = self.rank in senders, json.dumps(values).encode()
        with self._exchange(what, len(data)) as lengths:
            found = self._gathered(data, lengths)
            for name, x in tensors:
                pieces = self._pieces(len(x))
                away = pieces if sends else [0] * self.size
                come = [pieces[self.rank] if r in senders else 0 for r in range(self.size)]
                flat = x if sends else x.new_empty(0)
                out = torch.empty(sum(come), dtype=x.dtype, device=self._device)
                self._carry_out(dist.all_to_all_single, out, flat.to(self._device), come, away)
                self.sent += (sum(away) - away[self.rank]) * x.element_size()
                parts = out.to(x.device).split(come)
                take(name, [parts[r] for r in senders])
        return [found[r] for r in senders]

    def from_owners(
        self,
        what: str,
        pieces: Mapping[str, Tensor],
        lengths: Mapping[str, int],
        take: Callable[[str, Tensor], None],
    ) -> None:
        """``take`` is called for each of the flat tensors, put together from the pieces of all
        ranks."""
        with self._exchange(what, len(pieces)):
            for name, piece in pieces.items():
                take(name, self._to_all(piece, self._pieces(lengths[name])))

    # ---- failures --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _exchange(self, what: str, length: int) -> Iterator[list[int]]:
        """An exchange in which all ranks take part, with the ``length`` that each of them states.

        Raises the error of a rank that has failed, and RankError if a rank is gone. After an own
        error the others are in the middle of it, and cannot be told: they notice when this process
        ends.
        """
        begun = time.perf_counter()
        try:
            lengths = self._meet(_STOPPING if stop.is_set() else _WELL, what, length)
            self.waited += time.perf_counter() - begun
            yield lengths
        except BaseException:
            self._over = True
            raise
        finally:
            self.exchanging += time.perf_counter() - begun

    def _meet(self, state: int, what: str, length: int) -> list[int]:
        own = torch.tensor([state, zlib.crc32(what.encode()), length])
        every = self._to_all(own, [len(own)] * self.size).view(self.size, -1)
        states, labels, lengths = map(list[int], every.T.tolist())
        if _FAILED in states:
            source = states.index(_FAILED)
            data = what.encode() if self.rank == source else bytes(lengths[source])
            out = _bytes_of(data)
            kind, text = json.loads(bytes(self._broadcast(out, source).numpy()))
            if self.rank != source:
                error = _error(kind, text, source)
                error.rank = source  # type: ignore[attr-defined]
                raise error
        elif len(set(labels)) > 1:
            raise RankError(
                f"group: rank {self.rank} is at {what!r} and another is not; all ranks must call "
                "prune alike, with nothing else on this group meanwhile"
            )
        if _STOPPING in states:
            stop.set()
        return lengths

    def _carry_out(self, collective: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of ``torch.distributed``. Raises RankError where another rank is gone,
        and MemoryError where this one lacks memory."""
        try:
            return collective(*arguments, group=self.group)
        except RuntimeError as error:
            text = " ".join(str(error).split())[:200]
            here = f"rank {self.rank} of {self.size}"
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
                raise MemoryError(f"group: {here} has too little memory: {text}") from error
            raise RankError(
                f"group: another rank has ended or does not answer ({here} noticed: {text})"
            ) from error

    def tell(self, error: BaseException) -> None:
        """Let the other ranks know of an error on this one, at their next exchange. Nothing is
        told where it came from them, or of an interruption, which ends this process."""
        if self.size == 1 or self._over or not isinstance(error, (Exception, StoppedError)):
            return
        known = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KNOWN]
        kind = type(error).__name__
        text = json.dumps([known[0], str(error)] if known else [kind, f"{kind}: {error}"])
        self._over = True
        with contextlib.suppress(Exception, StoppedError):  # what counts is the error here
            self._meet(_FAILED, text, len(text.encode()))


def _bytes_of(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _error(kind: str, text: str, rank: int) -> BaseException:
    """The error of another rank, of the same class if that is known."""
    if kind == StoppedError.__name__:
        return StoppedError()
    if kind in _KNOWN:
        return _KNOWN[kind](f"rank {rank}: {text}")
    return RankError(f"group: rank {rank} has failed: {text}")


def _differing(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not the same on all ranks, and which of them differ from rank 0."""
    out = []
    for name in sorted({name for value in values for name in value}):
        others = [r for r, v in enumerate(values) if v.get(name) != values[0].get(name)]
        if others:
            out.append(f"{name} (on rank {', '.join(map(str, others))})")
    return out


def check_alike(ranks: Ranks, header: Mapping[str, Any]) -> None:
    """Raise ArgumentError, on all ranks, unless all have the same ``header``: what names what."""
    values = ranks.all_values("what the ranks are about to do", dict(header))
    if differing := _differing(values):
        error = ArgumentError(
            f"group: not the same as on rank 0: {'; '.join(differing)}; start all ranks with the "
            "same model, data, arguments, versions and threads"
        )
        error.rank = 0
        raise error


ALONE = Ranks()
