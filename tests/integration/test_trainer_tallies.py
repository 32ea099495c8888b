"""Whatever a trainer counts while it computes losses is counted in first passes alone."""

import pytest
import torch

from tests.integration.tiny import bert, samples

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("fsam_triton.integrations.transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


class Counting:
    """Counts as TRL's trainers do (privately) and as axolotl's does (tensors in the state)."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        tokens = inputs["input_ids"].numel()
        self._tokens = getattr(self, "_tokens", 0) + tokens
        self._losses = [*getattr(self, "_losses", []), 1.0]
        if not hasattr(self.state, "tokens"):
            self.state.tokens = {"total": torch.zeros(1), "last": torch.tensor(0)}
        self.state.tokens = {"total": self.state.tokens["total"] + tokens, "last": torch.tensor(tokens)}
        return super().compute_loss(model, inputs, *args, **kwargs)


class Plain(Counting, transformers.Trainer):
    pass


class Sharp(integration.SharpnessAwareMixin, Counting, transformers.Trainer):
    pass


def trained(cls, folder):
    args = transformers.TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        include_num_input_tokens_seen=True,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = cls(bert(), args, train_dataset=samples(24, 1))
    trainer.train()
    return trainer


def test_counts_are_those_of_a_plain_trainer(tmp_path):
    plain, sharp = (trained(cls, tmp_path) for cls in (Plain, Sharp))
    assert sharp._tokens == plain._tokens == 3 * 8 * 8
    assert sharp._losses == plain._losses
    assert sharp.state.tokens == plain.state.tokens
    assert sharp.state.num_input_tokens_seen == plain.state.num_input_tokens_seen > 0
