"""`python -m egemma` is `egemma`."""

import sys

from egemma.cli import main

sys.exit(main())
