"""What a state, a route and a budget look like, in a terminal and in a notebook."""

import re
import warnings

import numpy as np
import pytest
import rich.console
import torch

import optimisers as opt
from optimisers.errors import ArgumentError, ModelError, RoutingWarning, RuleError
from optimisers.tree.fold import fold
from optimisers.tree.show import bytes_text, state_bytes
from table import cases


def transformer(layers=12, width=8, *, device="meta"):
    """The names and owners of a GPT-2, on a device that has no memory."""

    class Conv1D(torch.nn.Module):
        def __init__(self, before, after):
            super().__init__()
            self.weight, self.bias = (torch.nn.Parameter(torch.ones(shape)) for shape in ((before, after), (after,)))

    def block():
        attention = torch.nn.ModuleDict({"c_attn": Conv1D(width, 3 * width), "c_proj": Conv1D(width, width)})
        mlp = torch.nn.ModuleDict({"c_fc": Conv1D(width, 4 * width), "c_proj": Conv1D(4 * width, width)})
        parts = {"ln_1": torch.nn.LayerNorm(width), "attn": attention, "ln_2": torch.nn.LayerNorm(width), "mlp": mlp}
        return torch.nn.ModuleDict(parts)

    with torch.device(device):
        body = {
            "wte": torch.nn.Embedding(50 * width, width),
            "wpe": torch.nn.Embedding(4 * width, width),
            "h": torch.nn.ModuleList([block() for _ in range(layers)]),
            "ln_f": torch.nn.LayerNorm(width),
        }
        net = torch.nn.ModuleDict(
            {"transformer": torch.nn.ModuleDict(body), "lm_head": torch.nn.Linear(width, 50 * width, bias=False)}
        )
    net["lm_head"].weight = net["transformer"]["wte"].weight
    return net


ROUTE = opt.Route(
    (("*.wte.*", "lm_head.*"), opt.AdamW(3e-4, (0.9, 0.95))),
    ("*.wpe.*", opt.AdamW(3e-4)),
    (lambda p: p.ndim >= 2, opt.Muon(layout="in_out", ns=opt.NewtonSchulz(coefficients="polar_express"))),
    otherwise=opt.OptimiserChain(opt.ClipGlobalNorm(), opt.AdamW(3e-4)),
)


# --- folding -----------------------------------------------------------------------------------------------------------------


def paths_of(text):
    """The paths that a folded one stands for."""
    match = re.search(r"\{([^}]*)\}", text)
    if match is None:
        return [text]
    indices = []
    for run in match[1].split(","):
        first, _, last = run.partition("..")
        indices += range(int(first), int(last or first) + 1)
    return [path for i in indices for path in paths_of(text[: match.start()] + str(i) + text[match.end() :])]


def folded(paths, alike=None):
    return [row.path for row in fold(paths, alike or [None] * len(paths))]


def test_paths_that_differ_in_an_index_are_one():
    assert folded(["h.0.w", "h.0.b", "h.1.w", "h.1.b", "out"]) == ["h.{0,1}.w", "h.{0,1}.b", "out"]
    assert folded(["0", "1", "2", "5"]) == ["{0..2,5}"]
    assert folded([f"a.{i}.b.{j}.c" for i in range(3) for j in range(4)]) == ["a.{0..2}.b.{0..3}.c"]


def test_paths_with_something_else_in_common_stay_apart():
    assert folded(["h.0.w", "h.1.w", "h.2.w"], ["x", "y", "x"]) == ["h.{0,2}.w", "h.1.w"]
    assert folded(["a.0", "b.0", "a.1"]) == ["a.{0,1}", "b.0"]
    assert folded(["a0.w", "a1.w", "w.01", "w.1"]) == ["a0.w", "a1.w", "w.01", "w.1"]  # no indices: parts of names


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_by_folding(seed):
    generator = np.random.default_rng(seed)
    grid = [f"{a}.{i}.{b}.{j}" for a in "xy" for i in range(6) for b in "pq" for j in range(3)]
    chosen = [path for path in grid if generator.random() < 0.7]
    alike = [int(generator.integers(2)) for _ in chosen]
    rows = fold(chosen, alike)
    assert sorted(i for row in rows for i in row.members) == list(range(len(chosen)))
    for row in rows:
        assert sorted(paths_of(row.path)) == sorted(chosen[i] for i in row.members)
        assert len({alike[i] for i in row.members}) == 1
    firsts = [row.members[0] for row in rows]
    assert firsts == sorted(firsts)


