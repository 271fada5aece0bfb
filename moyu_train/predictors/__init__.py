"""Registry of predictor families: name to `module:Class`, as strings so that a recipe is checked without torch."""

PREDICTORS = {
    "block": "moyu_train.predictors.block:Block",
    "dejavu": "moyu_train.predictors.imported:DejaVu",
    "history": "moyu_train.predictors.history:History",
    "lowbit": "moyu_train.predictors.lowbit:LowBit",
    "lowrank": "moyu_train.predictors.lowrank:LowRank",
    "mlp": "moyu_train.predictors.mlp:MLP",
    "powerinfer": "moyu_train.predictors.imported:PowerInfer",
    "shared": "moyu_train.predictors.shared:Shared",
    "signs": "moyu_train.predictors.signs:Signs",
    "svd": "moyu_train.predictors.svd:SVD",
}
