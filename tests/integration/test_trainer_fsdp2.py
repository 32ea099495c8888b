"""SAMTrainer under FSDP2 in two processes: the steps of one process, with the parameters in shards."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fsam_triton import ArgumentError, FisherMask
from tests.processes import eager_passes, spawn

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from fsam_triton.integrations.transformers import SAMTrainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
KWARGS = {
    "sam": {"rho": 0.5},
    "gsam on a mask": {"rho": 0.5, "alpha": 0.3, "mask": FisherMask(0.3)},
    "clipped": {"rho": 0.5, "max_grad_norm": 0.5},
}


class Sharded(SAMTrainer):
    """Under FSDP: Trainer takes it for something of GPUs, accelerate shards anywhere."""

    version = 2

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        accelerate.PartialState._shared_state["distributed_type"] = accelerate.DistributedType.FSDP
        state = self.accelerator.state
        state.distributed_type = accelerate.DistributedType.FSDP
        state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=self.version,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        self.is_fsdp_enabled = True


def train(folder: Path, name: str, n: int = 1, cls: type[SAMTrainer] = Sharded) -> tuple[nn.Module, list[float]]:
    """Three steps of batches of eight; the model, and the losses at the weights."""
    torch.manual_seed(0)
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, max_position_embeddings=8, **config))
    rows = torch.randint(32, (24, 8), generator=torch.Generator().manual_seed(1))
    args = transformers.TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=8 // n,
        learning_rate=1e-2,
        adam_epsilon=1e-2,
        max_grad_norm=0.0,
        logging_steps=1,
        train_sampling_strategy="sequential",
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = cls(model, args, train_dataset=data, optimizer_kwargs=KWARGS[name])
    trainer.train()
    return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# -- the processes -----------------------------------------------------------------------------------------------------


def run_all(rank: int, n: int, folder: Path) -> dict:
    # What torchrun sets, and accelerate goes by.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    out = {}
    for name in KWARGS:
        model, losses = train(folder, name, n)
        shards = [hasattr(p, "full_tensor") for p in model.parameters()]
        out[name] = {"weights": [p.full_tensor().detach() for p in model.parameters()], "shards": all(shards)}
        out[name]["losses"] = losses
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    return spawn(run_all, 2, tmp_path_factory.mktemp("trainer") / "processes")


@pytest.mark.parametrize("name", KWARGS)
def test_shards_are_trained_as_in_one_process(results, name, tmp_path):
    with eager_passes():
        model, losses = train(tmp_path, name, cls=SAMTrainer)
    for result in results:
        assert result[name]["shards"]
        assert result[name]["losses"] == pytest.approx(losses, rel=1e-5)
        for weight, expected in zip(result[name]["weights"], model.parameters(), strict=True):
            # Gradients are summed in another order, and divided by at least Adam's eps of 1e-2.
            torch.testing.assert_close(weight, expected.detach(), rtol=0, atol=2e-6)


def test_first_version_of_fsdp_is_refused_with_what_to_use_instead(tmp_path):
    class First(Sharded):
        version = 1

    try:
        with pytest.raises(ArgumentError, match="fsdp_version 2"):
            train(tmp_path, "sam", cls=First)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
