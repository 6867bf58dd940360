"""``python -m galore_kernels.plan``."""

from galore_kernels.plan.cli import main

raise SystemExit(main())
