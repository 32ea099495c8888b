"""A trainer for axolotl, by its name in the YAML file: ``trainer_cls``."""

from axolotl.core.trainers.base import AxolotlTrainer

from .transformers import SharpnessAwareMixin


class SharpnessAwareTrainer(SharpnessAwareMixin, AxolotlTrainer):
    """axolotl's trainer with sharpness-aware steps; ``optim_args`` has the arguments, see `SharpnessAwareMixin`."""
