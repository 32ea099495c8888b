"""Where the numbers live: lanes that the optimizers own, and the user's parameters and gradients where they are."""
