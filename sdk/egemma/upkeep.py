"""Look after an index file, given by its path: check, copy, compact, export, or migrate it.

    from egemma import upkeep

    assert upkeep.check("notes.db") == []
    upkeep.backup("notes.db", "copy.db")

All of it works while others have the index open; only `migrate` needs a model.
"""

from egemma.index.jsonl import ImportReport, export_jsonl
from egemma.index.migration import MigrationReport, abandon, migrate
from egemma.index.tuned import TuneReport, TuneRow
from egemma.index.upkeep.backup import backup
from egemma.index.upkeep.check import check
from egemma.index.upkeep.compact import CompactReport, compact
from egemma.index.upkeep.describe import IndexFacts, describe_index, is_new

describe = describe_index

__all__ = [
    "CompactReport",
    "ImportReport",
    "IndexFacts",
    "MigrationReport",
    "TuneReport",
    "TuneRow",
    "abandon",
    "backup",
    "check",
    "compact",
    "describe",
    "export_jsonl",
    "is_new",
    "migrate",
]
