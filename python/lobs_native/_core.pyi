from collections.abc import Callable, Sequence

__version__: str
parallel_runtime: str

_Tensor = tuple[int, int, Sequence[int], Sequence[int]]
_Plan = tuple[int, float, float, int, int, int, bool]
# ordinal, stream, allocate, report
_Device = tuple[int, int, Callable[[int], int], int]

def backends() -> list[tuple[str, bool, str, bool]]: ...
def load_backend(file: str) -> str: ...
def resolve(backend: str) -> str | None: ...
def hessian_accumulate(
    backend: str,
    H: _Tensor,
    X: _Tensor,
    t: int,
    ones: bool,
    threads: int,
    device: _Device | None = None,
) -> tuple[int, int]: ...
def inverse_update(
    backend: str,
    F: int,
    dtype: int,
    blocks: int,
    B: int,
    G: _Tensor,
    m: float,
    threads: int,
    device: _Device | None = None,
) -> tuple[int, int]: ...
def saliency_argmin(
    backend: str,
    column: int,
    value: int,
    W: _Tensor,
    diag: _Tensor,
    live: _Tensor,
    threads: int,
    device: _Device | None = None,
) -> tuple[int, int]: ...
def static_order_prune(
    backend: str,
    W: _Tensor,
    A: int,
    order: int,
    start: int,
    threads: int,
    device: _Device | None = None,
) -> tuple[int, int]: ...
def rank_lowest(
    backend: str,
    chosen: int,
    score: int,
    rows: int,
    columns: int,
    count: int,
    threads: int,
    device: _Device | None = None,
) -> tuple[int, int]: ...
def rank_rows(
    backend: str,
    order: int,
    start: int,
    chosen: int,
    score: int,
    rows: int,
    columns: int,
    threads: int,
    device: _Device | None = None,
) -> tuple[int, int]: ...
def exact_trace(
    backend: str,
    order: int,
    loss: int,
    count: int,
    status: int,
    W: _Tensor,
    A: int,
    state: int,
    plan: _Plan,
    threads: int,
    device: _Device | None = None,
) -> tuple[int, int]: ...
def exact_bytes(backend: str, dtype: int, columns: int, plan: _Plan) -> int: ...
def support_solve(
    backend: str, X: _Tensor, M: int, chosen: int, threads: int, device: _Device | None = None
) -> tuple[int, int]: ...
def exchange(
    backend: str,
    kept: int,
    swaps: int,
    left: int,
    W: _Tensor,
    A: int,
    fixed: int,
    group: int,
    limit: int,
    threads: int,
    device: _Device | None = None,
) -> tuple[int, int]: ...
def sweep_block(
    backend: str,
    W: _Tensor,
    U: _Tensor,
    gone: int,
    E: _Tensor,
    group: int,
    per_group: int,
    threads: int,
    device: _Device | None = None,
) -> tuple[int, int]: ...
