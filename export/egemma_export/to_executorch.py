"""The encoder as a .pte file: its graph is lowered to XNNPACK and written."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Registers the out-variants of the embedding operators. Never in one process with the runtime's own
# kernel library.
import executorch.kernels.quantized  # type: ignore[import-untyped]  # noqa: F401
import torch
import torch.fx.config
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # type: ignore[import-untyped]
from executorch.exir import (  # type: ignore[import-untyped]
    EdgeCompileConfig,
    to_edge_transform_and_lower,
)
from executorch.exir.backend.partitioner import PartitionResult  # type: ignore[import-untyped]
from executorch.exir.backend.utils import tag_constant_data  # type: ignore[import-untyped]

from egemma_core.nn.encoder import Encoder
from egemma_export.executorch_graph import DelegateEncoder
from egemma_export.executorch_weights import Weight
from egemma_quant.roles import quantize_encoder, role_of
from egemma_quant.schemes import Scheme


@dataclass(frozen=True, kw_only=True)
class LoweringReport:
    """What became of the graph."""

    delegates: int  # pieces that XNNPACK took; 1 is the aim
    outside: dict[str, int]  # operators that run outside, and how often each
    seconds: float  # from float weights to the written file
    cpu_seconds: float  # of this process, all threads
    file_bytes: int


def write_pte(
    encoder: Encoder,
    scheme: Scheme | None,
    path: Path,
    *,
    max_tokens: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> LoweringReport:
    """Write the encoder as a .pte file for ExecuTorch with XNNPACK.

    It takes (1, T) ids and mask, both int64, and gives (1, dim) float32.

    Args:
        encoder: any float dtype.
        scheme: how its weights are stored; None: float32.
        path: where to write.
        max_tokens: the longest T that the file accepts; the encoder's own limit if None.
        progress: called with each step as it begins.

    Raises:
        ExportError: the runtime has no kernel for the scheme, or the graph no form for the encoder.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    tokens = max_tokens or encoder.config.max_tokens
    progress("quantizing")
    graph = DelegateEncoder(encoder, _weights(encoder, scheme), tokens).eval()
    progress("tracing")
    example = (torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    length = torch.export.Dim("tokens", min=1, max=tokens)
    config = encoder.config
    numbers = {
        name: getattr(config, name)
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim")
    }
    with torch.no_grad(), _no_stack_traces():
        program = torch.export.export(graph, example, dynamic_shapes=({1: length}, {1: length}))
        del graph
        progress("lowering to XNNPACK")
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[_WholePartitioner()],
            constant_methods=numbers | {"num_dense": len(config.dense), "max_tokens": tokens},
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        del program
        calls = Counter(
            _short_name(node.target)
            for node in edge.exported_program().graph.nodes
            if node.op == "call_function"
        )
        progress("writing")
        lowered = edge.to_executorch()
    del edge
    with path.open("wb") as file:
        lowered.write_to_file(file)
    return LoweringReport(
        delegates=calls.pop("executorch_call_delegate", 0),
        outside=dict(calls),
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        file_bytes=path.stat().st_size,
    )


def _weights(encoder: Encoder, scheme: Scheme | None) -> dict[str, Weight]:
    if scheme is not None:
        return dict(quantize_encoder(encoder, scheme))
    return {
        name: weight.detach().float()
        for name, weight in encoder.named_parameters()
        if role_of(name) is not None
    }


@contextmanager
def _no_stack_traces() -> Iterator[None]:
    """Keep torch from noting where in Python each node came from.

    Some sixty passes trace the graph anew, and the notes would take 30% of the time.
    """
    before = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


class _WholePartitioner(XnnpackPartitioner):  # type: ignore[misc]  # untyped base
    """A partitioner that gives the delegate its norm weights and scalars too.

    They would be arguments of each call otherwise.
    """

    def partition(self, exported_program: torch.export.ExportedProgram) -> PartitionResult:
        result = super().partition(exported_program)
        tag_constant_data(exported_program)
        return result


def _short_name(target: object) -> str:
    return getattr(target, "__name__", str(target))
