"""Models as networks of units: from their traces."""
