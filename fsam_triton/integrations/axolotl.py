"""A trainer for axolotl, by its name in the YAML file: ``trainer_cls``."""

# Not in the development environment: it wants versions of its own of everything.
from axolotl.core.trainers.base import AxolotlTrainer  # pyright: ignore[reportMissingImports]

from .transformers import SharpnessAwareMixin


class SharpnessAwareTrainer(SharpnessAwareMixin, AxolotlTrainer):
    """axolotl's trainer with sharpness-aware steps; ``optim_args`` has the arguments, see `SharpnessAwareMixin`."""
