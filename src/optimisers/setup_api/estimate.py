"""``estimate``: what training takes in memory, before any of it is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..arrays import on_meta
from ..errors import OptimisersError, RuleError
from ..rules._base import AbstractRule
from ..tree.param import Param
from ..tree.show import bytes_of, bytes_text, rows_of, table
from .setup import check_arguments, moment_dtype, planned


@dataclass(frozen=True)
class Estimate:
    """Bytes that a model takes to train; ``print`` shows a table.

    Attributes:
        parameters: elements of the arrays with a place in the state, ties counted once.
        model: bytes of those arrays.
        gradients: bytes of a gradient for each that is trained, of its dtype.
        state: bytes of what rules keep.
        rules: for each rule, as ``print(state)`` writes it: (parameters, bytes of state).

    """

    parameters: int
    model: int
    gradients: int
    state: int
    rules: dict[str, tuple[int, int]]

    @property
    def total(self) -> int:
        """Bytes of model, gradients and state. Activations are not among them."""
        return self.model + self.gradients + self.state

    def __str__(self) -> str:
        rows = [
            [rule, f"{count:,}", bytes_text(used), f"{used / max(count, 1):.2f}"] for rule, (count, used) in self.rules.items()
        ]
        parts = (("model", self.model), ("gradients", self.gradients), ("state", self.state))
        return "\n".join(
            [
                table(["rule", "parameters", "state", "bytes each"], rows),
                " + ".join(f"{bytes_text(used)} of {name}" for name, used in parts) + f" = {bytes_text(self.total)}",
                f"update_ steps in that; update needs {bytes_text(self.model + self.state)} more, for what it returns",
            ]
        )


def estimate(
    rule: AbstractRule | Callable[[Param], AbstractRule | None],
    model: Any,
    *,
    trainable: Callable[[Param], bool] | None = None,
    state_dtype: Any = None,
) -> Estimate:
    """What training a model by a rule takes in memory. Nothing of it is taken: moments of tensors are made on ``meta``.

    The arguments are those of `setup`; the model may itself be on torch's ``meta`` device, so that the largest costs nothing.

    Raises what `setup` raises, and RuleError for a function in a rule, such as ``Muon.fallback``, that needs the numbers of an
    array on ``meta``.
    """
    check_arguments("estimate", rule, model)
    try:
        state = planned(rule, model, trainable, moment_dtype(state_dtype, "estimate: state_dtype"), on_meta)
    except OptimisersError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        msg = (
            f"estimate: a rule, or a function given to it, needs the numbers of an array, and arrays have none here ({error}); "
            "write it by shape and dtype"
        )
        raise RuleError(msg) from error
    rows = rows_of(state)
    rules: dict[str, tuple[int, int]] = {}
    for row in rows:
        count, used = rules.get(row.rule, (0, 0))
        rules[row.rule] = count + row.size, used + row.bytes
    trained = [row for row, entry in zip(rows, state._entries, strict=True) if entry.rule is not None]
    return Estimate(
        parameters=sum(row.size for row in rows),
        model=sum(row.size * bytes_of(row.dtype) for row in rows),
        gradients=sum(row.size * bytes_of(row.dtype) for row in trained),
        state=sum(row.bytes for row in rows),
        rules=rules,
    )
