"""What one of several processes does for ``tests/network/test_gathering.py``: networks in pieces
that are refused, runs that fail, and plans.

    python -m helpers.not_in_pieces FOLDER RANK SIZE TASK
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from helpers.in_pieces import by_block, layout, sharded
from helpers.on_ranks import main, one, raised, two
from helpers.stacks import batches
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Shard, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lobs_native as lobs
from lobs_native.network import gathering
from lobs_native.network.offloading import offloaded


class Heads(nn.Module):
    """Attention that counts on its share of the heads, as networks do that are made parallel."""

    def __init__(self, share: int, guessing: bool) -> None:
        super().__init__()
        torch.manual_seed(10)
        self.heads, self.guessing = 4 // share, guessing
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        size = -1 if self.guessing else 2
        q, k, v = (
            f(x).view(*x.shape[:2], self.heads, size).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        y = torch.softmax(q @ k.mT, -1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


def local_heads(size: int, guessing: bool) -> nn.Module:
    model = Heads(size, guessing)
    plan = {n: ColwiseParallel() for n in "qkv"} | {"o": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (size,)), plan)


def own_pieces(model: nn.Module) -> list[Tensor]:
    """Those of this rank that have values."""
    pieces = [x.to_local() for x in model.parameters() if isinstance(x, DTensor)]
    return [x for x in pieces if not x.is_meta]


@contextlib.contextmanager
def patched(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def refused(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Errors, of which each rank gets one, and after which all is as it was."""
    found: dict[str, Any] = {}
    world = distributed.group.WORLD
    mesh = init_device_mesh("cpu", (size,))

    def attempt(name: str, model: nn.Module, data: Any = None, **options: Any) -> None:
        data = batches(3) if data is None else data
        before = layout(model)
        bits = [x.clone() for x in own_pieces(model)]
        options = {"sparsity": 0.5, "progress": False, "group": world, **options}
        found[name] = raised(lambda: lobs.prune(model, data, **options))
        found[f"{name}: as before"] = (
            layout(model) == before
            and all(torch.equal(a, b) for a, b in zip(bits, own_pieces(model), strict=True))
        )  # fmt: skip

    attempt("no group", sharded(size), group=None)
    own = [distributed.new_group([r]) for r in range(size)]
    attempt("small group", sharded(size), group=own[rank])
    attempt("device", sharded(size), device="cpu")
    attempt("FSDP1", FullyShardedDataParallel(two(), device_id=torch.device("cpu")))
    half = nn.Linear(5, 4)
    pieces = [DTensor.from_local(half.weight.data, mesh, [Partial()])]
    half.weight = nn.Parameter(pieces[0])
    attempt("partial", half)
    with torch.device("meta"):
        empty = two()
    by_block(empty, size)
    attempt("meta", empty)
    unlike = one()
    linear = (unlike.layers[0].up, unlike.layers[0].down)[rank]
    linear.weight = nn.Parameter(DTensor.from_local(linear.weight.data, mesh, [Shard(0)]))
    attempt("other pieces", unlike)
    attempt("original", two(), original=sharded(size))
    for name, offload in (("memory", None), ("memory, offload", folder)):
        with patched(gathering, "_free", lambda device: 9_000):
            attempt(name, sharded(size), offload=offload)
    nowhere = Path(__file__) if rank == 1 else folder / "there"
    attempt("folder", sharded(size), offload=nowhere)
    unknown = sharded(size)
    unknown._forward_pre_hooks.clear()
    unknown._forward_hooks.clear()
    attempt("unknown", unknown)
    attempt("heads", local_heads(size, False), torch.randn(2, 3, 5, 8).unbind())
    attempt("guessed heads", local_heads(size, True), torch.randn(2, 3, 5, 8).unbind())

    back = gathering._piece_of

    def zeros(value: Tensor, like: Any) -> Tensor:
        return back(value, like) * (rank != 1)

    with patched(gathering, "_piece_of", zeros):
        attempt("the way back", sharded(size))
    broken = batches(4)
    broken[3][0, 0, 0] = float("nan")  # which one rank reads
    attempt("not finite", sharded(size), broken, inputs="pruned")
    copy, calls = gathering.overwrite, []

    def fails(target: Tensor, value: Tensor) -> None:
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            raise MemoryError("none left")
        copy(target, value)

    with patched(gathering, "overwrite", fails):
        attempt("handing back", sharded(size))
    found["handed back"] = len(calls)

    def refuse() -> None:
        with offloaded(sharded(size), lobs.NetworkSettings(sparsity=0.5), {}):
            pass

    found["the command"] = raised(refuse)
    return found


def planned(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """The plans of a network in pieces and of a plain one."""
    model, before = sharded(size), None
    before = layout(model)
    versions = [p.to_local()._version for p in model.parameters()]
    plans = {
        name: lobs.plan_prune(model, batches(3), sparsity=0.5, group=distributed.group.WORLD, **how)
        for name, how in {"plan": {}, "offload": {"offload": folder}}.items()
    }
    same = layout(model) == before and versions == [
        p.to_local()._version for p in model.parameters()
    ]
    plain = lobs.plan_prune(two(), batches(3), sparsity=0.5)
    return {
        "same": same,
        "plain": dataclasses.asdict(plain),
        "pieces": sum(p.to_local().nbytes for p in model.parameters()),
        **{name: [dataclasses.asdict(p), str(p)] for name, p in plans.items()},
    }


if __name__ == "__main__":
    main(refused, planned)
