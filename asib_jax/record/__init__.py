"""What a run leaves on disk and on screen, and what it goes on from."""
