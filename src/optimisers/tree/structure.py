"""The structure of a model: how it is taken apart into leaves, put together again, and aligned with gradients."""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree

from ..arrays import torch_if_loaded
from ..errors import ArgumentError, ModelError, StructureError, described
from .paths import keys_of, path_of, paths_of, shown
from .ties import refuse_cut, still_tied

_DICTS = (dict, OrderedDict, defaultdict)


def is_module(model: object) -> bool:
    """Whether the model is a ``torch.nn.Module``."""
    torch = torch_if_loaded()
    return torch is not None and isinstance(model, torch.nn.Module)


@dataclass(frozen=True)
class TreeStructure:
    """A tree that optree understands: its spec, and the keys and path of every leaf."""

    spec: optree.PyTreeSpec
    keys: tuple[tuple[Any, ...], ...]
    paths: tuple[str, ...]

    is_module = False

    @staticmethod
    def of(model: Any) -> tuple[TreeStructure, list[Any], list[Any]]:
        """The structure, the leaves, and for each leaf the container that holds it (None for a bare array)."""
        accessors, leaves, spec = optree.tree_flatten_with_accessor(model, none_is_leaf=True)
        keys = tuple(keys_of(accessor) for accessor in accessors)
        paths = paths_of(keys)
        _refuse_collisions(paths, keys)
        owners = [accessor[:-1](model) if len(accessor) else None for accessor in accessors]
        return TreeStructure(spec, keys, paths), leaves, owners

    def flatten(self, model: Any, what: str = "model") -> list[Any]:
        """The leaves of a model of this structure, or StructureError naming the first place that differs."""
        return self.taken_apart(model, what)[0]

    def taken_apart(self, model: Any, what: str = "model") -> tuple[list[Any], optree.PyTreeSpec]:
        """The leaves, and what puts others in their places."""
        leaves, spec = optree.tree_flatten(model, none_is_leaf=True)
        if spec != self.spec:
            if is_module(model):
                msg = f"the state was set up for a tree, and the {what} is a torch.nn.Module; set up the state with the module"
                raise ArgumentError(msg)
            example = self.spec.unflatten(self.paths)
            list(_align(example, model, (), what, skip=False))
            msg = f"{what}: its structure {spec} is not the one seen by setup, {self.spec}"
            raise StructureError(msg)
        return leaves, spec

    def align(self, model: Any, grads: Any) -> list[Any]:
        """For every leaf of the model its gradient, None where the gradient tree is absent there or further up."""
        if grads is None:
            return [None] * self.spec.num_leaves
        try:
            return self.spec.flatten_up_to(grads)
        except (ValueError, TypeError):
            return list(_align(model, grads, (), "gradient", skip=True))

    def unflatten(self, model: Any, leaves: Sequence[Any], spec: optree.PyTreeSpec | None = None) -> Any:
        """A model of the same structure with other leaves (dicts keep the key order of the model given).

        ``spec`` is the model's own, if it is at hand.
        """
        return (spec or optree.tree_structure(model, none_is_leaf=True)).unflatten(leaves)


