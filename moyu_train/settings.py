"""The sections of a recipe: typed, strict, each with its own checks. Imports no torch."""

import contextlib
import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

CONTROL, SHARED = "control", "shared"  # as finetune.parent: no other model

GOALS = ("bytes_skipped", "ppl_over_rule", "recall", "cut")  # of `calibrate`, one of them
STATISTIC = "contribution: abs(a) times the norm of the neuron's column of down; magnitude: abs(a)"


class Section(BaseModel):
    """Settings that go together: unknown keys are errors, and defaults are checked too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Method(BaseModel):
    """A method by its registry name; all other keys are options that the method's own file declares and checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="of the method; its options stand beside it")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, settings: Any) -> Any:
        """A name alone is a method with its default options."""
        return {"name": settings} if isinstance(settings, str) else settings

    @property
    def options(self) -> dict[str, Any]:
        """What is given beside the name, not yet checked."""
        return dict(self.model_extra or {})


class Adaptive(BaseModel):
    """The closed loop that finds a penalty's coefficient for `target_sparsity` (moyu_train/penalties/adaptive.py)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    gain: float = Field(0.1, gt=0, description="of the logarithm per step and relative error of the density")
    ramp: float = Field(0.5, gt=0, le=1, description="share of the steps until the density should be reached")


class Ratio(BaseModel):
    """BlockFFN's rule for a penalty's coefficient (moyu_train/penalties/ratio.py)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    window: int = Field(20, ge=1, description="optimizer steps whose means are compared")
    rise: float = Field(1.025, ge=1, description="least factor where the penalty rose")
    most: float = Field(4.0, ge=1, description="times the first coefficient, never beyond")


class Penalty(Method):
    """A penalty on activations with its coefficient: one number, or points of (share of the steps, value)."""

    model_config = ConfigDict(extra="allow", frozen=True, validate_default=True)
    coefficient: tuple[tuple[float, float], ...] = Field(
        description="what the penalty is multiplied with: a number, or points (share of the steps, value)"
    )
    interpolation: Literal["linear", "sine"] = Field("sine", description="between the points; sine starts flat")
    adaptive: Adaptive | None = Field(None, description="find the coefficient in a closed loop")
    ratio: Ratio | None = Field(None, description="raise the coefficient by BlockFFN's rule")

    @field_validator("coefficient", mode="before")
    @classmethod
    def _constant(cls, value: Any) -> Any:
        if isinstance(value, str):  # YAML takes 1e-4, without a point, for a string
            with contextlib.suppress(ValueError):
                value = float(value)
        return [(0.0, value)] if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _points(self) -> "Penalty":
        shares = [share for share, _ in self.coefficient]
        if not shares or shares != sorted(set(shares)) or not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                f"penalty.coefficient {list(self.coefficient)} must be a number or points of (share of the steps from "
                "0 to 1, value) with rising shares"
            )
        if not all(0 <= value < math.inf for _, value in self.coefficient):
            raise ValueError(
                "penalty.coefficient holds values that are not finite or below 0, which would reward dense "
                "activations; use finite values from 0"
            )
        if self.adaptive and self.ratio:
            raise ValueError("penalty.adaptive and penalty.ratio both move the coefficient; give one of them")
        moved = "adaptive" if self.adaptive else "ratio"
        if (self.adaptive or self.ratio) and (len(self.coefficient) > 1 or self.coefficient[0][1] == 0):
            raise ValueError(
                f"penalty.{moved} moves one coefficient above 0 that it starts from; give a number above 0"
            )
        return self


class Block(Section):
    """FFN blocks of an architecture whose names moyu does not know; their layout is told by their shapes."""

    path: str = Field(pattern=r"^[\w*]+(\.[\w*]+)*$", description="of the modules, * for any one name in it")
    gate: str | None = Field(None, description="projection under the activation, where `up` is another one")
    up: str = Field(description="projection to the neurons; of twice their number it holds gate and up")
    down: str = Field(description="projection back")
    act: str = Field(description="attribute of the module that holds the activation module")

    @model_validator(mode="after")
    def _distinct(self) -> "Block":
        names = [name for name in (self.gate, self.up, self.down, self.act) if name]
        if len(set(names)) < len(names):
            raise ValueError(f"gate, up, down and act have to be different attributes, got {', '.join(names)}")
        return self


