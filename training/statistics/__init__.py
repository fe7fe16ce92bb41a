"""Metrics, confidence intervals, paired comparisons and learning-curve laws, in NumPy. Knows no Keras."""
