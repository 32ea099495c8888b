"""The packages of the extra ``transformers``, each None where one of them is missing: `command.main` says so."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers
    from tqdm import tqdm
else:
    try:
        import psutil  # noqa: F401  (for the report, which would miss it only after training)
        import transformers
        from tqdm import tqdm
    except ImportError:
        transformers = tqdm = None

__all__ = ["tqdm", "transformers"]
