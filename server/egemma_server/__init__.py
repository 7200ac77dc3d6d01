"""What an operator runs: stores on servers, and bulk embedding.

The only room that may open a socket.
"""
