"""Registry of sparsifiers: name to `module:Class`, as strings so that a recipe is checked without importing torch."""

SPARSIFIERS = {
    "threshold": "moyu_train.sparsifiers.threshold:Threshold",
}
