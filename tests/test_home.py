"""Every sentence and every line of a table on the home page has something behind it: a test, or a recorded measurement."""

import re
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optax
import pytest
import torch
from torch.func import functional_call, grad, vmap

import optimisers as opt
from optimisers.torch import Optimizer

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)

# The beginning of a statement -> what is behind it: tests of this file by name, files by path, or "" for what claims nothing.
BEHIND = {
    "**Optimisers for PyTorch and NumPy": "test_a_rule_of_ones_own_works_everywhere",
    "For those who train models": "",
    "In a PyTorch script one line changes:": "test_one_line_changes",
    "The same rule as a pure function:": "test_the_pure_form_is_the_same_rule",
    "What goes in is left as it is.": "test_what_goes_in_is_left_as_it_is",
    "So steps can be differentiated": "test_steps_are_values",
    "*A small GPT, trained by four rules": "docs/example.md",
    "[How it was made]": "docs/example.md",
    "| arrays": "test_arrays",
    "| a step is": "test_a_step_is_in_place_or_pure",
    "| rules in a chain": "test_chains",
    "| a rule for each parameter": "test_a_rule_for_each_parameter",
    "| Muon |": "test_muon",
    "| a method of your own": "test_a_rule_of_ones_own_is_compiled",
    "| state": "test_states",
    "| torch's schedulers": "test_schedulers_and_scalers",
    "Time of a step, and its memory": "benchmarks/results.json",
    "[How this was measured]": "docs/benchmarks.md",
    "For CUDA devices there are": "tests/test_cuda.py",
    "From a clone of the repository:": ".ci/package.sh",
    "Importing `optimisers` does not import torch.": "tests/test_architecture.py",
    "Muon is for hidden matrices": "",
    "A pattern that matches nothing is an error": "test_a_rule_for_each_parameter",
    "Any tree will do": "test_any_tree_will_do",
    "Gradients have the structure of the model.": "test_any_tree_will_do",
    "`update_` gives the same result": "test_a_step_is_in_place_or_pure",
    "It *consumes* the state": "test_a_step_is_in_place_or_pure",
    "Two methods for one array": "test_a_rule_of_ones_own_is_compiled",
    "`apply` returns the new state": "test_a_rule_of_ones_own_works_everywhere",
    "It works everywhere at once": "test_a_rule_of_ones_own_works_everywhere",
}


def statements():
    """The sentences and the lines of tables, without headings, code, links to pages, and what is written by a script."""
    text = re.sub(r"^---\n.*?^---\n", "", PAGE, count=1, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```|<!-- measured.*?<!-- end -->|</?div[^>]*>", "\n", text, flags=re.MULTILINE | re.DOTALL)
    text = text.partition("## Where next")[0]
    for paragraph in re.split(r"\n\s*\n", text):
        rows = [line for line in paragraph.strip().splitlines() if line.startswith("|")]
        if rows:
            yield from rows[2:]
        elif paragraph.strip() and not paragraph.strip().startswith(("#", "[![")):
            yield from re.split(r"(?<=[.:])(?:\*\*)? +(?=[A-Z`\[])", " ".join(paragraph.split()))


def test_nothing_is_said_without_something_behind_it():
    said = list(statements())
    unknown = [text for text in said if sum(text.startswith(known) for known in BEHIND) != 1]
    assert unknown == [], "what is behind it? name it in BEHIND"
    assert [known for known in BEHIND if not any(text.startswith(known) for text in said)] == []
    for known, behind in BEHIND.items():
        assert not behind or behind in globals() or (ROOT / behind).is_file(), known


def run(*blocks):
    found = types.ModuleType("home")
    sys.modules["home"] = found
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, "docs/index.md", "exec"), vars(found))
    return found


