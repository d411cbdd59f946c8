import enum
from collections.abc import Callable, Sequence

__version__: str
parallel_runtime: str
MAX_BLOCK: int

# pointer, dtype, shape, strides
_Tensor = tuple[int, int, Sequence[int], Sequence[int]]
# W, A, start, scale, columns of the widest unit
_ColumnLayer = tuple[_Tensor, int, int, float, int]
# ordinal, stream, allocate, report
_Device = tuple[int, int, Callable[[int], int], int]

class Dtype(enum.IntEnum):
    F64 = 0
    F32 = 1
    F16 = 2
    BF16 = 3

class Status(enum.IntEnum):
    OK = 0
    NOT_FINITE = 1
    NOT_POSITIVE = 2
    OUT_OF_MEMORY = 3
    INTERRUPTED = 4
    UNSUPPORTED = 5
    BAD_ORDER = 6
    DEVICE_FAILED = 7

class WeightState(enum.IntEnum):
    MAY_GO = 0
    GOES_FIRST = 1
    STAYS = 2

class ExactPlan:
    def __init__(
        self,
        *,
        limit: int,
        stop: float,
        floor: float,
        block: int,
        group: int,
        per_group: int,
        update: bool,
    ) -> None: ...
    @property
    def limit(self) -> int: ...
    @property
    def stop(self) -> float: ...
    @property
    def floor(self) -> float: ...
    @property
    def block(self) -> int: ...
    @property
    def group(self) -> int: ...
    @property
    def per_group(self) -> int: ...
    @property
    def update(self) -> bool: ...

class AdmmPlan:
    def __init__(
        self,
        *,
        count: int,
        unit: int,
        group: int,
        per_group: int,
        by_row: bool,
        cut: float,
    ) -> None: ...
    @property
    def count(self) -> int: ...
    @property
    def unit(self) -> int: ...
    @property
    def group(self) -> int: ...
    @property
    def per_group(self) -> int: ...
    @property
    def by_row(self) -> bool: ...
    @property
    def cut(self) -> float: ...

class ColumnsPlan:
    def __init__(
        self,
        *,
        units: int,
        done: int,
        limit: int,
        floor: float,
        first: int,
        sets: int,
        set_start: int,
        set_unit: int,
    ) -> None: ...
    @property
    def units(self) -> int: ...
    @property
    def done(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def floor(self) -> float: ...
    @property
    def first(self) -> int: ...
    @property
    def sets(self) -> int: ...
    @property
    def set_start(self) -> int: ...
    @property
    def set_unit(self) -> int: ...

# name, ready, detail, whether it runs on a device
def backends() -> list[tuple[str, bool, str, bool]]: ...
def load_backend(file: str) -> str: ...
def resolve(backend: str) -> str | None: ...
def has(backend: str, operation: str) -> bool: ...
def info_of(report: int) -> tuple[Status, int]: ...
def hessian_accumulate(
    backend: str,
    H: _Tensor,
    X: _Tensor,
    t: int,
    ones: bool,
    threads: int,
    device: _Device | None = None,
) -> tuple[Status, int]: ...
def inverse_update(
    backend: str,
    F: int,
    dtype: Dtype,
    blocks: int,
    B: int,
    G: _Tensor,
    m: float,
    threads: int,
    device: _Device | None = None,
) -> tuple[Status, int]: ...
def saliency_argmin(
    backend: str,
    column: int,
    value: int,
    W: _Tensor,
    diag: _Tensor,
    live: _Tensor,
    threads: int,
    device: _Device | None = None,
) -> tuple[Status, int]: ...
def static_order_prune(
    backend: str,
    W: _Tensor,
    A: int,
    order: int,
    start: int,
    threads: int,
    device: _Device | None = None,
) -> tuple[Status, int]: ...
def rank_lowest(
    backend: str,
    chosen: int,
    score: int,
    rows: int,
    columns: int,
    count: int,
    threads: int,
    device: _Device | None = None,
) -> tuple[Status, int]: ...
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
) -> tuple[Status, int]: ...
def exact_trace(
    backend: str,
    order: int,
    loss: int,
    count: int,
    lost: int,
    W: _Tensor,
    A: int,
    state: int,
    plan: ExactPlan,
    threads: int,
    device: _Device | None = None,
) -> tuple[Status, int]: ...
def exact_bytes(backend: str, dtype: Dtype, columns: int, plan: ExactPlan) -> int: ...
def support_solve(
    backend: str, X: _Tensor, M: int, chosen: int, threads: int, device: _Device | None = None
) -> tuple[Status, int]: ...
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
) -> tuple[Status, int]: ...
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
) -> tuple[Status, int]: ...
def admm_step(
    backend: str,
    changed: int,
    cut: int,
    p: _Tensor,
    d: _Tensor,
    x: _Tensor,
    removed: int,
    state: int,
    plan: AdmmPlan,
    threads: int,
    device: _Device | None = None,
) -> tuple[Status, int]: ...
def conjugate_step(
    backend: str,
    w: _Tensor,
    g: _Tensor,
    p: _Tensor,
    h: _Tensor,
    removed: int,
    rr: int,
    threads: int,
    device: _Device | None = None,
) -> tuple[Status, int]: ...
def columns_trace(
    backend: str,
    order: int,
    cost: int,
    count: int,
    layers: list[_ColumnLayer],
    plan: ColumnsPlan,
    memory: int,
    threads: int,
    device: _Device | None = None,
) -> tuple[Status, int]: ...
def columns_bytes(backend: str, layers: list[_ColumnLayer], units: int, sets: int) -> int: ...
def sliced_linear(
    backend: str,
    y: _Tensor,
    x: _Tensor,
    values: int,
    dtype: Dtype,
    columns: int,
    steps: int,
    start: int,
    width: int,
    bias: int,
    threads: int,
    device: _Device | None = None,
) -> tuple[Status, int]: ...
