"""Streams over HTTP and WebSockets, directed while they are made."""
