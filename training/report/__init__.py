"""What people read of a run or a comparison: Markdown and figures. Measures nothing."""
