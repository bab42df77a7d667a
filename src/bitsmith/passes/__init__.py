"""What can be done to a model's weights, measured on the weights themselves."""

from bitsmith.passes import fold, permute, rescale, rotate  # each registers its transforms

__all__ = ["fold", "permute", "rescale", "rotate"]
