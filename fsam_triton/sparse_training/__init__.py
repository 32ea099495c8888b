"""Training a small part of the weights: small files of them, and several workers that exchange them."""
