"""``python -m galore_kernels.pretrain``: the same as ``galore-pretrain``."""

from .cli import main

raise SystemExit(main())
