"""Optimizers chosen by a string: transformers' ``optim_args``, and the YAML files that end up there."""

import pytest
import torch

from fsam_triton import FSAM, AdamWL2SP, ArgumentError, FisherMask, MomentumSAM, Schedule
from fsam_triton.integrations.optim_args import parse_optim_args
from tests.integration.tiny import bert, samples
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("rho=0.02", {"rho": 0.02}),
        (" rho = 1e-2 , adaptive=true,state_format=8bit,", {"rho": 0.01, "adaptive": True, "state_format": "8bit"}),
        ("backup_format=None,rule=lion", {"backup_format": None, "rule": "lion"}),
        ("schedule.last=decay,schedule.every=2", {"schedule": Schedule(last="decay", every=2)}),
        ("optimizer_cls=momentum-sam", {"optimizer_cls": MomentumSAM}),
    ],
)
def test_string_becomes_arguments(text, expected):
    assert parse_optim_args(text) == expected


def test_mask_is_made_of_its_arguments():
    mask = parse_optim_args("mask.keep_ratio=0.3,mask.unit=row")["mask"]
    assert isinstance(mask, FisherMask)
    assert (mask.keep_ratio, mask.unit) == (0.3, "row")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rho", "'rho'; must be name=value"),
        ("rho=", "'rho='; must be name=value"),
        ("rho=1,rho=2", "'rho'; must be there once"),
        ("mask.keep_ratio=1,mask.keep_ratio=2", "must be there once"),
        ("mask.keep=0.1", r"'mask.keep'; must be one of keep_ratio"),
        ("masks.keep_ratio=0.1", "'masks.keep_ratio'; must be of mask or schedule"),
        ("schedule.last=tail", "Invalid last: 'tail'"),
        ("optimizer_cls=adam", "'adam'; must be one of fsam, momentum-sam, adamw-l2sp"),
    ],
)
def test_what_cannot_be_read_is_named(text, said):
    with pytest.raises(ArgumentError, match=said):
        parse_optim_args(text)


# -- transformers ------------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("fsam_triton.integrations.transformers")


def trained(folder, cls, *options: str, **given):
    """A model trained by a script whose arguments are read by transformers' parser."""
    (args,) = transformers.HfArgumentParser(transformers.TrainingArguments).parse_args_into_dataclasses(
        [
            *("--output_dir", str(folder), "--max_steps", "3", "--per_device_train_batch_size", "4"),
            *("--learning_rate", "1e-2", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"),
            *("--save_strategy", "no", *options),
        ]
    )
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if "make" in given:
        given["optimizers"] = (given.pop("make")(model, args), None)
    trainer = cls(model, args, train_dataset=samples(16, 1), **given)
    trainer.train()
    return trainer


def test_command_line_chooses_a_two_pass_optimizer(tmp_path):
    options = ("--optim_args", "rho=0.5,mask.keep_ratio=0.3,schedule.every=2")
    by_string = trained(tmp_path, integration.SAMTrainer, *options)
    kwargs = {"rho": 0.5, "mask": FisherMask(0.3), "schedule": Schedule(every=2)}
    by_code = trained(tmp_path, integration.SAMTrainer, optimizer_kwargs=kwargs)
    assert isinstance(by_string.optimizer.optimizer, FSAM)
    assert_same_bits(by_string.model, by_code.model)


@pytest.mark.parametrize(("name", "cls"), [("momentum-sam", MomentumSAM), ("adamw-l2sp", AdamWL2SP)])
def test_command_line_chooses_a_one_pass_optimizer(name, cls, tmp_path):
    own = "rho=0.5" if cls is MomentumSAM else "l2_sp=0.1"
    by_string = trained(tmp_path, integration.SAMTrainer, "--optim_args", f"optimizer_cls={name},{own}")
    kwargs = {"rho": 0.5} if cls is MomentumSAM else {"l2_sp": 0.1}
    plain = trained(
        tmp_path,
        transformers.Trainer,
        make=lambda model, args: integration.create_optimizer(model, args, cls, **kwargs),
    )
    assert isinstance(by_string.optimizer.optimizer, cls)
    assert_same_bits(by_string.model, plain.model)


def test_arguments_in_code_go_before_the_string(tmp_path):
    trainer = trained(tmp_path, integration.SAMTrainer, "--optim_args", "rho=0.5", optimizer_kwargs={"rho": 0.1})
    assert trainer.optimizer.param_groups[0]["rho"] == 0.1


def test_interrupted_training_with_momentum_sam_leaves_clean_weights(tmp_path):
    class Stopping(integration.SAMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.state.global_step == 2:
                self.clean = [self.optimizer.optimizer.clean_weight(p).clone() for p in model.parameters()]
                self.seen = [p.detach().clone() for p in model.parameters()]
                raise KeyboardInterrupt
            return loss

    found = []
    with pytest.raises(KeyboardInterrupt):
        found.append(trained(tmp_path, recorded(Stopping, found), "--optim_args", "optimizer_cls=momentum-sam,rho=0.5"))
    (trainer,) = found
    for p, clean in zip(trainer.model.parameters(), trainer.clean, strict=True):
        assert torch.equal(p, clean)
    assert any(not torch.equal(seen, clean) for seen, clean in zip(trainer.seen, trainer.clean, strict=True))


def recorded(cls, found: list):
    def make(*args, **kwargs):
        found.append(cls(*args, **kwargs))
        return found[-1]

    return make


# -- axolotl -----------------------------------------------------------------------------------------------------------


def test_axolotl_finds_the_trainer_by_its_name():
    """As `trainer_cls` in the YAML file is looked up; axolotl pins the versions of half its dependencies."""
    pytest.importorskip("axolotl")
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.utils.import_helper import get_cls_from_module_str

    found = get_cls_from_module_str("fsam_triton.integrations.axolotl.SharpnessAwareTrainer")
    assert issubclass(found, integration.SharpnessAwareMixin)
    assert issubclass(found, AxolotlTrainer)
