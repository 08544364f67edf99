"""Object storage: listing, reading, conditional puts, checked objects, commit records, epochs."""
