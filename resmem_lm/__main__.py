"""`python -m resmem_lm` is the command `resmem`."""

import sys

from resmem_lm.cli import script

sys.exit(script())
