"""What can be done to a model's weights, measured on the weights themselves."""
