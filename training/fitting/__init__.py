"""Fitting: heads, fine-tuning and networks from scratch, epoch by epoch, with checkpoints."""
