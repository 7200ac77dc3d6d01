"""Files and folders into an index.

`plan_folder` says what is to be done, `sync` does it, `read_file` reads a single file.
"""

from egemma.ingest.config import IngestConfig, ParseLimits
from egemma.ingest.errors import UnreadableFileError
from egemma.ingest.parse import Parsed, read_file
from egemma.ingest.plan import Plan, plan_folder
from egemma.ingest.printing import render
from egemma.ingest.sync import SyncProgress, SyncReport, sync
from egemma.ingest.walk import Skipped

__all__ = [
    "IngestConfig",
    "ParseLimits",
    "Parsed",
    "Plan",
    "Skipped",
    "SyncProgress",
    "SyncReport",
    "UnreadableFileError",
    "plan_folder",
    "read_file",
    "render",
    "sync",
]
