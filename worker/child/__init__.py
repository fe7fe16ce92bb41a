"""The code that runs inside child processes. Each of these modules carries out one kind of order.

A child process does not use the database, and it ends when its worker ends.
"""
