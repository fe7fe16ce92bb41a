"""Reports of runs and comparisons: Markdown and figures. Measures nothing."""
