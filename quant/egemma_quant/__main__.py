"""`python -m egemma_quant` is `egemma-quantize`."""

import sys

from egemma_quant.cli import main

sys.exit(main())
