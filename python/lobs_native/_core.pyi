from collections.abc import Sequence

__version__: str
parallel_runtime: str

_Tensor = tuple[int, int, Sequence[int], Sequence[int]]

def backends() -> list[tuple[str, bool, str]]: ...
def resolve(backend: str) -> str | None: ...
def hessian_accumulate(
    backend: str, H: _Tensor, X: _Tensor, t: int, ones: bool, threads: int
) -> tuple[int, int]: ...
def inverse_update(
    backend: str, F: int, dtype: int, blocks: int, B: int, G: _Tensor, m: float, threads: int
) -> tuple[int, int]: ...
def saliency_argmin(
    backend: str, column: int, value: int, W: _Tensor, diag: _Tensor, live: _Tensor, threads: int
) -> tuple[int, int]: ...
def static_order_prune(
    backend: str, W: _Tensor, A: int, order: int, start: int, threads: int
) -> tuple[int, int]: ...
def rank_lowest(
    backend: str, chosen: int, score: int, rows: int, columns: int, count: int, threads: int
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
) -> tuple[int, int]: ...
