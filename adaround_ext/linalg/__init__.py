"""Products and factorisations whose bits do not depend on threads, and their precision."""
