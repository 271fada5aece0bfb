"""Registry of penalties: name to `module:Class`, as strings so that a recipe is checked without torch."""

PENALTIES = {
    "l1": "moyu_train.penalties.l1:L1",
    "hoyer": "moyu_train.penalties.hoyer:Hoyer",
    "budget": "moyu_train.penalties.budget:Budget",
    "margin": "moyu_train.penalties.margin:Margin",
    "lte": "moyu_train.penalties.lte:LTE",
    "chunk": "moyu_train.penalties.chunk:Chunk",
    "locality": "moyu_train.penalties.locality:Locality",
    "overlap_residual": "moyu_train.penalties.overlap_residual:OverlapResidual",
    "lag_decorrelation": "moyu_train.penalties.lag_decorrelation:LagDecorrelation",
    "prefix_contrast": "moyu_train.penalties.prefix_contrast:PrefixContrast",
    "history_consistency": "moyu_train.penalties.history_consistency:HistoryConsistency",
    "predictability": "moyu_train.penalties.predictability:Predictability",
}
