"""The recipe language: fields of a recipe, their defaults, the catalogue of backbones, and the shapes of networks.

Knows no image files, no SQL and no Keras.
"""
