"""Files that are stored by digest, in a folder or a bucket, and their formats, such as archives, images and bundles.

Knows no SQL.
"""
