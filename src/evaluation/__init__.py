"""How good a model is, in figures: one module a verb of ``python -m src.evaluate``, and what they are made of."""
