"""What it is made of: files named by digest, their formats, the catalogue, recipes. Knows no SQL and no network."""
