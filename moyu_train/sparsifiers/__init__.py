"""Registry of sparsifiers: name to `module:Class`, as strings so that a recipe is checked without importing torch."""

SPARSIFIERS = {
    "threshold": "moyu_train.sparsifiers.threshold:Threshold",
    "gate_threshold": "moyu_train.sparsifiers.gate_threshold:GateThreshold",
    "relu": "moyu_train.sparsifiers.relu:ReLU",
    "fatrelu": "moyu_train.sparsifiers.relu:FATReLU",
    "relu2": "moyu_train.sparsifiers.relu:ReLU2",
    "drelu": "moyu_train.sparsifiers.relu:DReLU",
    "topk": "moyu_train.sparsifiers.topk:TopK",
    "griffin": "moyu_train.sparsifiers.prompt:Griffin",
    "tda": "moyu_train.sparsifiers.prompt:TDA",
    "statistical_topk": "moyu_train.sparsifiers.topk:StatisticalTopK",
}
