"""Few objects for the garbage collector, among which FSAM looks for the modules that own its parameters."""

import gc
import importlib


def freeze_objects() -> None:
    """Hide what there is. Models that are made later are found.

    With PyTorch, its compiler, transformers and ten thousand tests there are a million objects. To look through them
    takes a tenth of a second, and is done twice for each optimizer.
    """
    # An optimizer's first step imports it.
    importlib.import_module("torch._dynamo")
    gc.collect()
    gc.freeze()
    # It counts them one by one, and FSAM asks.
    gc.get_freeze_count = lambda: 0
