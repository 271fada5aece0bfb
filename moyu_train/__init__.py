"""moyu: train LLMs to be activation-sparse, fit predictors, export checkpoints that decode faster."""

__version__ = "0.1.0"
