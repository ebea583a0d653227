"""Pages of what runs and studies have measured: HTML that needs no other file, and no network."""
