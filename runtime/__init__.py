"""Engine directory in, tokens out: executors, the speculative loop, sessions and the HTTP server."""
