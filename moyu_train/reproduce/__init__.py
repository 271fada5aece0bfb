"""Registry of reproductions: name to `module:Class`, as strings so that the verb lists them without torch."""

REPRODUCTIONS = {
    "inertia": "moyu_train.reproduce.inertia:Inertia",
    "locality-vs-inertia": "moyu_train.reproduce.locality:Locality",
    "prosparse": "moyu_train.reproduce.prosparse:ProSparse",
    "inertia-2x2": "moyu_train.reproduce.probe:Probe",
    "history": "moyu_train.reproduce.history:History",
    "pitfalls": "moyu_train.reproduce.pitfalls:Pitfalls",
    "tda": "moyu_train.reproduce.prompt_masks:PromptMasks",
    "drift": "moyu_train.reproduce.drift:Drift",
    "trinity": "moyu_train.reproduce.trinity:Trinity",
}
