"""The images of a run as arrays: pixels, features, targets and folds. Builds no networks and fits nothing."""