# --- print -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [ROUTE, opt.AdamW(), opt.MixedPrecision(opt.Muon())], ids=["route", "AdamW", "Muon"])
def test_the_state_of_a_large_model_fits_a_screen(rule):
    net = transformer()
    text = str(opt.setup(rule, net))
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    count = len(list(net.parameters()))
    assert lines[-1].startswith(f"{count} arrays, {sum(p.numel() for p in net.parameters()):,} parameters")
    rows = [line.split() for line in lines[2 : next(i for i, line in enumerate(lines) if line.startswith("148")) - 1]]
    assert ["transformer.h.{0..11}.attn.c_attn.bias", "x12", "24", "float32"] in [row[:4] for row in rows]


def rows_of_rules(text):
    """The lines of the table that stand for arrays."""
    return [line for line in text.splitlines()[2:] if re.search(r" float32 ", line)]


def test_every_rule_is_told_in_full_below():
    text = str(opt.setup(ROUTE, transformer()))
    assert re.search(r"wte.weight = lm_head.weight +400x8 +float32 +\S+ KiB +AdamW #1 ", text)
    assert "AdamW #1: AdamW(eta=0.0003, beta=(0.9, 0.95))" in text
    assert "AdamW #2: AdamW(eta=0.0003)" in text
    assert "AdamW #3: ClipGlobalNorm() > AdamW(eta=0.0003)" in text
    names = {note.partition(": ")[0] for note in re.findall(r"^\w+ #\d: |^\w+: ", text, re.MULTILINE)}
    assert len(names) > 3
    assert {re.search(r" B +(\w+(?: #\d)?) |iB +(\w+(?: #\d)?) ", line).group(1, 2) for line in rows_of_rules(text)} <= {
        pair for name in names for pair in ((name, None), (None, name))
    }
    assert "ns=NewtonSchulz(coefficients='polar_express')" in text
    assert "safety=None" not in text  # a default


def test_what_does_not_fit_is_counted():
    model = {f"layer{i}": np.ones(i + 1) for i in range(100)}
    lines = str(opt.setup(opt.Adam(), model)).splitlines()
    assert len(lines) == 40
    assert lines[-3] == "... and 65 more lines; optimisers.summary(state, by='path') has all"
    assert lines[-1].startswith("100 arrays, 5,050 parameters")
    full = opt.summary(opt.setup(opt.Adam(), model), by="path").splitlines()
    assert [line.split()[0] for line in full[2:102]] == sorted(model)


def test_a_long_path_keeps_both_ends():
    model = {"a" * 60: {"b" * 60: np.ones(2)}, "c": np.ones(3)}
    rule = opt.Route(("c", opt.Adam()), otherwise=opt.AdamW())
    lines = str(opt.setup(rule, model)).splitlines()
    assert max(map(len, lines)) <= 120
    assert re.match(r"a+\.\.\.b+ ", lines[2])


def test_frozen_layers_are_rows_of_their_own():
    state = opt.freeze(opt.setup(opt.Adam(), {"h": [np.ones(2) for _ in range(6)]}), where="h.2")
    rows = [line.split() for line in str(state).splitlines()[2:4]]
    assert [row[:2] for row in rows] == [["h.{0,1,3..5}", "x5"], ["h.2", "2"]]
    assert rows[1][-1] == "frozen"


def test_a_notebook_shows_a_table():
    model = {"<b>": np.ones(2), "h": [np.ones(3)] * 1}
    html = opt.setup(opt.Adam(), model)._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert html.count("<tr>") == 3
    assert html.count("<table>") == html.count("</table>") == 1
    state = opt.setup(opt.Momentum(), model)
    opt.update_(state, model, model)
    assert state._repr_html_() == "StateTree(consumed by update_)"


def test_rich_shows_the_table_in_colour():
    state = opt.setup(ROUTE, transformer())
    console = rich.console.Console(width=120, force_terminal=True, color_system="standard", record=True)
    with console.capture() as captured:
        console.print(state)
    assert "\x1b[36mMuon" in captured.get()  # cyan
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in captured.get().splitlines()]
    assert plain == [line for line in str(state).splitlines() if not line.startswith("---")]


# --- summary -----------------------------------------------------------------------------------------------------------------


