"""The diagonal Fisher information of a model's parameters, from which FISH masks are selected."""

from .estimate import estimate_fisher as estimate_fisher
from .losses import causal_lm_loss as causal_lm_loss
