"""`python -m hvdlm`, for launchers that start Python rather than a script."""

import sys

from hvdlm.cli import main

sys.exit(main())