def test_a_summary_by_owner_is_folded_too():
    net = transformer()
    lines = opt.summary(opt.setup(ROUTE, net), net).splitlines()
    assert len(lines) < 20
    row = next(line.split() for line in lines if "c_attn" in line)
    assert row[:7] == ["transformer.h.{0..11}.attn.c_attn", "x12", "Conv1D", "24", "24", "2,592", "10.1"]
    assert lines[-1] == "everything is trained"


def test_a_summary_by_rule_lists_the_paths_of_each():
    lines = opt.summary(opt.setup(ROUTE, transformer()), by="rule").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("Muon: Muon("))
    assert lines[at + 1 : at + 5] == [
        f"  transformer.h.{{0..11}}.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    total = next(line.split() for line in lines if line.startswith("all "))
    assert total[1:3] == ["148", "148"]


def test_a_summary_without_a_model_tells_what_the_state_knows():
    state = opt.freeze(opt.setup(opt.Adam(), {"a": np.ones(2), "b": np.ones(2), "n": 3}), where="a")
    assert opt.summary(state).endswith("not trained:\n  'a': frozen")
    assert "'n'" in opt.summary(state, {"a": np.ones(2), "b": np.ones(2), "n": 3})


def test_a_summary_by_something_else_is_refused():
    state = opt.setup(opt.Adam(), np.ones(2))
    with pytest.raises(ArgumentError, match="summary: by is 'owner', 'path' or 'rule'; got 'layer'"):
        opt.summary(state, by="layer")
    with pytest.raises(ArgumentError, match="depth says what an owner is, so it goes with by='owner'; got by='rule'"):
        opt.summary(state, by="rule", depth=1)


# --- review ------------------------------------------------------------------------------------------------------------------


def oddities(rule, model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = opt.review(rule, model)
    assert all(issubclass(w.category, RoutingWarning) for w in caught)
    assert text == opt.summary(opt.setup(rule, model), by="rule")
    return [str(w.message) for w in caught]


def test_what_looks_wrong_is_said():
    decayed = ", ".join(
        [f"transformer.h.{{0..11}}.{name}" for name in ("ln_1.weight", "ln_1.bias", "attn.c_attn.bias", "attn.c_proj.bias")]
        + [f"transformer.h.{{0..11}}.{name}" for name in ("ln_2.weight", "ln_2.bias", "mlp.c_fc.bias", "mlp.c_proj.bias")]
        + ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    )
    hidden = ", ".join(f"transformer.h.{{0..11}}.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    assert oddities(opt.Muon(), transformer()) == [
        (
            "Muon orthogonalises an embedding, whose rows are not used together; AdamW is usual: transformer.wte.weight, "
            "transformer.wpe.weight"
        ),
        f"AdamW decays vectors, which mostly are biases and norms; route them to a rule without decay: {decayed}",
        f"Muon takes a Conv1D for (out, in), but its weight is (in, out); give layout='in_out': {hidden}",
        (
            "Muon orthogonalises query, key and value as one matrix; give blocks=3, or the sizes of grouped heads: "
            "transformer.h.{0..11}.attn.c_attn.weight"
        ),
    ]


def test_an_output_layer_and_half_precision_are_said():
    net = torch.nn.ModuleDict({"body": torch.nn.Linear(4, 4, bias=False), "lm_head": torch.nn.Linear(4, 9, bias=False)})
    net = net.to(torch.bfloat16)
    assert oddities(opt.Muon(), net) == [
        (
            "small steps of bfloat16 parameters are rounded away; wrap the rule in "
            "MixedPrecision, StochasticRounding or Compensated: "
            "body.weight, lm_head.weight"
        ),
        "Muon orthogonalises an output layer; AdamW is usual: lm_head.weight",
    ]
    assert oddities(opt.MixedPrecision(opt.Route(("lm_head.*", opt.Adam()), otherwise=opt.Muon())), net) == []


def test_norms_that_are_made_for_embeddings_and_heads_are_not_warned_of():
    net = torch.nn.ModuleDict({"embed": torch.nn.Embedding(9, 4), "lm_head": torch.nn.Linear(4, 9, bias=False)})
    first = opt.Scion(norm="columns", normalised=False, layout="in_out")
    assert oddities(opt.Route(("embed.*", first), otherwise=opt.Scion(norm="sign")), net) == []
    assert oddities(opt.Scion(), net)[0].startswith("Scion orthogonalises an embedding")


def test_a_route_that_suits_is_not_warned_of():
    plain = opt.AdamW(3e-4)
    muon = opt.Muon(layout="in_out")
    route = opt.Route(
        (("*.wte.*", "lm_head.*", "*.wpe.*"), plain),
        ("*.c_attn.weight", opt.Muon(layout="in_out", blocks=3)),
        (lambda p: p.ndim >= 2, muon),
        otherwise=plain,
    )
    assert oddities(route, transformer()) == []
    assert oddities(opt.AdamW(lambda_=0.1), {"w": np.ones((2, 2))}) == []
    assert oddities(opt.OptimiserChain(opt.GrokFast(), opt.Adam()), {"b": np.ones(2)}) == []  # its lambda_ is no decay
    assert oddities(opt.Compensated(opt.Momentum()), torch.ones(2, dtype=torch.bfloat16)) == []


def test_oddities_can_be_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoutingWarning)
        with pytest.raises(RoutingWarning, match="WeightDecay decays vectors"):
            opt.review(opt.OptimiserChain(opt.WeightDecay(), opt.Adam()), {"b": np.ones(3)})


# --- estimate ----------------------------------------------------------------------------------------------------------------

BUDGETS = (
    opt.Descent(),
    opt.AdamW(),
    opt.MixedPrecision(opt.AdamW()),
    opt.Averaged(opt.Momentum()),
    opt.Muon(),
    opt.Apollo(),
    ROUTE,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", BUDGETS, ids=lambda rule: repr(rule)[:24])
def test_an_estimate_is_what_setup_takes(rule, dtype):
    net = transformer(2, device="cpu").to(dtype)
    found = opt.estimate(rule, net)
    state = opt.setup(rule, net)
    note = str(state).splitlines()[-1]
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.model == found.gradients == sum(p.nbytes for p in net.parameters())
    assert note.endswith(f" {bytes_text(found.state)} of state")
    assert sum(used for _, used in found.rules.values()) == found.state
    assert sum(count for count, _ in found.rules.values()) == found.parameters
    assert opt.estimate(rule, transformer(2).to(dtype)) == found  # on meta


@pytest.mark.parametrize("rule", [pytest.param(rule, id=name) for name, _, rule in cases()])
def test_an_estimate_of_every_rule_is_what_setup_takes(rule):
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 8, bias=False), "b": torch.nn.Linear(8, 4, bias=False)})
    state = opt.setup(rule, net)
    assert opt.estimate(rule, net).state == sum(state_bytes(entry.state) for entry in state._entries)


