"""Pictures measured and laid side by side: the verbs of ``python -m src.evaluate``."""
