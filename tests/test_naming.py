"""A module, the flat dict of its parameters and a nested dict are one model: the same paths, patterns and files."""

import itertools
import json

import numpy as np
import pytest

import optimisers as opt
from optimisers.interop import _tensor_file
from optimisers.interop import checkpoint as files

torch = pytest.importorskip("torch")


def module():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))


def flat(net):
    return dict(net.named_parameters())


def nested(net):
    tree = {}
    for name, x in net.named_parameters():
        layer, leaf = name.split(".")
        tree.setdefault(layer, {})[leaf] = x
    return tree


FORMS = {"module": lambda net: net, "flat": flat, "nested": nested}
forms = pytest.mark.parametrize("form", FORMS)
RULE = opt.Route(("0.*", opt.Adam(0.1)), ("*.bias", opt.Momentum(0.2)), otherwise=opt.Lion(0.3))


def rows(state):
    return sorted(opt.summary(state, by="path").splitlines()[2:6])


@forms
def test_paths_patterns_and_routes_are_the_same(form):
    net = module()
    model = FORMS[form](net)
    assert {path for path, _ in opt.trainables(model, path=True)} == set(flat(net))
    state = opt.setup(RULE, model)
    assert rows(state) == rows(opt.setup(RULE, net))
    assert set(opt.hyper(state)) == set(flat(net))
    adjusted = opt.hyper(opt.adjust(state, eta=0.7, where="0.weight"))
    assert {path for path, fields in adjusted.items() if fields["eta"] == 0.7} == {"0.weight"}


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.product(FORMS, FORMS)))
def test_a_file_of_one_form_loads_into_every_other(saved, loaded, tmp_path):
    net = module()
    state = opt.setup(RULE, net)
    net(torch.ones(4, 3)).sum().backward()
    state, _ = opt.update_(state, net)
    state = opt.extend(state, FORMS[saved](net))
    opt.save(tmp_path / "state", state)
    for like in (FORMS[loaded](net), opt.setup(RULE, FORMS[loaded](net))):
        other = opt.load(tmp_path / "state", like=like)
        assert files.state_dict(other).keys() == files.state_dict(state).keys()
        for name, x in files.state_dict(state).items():
            assert torch.equal(files.state_dict(other)[name], x)
        assert opt.hyper(other) == opt.hyper(state)


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.product(["module", "flat"], repeat=2)))
def test_a_tied_module_and_its_dict_which_has_one_name_of_it_are_one(saved, loaded, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net[1].weight = net[0].weight
    opt.save(tmp_path / "state", opt.setup(opt.Adam(), FORMS[saved](net)))
    assert "0.weight" in opt.hyper(opt.load(tmp_path / "state", like=FORMS[loaded](net)))


def test_only_two_leaves_of_one_name_are_escaped():
    model = {"a.b": np.ones(1), "a": {"b": np.ones(2), "c.d": np.ones(3)}}
    shapes = {path: x.shape for path, x in opt.trainables(model, path=True)}
    assert shapes == {"a\\.b": (1,), "a.b": (2,), "a.c.d": (3,)}


def test_keys_that_collide_even_so_are_an_error():
    with pytest.raises(opt.ModelError, match="two leaves have the path '0'"):
        opt.setup(opt.Adam(), {0: np.ones(1), "0": np.ones(2)})


@forms
def test_a_file_from_the_time_of_escaped_dots_still_loads(form, tmp_path):
    net = module()
    path = tmp_path / "state"
    opt.save(path, opt.setup(RULE, flat(net)))
    text, tensors = _tensor_file.read(path)
    header = json.loads(text)
    del header["paths"]
    for entry in header["entries"]:
        entry["path"] = entry["path"].replace(".", "\\.")
    _tensor_file.write(path, tensors, json.dumps(header))
    assert opt.hyper(opt.load(path, like=FORMS[form](net))) == opt.hyper(opt.setup(RULE, net))


def test_layers_thawed_since_the_file_was_saved_are_told(tmp_path):
    net = module()
    net[0].requires_grad_(False)
    state = opt.setup(opt.Adam(), net)
    opt.save(tmp_path / "state", state)
    assert opt.load(tmp_path / "state", like=net) == state
    net[0].requires_grad_(True)
    with pytest.raises(opt.CheckpointError) as caught:
        opt.load(tmp_path / "state", like=net)
    assert "'0.weight' was not trained when the file was saved" in str(caught.value)
    assert set(opt.hyper(opt.load(tmp_path / "state", like=net, strict=False))) == set(flat(net))
