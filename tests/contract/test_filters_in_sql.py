"""Filters mean in an index, where they are SQL, what they mean in the contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from egemma import Index, ModelIdentity
from egemma_core.errors import EgemmaError
from tests.contract.stranger import cases
from tests.contract.stranger_filters import meant

CONTENT = cases("filters")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    identity = ModelIdentity(fingerprint="0" * 64, name="a model", dims=(4,), parts={})
    with Index.open(tmp_path_factory.mktemp("filters") / "a.db", identity) as index:
        metadata = CONTENT["metadata"]
        vectors = np.tile(np.eye(4, dtype=np.float32)[:1], (len(metadata), 1))
        index.add_vectors(vectors, ids=[str(n) for n in range(len(metadata))], metadata=metadata)
        yield index


def test_every_filter_of_the_contract(index: Index) -> None:
    for case in CONTENT["cases"]:
        where = meant(case["where"], case.get("stand_ins", {}))
        try:
            found: Any = [int(id_) for id_ in index.ids(where)] if where is not None else None
        except EgemmaError as error:
            found = type(error).__name__
        if where is not None:
            assert found == case.get("error", case.get("true_for")), case
