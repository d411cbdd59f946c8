"""The table of runtimes: complete entries, and answers that follow from the pattern and shapes."""

from __future__ import annotations

import re

import pytest
from helpers.reports import layer

from lobs_native.report import runtimes


def answers(*layers, pattern="unstructured"):
    return {x.where.split(",")[0]: x for x in runtimes.runtimes_for(layers, pattern)}


def test_every_entry_has_a_source_a_date_and_a_known_answer():
    for entry in runtimes.table():
        assert entry.where
        assert entry.text.endswith(".")
        assert entry.source
        assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", entry.date)
        assert entry.date >= runtimes.as_of()
        assert entry.faster in ("yes", "with conditions", "no")
        assert entry.condition in (None, "2:4", "1 x 1 convolutions")


@pytest.mark.parametrize(
    ("patterns", "good"),
    [
        (["2:4"], True),
        (["2:4", "1:4"], True),
        (["1:2"], True),
        (["2:4", "unstructured"], False),
        (["4:8"], False),
        (["3:4"], False),
        (["x:4"], False),
    ],
)
def test_sparse_tensor_cores_need_two_of_four_in_every_layer(patterns, good):
    answer = answers(*(layer(pattern=name) for name in patterns))["TensorRT"]
    assert answer.faster == ("with conditions" if good else "no")
    assert ("not requested for every layer" in answer.why) == (not good)


def test_the_pattern_of_the_run_counts_for_layers_that_name_none():
    assert answers(layer(pattern=None), pattern="2:4")["TensorRT"].faster == "with conditions"
    assert answers(pattern="2:4")["TensorRT"].faster == "with conditions"
    assert answers()["TensorRT"].faster == "no"


def test_the_shapes_that_the_kernels_take_are_counted():
    shapes = [(64, 128), (64, 96), (48, 128)]
    layers = [layer(pattern="2:4", shape=shape) for shape in shapes]
    convolution = layer(pattern="2:4", kind="Conv2d", shape=(64, 64, 1, 1))
    rows = runtimes.runtimes_for([*layers, convolution], "2:4")
    (why,) = (x.why for x in rows if "to_sparse_semi_structured" in x.where)
    assert "shape in float16: 1 of 4." in why


def test_pointwise_convolutions_are_needed_by_xnnpack():
    def faster(*layers):
        return answers(*layers)["XNNPACK (TensorFlow Lite)"].faster

    assert faster(layer(), layer(kind="Conv2d", shape=(8, 8, 1, 1))) == "with conditions"
    assert faster(layer(), layer(kind="Conv2d", shape=(8, 8, 3, 3))) == "no"


def test_the_documentation_gets_a_row_for_every_entry():
    lines = runtimes.markdown().splitlines()
    assert len(lines) == 2 + len(runtimes.table())
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {6}
    for line, entry in zip(lines[2:], runtimes.table(), strict=True):
        assert line.startswith(f"| {entry.where} | {entry.faster} | ")
        assert entry.source in line
        assert entry.date in line
