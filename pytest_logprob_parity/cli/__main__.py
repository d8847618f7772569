"""`python -m pytest_logprob_parity.cli`."""

from __future__ import annotations

from . import main

raise SystemExit(main())
