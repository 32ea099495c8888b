"""SAM around any optimizer, resumed and copied, and the model's weights between its passes."""

import copy
import pickle

import pytest
import torch

from fsam_triton import SAM, FisherMask
from tests.optim.bases import every_base, matrices_of
from tests.problem import small_model
from tests.training import assert_same_bits, closure_of, round_trip, train

pytestmark = pytest.mark.usefixtures("one_thread")

MASKS = {
    "interval": FisherMask(0.3, interval=4),
    "samples": FisherMask(0.3, interval=4, samples=3),
    "random": FisherMask(0.3, interval=4, scores="random"),
}


@pytest.mark.parametrize("mask", [None, *MASKS.values()], ids=["none", *MASKS])
@every_base
def test_resumed_training_equals_uninterrupted_training_to_the_bit(base, mask):
    def fresh(seed: int):
        model = matrices_of(seed=seed)
        return model, SAM(base(model.named_parameters()), rho=0.5, mask=mask, beta=0.5, seed=3)

    model, optimizer = fresh(0)
    # In the middle of an interval, and between two squares that are added up.
    train(model, optimizer, 6)
    saved = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, 6, start=6)
    other, resumed = fresh(1)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, 6, start=6)
    assert_same_bits(model, other)


def test_state_of_the_base_alone_can_be_loaded():
    model, twin = small_model(), small_model()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, base, 3)
    twin.load_state_dict(model.state_dict())
    optimizer = SAM(torch.optim.AdamW(twin.parameters()), rho=0.7)
    optimizer.load_state_dict(base.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["rho"] == 0.7
    train(twin, optimizer, 2, start=3)
    assert optimizer.state[twin["dense"].weight]["step"] == 5


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("mask", [None, *MASKS.values()], ids=["none", *MASKS])
def test_copy_of_model_and_optimizer_continues_identically(mask, duplicate):
    model = small_model()
    optimizer = SAM(torch.optim.AdamW(model.named_parameters(), lr=0.01), rho=0.5, mask=mask)
    train(model, optimizer, 6)
    twin, twins = duplicate((model, optimizer))
    train(twin, twins, 6, start=6)
    assert not torch.equal(twin["dense"].weight, model["dense"].weight)
    train(model, optimizer, 6, start=6)
    assert_same_bits(twin, model)


def test_copying_while_perturbed_is_refused():
    model = small_model()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    closure_of(model, optimizer, 0)()
    optimizer.perturb()
    for thing in (optimizer, model):
        with pytest.raises(RuntimeError, match="perturbed"):
            copy.deepcopy(thing)
        with pytest.raises(RuntimeError, match="perturbed"):
            pickle.dumps(thing)
    optimizer.restore()
    copy.deepcopy((model, optimizer))


def test_state_dict_of_the_model_between_the_passes_is_clean():
    model = small_model()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1.0)
    closure_of(model, optimizer, 0)()
    optimizer.perturb()
    clean = small_model().state_dict()
    assert all(torch.equal(value, clean[name]) for name, value in model.state_dict().items())


def test_dropped_between_the_passes_it_leaves_clean_weights():
    model = small_model()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1.0)
    closure_of(model, optimizer, 0)()
    optimizer.perturb()
    del optimizer
    assert_same_bits(model, small_model())
