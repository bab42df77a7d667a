"""What is done to a checkpoint: plans, compression, the reference forward, evaluation, generation."""