def params_of(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def test_one_line_changes():
    before = "optimizer = torch.optim.AdamW(net.parameters(), 3e-4)"
    assert BLOCKS[0].count("optimizer = Optimizer(rule, net)") == 1
    ours, theirs = run(BLOCKS[0]), run(BLOCKS[0].replace("optimizer = Optimizer(rule, net)", before))
    assert isinstance(theirs.optimizer, torch.optim.AdamW)
    assert isinstance(ours.optimizer, torch.optim.Optimizer)
    assert not torch.equal(ours.net.weight, run("import torch; net = torch.nn.Linear(4, 1)").net.weight)


def test_the_pure_form_is_the_same_rule():
    ours = run(BLOCKS[0].partition("for _ in")[0], BLOCKS[1])
    trained = run(BLOCKS[0])
    for name, p in trained.net.named_parameters():
        torch.testing.assert_close(ours.params[name], p.detach(), rtol=1e-5, atol=1e-7)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    net, x = torch.nn.Linear(4, 1), torch.randn(64, 4)
    return params_of(net), lambda params: functional_call(net, params, (x,)).square().mean()


def test_what_goes_in_is_left_as_it_is(problem):
    params, loss = problem
    state, grads = opt.setup(opt.AdamW(3e-4), params), grad(loss)(params)
    before = [x.clone() for x in (*params.values(), *grads.values())]
    kept = opt.setup(opt.AdamW(3e-4), params)
    opt.update(state, params, grads)
    assert all(map(torch.equal, before, (*params.values(), *grads.values())))
    assert state == kept


def test_steps_are_values(problem):
    params, loss = problem
    eta = torch.tensor(0.1, requires_grad=True)
    _, after = opt.update(opt.setup(opt.Momentum(eta), params), params, grad(loss)(params))
    assert torch.autograd.grad(loss(after), eta)[0] < 0  # differentiated: a larger rate would do better

    def stepped(eta):
        return loss(opt.update(opt.setup(opt.Momentum(eta), params), params, grad(loss)(params))[1])

    losses = vmap(stepped)(torch.tensor([0.0, 0.01, 0.1]))
    assert (losses.diff() < 0).all()  # under vmap

    first = opt.setup(opt.AdamW(), params)
    second, _ = opt.update(first, params, grad(loss)(params))
    again, _ = opt.update(first, params, grad(loss)(params))  # taken back: from the first state once more
    assert second == again  # and compared
    assert second != first


def test_arrays():
    for array in (np.ones(3), torch.ones(3)):
        assert type(opt.update(opt.setup(opt.Adam(), array), array, array)[1]) is type(array)
    with pytest.raises(TypeError):
        torch.optim.Adam([np.ones(3)])
    rule = optax.adam(0.1)
    step, _ = rule.update(np.ones(3), rule.init(np.ones(3)))
    assert type(optax.apply_updates(np.ones(3), step)).__module__.startswith("jax")


def test_a_step_is_in_place_or_pure(problem):
    params, loss = problem
    grads = grad(loss)(params)
    after, pure = opt.update(opt.setup(opt.AdamW(), params), params, grads)
    mine = {name: p.clone() for name, p in params.items()}
    consumed = opt.setup(opt.AdamW(), mine)
    places = {name: p.data_ptr() for name, p in mine.items()}
    state_, mine = opt.update_(consumed, mine, grads)
    assert {name: p.data_ptr() for name, p in mine.items()} == places
    assert all(torch.equal(mine[name], pure[name]) for name in pure)
    assert state_ == after
    with pytest.raises(opt.ConsumedStateError):
        opt.update(consumed, mine, grads)


def test_chains():
    assert "chain" in vars(optax)
    assert not any("chain" in name.lower() for name in torch.optim.__all__)
    one = opt.OptimiserChain(opt.ClipNorm(1.0), opt.Descent(0.1))
    assert np.allclose(opt.update(opt.setup(one, np.zeros(2)), np.zeros(2), np.array([3.0, 4.0]))[1], [-0.06, -0.08])


def test_a_rule_for_each_parameter():
    assert hasattr(optax, "multi_transform")  # by labels
    net = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4))
    route = opt.Route((torch.nn.Embedding, opt.Adam()), ("*.bias", opt.Descent()), (lambda p: p.ndim == 2, opt.Muon()))
    state = opt.setup(route, net)
    assert [type(state[path].rule) for path in ("0.weight", "1.bias", "1.weight")] == [opt.Adam, opt.Descent, opt.Muon]
    lines = str(state).splitlines()
    assert lines[0].endswith("why this rule")
    for path, why in (("0.weight", "owner Embedding"), ("1.bias", "'*.bias'"), ("1.weight", "predicate <lambda>")):
        assert any(line.startswith(path) and line.rstrip().endswith(why) for line in lines), path
    with pytest.raises(opt.SelectionError):
        opt.setup(opt.Route(("emebd.*", opt.Adam()), otherwise=opt.Muon()), net)


