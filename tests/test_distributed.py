"""Models whose parameters are cut over ranks give the trajectory of one process."""

import pytest

pytest.importorskip("torch.distributed.tensor")

import os
import warnings

import torch

import optimisers as opt
import sharded
import sharded_files as files
import sharded_models as models
from optimisers.interop import _tensor_file
from ranks import RankError, Ranks

pytestmark = pytest.mark.xdist_group("ranks")


def agree(results):
    """Every rank came to the same result, which is returned."""
    assert all(result == results[0] for result in results)
    return results[0]


def assert_nothing_told(results):
    """No rank has anything to tell."""
    told = [row for result in results for row in result]
    assert told == []


# The whole table takes minutes: make test-distributed.
EVERYTHING = bool(os.environ.get("OPTIMISERS_ALL_LAYOUTS"))


@pytest.mark.parametrize("layout", ["fsdp", "columns", "replicated"] if EVERYTHING else ["fsdp"])
def test_every_rule_gives_what_one_process_gives_on_two_ranks(two, layout):
    steps = 10 if EVERYTHING else 4
    assert_nothing_told(two.run(sharded.run_table, layout, "float32", steps, not EVERYTHING, 2e-6, limit=600))


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "fsdp+columns", "fsdp+rows"] if EVERYTHING else ["fsdp+columns"])
def test_every_rule_gives_what_one_process_gives_on_four_ranks(four, layout):
    steps = 10 if EVERYTHING else 3  # of both kinds, with an absent gradient, one at a tie, and a change of the rate
    assert_nothing_told(four.run(sharded.run_table, layout, "float32", steps, True, 2e-6, limit=600))


def test_a_mesh_of_one_rank_gives_what_no_mesh_gives(one):
    assert_nothing_told(one.run(sharded.run_table, "fsdp", "float32", 3, True, 2e-6, limit=400))


def test_every_rule_gives_what_one_process_gives_in_bfloat16(two):
    assert_nothing_told(two.run(sharded.run_table, "fsdp", "bfloat16", 10 if EVERYTHING else 3, True, 2e-2, limit=400))


@pytest.mark.parametrize("adapter", [False, True], ids=["update_", "adapter"])
@pytest.mark.parametrize("rule", list(models.RULES))
@pytest.mark.parametrize("how", ["ddp", "fsdp", "tensor parallel"])
def test_a_wrapped_module_trains_as_in_one_process(two, how, rule, adapter):
    assert max(two.run(models.run_module, how, rule, adapter)) <= 5e-6


@pytest.mark.parametrize("rule", list(models.RULES))
@pytest.mark.parametrize("how", ["fsdp", "hsdp", "fsdp of tensor parallel"])
def test_a_wrapped_module_trains_as_in_one_process_on_four_ranks(four, how, rule):
    assert max(four.run(models.run_module, how, rule, False)) <= 5e-6


def test_a_nan_on_one_rank_is_told_on_all(two):
    assert "ClipNorm at 'w'" in agree(two.run(models.nan_under_throw))


def test_a_nan_on_one_rank_skips_the_step_on_all(two):
    assert agree(two.run(models.nan_under_skip)) == {"w": (1, 1), "b": (1, 0)}


