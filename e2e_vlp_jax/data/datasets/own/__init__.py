"""`own`: photographs and labels of anybody's; see `builder`."""
