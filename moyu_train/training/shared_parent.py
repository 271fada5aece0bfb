"""The dense parent that a LoRA student carries in itself: its frozen weights, without deltas and without masks.

No second copy of the model is held. Under QLoRA it is what the 4-bit weights stand for.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from moyu_train.errors import MoyuError
from moyu_train.recipe import SHARED
from moyu_train.training.control import SparsityControl
from moyu_train.training.head_control import HeadControl
from moyu_train.training.launch import asked_engine


def check_shared(parent: str) -> None:
    """Raises: MoyuError under an engine that shares weights out, where the student's forward belongs to the step."""
    if parent == SHARED and asked_engine():
        raise MoyuError(
            f"finetune.parent 'shared' runs the student's own weights, which {asked_engine()} shares out among "
            "processes; use accelerate_configs/ddp.yaml or single.yaml, or leave finetune.parent empty"
        )


class SharedParent:
    """Called as the model would be; its forward is the dense model's.

    Args:
        adapted: the student, a peft model.
        controls: whose masks are lifted for the while.
    """

    def __init__(self, adapted: Any, controls: Sequence[SparsityControl | HeadControl]) -> None:
        self.adapted, self.controls = adapted, controls

    def __call__(self, **tensors: Any) -> Any:
        training = self.adapted.training
        self.adapted.eval()
        with ExitStack() as without:
            without.enter_context(self.adapted.disable_adapter())
            for control in self.controls:
                without.enter_context(control.lifted())
            output = self.adapted(**tensors)
        self.adapted.train(training)
        return output
