"""Options of FSDP2 and DDP change nothing about a step; and what a step holds in memory at most."""

import pytest

pytest.importorskip("torch.distributed.tensor")

import sharded_policies as policies

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.mark.parametrize("adapter", [False, True], ids=["update_", "adapter"])
@pytest.mark.parametrize("rule", ["chain", "Muon"])
@pytest.mark.parametrize("option", list(policies.OPTIONS))
def test_options_of_fsdp_give_what_one_process_gives(two, option, rule, adapter):
    assert max(two.run(policies.run_option, option, rule, adapter)) <= 5e-6


@pytest.mark.parametrize("rule", ["chain", "Muon"])
@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_gradients_that_were_gathered_without_synchronisation_give_what_one_process_gives(two, how, rule):
    assert max(two.run(policies.run_accumulated, how, rule)) <= 5e-6


@pytest.mark.parametrize("rule", ["chain", "Muon"])
def test_a_compiled_model_that_is_cut_gives_what_one_process_gives(two, rule):
    assert max(two.run(policies.run_compiled, rule)) <= 5e-6


@pytest.mark.parametrize("set_to_none", [False, True], ids=["zeros", "None"])
@pytest.mark.parametrize("rule", ["chain", "Muon"])
def test_gradients_that_are_views_of_buckets_give_what_one_process_gives(two, rule, set_to_none):
    for adapter in (False, True):
        assert max(two.run(policies.run_bucket_views, rule, set_to_none, adapter)) <= 5e-6


@pytest.mark.parametrize("shapes", [[(96, 96)], [(96, 96), (64, 128), (80, 80)]], ids=["one", "three"])
def test_no_rank_holds_more_than_its_share_and_two_whole_stacks(two, shapes):
    """Besides what was there before the step, and what the iteration of an owner needs for its own matrices."""
    for held, share, stack in two.run(policies.memory_of_muon, 8, shapes):
        assert stack < held <= share + 2 * stack
