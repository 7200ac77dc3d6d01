import sys

from egemma_export.cli import main

sys.exit(main())
