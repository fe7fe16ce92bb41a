"""What an operator runs: the supervised service, the demo, imports of weights, the migration."""
