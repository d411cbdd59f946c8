"""What is known of tensors in memory, by their storage, so that every view of it is recognised."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

__all__ = ["Storages", "address", "tensors_in"]

Value = TypeVar("Value")


class Storages(Generic[Value]):
    """Storages with a value each, for as long as they are in memory."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[StorageWeakRef, Value]] = {}

    def __bool__(self) -> bool:
        return bool(self._kept)

    def note(self, result: Any, value: Value) -> bool:
        """Give this value to the storages of all tensors in what an operation has returned, in
        place of an earlier one; whether there are any."""
        found = [x for x in tensors_in(result) if address(x)]
        for x in found:
            self._kept[address(x)] = StorageWeakRef(x.untyped_storage()), value
        return bool(found)

    def of(self, x: Tensor) -> Value | None:
        """The value of a tensor's storage, if it has one."""
        if not self._kept or (entry := self._kept.get(address(x))) is None:
            return None
        if entry[0].expired():  # another storage has got its address
            del self._kept[address(x)]
            return None
        return entry[1]

    def forget_freed(self) -> None:
        """Drop the values of storages that are no longer in memory."""
        self._kept = {at: entry for at, entry in self._kept.items() if not entry[0].expired()}

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among the arguments of an operation, or in what it has returned."""
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def address(x: Tensor) -> int:
    """The address of a tensor's storage; 0 if it has none."""
    try:
        return x.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
