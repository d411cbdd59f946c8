"""What native code and Python share: enums, the plan of exact removal, the backend table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lobs_native import ops
from lobs_native.errors import LobsError
from lobs_native.ops import native

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = re.findall(r"COLUMN\(\w+, (\w+)\)", (ROOT / "csrc/dispatch.h").read_text())


@pytest.mark.parametrize(
    ("name", "header"), [("Dtype", "types"), ("WeightState", "types"), ("Status", "errors")]
)
def test_enums_are_those_of_the_headers(name, header):
    text = (ROOT / f"csrc/{header}.h").read_text()
    (body,) = re.findall(rf"enum class {name} : [\w ]+\{{(.*?)\}};", text, re.S)
    values = {member.upper(): int(value) for member, value in re.findall(r"(\w+) = (\d+)", body)}
    assert values
    assert {member.name: member.value for member in getattr(ops._core, name)} == values


def test_weight_states_go_into_tensors():
    state = torch.zeros(3, dtype=torch.uint8)
    state[1], state[2] = ops.WeightState.GOES_FIRST, ops.WeightState.STAYS
    assert state.tolist() == [0, 1, 2]
    assert (state == ops.WeightState.STAYS).tolist() == [False, False, True]


def test_the_plan_of_exact_removal_keeps_its_settings():
    settings = {"limit": 5, "stop": 0.5, "floor": 1e-6, "block": 1, "group": 4, "per_group": 2}
    plan = native.ExactPlan(**settings, update=True)
    assert {name: getattr(plan, name) for name in settings} == settings
    assert plan.update
    with pytest.raises(AttributeError):
        plan.limit = 6
    with pytest.raises(TypeError):
        native.ExactPlan(**settings)


def test_the_plan_of_an_admm_step_keeps_its_settings():
    settings = {"count": 5, "unit": 2, "group": 0, "per_group": 0, "by_row": True, "cut": 0.5}
    plan = native.AdmmPlan(**settings)
    assert {name: getattr(plan, name) for name in settings} == settings
    with pytest.raises(AttributeError):
        plan.count = 6


def test_the_plan_of_a_removal_of_columns_keeps_its_settings():
    settings = {"units": 5, "done": 1, "limit": 3, "floor": 0.5, "first": 64, "sets": 2}
    settings |= {"set_start": 128, "set_unit": 192}
    plan = native.ColumnsPlan(**settings)
    assert {name: getattr(plan, name) for name in settings} == settings


def test_cpu_levels_have_every_operation():
    assert len(OPERATIONS) == 16
    for level, _, _ in ops.levels():
        assert all(native.has(level, operation) for operation in OPERATIONS), level


def test_the_cuda_kernels_leave_some_operations_to_others(emulated):
    lacking = {operation for operation in OPERATIONS if not native.has(emulated, operation)}
    assert lacking == {"rank_rows", "support_solve", "exchange", "sliced_linear"}
    empty = torch.empty(0, 0)
    arguments = (native.crossing(empty), empty.data_ptr(), empty.data_ptr())
    with pytest.raises(ValueError, match=f"'{emulated}' has no support_solve"):
        native.call("support_solve", emulated, empty.device, *arguments)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="operation: unknown name 'exchang'"):
        native.has("cpu", "exchang")
    with pytest.raises(ValueError, match="backend: unknown name 'gpu'"):
        native.has("gpu", "exchange")


def test_a_report_of_a_device_is_a_status_and_a_place():
    assert ops._core.info_of(-1) == (native.Status.OK, 0)
    assert ops._core.info_of(16 * 7 + 2) == (native.Status.NOT_POSITIVE, 7)


def test_statuses_raise():
    native.check_status(native.Status.OK)
    with pytest.raises(MemoryError, match="scratch memory"):
        native.check_status(native.Status.OUT_OF_MEMORY)
    with pytest.raises(LobsError, match="BAD_ORDER"):
        native.check_status(native.Status.BAD_ORDER)
