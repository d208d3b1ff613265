"""Speed, proven by commands that anyone can run; never by a test that passes or fails."""
