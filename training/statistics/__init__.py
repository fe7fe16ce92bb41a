"""Numbers only: metrics, confidence intervals and paired comparisons. Knows no Keras."""
