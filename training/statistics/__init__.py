"""Metrics, confidence intervals, paired comparisons and power laws for learning curves, in NumPy. Knows no Keras."""
