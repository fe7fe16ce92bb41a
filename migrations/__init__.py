"""The history of the schema, as Alembic runs it. The records themselves are in `models/`."""
