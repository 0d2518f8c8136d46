"""The papers' tables from result units that accumulate, whichever machine measured them."""
