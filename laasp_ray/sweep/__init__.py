"""Sweeps: several runs that share one trajectory of prunes, and the search for the largest cut within a bar."""
