"""Keep a run alive: detect, attribute, act; see docs/guard.md."""
