"""The passes: one Triton kernel file each, and `reference`, the same arithmetic in plain PyTorch.

Nothing is imported here: `reference` needs torch alone, the kernel files need Triton.
"""