@dataclass(frozen=True)
class ModuleStructure:
    """A ``torch.nn.Module``: its named parameters, wrapper prefixes stripped; aliases are further names of tied ones."""

    paths: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...]

    is_module = True

    @property
    def keys(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(path.split(".")) for path in self.paths)

    @staticmethod
    def of(module: Any) -> tuple[ModuleStructure, list[Any], list[Any]]:
        names: dict[int, str] = {}
        leaves, owners, aliases = [], [], []
        for name, parameter, owner in named_parameters(module):
            if id(parameter) in names:
                aliases.append((name, names[id(parameter)]))
                continue
            names[id(parameter)] = name
            leaves.append(parameter)
            owners.append(owner)
        return ModuleStructure(tuple(names.values()), tuple(aliases)), leaves, owners

    def flatten(self, model: Any, what: str = "model") -> list[Any]:
        """The parameters of a module, or of a mapping of names, in the order of setup."""
        if is_module(model):
            found = _parameters_as_before(model, self)
            if found is not None:
                return found
            named = {name: parameter for name, parameter, _ in named_parameters(model)}
            self._refuse_cut_ties(named)
            _remember(model, self, named)
        elif isinstance(model, Mapping):
            named = dict(model)
            if what == "model":
                self._refuse_cut_ties(named)
        else:
            if what == "gradient":
                expected = "a dict of its parameters' names, or be left out to use .grad"
                hint = "; of the tuple that torch.autograd.grad gives, make dict(zip(names, grads))"
            else:
                expected, hint = "that module or a dict of its named parameters", ""
            msg = f"the state was set up for a torch.nn.Module; the {what} must be {expected}, not {described(model)}{hint}"
            raise ArgumentError(msg)
        known = {*self.paths, *dict(self.aliases)}
        missing = [path for path in self.paths if path not in named]
        extra = [name for name in named if name not in known]
        if missing or extra:
            parts = [f"lacks the parameter{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}"] if missing else []
            parts += [f"has {', '.join(map(repr, extra))}, which setup did not see"] if extra else []
            hint = "Put None where there is no gradient" if what == "gradient" else "Set up a new state, or opt.extend this one"
            msg = f"{what}: {' and '.join(parts)}. {hint}"
            raise StructureError(msg)
        return [named[path] for path in self.paths]

    def _refuse_cut_ties(self, named: Mapping[str, Any]) -> None:
        for alias, name in self.aliases:
            if alias in named and name in named and not still_tied(named[name], named[alias]):
                refuse_cut(name, alias)

    def align(self, _model: Any, grads: Any) -> list[Any]:
        """For every parameter its gradient from a mapping of names."""
        if grads is None:
            return [None] * len(self.paths)
        if is_module(grads):
            msg = "the gradient must be a dict of the module's parameter names, or be left out to use .grad"
            raise ArgumentError(msg)
        return self.flatten(grads, "gradient")

    def taken_apart(self, model: Any) -> tuple[list[Any], None]:
        """The parameters; nothing else is needed to put others in their places."""
        return self.flatten(model), None

    def unflatten(self, model: Any, leaves: Sequence[Any], _spec: None = None) -> Any:
        """A dict of names; for a mapping that also holds aliases, with those too."""
        named = dict(zip(self.paths, leaves, strict=True))
        if not is_module(model):
            named.update({alias: named[name] for alias, name in self.aliases if alias in model})
        return named


Structure = TreeStructure | ModuleStructure


def structure_of(model: Any) -> tuple[Structure, list[Any], list[Any]]:
    """(structure, leaves, owner of each leaf) of any model."""
    return ModuleStructure.of(model) if is_module(model) else TreeStructure.of(model)


class _Seen(NamedTuple):
    """A module as it was when its parameters were last named."""

    modules: list[Any]
    names: list[tuple[str, ...]]
    places: list[tuple[int, str]]
    """For each parameter of the structure the number of the module that holds it, and its name there."""
    ties: list[tuple[tuple[int, str], tuple[int, str]]]
    """Places that hold one parameter."""
    structure: weakref.ref[ModuleStructure]


_seen: weakref.WeakKeyDictionary[Any, _Seen] = weakref.WeakKeyDictionary()


def _parameters_as_before(module: Any, structure: ModuleStructure) -> list[Any] | None:
    """The parameters in the order of the structure, if the module is made up as it was; naming them takes ten times as long."""
    seen = _seen.get(module)
    if seen is None or seen.structure() is not structure:
        return None
    modules = _modules(module)
    held = [m._parameters for m in modules]
    if modules[1:] != seen.modules or list(map(tuple, held)) != seen.names:
        return None
    if any(held[m][a] is not held[n][b] for (m, a), (n, b) in seen.ties):
        return None
    leaves = [held[number][name] for number, name in seen.places]
    return None if any(leaf is None for leaf in leaves) else leaves


def _remember(module: Any, structure: ModuleStructure, named: dict[str, Any]) -> None:
    modules = _modules(module)
    held = [m._parameters for m in modules]
    where: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)
    for number, own in enumerate(held):
        for name, p in own.items():
            where[id(p)].append((number, name))
    places = [where.get(id(named.get(path)), []) for path in structure.paths]
    if id(None) in where or [] in places or len(where) != len(places):
        return  # something may come or go without a change of names
    first = [at[0] for at in places]
    ties = [(at[0], other) for at in places for other in at[1:]]
    _seen[module] = _Seen(modules[1:], list(map(tuple, held)), first, ties, weakref.ref(structure))


def _modules(module: Any) -> list[Any]:
    """The module and all modules inside it, in some order that is always the same."""
    found, ahead = [], [module]
    while ahead:
        here = ahead.pop()
        found.append(here)
        ahead += [child for child in here._modules.values() if child is not None]
    return found


