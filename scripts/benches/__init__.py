"""Parts of scripts/bench that have a file of their own."""
