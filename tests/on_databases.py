"""On which kinds of database a test runs; without a mark, one that asks for `database` runs on each."""

from __future__ import annotations

import pytest

ON_SQLITE = pytest.mark.parametrize("empty_database", ["sqlite"], indirect=True)
"""For what is decided before a database is asked, or in the same way whichever it is."""
ON_POSTGRESQL = pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
"""For what only PostgreSQL does."""