def named_parameters(module: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name without wrapper prefixes, parameter, module that owns it), every name of a shared parameter included."""
    torch: Any = torch_if_loaded()
    replicas = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    found = []
    for prefix, owner in module.named_modules(remove_duplicate=False):
        parts, at = [], module
        for part in prefix.split(".") if prefix else []:
            wrapper = part in {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
            if not wrapper and not (part == "module" and isinstance(at, replicas)):
                parts.append(part)
            at = getattr(at, part)
        found += [([*parts, name], p, owner) for name, p in owner._parameters.items() if p is not None]
    # A wrapper unknown to us that only holds `module` is a prefix too.
    while found and all(len(parts) > 1 and parts[0] == "module" for parts, _, _ in found):
        found = [(parts[1:], p, owner) for parts, p, owner in found]
    for parts, parameter, owner in found:
        yield ".".join(parts), parameter, owner


def _refuse_collisions(paths: Sequence[str], keys: Sequence[tuple[Any, ...]]) -> None:
    seen: dict[str, tuple[Any, ...]] = {}
    for path, key in zip(paths, keys, strict=True):
        if path in seen:
            msg = f"two leaves have the path {path!r}: their keys are {seen[path]!r} and {key!r}; rename one of the keys"
            raise ModelError(msg)
        seen[path] = key


def _align(model: Any, other: Any, keys: tuple[Any, ...], what: str, *, skip: bool) -> Iterator[Any]:
    """The leaves of other where model has leaves; a None above them counts for all of them if ``skip``."""
    if optree.tree_is_leaf(model, none_is_leaf=True):
        yield other
        return
    children, _, entries, _ = optree.tree_flatten_one_level(model, none_is_leaf=True)
    if other is None and skip:
        yield from [None] * optree.tree_structure(model, none_is_leaf=True).num_leaves
        return
    where = f"{what} at {shown(path_of(keys))}"
    if isinstance(model, _DICTS):
        if not isinstance(other, _DICTS):
            remedy = _remedy(what, model, other)
            raise StructureError(f"{where}: expected a dict with keys {_names(entries)}, got {_kind(other)}{remedy}")
        missing, extra = [k for k in entries if k not in other], [k for k in other if k not in model]
        if missing or extra:
            unknown = "the model does not have" if what == "gradient" else "setup did not see"
            parts = [f"lacks the key{'s' * (len(missing) > 1)} {_names(missing)}"] if missing else []
            parts += [f"has the key{'s' * (len(extra) > 1)} {_names(extra)}, which {unknown}"] if extra else []
            raise StructureError(f"{where}: {' and '.join(parts)}{_remedy(what)}")
        for key, child in zip(entries, children, strict=True):
            yield from _align(child, other[key], (*keys, key), what, skip=skip)
        return
    if type(other) is not type(model):
        raise StructureError(f"{where}: expected {_kind(model)}, got {_kind(other)}{_remedy(what, model, other)}")
    theirs, _, _, _ = optree.tree_flatten_one_level(other, none_is_leaf=True)
    if len(theirs) != len(children):
        raise StructureError(f"{where}: expected {_kind(model)}, got {_kind(other)}{_remedy(what)}")
    names = getattr(type(model), "_fields", entries) if isinstance(model, tuple) else entries
    for name, child, theirs_child in zip(names, children, theirs, strict=True):
        yield from _align(child, theirs_child, (*keys, name), what, skip=skip)


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list, deque)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, _DICTS):
        return f"a dict with keys {_names(list(value))}"
    shape = getattr(value, "shape", None)
    return described(value) + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) else "")


def _names(keys: Sequence[Any]) -> str:
    return ", ".join(map(repr, keys)) or "none"


def _remedy(what: str, model: Any = None, other: Any = None) -> str:
    if what == "gradient":
        if type(other) is tuple and isinstance(model, (tuple, list, *_DICTS)) and len(other) == len(model):
            name = type(model).__name__
            made = f"{name}({'*' * hasattr(model, '_fields')}grads)"
            made = "dict(zip(model, grads))" if isinstance(model, _DICTS) else made
            return (
                f". A gradient has the model's structure. torch.autograd.grad gives a tuple, in the order of what it was asked "
                f"for; make a {name} of it: {made}"
            )
        return ". A gradient has the model's structure; put None where there is no gradient"
    return ". The state fits the model it was set up with; set up a new state for another one"