@pytest.mark.parametrize(
    ("what", "fragments"),
    [
        ("partial parameter", ["ModelError", "'w'", "Partial", "Redistribute"]),
        ("partial gradient", ["GradientError", "'w'", "Shard(dim=0)", "Partial", "not been summed", "redistribute(placements"]),
        ("replicated gradient", ["GradientError", "'w'", "Shard(dim=0)", "Replicate()", "redistribute(placements"]),
        ("plain gradient", ["GradientError", "'w'", "Shard(dim=0)", "got a Tensor", "distribute_tensor"]),
        ("gradient of another shape", ["GradientError", "'w'", "(4, 3)", "(3,)"]),
        ("sharded gradient", ["GradientError", "'b'", "DTensor", "to_local"]),
        ("resharded", ["StructureError", "'w'", "Shard(dim=0)", "Replicate()", "load it"]),
        ("no longer sharded", ["StructureError", "'w'", "Shard(dim=0)", "Set up a new state"]),
        ("sharded after setup", ["StructureError", "'b'", "Shard(dim=0)", "Shard the model first"]),
        ("disagreement", ["ModelError", "rank 0", "rank 1", "'w'", "eta=0.1", "eta=0.2"]),
        ("other routes", ["ModelError", "rank 0 has 'b'", "Descent", "rank 1 has 'b'", "Adam"]),
        ("fewer parameters", ["ModelError", "only rank 0 trains 'w'"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_told_by_name_on_all_ranks(two, what, fragments):
    text = agree(two.run(models.bad_input, what))
    assert all(fragment in text for fragment in fragments), text


def test_elementwise_rules_communicate_nothing(two):
    assert two.run(models.communication, "elementwise") == [[], []]


@pytest.mark.parametrize(("name", "rounds"), [("one measure", 1), ("each its measure", 1), ("two measures", 2)])
def test_measures_that_do_not_wait_for_one_another_are_one_collective(two, name, rounds):
    for calls in two.run(models.communication, name):
        assert [call for call, _ in calls] == ["gather"] * rounds
        assert all(sent == 11 * 8 for _, sent in calls)


def test_matrices_travel_in_the_dtype_in_which_they_are_computed(two):
    wide, narrow = (two.run(models.communication, name) for name in ("Muon", "Muon in bfloat16"))
    for one_rank, other in zip(wide, narrow, strict=True):
        assert sum(sent for _, sent in other) * 2 == sum(sent for _, sent in one_rank)
    away, own_error = agree(two.run(models.bfloat16_beside_its_own_error))
    assert 0 < away <= 4 * own_error  # each rounds differently, and the iteration amplifies that alike


@pytest.mark.parametrize("count", [2, 4])
def test_matrices_travel_once_to_their_owner_and_back(two, four, count):
    matrices = 8 * 16 * 12 * 4
    for calls in (two if count == 2 else four).run(models.communication, "Muon"):
        assert {call for call, _ in calls} == {"exchange"}
        assert sum(sent for _, sent in calls) <= 2 * 1.2 * matrices * (count - 1) / count / count


def test_a_rank_that_fails_between_out_and_back_sends_nothing_more(one):
    *transforms, (first, sent), (second, sent_again) = agree(one.run(models.fail_between_out_and_back))
    assert transforms == ["transform"] * 2
    assert "'4 0'" in first
    assert sent == ["exchange"] * 3  # out, back, and out
    assert "go on from the last checkpoint" in second
    assert sent_again == []


# --- checkpoints --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "flat"), [("Muon", False), ("AdamW", True), ("Apollo", False)])
def test_torchs_distributed_checkpoint_is_loaded_on_another_number_of_ranks(one, two, three, four, tmp_path, rule, flat):
    four.run(files.save_with_dcp, str(tmp_path), rule, flat)
    for ranks in (two, one, three) if rule == "Muon" else (two,):
        assert max(ranks.run(files.load_with_dcp, str(tmp_path), rule, flat)) <= 5e-6


@pytest.mark.parametrize("rule", ["AdamW", "Muon", "Apollo"])
def test_a_file_is_saved_by_four_ranks_and_loaded_by_others(one, two, four, tmp_path, rule):
    path = str(tmp_path / "state.safetensors")
    model = four.run(files.save_file, path, rule)[0]
    for ranks in (two, one):
        assert max(ranks.run(files.load_file, path, rule, model)) <= 5e-6


def test_the_file_is_what_a_single_process_writes(two, tmp_path):
    two.run(files.save_file, str(tmp_path / "several"), "AdamW")
    with warnings.catch_warnings():
        files.quietly()
        state, _ = files.trained(models.RULES["AdamW"], module=models.net())
    opt.save(tmp_path / "one", state)
    text, tensors = _tensor_file.read(tmp_path / "one")
    others_text, others = _tensor_file.read(tmp_path / "several")
    assert others_text == text
    assert {name: x.dtype for name, x in others.items()} == {name: x.dtype for name, x in tensors.items()}
    assert all(torch.allclose(others[name], x, rtol=1e-5, atol=1e-7) for name, x in tensors.items())


def test_an_error_of_the_rank_that_writes_is_told_on_all(two, tmp_path):
    first, second = two.run(files.save_where_nobody_can, str(tmp_path / "no folder" / "state"))
    assert "No such file" in first
    assert "rank 0, which writes the file, could not" in second
    assert "No such file" in second


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_while_a_file_is_written_leaves_the_old_one(tmp_path, victim):
    path = tmp_path / "state.safetensors"
    ranks = Ranks(4)
    try:
        with pytest.raises(RankError, match="exit code 7"):
            ranks.run(files.die_while_saving, str(path), victim)
    finally:
        ranks.stop()
    state = opt.load(path, like=models.net())
    assert state["0.weight"].state[2][0] == pytest.approx(0.9**2)  # the power of beta after one step


def test_the_rest_of_the_library(two):
    assert "full_tensor()" in agree(two.run(files.the_rest))


def test_autograd_knows_of_dtensors_that_were_written(two):
    assert all("modified by an inplace operation" in text for text in two.run(files.a_gradient_through_what_was_written))


def test_one_norm_over_arrays_of_all_kinds(two):
    assert max(agree(two.run(files.one_norm_over_all_kinds))) <= 1e-7


def test_a_rank_that_is_dead_is_told_by_torch_and_changes_nothing(tmp_path):
    ranks = Ranks(2)
    try:
        with pytest.raises(RankError, match="rank 1 is dead, with exit code 7"):
            ranks.run(models.go_on_without_the_second, str(tmp_path / "told"))
    finally:
        ranks.stop()
    assert (tmp_path / "told").read_text() == "of torch: True, nothing changed: True"


# --- the processes themselves -----------------------------------------------------------------------------------------------


def test_ranks_that_hang_are_ended_and_say_where_they_were():
    ranks = Ranks(2)
    with pytest.raises(RankError, match="in hang_on_the_second"):
        ranks.run(models.hang_on_the_second, limit=2)
    assert ranks.run(models.rank_of) == [0, 1]
    ranks.stop()
