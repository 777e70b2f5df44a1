"""Every error this library raises on purpose derives from `OptimisersError`.

Each message says what went wrong, where (the parameter's path, or the field of a rule), what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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


class EntryError(OptimisersError, KeyError, IndexError, AttributeError):
    """A state tree has no entry of this key, index or name."""


class ImmutableError(OptimisersError, TypeError, AttributeError):
    """Something was to be assigned in a state tree, which is immutable."""


class ConsumedStateError(OptimisersError, RuntimeError):
    """A state was used after ``update_`` had taken over its memory."""


class UnfinishedStepError(OptimisersError, RuntimeError):
    """``update_`` could not step some parameters, for lack of memory say, when others were written. The text names them.

    The state that was given to it is then the one after this step, in which those are as if they had had no gradient.
    """


class CaptureError(OptimisersError, RuntimeError):
    """A step was to be recorded in a CUDA graph, which would repeat the numbers of that one step for ever."""


class ArgumentError(OptimisersError, TypeError):
    """An argument is of the wrong kind, for example a model where a state is expected."""


class CheckpointError(OptimisersError, ValueError):
    """A checkpoint is damaged, does not fit what it is loaded into, or holds what a file cannot say."""


class MissingPackageError(OptimisersError, ImportError):
    """A part of the library needs a package that is not installed."""


def described(value: object) -> str:
    """A value that is of the wrong kind, for a message: ``"None"``, ``"a dict"``, ``"the class Adam"``."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    text = f"{'an' if name[0] in 'aeiouAEIOU' or name == 'ndarray' else 'a'} {name}"
    return f"{text} {brief(value)}" if isinstance(value, (int, float, complex, str)) else text


def brief(value: object, most: int = 200) -> str:
    """A value for a message, cut off where it is long. Python itself refuses to write out numbers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length():,} bits"
    try:
        text = repr(value)
    except ValueError:
        return described(value)
    return text if len(text) <= most else f"{text[:most]}..."


def not_a_rule(value: object) -> str:
    """What stands where a rule should, and what to write instead."""
    if isinstance(value, type):
        return f"{described(value)}; write {value.__name__}(...)"
    return described(value) + ("; write OptimiserChain(*rules)" if isinstance(value, (list, tuple)) else "")


@contextmanager
def locating(path: str) -> Iterator[None]:
    """Name the parameter in errors raised inside: in the text of our own, in a note on those of others."""
    where = f"parameter {path!r}" if path else "the array itself (the root)"
    try:
        yield
    except OptimisersError as error:
        if where not in str(error):
            error.args = (f"{where}: {error}",)
        raise
    except Exception as error:
        error.add_note(f"at {where}")
        raise


# Not an assignment, since type checkers and documentation tools read the imports above but cannot evaluate this.
globals()["__all__"] = [
    name for name, value in vars().items() if isinstance(value, type) and issubclass(value, OptimisersError)
]


class CompileWarning(UserWarning):
    """Loops could not be compiled, so arrays are stepped without them: same results, slower."""


class GatherWarning(UserWarning):
    """Arrays that are cut over ranks are put together for a rule in every step: same results, slower."""


class RoutingWarning(UserWarning):
    """A parameter has a rule that rarely suits it, as `optimisers.review` sees it."""


class DecompositionWarning(UserWarning):
    """A matrix of gradients is not finite or could not be decomposed, so something else stands in for what is made of it."""
