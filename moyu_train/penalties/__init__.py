"""Registry of penalties: name to `module:Class`, as strings so that a recipe is checked without torch."""

PENALTIES = {
    "l1": "moyu_train.penalties.l1:L1",
    "hoyer": "moyu_train.penalties.hoyer:Hoyer",
}
