"""Experiments on what sharpness-aware training is good for: forgetting, rounding of weights, wrong labels."""
