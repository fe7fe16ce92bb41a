"""The migrations of the database schema, which Alembic runs. The SQLAlchemy records are in `models/`."""
