"""The documented recipes on a transformer and on a residual network: the printed table routes every parameter as they say."""

import numpy as np
import pytest
import torch
from torch import nn

import optimisers as opt

ADAMW = opt.AdamW(3e-4, (0.9, 0.95), 0.1)
PLAIN = ADAMW.replace(lambda_=0.0)
MUON = opt.Muon(eta=0.02)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, tied, width=8, words=11, depth=2):
        super().__init__()
        self.embed, self.position = nn.Embedding(words, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Residual(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x):
        return torch.relu(self.skip(x) + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """Convolutions, batch norms, a layer that is used twice, and a head whose matrix is that of the class embedding."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList([Residual(4, 8), Residual(8, 8)])
        self.again = self.layers[1]
        self.classes = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.classes.weight

    def forward(self, x):
        x = self.again(self.layers[1](self.layers[0](self.stem(x))))
        return self.head(x.mean((-2, -1)))


NORMS = (nn.LayerNorm, nn.BatchNorm2d)


def muon_on_hidden_matrices():
    return opt.Route(
        (("*.bias", *NORMS), PLAIN),
        ((nn.Embedding, "head.*"), ADAMW),
        (lambda p: p.ndim >= 2, MUON),
    )


def rows(state):
    """The full table: path -> the rest of its line."""
    lines = opt.summary(state, by="path").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("-----"))
    end = next(i for i, line in enumerate(lines) if " parameters, " in line)
    return dict(line.split(maxsplit=1) for line in lines[start + 1 : end])


def kind_of(module, path):
    """What a recipe calls a parameter, from the module that owns it."""
    owner = module.get_submodule(path.rpartition(".")[0])
    if path.endswith(".bias") or isinstance(owner, NORMS):
        return "norm or bias"
    return "embedding or head" if isinstance(owner, nn.Embedding) or path.startswith("head.") else "hidden"


def step(state, module, inputs):
    module(inputs).square().mean().backward()
    return opt.update_(state, module)


MODELS = {
    "transformer": lambda: (Transformer(tied=False), torch.arange(12).reshape(2, 6) % 11),
    "tied transformer": lambda: (Transformer(tied=True), torch.arange(12).reshape(2, 6) % 11),
    "resnet": lambda: (ResNet(), torch.ones(2, 3, 6, 6)),
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


@models
def test_muon_on_hidden_matrices(make):
    torch.manual_seed(0)
    module, inputs = make()
    state = opt.setup(muon_on_hidden_matrices(), module)
    table = rows(state)
    assert set(table) == {path for path, _ in module.named_parameters()}
    for path, line in table.items():
        what = kind_of(module, path)
        if what == "hidden":
            assert "Muon(" in line
            assert line.endswith("predicate <lambda>")
            assert isinstance(state[path].rule, opt.Muon)
        else:
            assert "Muon" not in line
            assert isinstance(state[path].rule, opt.AdamW)
            assert state[path].rule.lambda_ == (0.0 if what == "norm or bias" else 0.1)
            reasons = {
                "norm or bias": ("'*.bias' or owner LayerNorm or owner BatchNorm2d",),
                "embedding or head": ("owner Embedding or 'head.*'",),
            }
            assert line.endswith(reasons[what])
    before = {path: p.detach().clone() for path, p in module.named_parameters()}
    step(state, module, inputs)
    assert all((p != before[path]).any() for path, p in module.named_parameters() if p.grad.abs().max() > 0)


def test_ties_and_reused_layers_have_one_line():
    lines = str(opt.setup(muon_on_hidden_matrices(), ResNet())).splitlines()
    assert sum("classes.weight = head.weight" in line for line in lines) == 1
    assert sum("layers.1.conv1.weight = again.conv1.weight" in line for line in lines) == 1
    assert not any(line.startswith(("head.weight", "again.")) for line in lines)
    tied = str(opt.setup(muon_on_hidden_matrices(), Transformer(tied=True)))
    assert "embed.weight = head.weight" in tied


def test_a_tied_embedding_routed_two_ways_is_an_error():
    # The head of the first pattern is the embedding of the second.
    route = opt.Route(("head.*", opt.AdamW(1e-3)), (nn.Embedding, opt.AdamW(1e-2)), otherwise=ADAMW)
    with pytest.raises(opt.TieError) as raised:
        opt.setup(route, Transformer(tied=True))
    text = str(raised.value)
    assert "'embed.weight' and 'head.weight' are one tied array, but get different rules" in text
    assert "(owner Embedding)" in text
    assert "('head.*')" in text
    opt.setup(route, Transformer(tied=False))
    # and the way out that the error names
    opt.setup(opt.Route((("embed.weight", "head.weight"), ADAMW), otherwise=ADAMW), Transformer(tied=True))


@models
def test_no_weight_decay_on_norms_and_biases(make):
    module, _ = make()
    state = opt.setup(opt.Route((("*.bias", *NORMS), PLAIN), otherwise=ADAMW), module)
    for path, line in rows(state).items():
        decays = kind_of(module, path) != "norm or bias"
        assert state[path].rule.lambda_ == (0.1 if decays else 0.0)
        assert ("lambda_=0.1" in line) == decays
        assert line.endswith("otherwise") == decays
    # with no gradient at all, exactly the others shrink
    before = {path: p.detach().clone() for path, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    opt.update_(state, module)
    for path, p in module.named_parameters():
        expected = before[path] if kind_of(module, path) == "norm or bias" else before[path] * (1 - 3e-4 * 0.1)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


def layer_wise_decay(param):
    """0.5 less for each layer further from the head."""
    depth = {"embed": 0, "position": 0, "blocks": 1, "norm": 3, "head": 3}[param.keys[0]]
    if param.keys[0] == "blocks":
        depth += int(param.keys[1])
    return opt.AdamW(1e-3 * 0.5 ** (3 - depth))


def test_layer_wise_learning_rate_decay():
    module, inputs = MODELS["transformer"]()
    state = opt.setup(layer_wise_decay, module)
    for path, line in rows(state).items():
        first, _, rest = path.partition(".")
        power = {"embed": 3, "position": 3, "norm": 0, "head": 0}.get(first)
        power = 2 - int(rest[0]) if power is None else power
        assert state[path].rule.eta == 1e-3 * 0.5**power
        assert line.endswith("chosen by layer_wise_decay")
    state = opt.adjust(state, times=0.1)  # the ratios survive
    assert state["embed.weight"].rule.eta == pytest.approx(0.1 * 1e-3 * 0.5**3)
    step(state, module, inputs)


def test_the_function_sees_what_it_needs():
    module = ResNet()
    seen = {}

    def choose(param):
        assert param.path not in seen
        seen[param.path] = (param.shape, param.ndim, param.size, param.module, param.owner, param.tied_paths)
        assert isinstance(param.array, torch.Tensor)
        return ADAMW

    opt.setup(choose, module)
    assert set(seen) == {path for path, _ in module.named_parameters()}
    shape, ndim, size, owner, owner_type, ties = seen["layers.1.conv1.weight"]
    assert (shape, ndim, size) == ((8, 8, 3, 3), 4, 576)
    assert owner is module.layers[1].conv1
    assert owner_type is nn.Conv2d
    assert ties == ("again.conv1.weight",)


def test_convolutions_are_stepped_as_flattened_matrices():
    module = ResNet()
    state = opt.setup(muon_on_hidden_matrices(), module)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    before = module.stem.weight.detach().clone()
    grad = module.stem.weight.grad.clone()
    opt.update_(state, module)
    moved = (before * (1 - 0.02 * 0.01) - module.stem.weight.detach()) / 0.02
    # 0.0975 g is the first Nesterov momentum; its size matters to epsilon alone
    expected = opt.orthogonalise(0.0975 * grad.reshape(4, 27)).reshape(4, 3, 3, 3)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4)


# --- the same on plain trees ----------------------------------------------------------------------------------------------


def test_the_recipe_on_a_tree_of_arrays():
    layers = [{"w": np.ones((4, 4)), "b": np.ones(4)} for _ in range(2)]
    model = {"embed": {"w": np.ones((6, 4))}, "layers": layers, "head": {"w": np.ones((6, 4)), "b": np.ones(6)}}
    route = opt.Route(("*.b", PLAIN), (("embed.*", "head.*"), ADAMW), otherwise=MUON)
    state = opt.setup(route, model)
    kinds = {path: line.split("(")[0].split()[-1] for path, line in rows(state).items()}
    assert kinds == {
        "embed.w": "AdamW", "head.b": "AdamW", "head.w": "AdamW",
        "layers.0.b": "AdamW", "layers.0.w": "Muon", "layers.1.b": "AdamW", "layers.1.w": "Muon",
    }  # fmt: skip


# --- bad input ------------------------------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing():
    with pytest.raises(opt.SelectionError, match=r"the pattern 'haed\.\*' matches no parameter") as raised:
        opt.setup(opt.Route(("haed.*", ADAMW), otherwise=MUON), Transformer(tied=False))
    assert "The paths are: 'embed.weight', 'position.weight', " in str(raised.value)
    with pytest.raises(opt.SelectionError, match="owner BatchNorm2d matches no parameter"):
        opt.setup(opt.Route((nn.BatchNorm2d, PLAIN), otherwise=ADAMW), Transformer(tied=False))
    with pytest.raises(opt.SelectionError, match="predicate huge matches no parameter"):
        opt.setup(opt.Route((huge, PLAIN), otherwise=ADAMW), Transformer(tied=False))


def huge(param):
    return param.size > 10**9


def test_unmatched_parameters_are_listed():
    with pytest.raises(opt.SelectionError, match=r"no pattern matches 'norm\.weight', 'norm\.bias'") as raised:
        opt.setup(opt.Route((("embed.*", "position.*", "blocks.*", "head.*"), ADAMW)), Transformer(tied=False))
    assert "otherwise=" in str(raised.value)


def test_blocks_that_do_not_divide_the_rows_name_the_parameter():
    route = opt.Route(("*.qkv.weight", opt.Muon(blocks=5)), otherwise=ADAMW)
    with pytest.raises(opt.RuleError, match=r"blocks\.0\.qkv\.weight") as raised:
        opt.setup(route, Transformer(tied=False))
    assert "blocks=5 does not divide the output axis of shape (24, 8), which has 24 rows" in str(raised.value)


def test_a_projection_of_the_wrong_shape_names_the_parameter():
    module, inputs = MODELS["resnet"]()
    rule = opt.Apollo(rank=2, projection=lambda shape, refresh: torch.ones(shape[1], shape[0]))
    state = opt.setup(opt.Route(("stem.weight", rule), otherwise=ADAMW), module)
    with pytest.raises(opt.RuleError, match=r"stem\.weight"):
        step(state, module, inputs)


def test_a_gradient_that_is_not_finite_names_the_parameter():
    module, inputs = MODELS["resnet"]()
    state = opt.setup(opt.OptimiserChain(opt.NormGrowthCap(), muon_on_hidden_matrices()), module)
    module(inputs).square().mean().backward()
    module.stem.weight.grad[0, 0, 0, 0] = torch.nan
    before = {path: p.detach().clone() for path, p in module.named_parameters()}
    with pytest.raises(opt.NonFiniteError, match=r"NormGrowthCap at 'stem\.weight'"):
        opt.update_(state, module)
    assert all(torch.equal(p, before[path]) for path, p in module.named_parameters())


def test_where_takes_the_same_patterns():
    state = opt.setup(muon_on_hidden_matrices(), Transformer(tied=True))
    for where in ("head.weight", nn.Embedding, lambda p: "head.weight" in p.tied_paths, ("embed.*", "position.*")):
        changed = opt.adjust(state, eta=0.5, where=where)
        assert changed["embed.weight"].rule.eta == 0.5
        assert changed["blocks.0.qkv.weight"].rule.eta == 0.02
    with pytest.raises(opt.SelectionError, match="selects no parameter"):
        opt.adjust(state, eta=0.5, where=nn.BatchNorm2d)
