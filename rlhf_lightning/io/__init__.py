"""Row readers, and the JSON-lines log."""
