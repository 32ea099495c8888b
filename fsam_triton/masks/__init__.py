"""Two kinds of masks: `FisherMask` selects the weights that SAM perturbs, `FishMask` the weights that are trained."""
