"""Registry of predictor families: name to `module:Class`, as strings so that a recipe is checked without torch."""

PREDICTORS = {
    "lowrank": "moyu_train.predictors.lowrank:LowRank",
}
