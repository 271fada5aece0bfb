"""What a call keeps of lists of neurons, and the launch that adds up their weight rows."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ..aot import Launch
from .triton_kernels import down_kernel

THREADS = 128
TILE_BYTES = 256  # of a row per program: 16 threads with a 16-byte load each
CHAINS = THREADS // 16  # chains in work at once


@dataclass(frozen=True)
class Lists:
    """Scratch of N rows over weight rows `[F, D]`, as the kernels of `triton_kernels.py` take it, in their order."""

    values: Tensor  # [N, F] fp32
    neurons: Tensor  # [F] int32
    lengths: Tensor  # [B] int32
    tallies: Tensor  # [2, N, B] int32
    tickets: Tensor  # [C] int32
    block: int

    @classmethod
    def empty(cls, rows: int, weight: Tensor) -> "Lists":
        """About 256 blocks, whatever the model: enough programs for a large GPU."""
        f, d = weight.shape
        block = min(128, max(16, triton.next_power_of_2(triton.cdiv(f, 256))))
        blocks, tiles = triton.cdiv(f, block), triton.cdiv(d, TILE_BYTES // weight.element_size())

        def ints(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=weight.device)

        values = torch.empty(rows, f, dtype=torch.float32, device=weight.device)
        return cls(values, ints(f), ints(blocks), ints(2, rows, blocks), ints(tiles), block)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.values, self.neurons, self.lengths, self.tallies, self.tickets

    @property
    def constants(self) -> dict[str, int | str]:
        """N, its power of two and the size of a block, as the kernels take them."""
        rows = len(self.values)
        return {"N": rows, "ROWS": triton.next_power_of_2(rows), "BLOCK": self.block}

    def sum_rows(
        self,
        weight: Tensor,
        bias: Tensor | None,
        options: dict[str, int | bool],
        dtype: torch.dtype,
        columns: Tensor | None = None,
    ) -> tuple[Launch, Tensor, Tensor]:
        """The launch of `down_kernel`, and the outputs that it fills: y `[N, D]` of `dtype`, counts `[N, 2]`.

        columns: fp32 `[D]` of int8 rows, which y is multiplied by.
        """
        (f, d), n, blocks = weight.shape, len(self.values), len(self.lengths)
        links = min(4, triton.next_power_of_2(triton.cdiv(blocks, 64)))  # about 64 chains: few partial sums
        chains = triton.cdiv(blocks, links)
        y = torch.empty(n, d, dtype=dtype, device=weight.device)
        counts = torch.empty(n, 2, dtype=torch.int32, device=weight.device)
        programs = triton.cdiv(chains, CHAINS)
        partials = torch.empty(programs, n, d, dtype=torch.float32, device=weight.device)
        launch = Launch(
            down_kernel,
            (programs, len(self.tickets)),
            (weight, columns, bias, *self.tensors, partials, y, counts, f, d, blocks),
            {
                **self.constants,
                "LINKS": links,
                "CHAINS": CHAINS,
                "COLUMNS": TILE_BYTES // weight.element_size(),
                "STEPS": 16 if n <= 4 else 12 if weight.element_size() > 1 else 8,
                "RUNS": min(32, (128 if weight.element_size() > 1 else 64) // triton.next_power_of_2(n)),
            },
            options,
        )
        return launch, y, counts


def options_of(target: GPUTarget, registers: int = 255) -> dict[str, int | bool]:
    """Options of every launch; registers: most of a thread, for ptxas spills to reach an occupancy that these grids
    cannot use. Products and sums are fused where tl.fma says so; the default differs between Triton versions."""
    limit = {"maxnreg": registers} if target.backend == "cuda" else {}
    return {"num_warps": THREADS // target.warp_size, "enable_fp_fusion": False} | limit
