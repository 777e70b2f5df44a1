"""Every error this library raises on purpose derives from :class:`OptimisersError`.

Each message says what went wrong, where (the parameter's path, or the field of a rule), what was expected, and what to do.
"""

from __future__ import annotations


class OptimisersError(Exception):
    """Base of all errors of this library."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would hide the line breaks of a message.
        return "\n".join(str(arg) for arg in self.args)


class HyperParameterError(OptimisersError, ValueError):
    """A field of a rule has a value outside its range, or of the wrong type."""


class UnknownFieldError(OptimisersError, TypeError):
    """A rule was given, or asked to adjust, a field that it does not have."""


class RuleError(OptimisersError, TypeError):
    """Something that should be a rule is not one, or a rule breaks the protocol of ``init`` and ``apply``."""


class ModelError(OptimisersError, ValueError):
    """The model cannot be used: nothing to train, arrays hidden in an unregistered class, paths that collide."""


class TieError(ModelError):
    """Arrays share memory in a way that cannot be stepped once, or a tied array is given two different rules."""


class StructureError(OptimisersError, ValueError, KeyError):
    """A model or a gradient tree does not have the structure that ``setup`` saw."""


class GradientError(OptimisersError, ValueError, TypeError):
    """A gradient does not fit its parameter: shape, dtype, framework or layout."""


class NonFiniteError(OptimisersError, FloatingPointError, ValueError):
    """A rule with ``throw=True`` met a norm that is infinite or NaN. Nothing was changed."""


class SelectionError(OptimisersError, LookupError, ValueError):
    """A pattern selects no parameter, or a parameter is selected by no pattern."""


class ConsumedStateError(OptimisersError, RuntimeError):
    """A state was used after ``update_`` had taken over its memory."""


class ArgumentError(OptimisersError, TypeError):
    """An argument is of the wrong kind, for example a model where a state is expected."""
