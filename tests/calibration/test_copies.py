"""Where the operand of a product lies in the parameter that was copied for it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lobs_native.calibration.copies import Copies
from lobs_native.calibration.storages import address
from lobs_native.layers.block import Block, group_step, merged, strided


def entries(block: Block) -> Tensor:
    """The places (C, R) of a block's entries, from its sizes and steps one by one."""

    def along(dims: tuple[tuple[int, int], ...]) -> list[int]:
        counts = itertools.product(*(range(size) for size, _ in dims))
        return [sum(i * s for i, (_, s) in zip(at, dims, strict=True)) for at in counts]

    rows, columns = torch.tensor(along(block.rows)), torch.tensor(along(block.columns))
    return block.offset + columns[:, None] + rows


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("of_columns", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_copy_in_any_order_is_followed_to_the_parameter(order, of_columns, transposed):
    parameter = torch.arange(2.0 * 3 * 5).view(2, 3, 5)
    source = parameter.permute(order)
    copy = source.contiguous().clone()
    copies = Copies[str]()
    assert copies.note("it", parameter, source, copy)
    (found,) = copies.of(copy)
    operand = copy.reshape(math.prod(copy.shape[:of_columns]), -1)
    operand = operand.T if transposed else operand
    assert found.owner == "it"
    block = found.block(operand)
    assert torch.equal(entries(block), operand.long())
    assert block.shape == operand.T.shape
    part = found.block(operand[:, 1:2])
    assert torch.equal(entries(part), operand[:, 1:2].long())


def test_operands_in_the_parameter_itself_and_rows_that_are_not_alike():
    parameter = torch.arange(24.0)
    matrix = parameter.view(4, 6)
    for operand, offset in ((matrix.T, 0), (matrix[1:3].T, 6), (matrix[:, 2:4], 2)):
        assert torch.equal(entries(Block.of(operand, offset)), operand.long())
    copies = Copies[str]()
    copy = parameter.view(2, 3, 4).transpose(1, 2).contiguous()
    copies.note("it", parameter, parameter.view(2, 3, 4).transpose(1, 2), copy)
    assert copies.of(copy)[0].block(copy.view(-1)[1:21].view(4, 5)) is None
    assert not copies.of(parameter)
    assert not copies.note("it", parameter, parameter[:1], parameter.expand(2, 24))


def test_a_copy_that_is_freed_is_forgotten():
    parameter, copies = torch.ones(5000), Copies[str]()
    copy = parameter.clone()
    copies.note("it", parameter, parameter, copy)
    where = address(copy)
    assert copies.of(copy[5:])
    del copy
    for _ in range(20):
        again = torch.ones(5000)
        if address(again) == where:
            assert not copies.of(again)
    copies.clear()
    assert not copies


def test_blocks_cover_a_parameter_once_or_not_at_all():
    heads = Block(0, ((2, 12),), ((4, 1),))  # (2, 3, 4): one of the three in the middle
    assert group_step(heads, 24) == 4
    assert group_step(Block(8, ((2, 12),), ((4, 1),)), 24) == 4
    assert group_step(Block(0, ((4, 6),), ((6, 1),)), 24) == 24
    assert group_step(Block(0, ((2, 6),), ((6, 1),)), 24) == 12
    assert group_step(Block(0, ((2, 6),), ((5, 1),)), 24) is None  # rows with a gap
    assert group_step(Block(0, ((2, 12),), ((2, 2),)), 24) is None  # two gaps
    assert group_step(Block(0, ((4, 1),), ((4, 1),)), 16) is None  # the same entries again
    sizes, steps = strided(3, 4, heads)
    assert sorted(torch.arange(24).as_strided(sizes, steps).flatten().tolist()) == [*range(24)]
    assert merged([(2, 12), (3, 4), (1, 7), (4, 1)]) == ((24, 1),)


def test_pieces_of_an_operand_go_to_the_copies_they_lie_in():
    a, b = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    copies = Copies[str]()
    tall = torch.cat([a, torch.zeros(1, 3), b])
    assert copies.note_joined([a, torch.zeros(1, 3), b], [("a", a), None, ("b", b)], tall, 0, False)
    found = copies.pieces(tall.T)
    assert [(p.owner, p.rows) for p in found] == [("a", slice(0, 2)), ("b", slice(3, 7))]
    for piece, source in zip(found, (a, b), strict=True):
        assert torch.equal(entries(piece.block(tall.T)), source.T.long())
    assert copies.owners(tall) == ["a", "b"]
    assert [p.owner for p in copies.pieces(tall)] == ["a", "b"]  # cut between columns
    assert [p.owner for p in copies.pieces(tall[3:].T)] == ["b"]
    assert copies.pieces(tall.view(3, 7)) is None  # rows of both that are folded across each other
