"""Cost of a program: FLOPs, bytes, time by module; data sheets of chips."""
