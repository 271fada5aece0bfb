"""Registry of predictor families: name to `module:Class`, as strings so that a recipe is checked without torch."""

PREDICTORS = {
    "lowbit": "moyu_train.predictors.lowbit:LowBit",
    "lowrank": "moyu_train.predictors.lowrank:LowRank",
}
