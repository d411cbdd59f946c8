"""What one of several processes does for ``tests/network/test_gathering.py``: networks that lie in
pieces on the ranks (DTensor), against the same ones on one process.

    python -m helpers.in_pieces FOLDER RANK SIZE TASK
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers.on_ranks import Padded, main, one, other, padded, seen, two, wide
from helpers.stacks import batches, made
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import lobs_native as lobs
from lobs_native.calibration import offload as offloading


def deep() -> nn.Module:
    return made(blocks=2, width=48)


def llama() -> nn.Module:
    import transformers

    torch.manual_seed(6)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 31}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def tokens(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(31, (2, 9), generator=generator)} for _ in range(count)]


class Tied(nn.Module):
    """Two layers with one weight, a buffer, and another method that runs it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Conv1d(1, 3, 3)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.rand(6))

    def features(self, x: Tensor) -> Tensor:
        scale = self.scale.full_tensor() if isinstance(self.scale, DTensor) else self.scale
        return self.b(torch.relu(self.a(x)) * scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.features(x).unsqueeze(1))


def rows(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(20, 6, generator=generator) for _ in range(count)]


# ---- ways to lay a network out -------------------------------------------------------------------


def by_block(model: nn.Module, size: int, **how: Any) -> None:
    mesh = init_device_mesh("cpu", (size,))
    layers = model.model.layers if hasattr(model, "model") else model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh, **how)
    fully_shard(model, mesh=mesh, **how)


def whole(model: nn.Module, size: int) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))


def mixed(model: nn.Module, size: int) -> None:
    """FSDP2 runs it in bfloat16; its parameters are of float32."""
    by_block(model, size, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def replicated(model: nn.Module, size: int) -> None:
    """HSDP: the second dimension of the mesh has the pieces."""
    fully_shard(model, mesh=init_device_mesh("cpu", (size, 1), mesh_dim_names=("copy", "shard")))


def in_columns(model: nn.Module, size: int) -> None:
    """Where the columns can be divided; and the modules of a group of FSDP2."""

    def place(p: nn.Parameter) -> Any:
        return Shard(1) if p.ndim == 2 and p.shape[1] % size == 0 else None

    mesh = init_device_mesh("cpu", (size,))
    fully_shard([model.embed, model.head], mesh=mesh, shard_placement_fn=place)
    by_block(model, size, reshard_after_forward=False)


def with_methods(model: nn.Module, size: int) -> None:
    whole(model, size)
    register_fsdp_forward_method(model, "features")
    mesh = init_device_mesh("cpu", (size,))
    model.register_buffer("scale", distribute_tensor(model.scale, mesh, [Shard(0)]))


def parallel(model: nn.Module, size: int) -> None:
    """Tensor parallel feed-forward parts, with the rows of a sequence on all ranks between."""
    mesh = init_device_mesh("cpu", (size,))
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def both(model: nn.Module, size: int) -> None:
    """Tensor parallel by 2, and FSDP2 around it."""
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
    for layer in model.layers:
        parallelize_module(
            layer, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
        )
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])


def sharded(size: int) -> nn.Module:
    model = two()
    by_block(model, size)
    return model


Case = tuple[Callable[[], nn.Module], Callable[..., None], Callable[[], Any], dict[str, Any]]

METHODS: dict[str, Case] = {
    f"{method}, {scope}, {inputs}": (
        one,
        by_block,
        lambda: batches(4),
        {"method": method, "scope": scope, "inputs": inputs},
    )
    for method in ("exact", "admm")
    for scope in ("row", "layer")
    for inputs in ("dense", "pruned", "corrected")
}
WAYS: dict[str, Case] = {
    "llama": (llama, by_block, lambda: tokens(5), {"method": "exact", "scope": "row"}),
    "llama, admm": (llama, by_block, lambda: tokens(4), {"method": "admm", "inputs": "pruned"}),
    "offload": (deep, by_block, lambda: batches(5), {"offload": "offload"}),
    "offload, dense": (wide, whole, lambda: batches(3), {"offload": "offload", "inputs": "dense"}),
    "model": (two, whole, lambda: iter(batches(5)), {"scope": "model", "held_back": 0.3}),
    "searched": (two, whole, lambda: batches(6), {"search": 2, "held_back": 0.3, "scope": "model"}),
    "tuned": (two, by_block, lambda: batches(4), {"tune": "network", "tune_passes": 1}),
    "tuned blocks": (two, by_block, lambda: batches(4), {"tune": "blocks", "inputs": "pruned"}),
    "kept": (two, by_block, lambda: batches(4), {"run_dir": "run", "inputs": "pruned"}),
    "again": (one, whole, lambda: batches(3), {"original": other()}),
    "padded": (Padded, whole, lambda: padded(5), {}),
    "replicated": (two, replicated, lambda: batches(3), {}),
    "columns": (two, in_columns, lambda: batches(3), {}),
    "mixed": (two, mixed, lambda: batches(3), {}),
    "methods": (Tied, with_methods, lambda: rows(4), {}),
    "parallel": (two, parallel, lambda: iter(batches(4)), {"scope": "row"}),
    "parallel, offload": (wide, parallel, lambda: batches(4), {"offload": "offload"}),
}


