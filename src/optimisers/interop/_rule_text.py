"""Rules as plain data, and rules made of such data: no code is stored, and none is imported on a file's word.

A rule is ``{"type": name, "fields": {name: value}}``, where a value is a number, a string, a truth value or null; a list (for
a tuple); a rule again; ``{"float": "inf"}``; ``{"tensor": name}`` for a field that is a tensor; or, for what no file can hold,
``{"callable": its name}`` and ``{"object": the name of its type}``. The type is the plain name of a rule of this library, or
the module and name of a user's own.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .. import rules
from ..errors import CheckpointError, OptimisersError
from ..rules import NewtonSchulz, OptimiserChain, Scheduled
from ..rules._base import AbstractRule, walk
from ..rules._fields import is_tensor

OWN: dict[str, type] = {
    name: value
    for name, value in vars(rules).items()
    if inspect.isclass(value) and issubclass(value, (AbstractRule, NewtonSchulz)) and not inspect.isabstract(value)
}
"""The rules of this library, and what stands in their fields."""

NOTHING: Any = object()
"""Where nothing is at hand to supply what a file cannot hold."""


def type_name(cls: type) -> str:
    """A plain name for what is the library's own, module and name for a user's rule."""
    return cls.__name__ if OWN.get(cls.__name__) is cls else f"{cls.__module__}.{cls.__qualname__}"


def all_own(rule: AbstractRule | None) -> bool:
    """Whether a rule and all rules inside it are this library's."""
    return rule is None or all(type(inner) in OWN.values() for inner in walk(rule))


# --- writing ----------------------------------------------------------------------------------------------------------


def described(value: Any, keep: Callable[[Any], str]) -> Any:
    """A rule, or the value of a field, as plain data; ``keep`` stores a tensor and returns its name."""
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, tuple) and type(value) is tuple:
        return [described(item, keep) for item in value]
    if is_tensor(value):
        return {"tensor": keep(value), "requires_grad": bool(value.requires_grad)}
    if isinstance(value, Scheduled):
        schedules = {name: described(schedule, keep) for name, schedule in value.schedules}
        return {"type": "Scheduled", "fields": {"rule": described(value.rule, keep), "schedules": schedules}}
    if isinstance(value, (AbstractRule, NewtonSchulz)):
        names = [f.name for f in dataclasses.fields(value) if not f.name.startswith("_")]  # type: ignore[arg-type]
        fields = {name: described(getattr(value, name), keep) for name in names}
        return {"type": type_name(type(value)), "fields": fields}
    if callable(value) and not isinstance(value, type):
        return {"callable": f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"}
    return {"object": type_name(type(value))}


# --- reading ----------------------------------------------------------------------------------------------------------


def rebuilt(value: Any, tensor: Callable[[str], Any], like: Any, where: str) -> Any:
    """What `described` described; callables and foreign objects are those of ``like``, which may be NOTHING.

    Raises CheckpointError naming the field: for what only ``like`` can supply, for unknown types, and for values that the
    rule itself refuses.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        likes = like if isinstance(like, tuple) and len(like) == len(value) else [NOTHING] * len(value)
        return tuple(rebuilt(v, tensor, other, f"{where}[{i}]") for i, (v, other) in enumerate(zip(value, likes, strict=True)))
    if not isinstance(value, dict):
        msg = f"{where}: the file has a {type(value).__name__}, which describes nothing"
        raise CheckpointError(msg)
    if value.get("float") in ("inf", "-inf", "nan"):
        return float(value["float"])
    if "tensor" in value:
        found = tensor(value["tensor"])
        found = found.to(like.device) if is_tensor(like) else found
        return found.requires_grad_() if value.get("requires_grad") is True else found
    if "callable" in value or "object" in value:
        return _supplied(value, like, where)
    if isinstance(value.get("type"), str) and isinstance(value.get("fields"), dict):
        return _rule(value["type"], value["fields"], tensor, like, where)
    msg = f"{where}: the file describes nothing that is known here: {str(value)[:80]}"
    raise CheckpointError(msg)


def _supplied(value: Mapping[str, Any], like: Any, where: str) -> Any:
    """What no file can hold, from ``like``."""
    what = "a function" if "callable" in value else "an object"
    if like is NOTHING or (like is None) or ("callable" in value) != callable(like):
        msg = (
            f"{where} is {what} ({next(iter(value.values()))}), which a file cannot hold; give like= a state that was set up "
            "with the same rule, and it is taken from there"
        )
        raise CheckpointError(msg)
    return like


def _rule(name: str, fields: Mapping[str, Any], tensor: Callable[[str], Any], like: Any, where: str) -> Any:
    cls = _class_of(name, like, where)
    like = like if type(like) is cls else NOTHING
    place = f"{where}, {cls.__name__}" if where else cls.__name__
    if cls is Scheduled:
        known = dict(like.schedules) if like is not NOTHING else {}
        inner = rebuilt(fields.get("rule"), tensor, getattr(like, "rule", NOTHING), f"{place}: field 'rule'")
        given = fields.get("schedules")
        if not isinstance(given, dict):
            msg = f"{place}: the file gives no schedules"
            raise CheckpointError(msg)
        schedules = {n: rebuilt(v, tensor, known.get(n, NOTHING), f"{place}: the schedule of {n!r}") for n, v in given.items()}
        return _made(place, lambda: Scheduled(inner, **schedules))
    # What a rule decides at setup is decided again, or is that of ``like``: a file sets public fields only.
    values = {
        n: rebuilt(v, tensor, getattr(like, n, NOTHING), f"{place}: field {n!r}")
        for n, v in fields.items()
        if not n.startswith("_")
    }
    if like is not NOTHING:
        values |= {f.name: getattr(like, f.name) for f in dataclasses.fields(like) if f.name.startswith("_")}
    if cls is OptimiserChain:
        members = values.get("rules")
        return _made(place, lambda: OptimiserChain(*members))  # type: ignore[misc]
    return _made(place, lambda: cls(**values))


def _made(place: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (OptimisersError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        msg = f"{place}: the file describes a rule that cannot be: {error}"
        raise CheckpointError(msg) from None


def _class_of(name: str, like: Any, where: str) -> type:
    """A rule of this library, the type of ``like``, or a rule class that the program has defined; nothing is imported."""
    if name in OWN:
        return OWN[name]
    if isinstance(like, AbstractRule) and type_name(type(like)) == name:
        return type(like)
    defined = [cls for cls in _subclasses(AbstractRule) if type_name(cls) == name]
    if not defined:
        msg = (
            f"{where or 'the rule'} is of the type {name}, which is no rule of this library; nothing is imported on a file's "
            "word: define or import that class first, or give like= a state that was set up with it"
        )
        raise CheckpointError(msg)
    return defined[-1]  # one defined again, as in a notebook, counts as it is now


def _subclasses(cls: type) -> Iterator[type]:
    sub: type
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
