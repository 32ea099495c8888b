"""Two kinds of masks: `FisherMask` says which weights are perturbed, `FishMask` which weights are trained."""
