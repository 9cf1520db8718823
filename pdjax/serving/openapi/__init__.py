"""The server's OpenAPI document: what generators of clients, and testers, read of it."""
