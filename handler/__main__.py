"""`python -m handler COMMAND`, the same as `firstlight COMMAND`."""

from __future__ import annotations

import sys

from handler.cli import main

if __name__ == "__main__":
    sys.exit(main())
