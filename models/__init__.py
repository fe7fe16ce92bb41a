"""Database records and the only functions that change their state. Knows no HTTP."""
