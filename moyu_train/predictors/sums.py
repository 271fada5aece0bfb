"""What predictors fitted in closed form share: sums over tokens, which a fit saves, resumes and adds over processes."""

from torch import Tensor


class Sums:
    """`sums`: fp32 tensors on the model's device, each a sum over the tokens observed so far."""

    sums: dict[str, Tensor]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint of a fit keeps, and what processes sum."""
        return self.sums

    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.sums[name].copy_(value)
