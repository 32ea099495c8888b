"""``python -m fsam_triton.finetune`` is ``fsam-finetune``."""

from . import main

raise SystemExit(main())
