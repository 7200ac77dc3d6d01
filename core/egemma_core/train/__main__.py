import sys

from egemma_core.train.cli import main

sys.exit(main())
