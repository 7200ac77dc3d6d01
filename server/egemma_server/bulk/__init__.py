"""Millions of texts from Parquet to Parquet, on one machine or on Ray; stopped at any moment, it
goes on where it was.

    from egemma_server.bulk import embed_parquet, load_parquet

    report = embed_parquet("passages/", "vectors/", bundle="my-bundle", engine="ray", workers=2)
    load_parquet(index, "vectors/")

Needs `pip install 'egemma[bulk]'`, and `'egemma[ray]'` for Ray. docs/bulk.md says what the files
hold.
"""

from egemma_server.bulk.load import LoadReport, load_parquet
from egemma_server.bulk.report import BulkReport
from egemma_server.bulk.run import embed_parquet

__all__ = ["BulkReport", "LoadReport", "embed_parquet", "load_parquet"]
