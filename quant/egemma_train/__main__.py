"""`python -m egemma_train` is `egemma-train`; torchrun starts it so."""

import sys

from egemma_train.cli import main

sys.exit(main())
