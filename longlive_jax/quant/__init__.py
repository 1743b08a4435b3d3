"""Quantisation recipes, the linear layer they are for, and trees of quantised weights."""
