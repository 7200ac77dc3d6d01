"""The local index. `Index` is what users open; contract/index-format.md is the file."""

from egemma.index.file import IndexFacts, describe_index, is_new
from egemma.index.hits import Document, Hit, Hits, How
from egemma.index.index import Index, IndexOverflow
from egemma.index.inputs import content_id
from egemma.index.put import PutReport

__all__ = [
    "Document",
    "Hit",
    "Hits",
    "How",
    "Index",
    "IndexFacts",
    "IndexOverflow",
    "PutReport",
    "content_id",
    "describe_index",
    "is_new",
]
