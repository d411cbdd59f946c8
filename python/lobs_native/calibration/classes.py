"""Variables that belong together, in classes, and labels that say where a tensor has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Classes", "Label"]


@dataclass
class Label:
    """The variables along some axes of a tensor, and which of these axes are whole axes of a
    parameter."""

    axes: dict[int, list[int]]
    sources: dict[int, tuple[str, int]] = field(default_factory=dict)

    def moved(self, axes: dict[int, int]) -> Label:
        """With axes under other numbers (old -> new)."""
        return Label(
            {axes[d]: v for d, v in self.axes.items() if d in axes},
            {axes[d]: s for d, s in self.sources.items() if d in axes},
        )


class Classes:
    """Variables, numbered from 0, in classes; some have to stay, for a reason."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._why: dict[int, str] = {}  # root of a class that has to stay -> the reason

    def new(self, count: int) -> list[int]:
        """So many new variables, each a class of its own."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return list(range(first, first + count))

    def why(self, root: int) -> str | None:
        """Why a class has to stay; None if it need not."""
        return self._why.get(root)

    def root(self, v: int) -> int:
        """The variable that stands for the class of ``v``."""
        parent = self._parent
        while parent[v] != v:
            parent[v] = parent[parent[v]]
            v = parent[v]
        return v

    def tie(self, some: Sequence[int], others: Sequence[int]) -> None:
        """Each of these variables and the other at its place become one class."""
        for a, b in zip(some, others, strict=True):
            a, b = self.root(a), self.root(b)
            if a != b:
                self._parent[b] = a
                if b in self._why:
                    self._why.setdefault(a, self._why.pop(b))

    def pin(
        self, labels: Iterable[Label | None], why: str, axes: Iterable[int] | None = None
    ) -> None:
        """The variables of these labels (along some axes, or all) have to stay."""
        wanted = None if axes is None else set(axes)
        for label in labels:
            for axis, variables in () if label is None else label.axes.items():
                if wanted is None or axis in wanted:
                    for v in variables:
                        self._why.setdefault(self.root(v), why)