def test_an_estimate_of_numpy_and_of_a_state_dtype():
    model = {"w": np.ones((30, 40), "float32"), "b": np.ones(40, "float32"), "left": np.ones(5)}
    found = opt.estimate(opt.Momentum(), model, trainable=lambda p: p.path != "left", state_dtype="float64")
    assert (found.parameters, found.model, found.state) == (1240, 4960, 9920)
    assert found.total == 2 * 4960 + 9920
    lines = str(found).splitlines()
    assert lines[2].split() == ["Momentum(eta=0.01)", "1,240", "9.7", "KiB", "8.00"]
    assert lines[3] == "4.8 KiB of model + 4.8 KiB of gradients + 9.7 KiB of state = 19.4 KiB"


def test_what_is_not_trained_has_no_gradient():
    found = opt.estimate(opt.Route(("a", None), otherwise=opt.Momentum()), {"a": np.ones(10), "b": np.ones(2)})
    assert (found.model, found.gradients, found.state) == (96, 16, 16)


def test_an_estimate_that_needs_numbers_is_refused():
    net = transformer(1)
    with pytest.raises(RuleError, match="estimate: a rule, or a function given to it, needs the numbers of an array"):
        opt.estimate(opt.Muon(fallback=lambda x: bool((x > 0).all())), net)
    assert opt.estimate(opt.Scheduled(opt.Muon(fallback=lambda x: x.shape[0] > 100), eta=lambda step: 0.1), net).state > 0
    with pytest.raises(ModelError):
        opt.estimate(opt.Adam(), {"n": 3})
    with pytest.raises(RuleError, match=r"estimate: expected a rule .* the order is estimate\(rule, model\)"):
        opt.estimate({"n": np.ones(2)}, opt.Adam())
