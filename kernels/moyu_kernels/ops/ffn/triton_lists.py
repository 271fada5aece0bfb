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
BLOCKS = 256  # enough programs for a large GPU
AT_ONCE = 512  # programs that a large GPU has room for, four on an SM


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
        """From `BLOCKS` on and fewer than twice as many, whatever the model, but for small ones."""
        f, d = weight.shape
        block = min(128, max(16, triton.next_power_of_2(f // BLOCKS + 1) // 2))
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
        tiles = len(self.tickets)
        links = next((links for links in (1, 2) if _programs(blocks, links) * tiles <= AT_ONCE), 4)
        y = torch.empty(n, d, dtype=dtype, device=weight.device)
        counts = torch.empty(n, 2, dtype=torch.int32, device=weight.device)
        programs = _programs(blocks, links)
        partials = torch.empty(programs, n, d, dtype=torch.float32, device=weight.device)
        launch = Launch(
            down_kernel,
            (programs, tiles),
            (weight, columns, bias, *self.tensors, partials, y, counts, f, d, blocks),
            {
                **self.constants,
                "LINKS": links,
                "CHAINS": CHAINS,
                "COLUMNS": TILE_BYTES // weight.element_size(),
                "STEPS": 8 if n <= 4 or weight.element_size() == 1 else 12,
                "RUNS": min(32, (128 if weight.element_size() > 1 else 64) // triton.next_power_of_2(n)),
            },
            options | ({"maxnreg": 128} if n <= 2 and "maxnreg" in options else {}),  # 4 programs on an SM
        )
        return launch, y, counts


def _programs(blocks: int, links: int) -> int:
    return triton.cdiv(triton.cdiv(blocks, links), CHAINS)


def options_of(target: GPUTarget, registers: int = 255) -> dict[str, int | bool]:
    """Options of every launch; registers: most of a thread, for ptxas spills to reach an occupancy that these grids
    cannot use. Products and sums are fused where tl.fma says so; the default differs between Triton versions."""
    limit = {"maxnreg": registers} if target.backend == "cuda" else {}
    return {"num_warps": THREADS // target.warp_size, "enable_fp_fusion": False} | limit
