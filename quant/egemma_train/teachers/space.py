"""The space in which a student's vectors are compared with a teacher's."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egemma_core.checks import one_of
from egemma_core.errors import ConfigError

Match = Literal["same", "prefix", "linear"]


class TeacherSpace(nn.Module):
    """The map into a space in which vectors of different widths are compared.

    The report does not name it, so there is a choice. "same": the widths are equal. "prefix": the
    teacher's first channels, at unit length again; right for a teacher that was trained for short
    prefixes, as Gemini Embedding was. "linear": a map from the student's width to the teacher's,
    without bias, trained with the student and thrown away; it starts with orthonormal columns or
    rows, so that a narrower student starts with its own cosines. Source: "linear" is the projection
    of EmbedDistill, arXiv:2301.12005.

    Args:
        dim: D, the student's width.
        teacher_dim: the teacher's.
        match: None for "same".
        seed: of the map.

    Raises:
        ConfigError: the widths differ and `match` is None or "same", or "prefix" of a teacher that
            is narrower than the student.
    """

    def __init__(
        self, dim: int, teacher_dim: int, match: Match | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if match is not None:
            one_of("match", match, get_args(Match))
        if match in (None, "same") and dim != teacher_dim:
            raise ConfigError(
                f"The student has {dim} channels, the teacher {teacher_dim}.",
                hint=f"Set match='prefix' if the teacher's first {dim} channels are an embedding "
                "by themselves (it was trained so), or match='linear' to learn a map that is "
                "thrown away after training.",
            )
        if match == "prefix" and teacher_dim < dim:
            raise ConfigError(
                f"match='prefix', but the teacher has {teacher_dim} channels, fewer than the "
                f"student's {dim}.",
                hint="Set match='linear'.",
            )
        self.dim, self.teacher_dim = dim, teacher_dim
        self.match: Match = match or "same"
        self.map = nn.Linear(dim, teacher_dim, bias=False) if match == "linear" else None
        if self.map is not None:
            nn.init.orthogonal_(self.map.weight, generator=torch.Generator().manual_seed(seed))

    def student(self, vectors: Tensor) -> Tensor:
        """Return the (B, width in common) unit vectors of (B, D) ones, with a gradient."""
        return F.normalize((vectors if self.map is None else self.map(vectors)).float(), dim=1)

    def teacher(self, vectors: Tensor) -> Tensor:
        """Return the (B, width in common) unit vectors of (B, teacher_dim) ones; no gradient."""
        return F.normalize(
            (vectors[:, : self.dim] if self.match == "prefix" else vectors).detach().float(), dim=1
        )