class Data(Section):
    """Text to train on and to be tested on (docs/training.md)."""

    train: str | tuple[str, ...] = Field(
        "builtin:state-union-train",
        description="file (JSON lines, CSV, TSV, Parquet, text), id[:subset[:split]], builtin:<name>, self; or a list",
    )
    test: str = Field("builtin:state-union-test", description="held-out documents, used by `evaluate` alone")
    text_field: str = Field("text", description="where a document is in JSON lines, tables and data sets")
    validation_documents: int = Field(3, ge=1, description="training documents held back for choosing settings")
    max_tokens: int = Field(2_000_000, ge=1, description="read no more than this of each training text")

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the training text comes from."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @field_validator("train")
    @classmethod
    def _some(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("data.train names no text; give one source, or a list of them")
        return value


class Inputs(Method):
    """Sparse inputs of linear layers anywhere in the model, by a sparsifier for layout `linear`: threshold or topk.

    With `statistic: magnitude` a threshold is TEAL (arXiv 2408.14690), with `contribution` WINA (arXiv 2505.19427);
    topk with `straight_through` is Q-Sparse (arXiv 2407.10969).
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field("threshold", description="of the sparsifier: threshold or topk; its options stand beside it")
    modules: str = Field(r"self_attn\.[qkvo]_proj", description="regular expression, found anywhere in the path")
    sparsity: float = Field(gt=0, lt=1, description="share of the inputs that are off")
    centre: Literal["zero", "median"] = Field(
        "zero",
        description="what an input that is off is taken for, and its strength is measured from; median: of each input "
        "over the calibration text",
    )

    @field_validator("modules")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"inputs.modules {value!r} is no regular expression: {error}") from error
        return value


class Analyze(Section):
    """Beside the uplift curve and needed neurons, always measured: what of history and inertia (docs/analysis.md)."""

    tokens: int = Field(4096, ge=2, description="validation tokens for the statistics and each point of the curve")
    sparsities: tuple[float, ...] = Field((0.5, 0.7, 0.8, 0.9), description="points of the uplift curve")
    measures: tuple[Literal["history", "inertia", "senses", "causal", "gap", "cett_ppl"], ...] = Field(
        ("history", "inertia"), description="what else is measured; none with ()"
    )
    tau: float = Field(0.2, gt=0, lt=1, description="relative error of an FFN's output that dropping neurons may make")
    density: float | None = Field(None, gt=0, lt=1, description="count so many neurons as active, in place of by tau")

    @model_validator(mode="after")
    def _range(self) -> "Analyze":
        if any(not 0 < s < 1 for s in self.sparsities):
            raise ValueError("sparsities are shares of neurons off, each between 0 and 1")
        return self


class Lora(Section):
    """Low-rank adaptation (arXiv 2106.09685) by peft: only A and B of these projections train, and are merged."""

    rank: int = Field(16, ge=1, description="of A and B")
    alpha: int = Field(32, gt=0, description="deltas are multiplied with alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the input of A")
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="module names, or one regular expression of whole paths"
    )
    quantise: Literal["nf4"] | None = Field(
        None,
        description="train on 4-bit weights (QLoRA, arXiv 2305.14314), and add the deltas to these",
    )

    @field_validator("targets")
    @classmethod
    def _name(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        """peft takes a text for an expression of whole paths, which no name of a module is."""
        return (value,) if isinstance(value, str) and value.isidentifier() else value


class Compensate(Section):
    """A low-rank map of each FFN's input in place of what is off: fitted in closed form, then trained."""

    rank: int = Field(64, ge=1, description="of the map; 64 is 2.8 % of a gated FFN's weights where F is 1536")
    tokens: int = Field(20_480, ge=1, description="of training text to fit it on")


class Optimise(Section):
    """Training of the masked model, and, but for the loss, of the dense control."""

    tokens: int = Field(24_576, ge=1, description="training tokens in all, epochs included")
    epochs: int = Field(1, ge=1, description="how often the training text may be gone through to give `tokens`")
    window: int = Field(256, ge=8, description="tokens per training sequence")
    batch: int = Field(4, ge=1, description="sequences per device and micro-batch")
    accumulation: int = Field(1, ge=1, description="micro-batches per optimizer step")
    learning_rate: Annotated[float, Field(gt=0)] | Literal["control"] = Field(
        1e-4, description="at its highest, after the warm-up; `control`: the one that suited the dense control best"
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    save_steps: int = Field(10, ge=1, description="optimizer steps between checkpoints")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights in training")
    activation_checkpointing: bool = Field(False, description="compute activations again in the backward: less memory")
    parent: str = Field(
        "",
        description="dense model to distil from, of the same vocabulary: default a copy of `model`; `control`: the "
        "dense control; `shared`: with lora, the student without its deltas and masks, no copy",
    )
    parent_offload: bool = Field(
        False,
        description="keep the parent's weights in the CPU's memory, and bring each module's to the GPU when it "
        "computes: slower, but next to no memory there",
    )
    kl_weight: float = Field(1.0, ge=0, description="KL to the dense parent")
    kl_top_k: int | None = Field(None, ge=1, description="of its distribution only the likeliest tokens; default all")
    block_weight: float = Field(0.0, ge=0, description="relative error of each FFN block's output to the parent's")
    lm_weight: float = Field(0.0, ge=0, description="next-token loss")
    lora: Lora | None = Field(None, description="train low-rank deltas in place of all weights")
    compensation: Compensate | None = Field(
        None, description="what stands for the neurons that are off, for rules by threshold or top-k; null for nothing"
    )
    embeddings: bool = Field(True, description="without lora, train the token embeddings and the output layer too")

    @model_validator(mode="after")
    def _loss(self) -> "Optimise":
        if self.kl_weight == 0 and self.lm_weight == 0 and self.block_weight == 0:
            raise ValueError("kl_weight, lm_weight and block_weight are all 0: nothing to train; set one above 0")
        if self.tokens < self.tokens_per_step:
            raise ValueError(
                f"tokens ({self.tokens}) is less than one step, window x batch x accumulation = "
                f"{self.tokens_per_step}; raise tokens or lower one of the three"
            )
        return self

    @property
    def holds_parent(self) -> bool:
        """Whether training holds a frozen parent beside the model."""
        return self.kl_weight + self.block_weight > 0 and self.parent != SHARED

    @property
    def tokens_per_step(self) -> int:
        """Of one optimizer step, on one device."""
        return self.window * self.batch * self.accumulation


class Control(Section):
    """The dense control: the same training without a mask, which sparse results are compared with; null for none."""

    learning_rates: tuple[float, ...] = Field((1e-5, 3e-5, 1e-4), min_length=1, description="best on validation wins")
    reuse: str = Field("", description="folder of a run with the same text and training settings, to take its control")

    @model_validator(mode="after")
    def _distinct(self) -> "Control":
        if len({f"{rate:g}" for rate in self.learning_rates}) < len(self.learning_rates):
            raise ValueError(f"learning_rates {self.learning_rates} holds one twice; each is a run of its own")
        return self


class Fit(Section):
    """Text that predictors are fitted on."""

    tokens: int = Field(49_152, ge=1, description="training tokens, gone through once")
    window: int = Field(1024, ge=8, description="tokens per sequence")
    save_every: int = Field(16, ge=1, description="windows between checkpoints")


class Calibrate(Section):
    """Text to calibrate on, and the one goal that the predictors' cuts are found for (moyu_train/training/loop.py)."""

    tokens: int = Field(4096, ge=1, description="training tokens that levels and cuts are taken from")
    bytes_skipped: float | None = Field(
        None, gt=0, lt=1, description="share of FFN bytes, predictor bytes counted as read; 0.45 where no goal is named"
    )
    ppl_over_rule: float | None = Field(None, gt=1, description="most perplexity, over that under the rule's own mask")
    recall: float | None = Field(None, gt=0, lt=1, description="least share of the rule's neurons that is selected")
    cut: float | None = Field(None, description="no search: this cut in all layers; PowerInfer needs 0")
    batch: int = Field(1, ge=1, le=8, description="sequences decoded together: bytes are of the union of their neurons")
    search: int = Field(0, ge=0, description="runs of the model to share out the bytes among the layers; 0: evenly")

    @model_validator(mode="before")
    @classmethod
    def _one_goal(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        named = [goal for goal in GOALS if settings.get(goal) is not None]
        if len(named) > 1:
            given = " and ".join(f"{goal} {settings[goal]}" for goal in named)
            raise ValueError(f"calibrate takes one goal, and {given} are given; set all but one to null")
        if named == ["cut"] and settings.get("search"):
            raise ValueError(f"calibrate.cut {settings['cut']} leaves nothing to search; set calibrate.search to 0")
        return settings if named else {**settings, "bytes_skipped": 0.45}

    @property
    def goal(self) -> tuple[str, float]:
        """Name and value."""
        return next((name, value) for name in GOALS if (value := getattr(self, name)) is not None)


class Allocation(Section):
    """How `target_sparsity` is shared out among the layers (moyu_train/training/allocation.py).

    `uniform`: every layer is held at it. `greedy`: each layer at what its block's error says, before training.
    `learned`: only the mean is held, by one factor on the thresholds of all layers, so that training shares it out.
    """

    method: Literal["uniform", "greedy", "learned"] = Field(
        "uniform", description="every layer alike, by the error of each block before training, or by training"
    )
    step: float = Field(0.04, gt=0, le=0.25, description="greedy: share of a layer's neurons that is taken at a time")
    most: float = Field(0.98, gt=0, lt=1, description="greedy: sparsity that no layer goes beyond")

    @property
    def sparsities(self) -> list[float]:
        """Those at which greedy measures a block's error."""
        count = max(math.floor(self.most / self.step + 1e-9), 1)
        return [self.most * (i + 1) / count for i in range(count)]


class Compare(Section):
    """Predictor families for `moyu compare-predictors`; the first is what the others' layers are compared with."""

    model: Literal["finetuned", "dense"] = Field("finetuned", description="whose FFN blocks they are fitted to")
    predictors: tuple[Method, ...] = Field(
        (
            Method(name="lowrank", rank=32),
            Method(name="history", rank=25),
            Method(name="svd", rank=32),
            Method(name="mlp", rank=32),
            Method(name="signs"),
            Method(name="lowbit", bits=1),
        ),
        min_length=1,
        description="each with its options",
    )
    bytes_skipped: tuple[float, ...] = Field((0.5, 0.6, 0.7), min_length=1, description="operating points")
