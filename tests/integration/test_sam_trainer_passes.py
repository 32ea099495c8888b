"""The second pass of `SAMTrainer` leaves nothing behind: no statistics, random numbers, NaN or perturbed weights."""

import functools

import pytest
import torch
from torch import Tensor, nn

from tests.integration.tiny import assert_equal, bert, copied

pytest.importorskip("transformers")
import transformers

from tests.integration.sam_trainer import Counting, KeepWeights, plain_trainer, sam_trainer, trained

pytestmark = pytest.mark.usefixtures("one_thread")


def test_training_stopped_within_a_step_begins_the_next_one_anew(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = sam_trainer(
        tmp_path, bert(), cls=Counting, given={"callbacks": [Stop()]}, max_steps=1, gradient_accumulation_steps=2
    )
    trainer.train()
    trainer.remove_callback(Stop)
    trainer.train()
    assert [is_perturbed for _, is_perturbed in trainer.passes] == [False, False, False, True, True]


def test_step_with_nan_in_the_first_pass_is_adamws(tmp_path):
    """In one micro-batch; the second passes are at the weights then, as those of a radius of 0 are."""
    trainer = sam_trainer(tmp_path, bert(), cls=Counting, max_steps=1)
    trainer.meanwhile = lambda at, loss: loss * float("nan") if len(trainer.passes) == 2 else loss
    trainer.train()
    adamw = trained(sam_trainer(tmp_path, bert(), given={"optimizer_kwargs": {"rho": 0.0}}, max_steps=1))
    assert_equal(copied(trainer.model), copied(adamw.model))


@pytest.mark.parametrize("max_grad_norm", [0, 1.0])
def test_nan_in_the_second_pass_changes_no_weight_and_training_goes_on(max_grad_norm, tmp_path):
    trainer = sam_trainer(tmp_path, bert(), cls=Counting, max_steps=3, max_grad_norm=max_grad_norm)
    held = KeepWeights()
    trainer.add_callback(held)
    trainer.meanwhile = lambda at, loss: loss * float("nan") if at == (1, True) else loss
    trainer.train()
    assert_equal(held.at[2], held.at[1])
    assert not torch.equal(held.at[3]["classifier.weight"], held.at[2]["classifier.weight"])


class Normalised(nn.Module):
    """A classifier with dropout that keeps its masks, and a layer with running statistics."""

    def __init__(self, norm: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(32, 16), nn.Linear(16, 2)
        self.norm = nn.Identity() if norm is None else norm
        self.masks: list[Tensor] = []

    def forward(self, input_ids, labels):
        hidden = self.norm(self.embedding(input_ids).transpose(1, 2)).mean(-1)
        self.masks.append(torch.rand(hidden.shape) < 0.5)
        logits = self.head(hidden * self.masks[-1])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


NORMS = {
    "batch": functools.partial(nn.BatchNorm1d, 16),
    "cumulative batch": functools.partial(nn.BatchNorm1d, 16, momentum=None),
    "instance": functools.partial(nn.InstanceNorm1d, 16, track_running_stats=True),
}


@pytest.mark.parametrize("norm", NORMS)
def test_running_statistics_are_those_of_the_first_passes(norm, tmp_path):
    """With a learning rate of 0 the plain Trainer sees the same weights in its passes, step after step."""
    sam = trained(sam_trainer(tmp_path, Normalised(NORMS[norm]()), learning_rate=0.0))
    plain = trained(plain_trainer(tmp_path, Normalised(NORMS[norm]()), learning_rate=0.0))
    assert_equal(dict(sam.model.named_buffers()), dict(plain.model.named_buffers()))
    assert sam.model.norm.num_batches_tracked > 0 or norm == "instance"


def test_same_dropout_gives_both_passes_the_same_masks(tmp_path):
    trainer = sam_trainer(tmp_path, Normalised(), given={"same_dropout": True}, max_steps=1)
    trainer.train()
    first, second = trainer.model.masks[:4], trainer.model.masks[4:]
    assert len(second) == 4
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[1])


def test_passes_have_masks_of_their_own_by_default(tmp_path):
    trainer = sam_trainer(tmp_path, Normalised(), max_steps=1)
    trainer.train()
    assert not any(map(torch.equal, trainer.model.masks[:4], trainer.model.masks[4:]))


def test_same_dropout_leaves_the_random_numbers_as_one_pass_does(tmp_path):
    sam = sam_trainer(tmp_path, Normalised(), given={"same_dropout": True})
    sam.train()
    after = torch.get_rng_state()
    plain_trainer(tmp_path, Normalised()).train()
    assert torch.equal(torch.get_rng_state(), after)


class Failing(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["second pass", "before the step"])
def test_interruption_leaves_the_clean_weights(where, tmp_path):
    def fail(at, loss):
        if at == (1, True):
            raise KeyboardInterrupt
        return loss

    held = KeepWeights()
    trainer = sam_trainer(tmp_path, bert(), cls=Counting, given={"callbacks": [held]})
    if where == "second pass":
        trainer.meanwhile = fail
    else:
        trainer.add_callback(Failing)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (1, True) in trainer.passes
    assert_equal(copied(trainer.model), held.at[1])


def test_second_pass_that_runs_out_of_memory_is_made_anew_with_smaller_batches(tmp_path):
    """Trainer begins again, at the clean weights, and without the micro-batches that were too large."""
    before = copied(bert())
    trainer = sam_trainer(
        tmp_path, bert(), cls=Counting, auto_find_batch_size=True, gradient_accumulation_steps=2, max_steps=1
    )

    def fail(at, loss):
        if not at[1]:
            assert_equal(copied(trainer.model), before)
        elif trainer._train_batch_size == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return loss

    trainer.meanwhile = fail
    trainer.train()
    assert [is_perturbed for _, is_perturbed in trainer.passes] == [False, False, True, False, False, True, True]
