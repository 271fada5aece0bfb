"""Registry of predictor families: name to `module:Class`, as strings so that a recipe is checked without torch."""

PREDICTORS = {
    "history": "moyu_train.predictors.history:History",
    "lowbit": "moyu_train.predictors.lowbit:LowBit",
    "lowrank": "moyu_train.predictors.lowrank:LowRank",
    "mlp": "moyu_train.predictors.mlp:MLP",
    "signs": "moyu_train.predictors.signs:Signs",
    "svd": "moyu_train.predictors.svd:SVD",
}
