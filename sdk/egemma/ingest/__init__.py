"""Files and folders into an index: `plan_folder` says what is to be done, `sync` does it,
`read_file` reads a single file.
"""

from egemma.ingest.parse import Parsed, ParseLimits, UnreadableFileError, read_file
from egemma.ingest.plan import IngestConfig, Plan, plan_folder, render
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
