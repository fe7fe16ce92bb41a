"""Stored files by digest, in a folder or a bucket, and their formats: archives, images, bundles. Knows no SQL."""
