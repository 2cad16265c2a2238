"""Small things that do not belong to one part of the library."""
