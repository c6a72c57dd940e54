"""Where ranks live: actors of Ray (`ray_fleet`), or threads of one process (`thread_fleet`)."""
