"""Fits heads, fine-tunes backbones and trains networks from scratch, epoch by epoch, with checkpoints."""
