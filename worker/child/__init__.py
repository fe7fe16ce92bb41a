"""What runs inside child processes: each file is one kind of order. Writes no rows, and ends when its worker does."""
