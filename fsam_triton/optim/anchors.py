"""Anchors whose names are nearly those of parameters: the model that they were taken from was wrapped."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# What torch.compile, DDP, activation checkpointing and FSDP put into the names of parameters.
_WRAPPERS = {"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def misnamed(unused: Mapping[str, Tensor], novel: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The names of an anchor and of the parameter without one that it must have been meant for; None if there are none.

    A state dict names much that is no parameter of an optimizer: buffers, frozen weights, the head of another task.
    Such a name is a mistake only if a parameter that has no anchor has its shape, and its name except for wrappers or
    for a prefix.

    Args:
        unused: anchors that are no parameter's, by name.
        novel: parameters without an anchor, by name.
    """
    ends = {(end, anchor.shape): name for name, anchor in unused.items() for end in _ends(name)}
    whole = {(_ends(name)[0], anchor.shape): name for name, anchor in unused.items()}
    for name, p in novel.items():
        own = _ends(name)
        for found in (ends.get((own[0], p.shape)), *(whole.get((end, p.shape)) for end in own)):
            if found is not None:
                return found, name
    return None


def _ends(name: str) -> list[str]:
    """The name without wrappers, and its ends of at least two parts: "weight" alone could be any layer's."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return [".".join(parts[i:]) for i in range(max(len(parts) - 1, 1))]
