"""The local index. `Index` is what users open; contract/index-format.md is the file."""

from egemma.index.hits import Document, Hit, Hits, SearchInfo
from egemma.index.index import Index
from egemma.index.inputs import content_id
from egemma.index.prepare import IndexOverflow
from egemma.index.put import PutReport
from egemma.index.upkeep.describe import IndexFacts, describe_index, is_new

__all__ = [
    "Document",
    "Hit",
    "Hits",
    "Index",
    "IndexFacts",
    "IndexOverflow",
    "PutReport",
    "SearchInfo",
    "content_id",
    "describe_index",
    "is_new",
]
