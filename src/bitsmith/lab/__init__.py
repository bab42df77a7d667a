"""The lab: tiny real models and synthetic checkpoints of real shapes, made on this machine."""
