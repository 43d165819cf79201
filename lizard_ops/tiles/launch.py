"""How a kernel is launched: the one type of every table of launch configurations."""

from __future__ import annotations

import functools
from typing import NamedTuple


class Launch(NamedTuple):
    """The tile of one program, and what Triton is told about it; each table says what its tile is a tile of."""

    rows: int
    columns: int
    warps: int
    stages: int  # of the pipeline
    registers: int | None = None  # the most a thread may have; None: the compiler's choice
    heads: int = 1  # query heads stacked in the rows of a tile

    @property
    @functools.cache  # noqa: B019  # few configurations, asked in every launch
    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch whose kernel takes its stages as a constant."""
        return {"num_warps": self.warps} | ({} if self.registers is None else {"maxnreg": self.registers})

    @property
    @functools.cache  # noqa: B019
    def options(self) -> dict[str, int]:
        """Keyword arguments of any other launch."""
        return self.launch | {"num_stages": self.stages}
