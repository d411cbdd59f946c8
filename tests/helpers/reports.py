"""Reports and layer reports that were never computed, with every field filled."""

from lobs_native.report.records import ErrorBound, LayerReport
from lobs_native.report.report import Report


def layer(name="fc1", **changes):
    values = {
        "name": name, "kind": "Linear", "shape": (300, 64), "method": "lobs", "scope": "layer",
        "asked": "sparsity 0.9", "sparsity": 0.9, "error": 4.8, "relative_error": 0.16,
        "damping": 0.01, "damping_asked": 0.01, "rows": 1297.0, "columns": 64, "dead_columns": 4,
        "backend": "cpu_v3", "status": "ok", "notes": (), "seconds_calibrating": 0.004,
        "seconds_pruning": 0.012,
        "optimality": 0.003, "swaps": 0, "pattern": "unstructured", "dtype": "float32",
        "predicted": 4.9, "energy": 30.0, "condition": 3400.0, "peak_memory": 567_000_000,
        "curve_sparsity": (0.0, 0.5, 0.9, 0.92), "curve_error": (0.0, 0.4, 4.9, 6.0),
    }  # fmt: skip
    return LayerReport(**{**values, **changes})


def report(*layers, skipped=(), bound=None, settings=None, missing=()):
    return Report(
        layers=layers or (layer(),),
        skipped=tuple(skipped),
        error_bound=bound or ErrorBound(True, "Theorem 3.2", 122.0, 29.6, 8.47, 14.3),
        sparsity=0.9,
        removed=17280,
        weights=19200,
        seconds=0.25,
        settings=settings or {"method": "lobs", "include": None},
        versions={"torch": "2.13.0"},
        missing=tuple(missing),
    )
