import sys

from resmem_lm.main import main

sys.exit(main())
