"""A tied optimizer is saved, loaded, copied and pickled as the optimizer that it wraps."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from checks import (
    GROUPS,
    REDUCTIONS,
    SHAPE,
    bits,
    mean_gradient,
    one_bare,
    one_tied,
    parameter,
    pickled,
    randn,
    same_bits,
    same_tree,
    tied_bitwise,
    train,
)
from torch.optim import SGD, Adagrad, AdamW

from tieopt import Tie, TiedOptimizer

# --- state_dict, load_state_dict, __setstate__ ---


@pytest.mark.parametrize("kwargs", [{"momentum": 0.9}, {}])
def test_the_state_and_the_groups_of_a_state_dict_have_exactly_the_inner_schema(kwargs):
    for inner, settings in [(SGD, kwargs), (AdamW, {"amsgrad": bool(kwargs)}), (Adagrad, {})]:
        _, tied = one_tied(inner, **settings)
        _, bare = one_bare(inner, **settings)
        train(tied, 2)
        train(bare, 2)
        saved, expected = tied.state_dict(), bare.state_dict()

        assert set(saved) == {*expected, "tieopt"}
        assert saved["param_groups"] == expected["param_groups"]
        assert saved["state"].keys() == expected["state"].keys()
        for key, entries in expected["state"].items():
            assert list(saved["state"][key]) == list(entries)
            for name, value in entries.items():
                assert type(saved["state"][key][name]) is type(value)
                assert getattr(saved["state"][key][name], "shape", None) == getattr(value, "shape", None)


def test_a_bare_optimizer_loads_the_state_of_a_tied_one():
    weight, tied = one_tied(AdamW)
    train(tied, 3)
    other, bare = one_bare(AdamW)
    bare.load_state_dict(tied.state_dict())

    assert type(bare) is AdamW
    assert same_tree(bare.state_dict(), {key: tied.state_dict()[key] for key in ("state", "param_groups")})
    assert bare.state[other]["step"] == tied.state[weight]["step"]


def test_a_tied_optimizer_loads_the_state_of_a_bare_one():
    _, bare = one_bare(AdamW)
    train(bare, 3)
    weight, tied = one_tied(AdamW)
    tied.load_state_dict(bare.state_dict())

    saved, expected = tied.state_dict(), bare.state_dict()
    saved.pop("tieopt")
    expected["state"] = {
        0: {key: mean_gradient(value) if value.shape == SHAPE else value for key, value in expected["state"][0].items()}
    }
    assert same_tree(saved, expected)
    train(tied, 3)
    assert tied_bitwise(weight)


@pytest.mark.parametrize("inner", [SGD, AdamW])
def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit(compact, inner):
    weight, optimizer = one_tied(inner, compact=compact)
    train(optimizer, 3)
    file = io.BytesIO()
    torch.save({"weight": weight.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    train(optimizer, 3, seed=900)

    checkpoint = torch.load(file, weights_only=True)
    other, resumed = one_tied(inner, compact=compact)
    other.data.copy_(checkpoint["weight"])
    resumed.load_state_dict(checkpoint["optimizer"])
    train(resumed, 3, seed=900)

    assert same_bits(weight, other)
    assert same_tree(optimizer.state_dict(), resumed.state_dict())


def test_load_state_dict_takes_its_argument_by_keyword_and_leaves_it_as_it_was(compact):
    _, optimizer = one_tied(AdamW, compact=compact)
    train(optimizer, 2)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    _, other = one_tied(AdamW, compact=compact)

    other.load_state_dict(state_dict=saved)

    assert same_tree(saved, before)
    assert same_tree(other.state_dict(), before)


def test_load_state_dict_writes_through_the_setstate_of_the_inner_class(compact):
    class Newer(SGD):
        def __setstate__(self, state):
            super().__setstate__(state)
            for group in self.param_groups:
                group.setdefault("added_since", "filled in")

    weight, optimizer = one_tied(Newer, compact=compact)
    optimizer.load_state_dict(SGD([weight], lr=0.25).state_dict())

    assert optimizer.param_groups[0]["added_since"] == "filled in"
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert vars(optimizer)["param_groups"] is optimizer.param_groups


def test_a_loaded_checkpoint_aliases_the_live_state_exactly_where_it_does_for_the_bare_optimizer():
    _, donor = one_tied(AdamW)
    train(donor, 2)

    def aliased(optimizer):
        saved = copy.deepcopy(donor.state_dict())
        optimizer.load_state_dict(saved)
        ((live, *_),) = [list(optimizer.state.values())]
        return {name: live[name].data_ptr() == value.data_ptr() for name, value in saved["state"][0].items()}

    assert aliased(one_tied(AdamW)[1]) == aliased(one_bare(AdamW)[1])


def test_tying_writes_nothing_into_a_checkpoint_that_aliases_the_live_state(compact):
    _, donor = one_bare(AdamW)
    train(donor, 2)
    saved = donor.state_dict()
    before = copy.deepcopy(saved)
    weight, optimizer = one_tied(AdamW, compact=compact)
    weight.grad = randn(*SHAPE, seed=1)

    optimizer.load_state_dict(saved)
    optimizer.tie_gradients()
    optimizer.tie_weights()

    assert same_tree(saved, before)


def test_state_dict_hooks_fire_once(compact):
    _, optimizer = one_tied(compact=compact)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("after saving"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("after loading"))

    optimizer.load_state_dict(optimizer.state_dict())

    assert seen == ["before saving", "after saving", "before loading", "after loading"]


def _by_name(optimizer, state_dict):
    """Find parameters by their names, in whatever order they were saved."""
    (ours,), (theirs,) = optimizer.param_groups, state_dict["param_groups"]
    names, saved = ours["param_names"], theirs["param_names"]
    state = {names.index(name): state_dict["state"][number] for number, name in enumerate(saved)}
    return {"state": state, "param_groups": [{**theirs, "param_names": names}]}


def test_what_hooks_make_of_a_state_is_what_is_loaded_and_checked(compact):
    layer = torch.nn.Linear(*SHAPE[::-1])
    bare = AdamW(list(layer.named_parameters())[::-1])
    layer(torch.ones(1, SHAPE[1])).sum().backward()
    bare.step()
    optimizer = TiedOptimizer(AdamW(layer.named_parameters()), {"weight": GROUPS}, compact=compact)
    optimizer.register_load_state_dict_pre_hook(_by_name)
    optimizer.load_state_dict(bare.state_dict())
    bare.load_state_dict(bare.state_dict())
    averages = [held.state[layer.bias]["exp_avg"] for held in (optimizer, bare)]
    assert torch.equal(*averages)
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


def test_what_hooks_make_of_a_state_is_refused_before_anything_is_loaded(compact):
    weight, optimizer = one_tied(AdamW, compact=compact)
    weight.grad = randn(*SHAPE, seed=1)
    optimizer.step()
    before, saved = copy.deepcopy(optimizer.state_dict()), optimizer.state_dict()
    other = TiedOptimizer(AdamW([weight]), {weight: [[0, 1]]}, compact=compact).state_dict()

    def refused(state, match):
        handle = optimizer.register_load_state_dict_pre_hook(lambda *_: state)
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(saved)
        handle.remove()
        assert same_tree(optimizer.state_dict(), before)

    refused({**saved, "tieopt": other["tieopt"]}, "saved with other ties")
    refused({**saved, "param_groups": []}, "parameter groups")
    # In the format of another one, and what it says of ties lost on the way.
    optimizer.register_load_state_dict_pre_hook(lambda _, given: {key: given["held"][key] for key in given["held"]})
    optimizer.load_state_dict({"held": saved})
    assert same_tree(optimizer.state_dict(), before)


def test_hooks_run_within_the_load_state_dict_of_the_inner_class(compact):
    """They get what it hands on, and what they register stays."""
    seen = []

    class Wrapping(SGD):
        def state_dict(self):
            return {"inner": super().state_dict()}

        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict["inner"])

    weight, optimizer = one_tied(Wrapping, compact=compact)
    optimizer.register_load_state_dict_pre_hook(lambda _, given: seen.append(sorted(given)))
    other = TiedOptimizer(Wrapping([weight]), {weight: [[0, 1]]}, compact=compact)
    with pytest.raises(ValueError, match="saved with other ties"):
        optimizer.load_state_dict(other.state_dict())
    assert not seen
    optimizer.register_load_state_dict_post_hook(
        lambda _: optimizer.register_load_state_dict_pre_hook(lambda _, given: seen.append("registered"))
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [["param_groups", "state"]]
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [["param_groups", "state"], ["param_groups", "state"], "registered"]


# --- pickle, deepcopy, and ties by position ---


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_copy_keeps_the_ties_and_goes_on_bit_for_bit(compact, how, reduction):
    weight, optimizer = one_tied(AdamW, reduction=reduction, compact=compact)
    train(optimizer, 2)

    other, twin = COPIES[how]((weight, optimizer))
    train(optimizer, 3, seed=500)
    train(twin, 3, seed=500)

    assert type(twin) is type(optimizer)
    assert twin is not optimizer
    assert twin.param_groups[0]["params"][0] is other
    assert tied_bitwise(other)
    assert same_bits(weight, other)
    assert same_tree(optimizer.state_dict(), twin.state_dict())


@pytest.mark.parametrize("how", COPIES)
def test_training_a_copy_leaves_the_original_alone(compact, how):
    weight, optimizer = one_tied(AdamW, compact=compact)
    train(optimizer, 2)
    before, state = bits(weight), copy.deepcopy(optimizer.state_dict())

    train(COPIES[how](optimizer), 2)

    assert torch.equal(bits(weight), before)
    assert same_tree(optimizer.state_dict(), state)


def test_a_deepcopy_of_model_and_optimizer_together_is_tied_to_the_copied_model(compact):
    model = torch.nn.Linear(5, 7)
    optimizer = TiedOptimizer(AdamW(model.parameters()), {model.weight: GROUPS}, compact=compact)
    twin_model, twin = copy.deepcopy((model, optimizer))
    before = bits(model.weight)

    train(twin, 2)

    assert tied_bitwise(twin_model.weight)
    assert not same_bits(twin_model.weight, model.weight)
    assert torch.equal(bits(model.weight), before)


@pytest.mark.slow
def test_a_pickle_is_read_by_a_process_that_has_never_seen_the_class(compact, tmp_path):
    weight, optimizer = one_tied(AdamW, compact=compact)
    train(optimizer, 2)
    (tmp_path / "optimizer.pickle").write_bytes(pickle.dumps(optimizer))
    program = (
        "import pickle, sys, torch\n"
        "optimizer = pickle.load(open(sys.argv[1], 'rb'))\n"
        "weight = optimizer.param_groups[0]['params'][0]\n"
        "weight.grad = torch.arange(35.0).view(7, 5)\n"
        "optimizer.step()\n"
        "print(type(optimizer).__name__, isinstance(optimizer, torch.optim.AdamW))\n"
        "print(weight.detach().numpy().tobytes().hex())\n"
    )
    read = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program, str(tmp_path / "optimizer.pickle")], capture_output=True, text=True, check=True
    )
    weight.grad = torch.arange(35.0).view(7, 5)
    optimizer.step()

    assert read.stdout.splitlines() == ["TiedAdamW True", weight.detach().numpy().tobytes().hex()]


def test_ties_are_held_by_position_when_the_parameter_objects_are_replaced(compact):
    weight, optimizer = one_tied(compact=compact)
    before = bits(weight)
    replacement = parameter(*SHAPE, seed=2)
    optimizer.param_groups[0]["params"][0] = replacement

    with pytest.warns(UserWarning, match="replaced or written to"):
        train(optimizer, 1)

    assert tied_bitwise(replacement)
    assert torch.equal(bits(weight), before)
    assert optimizer.ties[0].parts[0].param is replacement


def test_ties_are_held_by_position_when_the_list_of_parameters_is_replaced(compact):
    _, optimizer = one_tied(compact=compact)
    replacement = parameter(*SHAPE, seed=2)
    optimizer.param_groups = [{**group, "params": [replacement]} for group in optimizer.param_groups]

    with pytest.warns(UserWarning, match="replaced or written to"):
        train(optimizer, 1)

    assert tied_bitwise(replacement)


# --- torch.distributed.checkpoint, in one process ---

distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
state_dicts = pytest.mark.host("torch.distributed.checkpoint", "the state dicts of one process")


def tied_linear(inner=AdamW, compact=False, **kwargs):
    model = torch.nn.Linear(5, 7)
    with torch.no_grad():
        model.weight.copy_(randn(7, 5))
        model.bias.copy_(randn(7, seed=1))
    return model, TiedOptimizer(inner(model.parameters(), **kwargs), {model.weight: GROUPS}, compact=compact)


@state_dicts
@distributed
@pytest.mark.parametrize("inner", [SGD, AdamW])
def test_distributed_checkpoint_saves_and_loads_the_state(compact, inner):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    kwargs = {"momentum": 0.9, "lr": 0.1} if inner is SGD else {}
    model, optimizer = tied_linear(inner, compact, **kwargs)
    train(optimizer, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin_model, twin = tied_linear(inner, compact, **kwargs)
    twin_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin_model, twin, saved)
    optimizer.zero_grad()
    train(optimizer, 2, seed=700)
    train(twin, 2, seed=700)

    assert set(saved) == {"state", "param_groups"}
    assert set(saved["state"]) == {"weight", "bias"}
    assert same_bits(model.weight, twin_model.weight)
    assert same_tree(optimizer.state_dict(), twin.state_dict())
    assert tied_bitwise(twin_model.weight)


@state_dicts
@distributed
def test_the_fake_step_with_which_distributed_checkpoint_fills_an_empty_state_changes_no_weight(compact):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = tied_linear(compact=compact)
    before = bits(model.weight), bits(model.bias)

    saved = get_optimizer_state_dict(model, optimizer)

    assert saved["state"]["weight"]["exp_avg"].shape == ((4, 5) if compact else (7, 5))
    assert torch.equal(bits(model.weight), before[0])
    assert torch.equal(bits(model.bias), before[1])
    assert model.weight.grad is None


@state_dicts
@distributed
def test_distributed_checkpoint_sees_the_schema_of_the_bare_optimizer():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = tied_linear()
    bare_model = torch.nn.Linear(5, 7)
    tied = get_optimizer_state_dict(model, optimizer)
    bare = get_optimizer_state_dict(bare_model, AdamW(bare_model.parameters()))

    assert tied["param_groups"] == bare["param_groups"]
    assert {key: list(value) for key, value in tied["state"].items()} == {
        key: list(value) for key, value in bare["state"].items()
    }


@distributed
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_relaxed_ties_go_on_bit_for_bit_once_distributed_checkpoint_has_set_weights_and_then_the_state(lr):
    from torch.distributed.checkpoint.state_dict import (
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    def relaxed():
        model = torch.nn.Linear(5, 7)
        return model, TiedOptimizer(AdamW(model.parameters(), lr=lr), {model.weight: GROUPS}, strength=0.5)

    (model, optimizer), (other, twin) = relaxed(), relaxed()
    train(optimizer, 3)
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    set_model_state_dict(other, weights)
    set_optimizer_state_dict(other, twin, state)

    assert same_bits(other.weight, model.weight)
    optimizer.zero_grad()
    train(optimizer, 2, seed=700)
    train(twin, 2, seed=700)
    assert same_bits(other.weight, model.weight)
    assert optimizer.tie_drift() > 0


@distributed
@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # by torch 2.6 itself
def test_distributed_checkpoint_writes_and_reads_the_state_dict_itself(compact, tmp_path):
    from torch.distributed.checkpoint import load, save

    def read_into(optimizer):
        train(optimizer, 1, seed=900)
        content = {"optimizer": optimizer.state_dict()}
        load(content, checkpoint_id=tmp_path)
        optimizer.load_state_dict(content["optimizer"])
        return optimizer

    _, optimizer = tied_linear(compact=compact)
    train(optimizer, 2)
    save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path)

    assert same_tree(read_into(tied_linear(compact=compact)[1]).state_dict(), optimizer.state_dict())
    if not compact:
        other = torch.nn.Linear(5, 7)
        with pytest.raises(ValueError, match="saved with other ties"):
            read_into(TiedOptimizer(AdamW(other.parameters()), {other.weight: [[0, 1]]}))


def test_a_look_at_a_copy_in_inference_mode_does_not_stop_the_next_step(compact):
    _, optimizer = one_tied(compact=compact)
    again = pickled(optimizer)
    with torch.inference_mode():
        assert again.tie_drift() == 0.0
        again.tie_summary()
    train(again, 1)
    assert tied_bitwise(again.param_groups[0]["params"][0])


@pytest.mark.parametrize("how", ["wrap", "retie", "untie", "load"])
def test_a_state_that_was_tied_in_inference_mode_is_trained_on_outside_of_it(compact, how):
    weight = parameter(*SHAPE)
    optimizer = AdamW([weight])
    train(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    if how != "wrap":
        TiedOptimizer(optimizer, {weight: GROUPS}, compact=compact)
    with torch.inference_mode():
        if how == "wrap":
            TiedOptimizer(optimizer, {weight: GROUPS}, compact=compact)
        elif how == "retie":
            optimizer.retie({weight: [[0, 1, 2, 3]]})
        elif how == "untie":
            optimizer.untie()
        else:
            optimizer.load_state_dict(saved)
    before = weight.detach().clone()
    train(optimizer, 1)

    assert not same_bits(weight, before)
    assert optimizer.tie_drift() == 0


@pytest.mark.parametrize(
    ("groups", "scale", "fingerprint"),
    [
        (
            [[0, 2], [1, 3]],
            None,
            "2 groups of 4 members, 0 free, sha256 3f8cf53c3b0f4d8a9ffb5d84db3819553f4a154862c751386f3fa3821d3a8f54",
        ),
        (
            [[0]],
            torch.full((4,), 2.0),
            "1 group of 1 members, 3 free, sha256 55deacf4d1cd9167e077449422418c780a5279e630c8e7ef0600bc36971c6f52",
        ),
        ([], None, "0 groups of 0 members, 4 free, sha256 "),
    ],
    ids=["groups", "scaled", "empty"],
)
def test_a_fingerprint_is_written_as_in_the_first_version(groups, scale, fingerprint):
    weight = torch.nn.Parameter(torch.ones(4, 2))
    saved = TiedOptimizer(SGD([weight]), Tie(weight, groups, scale=scale)).state_dict()["tieopt"]["ties"]
    assert list(saved) == [0]
    assert saved[0].startswith(fingerprint)
