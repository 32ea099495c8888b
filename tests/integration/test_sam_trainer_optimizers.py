"""Optimizers that `create_optimizer` and `SAMTrainer` make of the training arguments, and those that are given."""

import subprocess
import sys

import pytest
import torch

from fsam_triton import FSAM, AdamWL2SP, MomentumSAM
from fsam_triton import SAM as SAM_AROUND
from tests.integration.tiny import assert_equal, bert, copied
from tests.processes import ROOT

pytest.importorskip("transformers")
from fsam_triton.integrations.transformers import SAMTrainer, create_optimizer
from tests.integration.sam_trainer import SAM, arguments_for, assert_close, plain_trainer, sam_trainer, trained

pytestmark = pytest.mark.usefixtures("one_thread")


def test_optimizer_has_trainers_groups_and_the_arguments_values(tmp_path):
    args = arguments_for(tmp_path, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.9, seed=5)
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    optimizer = create_optimizer(model, args, rho=0.3)
    plain = plain_trainer(tmp_path, model).create_optimizer()
    assert [group["params"] for group in optimizer.param_groups] == [group["params"] for group in plain.param_groups]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[p] for p in group["params"]]
        assert (group["lr"], group["betas"], group["eps"], group["rho"]) == (1e-2, (0.8, 0.9), 1e-2, 0.3)
    assert optimizer.seed == 5


def test_arguments_given_by_hand_go_before_the_training_arguments(tmp_path):
    optimizer = create_optimizer(bert(), arguments_for(tmp_path), AdamWL2SP, lr=0.5, weight_decay=0.4)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.4), (0.5, 0.0)]


def test_novel_parameters_decay_to_zero_and_the_others_to_their_first_values(tmp_path):
    model = bert()
    before = copied(model)
    args = arguments_for(tmp_path, learning_rate=0.5, weight_decay=0.5)
    optimizer = create_optimizer(model, args, AdamWL2SP, l2_sp=0.5, novel=["classifier.weight", "classifier.bias"])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = copied(model)
    torch.testing.assert_close(after.pop("classifier.weight"), before.pop("classifier.weight") * 0.75)
    assert_equal(after, before)


def test_adamw_of_the_factory_steps_like_trainers_own(tmp_path):
    model = bert()
    args = {"max_grad_norm": 1.0}
    given = {"optimizers": (create_optimizer(model, arguments_for(tmp_path, **args), AdamWL2SP), None)}
    ours = trained(plain_trainer(tmp_path, model, given=given, **args))
    theirs = trained(plain_trainer(tmp_path, bert(), **args))
    assert_close(copied(ours.model), copied(theirs.model))


def test_momentum_sam_of_the_factory_steps_like_one_that_trainer_makes(tmp_path):
    model, kwargs = bert(), {"rho": 0.5, "lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1}
    ours = {"optimizers": (create_optimizer(model, arguments_for(tmp_path), MomentumSAM, rho=0.5), None)}
    theirs = {"optimizer_cls_and_kwargs": (MomentumSAM, kwargs)}
    trainers = [trained(plain_trainer(tmp_path, m, given=given)) for m, given in ((model, ours), (bert(), theirs))]
    for trainer in trainers:
        trainer.optimizer.eval()
    assert_equal(*(copied(trainer.model) for trainer in trainers))


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_fsam_that_is_given_steps_like_the_one_that_is_made(how, tmp_path):
    model, kwargs = bert(), {**SAM, "lr": 1e-2, "eps": 1e-2}
    own = (create_optimizer(model, arguments_for(tmp_path), **SAM), None) if how == "optimizers" else (FSAM, kwargs)
    given = trained(sam_trainer(tmp_path, model, given={"optimizer_kwargs": None, how: own}))
    made = trained(sam_trainer(tmp_path, bert()))
    assert_equal(copied(given.model), copied(made.model))


def test_choice_of_decaying_parameters_can_be_overridden(tmp_path):
    class Decaying(SAMTrainer):
        def get_decay_parameter_names(self, model):
            return ["classifier.bias"]

    optimizer = sam_trainer(tmp_path, bert(), cls=Decaying).create_optimizer()
    assert optimizer.param_groups[0]["param_names"] == ["classifier.bias"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer_cls_and_kwargs": (torch.optim.AdamW, {})}, "Invalid optimizer: 'AdamW'"),
        ({"optimizer_cls_and_kwargs": (FSAM, {"gamma": 0.5})}, "Invalid gamma: 0.5"),
        ({"optimizer_kwargs": SAM, "optimizer_cls_and_kwargs": (FSAM, {})}, "Invalid optimizer_kwargs"),
        ({"optimizer_kwargs": {"novel": ["a"], "anchors": {}}}, "Invalid novel"),
    ],
)
def test_trainer_refuses_what_it_cannot_do(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sam_trainer(tmp_path, bert(), given={"optimizer_kwargs": None, **given}).train()


def test_library_itself_does_not_import_transformers():
    code = "import sys, fsam_triton; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_another_optimizer_in_the_arguments_is_not_left_unread(tmp_path):
    with pytest.raises(ValueError, match="optim"):
        sam_trainer(tmp_path, bert(), optim="adafactor")


def test_steps_of_a_sam_around_adamw_are_those_of_an_fsam(tmp_path):
    model, other = bert(hidden_dropout_prob=0.0), bert(hidden_dropout_prob=0.0)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2, weight_decay=0.0)
    fused = FSAM(other.parameters(), lr=1e-2, eps=1e-2, weight_decay=0.0, rho=0.5)
    for own, optimizer in ((model, SAM_AROUND(base, rho=0.5)), (other, fused)):
        trained(sam_trainer(tmp_path, own, given={"optimizer_kwargs": None, "optimizers": (optimizer, None)}))
    assert_close(copied(model), copied(other))
