"""The local index. `Index` is what users open; docs/index-format.md is the file."""

from egemma.index.file import IndexFacts, describe_index, is_new
from egemma.index.index import Document, Hit, Hits, How, Index, IndexOverflow, PutReport
from egemma.index.inputs import content_id

__all__ = ["Document", "Hit", "Hits", "How", "Index", "IndexFacts", "IndexOverflow", "PutReport", "content_id", "describe_index", "is_new"]
