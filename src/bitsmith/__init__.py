"""bitsmith measures, compresses and verifies LLM checkpoints."""

__version__ = "0.1.0"
