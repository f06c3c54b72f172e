"""`python -m ltx_batch.cli` is `ltx-batch`."""

import sys

from ltx_batch.cli import main

sys.exit(main())
