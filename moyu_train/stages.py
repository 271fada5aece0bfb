"""The stages of a run: what computes each, what it reads from, and which settings it depends on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    name: str
    function: str  # module:function, called with (run, folder), returns figures
    needs: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    only_with: str = ""  # a section, or `section.key`, that may be null or false: then the stage is left out


STAGES = {
    stage.name: stage
    for stage in (
        Stage("analyze", "moyu_train.analysis.stage:analyze", (), ("analyze",)),
        Stage(
            "calibrate",
            "moyu_train.training.stages:calibrate",
            (),
            ("calibrate", "sparsifier", "target_sparsity", "inputs", "allocation"),
        ),
        Stage(
            "fit-predictors",
            "moyu_train.training.stages:fit_predictors",
            ("calibrate",),
            ("fit", "predictor"),
            "predictor",
        ),
        Stage("calibrate-in-loop", "moyu_train.training.stages:in_loop", ("fit-predictors",), ("export",), "predictor"),
        Stage(
            "fit-heads",
            "moyu_train.training.stages:fit_heads",
            ("calibrate",),
            ("fit", "heads.unit", "heads.dense_layers", "heads.keep", "export.dtype"),
            "heads.train",
        ),
        Stage(
            "control",
            "moyu_train.training.dense_control:control",
            (),
            ("finetune", "control", "analyze.tokens"),
            "control",
        ),
        Stage(
            "finetune",
            "moyu_train.training.finetune:finetune",
            ("calibrate-in-loop", "fit-heads"),
            ("finetune", "penalty", "delta"),
        ),
        Stage(
            "refit-heads",
            "moyu_train.training.stages:refit_heads",
            ("finetune",),
            ("fit", "heads.unit", "heads.dense_layers", "export.dtype", "export.weights"),
            "heads.keep",
        ),
        Stage("refit-predictors", "moyu_train.training.stages:refit_predictors", ("finetune",), (), "predictor"),
        Stage(
            "recalibrate",
            "moyu_train.training.stages:recalibrate",
            ("refit-predictors", "refit-heads"),
            ("heads.keep",),
            "predictor",
        ),
        Stage(
            "export",
            "moyu_train.checkpoints.stage:export_stage",
            ("recalibrate", "refit-heads"),
            ("export", "heads.keep"),
        ),
        Stage("verify", "moyu_train.checkpoints.stage:verify_stage", ("export",)),
        Stage(
            "evaluate",
            "moyu_train.evaluation.stage:evaluate",
            ("export", "control"),
            ("evaluate", "heads.context"),
        ),
        Stage("bench", "moyu_train.evaluation.bench:bench", ("export",), ("bench",), "bench"),
        Stage(
            "report",
            "moyu_train.analysis.report:report",
            ("analyze", "finetune", "verify", "evaluate", "bench"),
        ),
    )
}
