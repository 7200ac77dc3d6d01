import sys

from egemma_train.cli import main

sys.exit(main())
