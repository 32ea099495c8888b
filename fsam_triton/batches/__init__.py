"""What goes into a model: choosing samples of a batch, mixing texts."""
