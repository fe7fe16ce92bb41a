"""Commands for operators, such as starting the service on one machine, the demo, and migrating the database."""
