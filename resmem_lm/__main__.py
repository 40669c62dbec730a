"""`python -m resmem_lm` is the command `resmem`."""

import sys

from resmem_lm.main import script

sys.exit(script())