BOTH = ("llama", "offload", "parallel")


def whole_of(make: Callable[[], nn.Module], model: nn.Module) -> nn.Module:
    """A plain network with the values of one that lies in pieces."""
    plain, state = make(), model.state_dict()
    values = {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in state.items()}
    plain.load_state_dict(values)
    return plain


def layout(model: nn.Module) -> list[Any]:
    """All that must be as it was before: objects, placements, classes, hooks and methods."""
    modules = list(model.modules())
    return [
        [
            (n, id(p), str(getattr(p, "placements", None)), p.requires_grad)
            for n, p in model.named_parameters()
        ],
        [(n, id(b)) for n, b in model.named_buffers()],
        [(id(m), type(m)) for m in modules],
        [(list(m._forward_pre_hooks.items()), list(m._forward_hooks.items())) for m in modules],
        [{k: id(v) for k, v in vars(m).items() if callable(v)} for m in modules],
    ]


def compared(name: str, case: Case, rank: int, size: int, folder: Path) -> dict[str, Any]:
    make, lay_out, data, options = case
    options = {"sparsity": 0.5, "progress": False, **options}
    own = [options | {k: folder / f"{name} {n}" for k in ("offload", "run_dir") if k in options}
           for n in ("alone", "ranks")]  # fmt: skip
    plain = make()
    first = next(iter(data()))
    call = (lambda m: m(**first)) if isinstance(first, dict) else (lambda m: m(first))
    alone = lobs.prune(plain, data(), **own[0]) if rank == 0 else None
    model = make()
    lay_out(model, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        call(model)  # FSDP2 starts with the first pass, and may leave parameters gathered
    before = None
    for module in model.modules():
        getattr(module, "reshard", lambda: None)()
    before = layout(model)
    report = lobs.prune(model, data(), group=distributed.group.WORLD, **own[1])
    found = {
        "same layout": layout(model) == before,
        "same optimizer": [id(p) for p in optimizer.param_groups[0]["params"]]
        == [id(p) for p in model.parameters()],
        "ranks": seen(whole_of(make, model), report),
        "gathered": report.settings["gathered"],
        "plan": report.settings["plan"],
    }
    if rank == 0:
        found["alone"] = seen(plain, alone)
    out = call(model)
    out = out if isinstance(out, Tensor) else out.logits
    again = call(whole_of(make, model))
    again = again if isinstance(again, Tensor) else again.logits
    near = 0.1 if name == "mixed" else 1e-6
    found["runs"] = bool(torch.allclose(out.float(), again, atol=near))
    out.square().sum().backward()
    optimizer.step()
    found["trains"] = seen(whole_of(make, model), None) != found["ranks"][0]
    return found


def methods(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Methods, scopes and kinds of inputs."""
    return equal(METHODS, rank, size, folder)


def ways(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Ways to lay a network out, and arguments of a run."""
    return equal(WAYS, rank, size, folder)


def equal(cases: dict[str, Case], rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Every second case, and those of BOTH, on one process and in pieces on all."""
    scratches: list[Any] = []

    class Watched(offloading.Scratch):
        def __init__(self, where: Path) -> None:
            super().__init__(where)
            scratches.append(self)

    offloading.Scratch = Watched
    found: dict[str, Any] = {}
    for i, (name, case) in enumerate(cases.items()):
        if i % 2 != size % 2 and name not in BOTH:
            continue
        scratches.clear()
        found[name] = compared(name, case, rank, size, folder)
        found[name]["written"] = [x._end for x in scratches[-3:]]
    return found


def nested(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Two dimensions of a mesh: tensor parallelism and FSDP2 together."""
    case = two, both, lambda: batches(3), {}
    return compared("both", case, rank, size, folder)


if __name__ == "__main__":
    main(methods, ways, nested)
