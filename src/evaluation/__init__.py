"""Pictures in figures: metrics on feature matrices, extractors, and one module a verb of ``python -m src.evaluate``."""