def test_muon():
    presets = re.findall(r'"(\w+)"', opt.Muon.preset.__doc__.splitlines()[0])
    assert "five implementations" in PAGE
    assert len({opt.Muon.preset(name) for name in presets}) == 5
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([torch.nn.Parameter(torch.ones(2, 2, 3, 3))])
    assert callable(optax.contrib.muon)
    for shape, fields in (((4, 2, 3, 3), {}), ((6, 4, 2), {"batch_dims": 1}), ((6, 2), {"blocks": 3})):
        x = np.random.default_rng(0).normal(size=shape)
        assert opt.setup(opt.Muon(**fields), x)[()].state.shape == shape  # the momentum of a matrix, not what AdamW keeps


@dataclass(frozen=True)
class HeavyBall(opt.AbstractRule):
    """As on the page, which test_docs runs."""

    eta: float = 0.01
    rho: float = 0.9
    law = "elementwise"

    def init(self, x):
        return 0 * x

    def apply(self, state, x, dx):
        step = self.rho * state + self.eta * dx
        return step, step


def test_the_rule_here_is_that_of_the_page():
    assert "step = self.rho * state + self.eta * dx" in BLOCKS[-1]
    assert opt.AbstractRule.__abstractmethods__ == {"init", "apply"}  # two methods
    assert optax.GradientTransformation._fields == ("init", "update")  # two functions


def test_a_rule_of_ones_own_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("OPTIMISERS_CACHE", str(tmp_path))
    monkeypatch.setenv("OPTIMISERS_COMPILE", "1")
    x = np.ones(10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, new = opt.update(opt.setup(HeavyBall(eta=0.1), x), x, x)
    assert np.allclose(new, 0.9)
    assert any(path.is_file() for path in tmp_path.rglob("*"))  # the loop that was made of it


def test_a_rule_of_ones_own_works_everywhere():
    rule = opt.OptimiserChain(opt.WeightDecay(1e-4), HeavyBall(eta=0.1))
    results = []
    for start in (np.ones(3), torch.ones(3, dtype=torch.float64)):
        state, array = opt.update(opt.adjust(opt.setup(rule, start), times=0.5), start, start)
        state, array = opt.update_(state, array, start)
        _, same = opt.update(opt.freeze(state), array, start)
        assert (same == array).all()
        results.append(np.asarray(array))
    assert np.allclose(*results)
    assert (results[0] < 1).all()  # the step was subtracted
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    Optimizer(rule, [p]).step()
    assert torch.allclose(p.detach(), torch.full((3,), 1 - 0.1 * 1.0001))


def test_states(tmp_path):
    model = {"a": {"b": np.ones(3)}}
    state = opt.setup(opt.Adam(), model)
    assert "a.b" in str(state)
    opt.save(tmp_path / "file", state)
    assert opt.load(tmp_path / "file", like=model) == state
    assert b"a.b" in (tmp_path / "file").read_bytes()


def test_schedulers_and_scalers():
    # Every scheduler and the frameworks: tests/test_torch_optimizer.py, tests/frameworks.
    net = torch.nn.Linear(2, 1)
    optimizer = Optimizer(opt.AdamW(0.1), net)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.ones(1, 2)).sum()).backward()
    scaler.step(optimizer)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert {"accelerate", "lightning", "trainer"} <= {
        p.stem.removeprefix("test_") for p in (ROOT / "tests" / "frameworks").glob("*")
    }


def test_any_tree_will_do():
    for model in ({"w": np.ones(3)}, [np.ones(3)], (np.ones(3), [np.ones(2)]), np.ones(3)):
        _, new = opt.update(opt.setup(opt.Descent(0.5), model), model, model)
        for (path, before), (_, after) in zip(opt.trainables(model, path=True), opt.trainables(new, path=True), strict=True):
            assert (after == 0.5 * before).all(), path
        assert type(new) is type(model)
    with pytest.raises(opt.OptimisersError):
        opt.update(opt.setup(opt.Descent(), {"w": np.ones(3)}), {"w": np.ones(3)}, {"v": np.ones(3)})
