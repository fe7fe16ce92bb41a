"""Stored files: by digest, in a folder or a bucket, with their formats; archives, images and bundles. Knows no SQL."""
