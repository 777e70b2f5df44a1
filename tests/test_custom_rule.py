"""The rules of the page "Write your own rule" have the properties that the rules of the table have."""

import inspect
import sys
import types
from typing import Any

import pytest

import test_properties as properties
from table import Row
from test_docs import ROOT, python_blocks

LIBRARIES = ("numpy", "torch")

EVERY = (
    "law_is_as_claimed",
    "equality_and_hash",
    "rule_survives_pickle_and_copy",
    "fields_cannot_be_assigned",
    "update_writes_to_nothing",
    "update_in_place_gives_the_same_bytes",
    "numpy_and_torch_agree",
    "dtype_shape_device_and_strides_are_kept",
    "gradients_of_another_precision_are_taken_in_that_of_the_parameter",
    "state_dtype",
    "half_precision_is_computed_in_float32_and_rounded_once",
    "absent_gradient_is_no_step",
    "frozen_parameters_are_left_alone",
    "state_survives_pickle_and_copy",
    "resumed_training_is_the_same_training",
    "plain_update_gives_leaves_of_the_same_class",
    "differentiable_forces_the_graph",
    "vmap_equals_a_loop",
    "derivative_by_the_gradients",
)
BY_LAW = {
    "elementwise": ("elementwise_law", "elementwise_rules_are_stackable", "gradients_of_tied_places_are_added"),
    "measured": ("measured_law",),
}


@pytest.fixture(scope="module")
def page():
    """What the code of the page defines, in a module that pickle and copy can find."""
    path = ROOT / "docs" / "custom-rule.md"
    module = types.ModuleType("docs_custom_rule")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        for block in python_blocks(path.read_text(encoding="utf-8")):
            exec(compile("\n" * block.line + block.code, str(path), "exec"), vars(module))
        yield module


RULES = {"SoftSign": "elementwise", "DebiasedMomentum": "elementwise", "TrustRatio": "measured"}


def checks():
    for name, law in RULES.items():
        for check in (*EVERY, *BY_LAW[law]):
            wants = inspect.signature(getattr(properties, f"test_{check}")).parameters
            for lib in LIBRARIES if "lib" in wants else (None,):
                yield pytest.param(name, law, check, lib, id="-".join(filter(None, (name, check, lib))))


@pytest.mark.parametrize(("name", "law", "check", "lib"), list(checks()))
def test_rule_of_the_page(page, name, law, check, lib):
    cls = getattr(page, name)
    row = Row(name, cls, (cls(),), law=law)
    function = getattr(properties, f"test_{check}")
    given: dict[str, Any] = {"row": row, "rule": cls(eta=0.1), "lib": lib}
    function(**{key: given[key] for key in inspect.signature(function).parameters})


def test_every_rule_of_the_page_is_tested(page):
    rules = {name for name, value in vars(page).items() if isinstance(value, type) and value.__module__ == page.__name__}
    assert rules - {"UnitScale"} == set(RULES)  # the measure of UnitScale is not of one array, so its law is none of one array


def test_the_first_rule_has_ten_lines(page):
    (block, *_) = python_blocks((ROOT / "docs" / "custom-rule.md").read_text(encoding="utf-8"))
    body = block.code[block.code.index("class SoftSign") :].splitlines()
    assert len([line for line in body if line.strip()]) <= 10
