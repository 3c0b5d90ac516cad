"""Load on a server: the clients, the server that is measured, and what became of the answers."""
