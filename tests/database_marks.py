"""Marks that choose the databases of a test. A test with the fixture `database` runs on each kind without a mark."""

from __future__ import annotations

import pytest

ON_SQLITE = pytest.mark.parametrize("empty_database", ["sqlite"], indirect=True)
"""Runs a test on SQLite only, because the kind of database makes no difference to it."""
ON_POSTGRESQL = pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
"""Runs a test on PostgreSQL only, because it tests what only PostgreSQL does."""
