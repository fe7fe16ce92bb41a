"""What was measured, to be measured again: ratios to a baseline in the same run, never absolute times alone."""
