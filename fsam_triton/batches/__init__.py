"""The input of a model: choosing samples of a batch, mixing texts."""
