"""Which layers ranks share by rows, and which rank prunes each of the others."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lobs_native.calibration.ranks import Ranks
from lobs_native.layers import layers_of
from lobs_native.network.divided import divided, owners
from lobs_native.network.selection import LayerJob
from lobs_native.solvers.settings import LayerSettings


def jobs(*shapes: tuple[int, int], **options: Any) -> list[LayerJob]:
    """Layers of so many rows and columns; they have no values."""
    model = nn.ModuleList(nn.Linear(c, r, bias=False, device="meta") for r, c in shapes)
    settings = [LayerSettings(**{"sparsity": 0.5, **options}).for_order(c) for _, c in shapes]
    return [LayerJob(*pair) for pair in zip(layers_of(model), settings, strict=True)]


def ranks(size: int) -> Ranks:
    made = Ranks()
    made.size, made._load = size, [0.0] * size
    return made


def names(some: list[LayerJob]) -> list[str]:
    return [job.layer.name for job in some]


def test_one_wide_layer_is_shared_by_rows():
    assert names(divided(jobs((4096, 4096)), 4)) == ["0"]
    assert names(divided(jobs((512, 512), method="exact"), 2)) == ["0"]


@pytest.mark.parametrize("shape", [(1024, 4096), (64, 64), (320, 320)])
def test_layers_of_few_blocks_of_rows_or_little_work_are_not(shape):
    assert divided(jobs(shape), 4) == []


@pytest.mark.parametrize("method", ["sweep", "magnitude", "wanda"])
def test_nor_are_those_of_methods_without_work_by_row(method):
    assert divided(jobs((4096, 4096), method=method), 4) == []


def test_but_exchanges_are_by_row_whatever_the_method():
    assert divided(jobs((4096, 512), method="wanda", refine="exchange"), 4)


def test_as_many_layers_as_ranks_are_pruned_whole():
    assert divided(jobs(*[(4096, 4096)] * 8), 4) == []


def test_a_large_layer_is_shared_beside_small_ones():
    assert names(divided(jobs((512, 512), (8192, 4096), (512, 512)), 4)) == ["1"]


def test_alone_nothing_is_shared():
    assert divided(jobs((4096, 4096)), 1) == []


def test_whole_layers_go_to_the_ranks_with_the_least_to_do():
    of = ranks(2)
    found = owners(of, jobs((100, 64), (300, 64), (250, 64)))
    assert found["1"] != found["0"] == found["2"]
    # What is equal here goes to the rank that has done less before.
    assert owners(of, jobs((64, 64))) == {"0": found["1"]}
