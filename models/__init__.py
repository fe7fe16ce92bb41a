"""What is so: the rows of the database and the only functions that change their state. Knows no HTTP."""
