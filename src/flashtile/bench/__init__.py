"""What `flashtile bench` runs: suites of named cells, each checked before it is timed."""
