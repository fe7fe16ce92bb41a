"""Commands for operators: the supervised service, the demo, the import of weights, the migration."""
