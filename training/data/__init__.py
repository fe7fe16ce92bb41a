"""Images as arrays: pixels, features, targets, and which images each fold trains on."""
