"""The recipe language: what a run may ask for, its defaults, the catalogue of backbones and the shapes of networks.

Knows no files, no SQL and no Keras.
"""
